"""Guessing ahead as a real service does it: counters on real llama.cpp, and changes of mode that cut nothing off.

The scripted engine is used where a batch must last as long as the test needs and where a child has to die in the middle
of a change. Waiting here is the policy's own hysteresis, in real seconds.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from protocol.messages.infer import ChatMessage, InferFinal, InferRequest, Sampling
from services.ctl.bench.demo_models import DEMO_MODEL
from services.inference.engines import find_native
from services.kit.config import load_home
from tests.system.inference_stack import FAKE_BINARY, InferenceStack, ask_for

LOOKUP = {"type": "ngram-simple", "ngram_n": 4, "ngram_m": 24}
CODE = "".join(
    f"def step_{name}(values):\n    return [value * {n} for value in values]\n\n\n" for n, name in enumerate("abcdef")
)
COPY = [
    ChatMessage(role="user", content="Write the module."),
    ChatMessage(role="assistant", content=f"```python\n{CODE}```"),
    ChatMessage(role="user", content="Write the module again, without any change."),
]
PROSE = ("Tell a story about a lighthouse.", "Describe how a river shapes a valley.", "Explain why people travel.")


def greedy(messages: list[ChatMessage], max_tokens: int) -> InferRequest:
    return InferRequest(role="t", messages=messages, max_tokens=max_tokens, sampling=Sampling(temperature=0, seed=1))


def guesses(child_pid: int) -> bool:
    """Whether the command line of the child asks for guesses."""
    return "--spec-type" in psutil.Process(child_pid).cmdline()


@pytest.mark.parametrize("engine", ["embedded", "llama-server"])
def test_a_copy_is_guessed_ahead_and_prose_switches_it_off(engine: str) -> None:
    model = load_home().models / DEMO_MODEL
    if not model.is_file():
        pytest.skip(f"no demo model at {model}: run deploy/fetch-model, or set TIERLINE_CACHE")
    if engine == "llama-server" and find_native(load_home()) is None:
        pytest.skip("no llama-server: run deploy/build-native")
    native = {"binary": str(find_native(load_home()))} if engine == "llama-server" else {}
    with InferenceStack() as stack:
        stack.entry("m", path=str(model), engine=engine, slots=2, context_tokens=2048, speculation=LOOKUP, **native)
        stack.start("m")
        stack.hub.await_peer("inference-m")
        final = stack.ask("m", greedy(COPY, 160))
        assert isinstance(final, InferFinal), final
        assert final.accepted_tokens > 0
        assert final.draft_tokens >= final.accepted_tokens
        metrics = stack.figures("m")
        assert metrics["mode"] == "speculating"
        assert metrics["accepted_tokens_total"] == final.accepted_tokens
        assert metrics["acceptance"] > 0
        assert guesses(metrics["child_pid"])
        first = metrics["child_pid"]
        for number in range(12):
            assert isinstance(
                stack.ask("m", greedy([ChatMessage(role="user", content=PROSE[number % 3])], 90)), InferFinal
            )
            metrics = stack.figures("m")
            if metrics["mode_wanted"] == "plain":
                break
        metrics = stack.await_figures("m", mode="plain", mode_changes=1)
        assert not guesses(metrics["child_pid"])
        assert metrics["child_pid"] != first
        assert "tried again in" in metrics["mode_reason"]
        plain = stack.ask("m", greedy(COPY, 60))
        assert isinstance(plain, InferFinal)
        assert plain.draft_tokens == 0


@pytest.fixture
def scripted() -> Iterator[InferenceStack]:
    with InferenceStack() as stack:
        fields = {"binary": str(FAKE_BINARY), "engine": "llama-server", "slots": 3, "context_tokens": 512}
        stack.entry("m", **fields, speculation=LOOKUP)
        stack.script("m", {"default": {"text": "word " * 10, "token_s": 0.3}})
        stack.start("m")
        stack.hub.await_peer("inference-m")
        yield stack


def run_batch(stack: InferenceStack, seconds: float) -> int:
    """Keep all slots busy; every answer must be whole. Returns how many there were."""
    end = time.monotonic() + seconds
    answers = 0
    while time.monotonic() < end:
        requests = [stack.hub.request("inference-m", "infer.request", ask_for("go")) for _ in range(3)]
        for request in requests:
            _, final, _ = stack.hub.collect(request)
            assert isinstance(final, InferFinal), final
            assert final.generated_tokens == 10
            answers += 1
    return answers


def test_a_batch_changes_the_mode_once_idle_and_a_single_stream_changes_it_back(scripted: InferenceStack) -> None:
    first = scripted.figures("m")["child_pid"]
    assert guesses(first)
    run_batch(scripted, 8)
    busy = scripted.hub.pongs["inference-m"].metrics
    assert busy["child_pid"] == first, "not under running work"
    plain = scripted.await_figures("m", mode="plain", mode_changes=1)
    assert not guesses(plain["child_pid"])
    end = time.monotonic() + 200
    while scripted.hub.pongs["inference-m"].metrics["mode_wanted"] == "plain" and time.monotonic() < end:
        assert isinstance(scripted.ask("m", ask_for("go")), InferFinal)
    again = scripted.await_figures("m", mode="speculating", mode_changes=2)
    assert guesses(again["child_pid"])
    assert again["requests_processing"] == 0


def test_an_engine_that_is_never_idle_is_drained_for_a_change(scripted: InferenceStack) -> None:
    running = {scripted.hub.request("inference-m", "infer.request", ask_for("go"))}
    end = time.monotonic() + 200
    while scripted.hub.pongs["inference-m"].state.value == "ready" and time.monotonic() < end:
        scripted.hub.pump_for(0.9)
        running |= {scripted.hub.request("inference-m", "infer.request", ask_for("go"))}  # always two or three at work
        ended = {head.corr for _, head, _ in scripted.hub.received if head.kind == "infer.final"}
        running -= ended
    assert "about to change to plain" in (scripted.hub.pongs["inference-m"].reason or "")
    for request in running:
        _, final, _ = scripted.hub.collect(request)
        assert isinstance(final, InferFinal), "what runs is not cut off"
    assert not guesses(scripted.await_figures("m", mode="plain")["child_pid"])


def test_a_child_that_dies_during_a_change_is_replaced_and_no_slot_is_lost(scripted: InferenceStack) -> None:
    old = scripted.figures("m")["child_pid"]
    run_batch(scripted, 8)
    scripted.script("m", {"load_s": 30, "default": "ok"})
    scripted.hub.until(
        lambda: scripted.hub.pongs["inference-m"].metrics["child_pid"] not in (old, None), "a new engine is started"
    )
    pong = scripted.hub.pongs["inference-m"]
    assert pong.state.value == "loading"
    early = scripted.hub.request("inference-m", "infer.request", ask_for("a call that came too early"))
    scripted.hub.pump()
    os.kill(pong.metrics["child_pid"], signal.SIGKILL)
    scripted.hub.await_peer("inference-m", "degraded")
    scripted.hub.collect(early)  # it ends, either way, and gives its credit back
    scripted.script("m", {"default": "ok"})
    scripted.hub.await_peer("inference-m", "ready")
    requests = [scripted.hub.request("inference-m", "infer.request", ask_for("go")) for _ in range(3)]
    finals = [scripted.hub.collect(request)[1] for request in requests]
    assert all(isinstance(final, InferFinal) for final in finals), finals
    scripted.hub.pump_for(1.5)  # the service asks its engine once a second
    metrics = scripted.await_figures("m", requests_processing=0)
    assert scripted.hub.pongs["inference-m"].in_flight == 0
    assert metrics["mode"] == "plain"


def test_an_engine_that_hangs_while_it_guesses_comes_back_plain(scripted: InferenceStack) -> None:
    assert guesses(scripted.figures("m")["child_pid"])
    os.kill(scripted.figures("m")["child_pid"], signal.SIGSTOP)
    scripted.hub.await_peer("inference-m", "degraded")
    assert "no answer and no token" in (scripted.hub.pongs["inference-m"].reason or "")
    scripted.hub.await_peer("inference-m", "ready")
    metrics = scripted.figures("m")
    assert metrics["mode"] == "plain"
    assert "no answer and no token" in metrics["mode_reason"]
    assert not guesses(metrics["child_pid"])


def test_a_model_file_that_was_missing_says_nothing_about_guessing() -> None:
    with InferenceStack() as stack:
        stack.entry(
            "m", binary=str(FAKE_BINARY), engine="llama-server", slots=3, context_tokens=512, speculation=LOOKUP
        )
        model = stack.model_path("m")
        away = model.rename(model.with_suffix(".away"))
        stack.start("m")
        stack.hub.await_peer("inference-m", "degraded")
        away.rename(model)
        stack.hub.await_peer("inference-m", "ready")
        metrics = stack.figures("m")
        assert metrics["mode"] == "speculating", metrics["mode_reason"]
        assert guesses(metrics["child_pid"])


def test_a_call_during_a_change_waits_for_the_new_child(scripted: InferenceStack) -> None:
    run_batch(scripted, 8)
    scripted.script("m", {"load_s": 2, "default": "ok"})
    scripted.hub.await_peer("inference-m", "loading")
    assert "changing to plain" in (scripted.hub.pongs["inference-m"].reason or "")
    final = scripted.ask("m", ask_for("a call that came too early"))
    assert isinstance(final, InferFinal), final
    assert scripted.figures("m")["mode"] == "plain"
