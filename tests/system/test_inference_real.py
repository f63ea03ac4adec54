"""The inference service on real llama.cpp, with each engine: what a scripted one cannot prove."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from protocol.errors import StrandPeer
from protocol.kinds import Empty
from protocol.messages.failure import Category
from protocol.messages.infer import AbortLimits, InferFinal, InferPartial, Sampling
from protocol.messages.reply import ErrorReply
from services.ctl.bench.demo_models import DEMO_MODEL
from services.inference.engines import find_native
from services.kit.config import load_home
from tests.system.inference_stack import InferenceStack, ask_for
from tests.waiting import WITHIN_S, until


def native_binary() -> str | None:
    """The binary named in TIERLINE_TEST_LLAMA_SERVER, else the one that the service itself would find."""
    named = os.environ.get("TIERLINE_TEST_LLAMA_SERVER")
    found = named or find_native(load_home())
    return None if found is None else str(found)


ENDLESS = "root ::= [a-z ] root"
"""A grammar that no answer can satisfy in the end: the model goes on until something stops it."""


ENDLESS_LINES = 'root ::= line root\nline ::= [a-z ] [a-z ] [a-z ] [a-z ] [a-z ] [a-z ] [a-z ] [a-z ] "\\n"'
"""The same in short lines: llama.cpp looks at its time limit at line breaks."""


@pytest.fixture(scope="module", params=["embedded", "llama-server"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stack(engine: str):
    """One stack per engine: a start takes seconds. The last test of the file ends it."""
    model = load_home().models / DEMO_MODEL
    if not model.is_file():
        pytest.skip(f"no demo model at {model}: run deploy/fetch-model, or set TIERLINE_CACHE")
    fields: dict[str, object] = {"path": str(model), "slots": 2, "context_tokens": 1024, "engine": engine}
    if engine == "llama-server":
        binary = native_binary()
        if binary is None:
            pytest.skip("no llama-server: run deploy/build-native, or set TIERLINE_TEST_LLAMA_SERVER")
        fields["binary"] = binary
    with InferenceStack() as running:
        running.entry("m", **fields)
        running.start("m")
        running.hub.await_peer("inference-m")
        yield running


def settled(stack: InferenceStack) -> dict[str, Any]:
    """Figures after the service has asked its engine for them once more, which it does every second."""
    stack.hub.pump_for(1.5)
    return stack.await_figures("m", requests_processing=0)


def test_it_streams_and_counts(stack: InferenceStack, engine: str) -> None:
    before = settled(stack)["tokens_predicted_total"]
    sampling = Sampling(temperature=0, seed=1)
    question = ask_for("Count from one to thirty in words.", max_tokens=40, stream=True, sampling=sampling)
    request = stack.hub.request("inference-m", "infer.request", question)
    _, final, partials = stack.hub.collect(request)
    assert isinstance(final, InferFinal)
    assert final.engine == engine
    assert final.generated_tokens > 10
    assert final.prompt_tokens > 10
    assert final.generate_ms > 0
    assert final.first_token_ms > 0
    pieces = [piece for piece in partials if isinstance(piece, InferPartial)]
    assert len(pieces) >= 2
    assert final.text.startswith("".join(piece.text for piece in pieces))
    again = stack.ask("m", question)
    assert isinstance(again, InferFinal)
    assert again.cached_tokens > 0
    counted = before + final.generated_tokens + again.generated_tokens
    figures = stack.await_figures("m", tokens_predicted_total=counted, requests_processing=0)
    assert figures["prompt_tokens_total"] > 0
    assert figures["tokens_per_s"] > 0
    assert figures["child_rss_bytes"] > 50_000_000
    assert stack.hub.pongs["inference-m"].rss_bytes > figures["child_rss_bytes"]


def test_a_cancel_frees_the_slot_and_generation_stops(stack: InferenceStack) -> None:
    respawns = stack.figures("m")["respawns"]
    question = ask_for("Write an endless story.", max_tokens=900, stream=True, grammar=ENDLESS)
    request = stack.hub.request("inference-m", "infer.request", question, key="long")
    stack.hub.until(lambda: any(head.corr == request for _, head, _ in stack.hub.received), "it streams")
    stack.hub.send(stack.hub.peers["inference-m"], "infer.cancel", Empty(), corr=request, key="long")
    _, body, _ = stack.hub.collect(request)
    assert isinstance(body, ErrorReply)
    assert body.failure.code == "call.cancelled"
    stopped = settled(stack)
    assert stopped["respawns"] == respawns
    later = settled(stack)
    assert later["tokens_predicted_total"] == stopped["tokens_predicted_total"]
    assert isinstance(stack.ask("m", ask_for("Hi", max_tokens=3)), InferFinal)


def test_decoding_is_constrained_by_the_schema(stack: InferenceStack) -> None:
    sizes = {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 3}
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "sizes": sizes},
        "required": ["colour", "sizes"],
        "additionalProperties": False,
    }
    final = stack.ask("m", ask_for("Describe a car as JSON.", max_tokens=200, json_schema=schema))
    assert isinstance(final, InferFinal), final
    assert json.loads(final.text)["colour"] in ("red", "blue")


def test_a_schema_the_converter_cannot_take_does_not_let_a_wrong_answer_pass(stack: InferenceStack) -> None:
    never = {"type": "string", "pattern": "(?=x)q"}  # no answer is right, however well the model takes the hint
    schema = {"type": "object", "properties": {"a": never}, "required": ["a"]}
    body = stack.ask("m", ask_for("Give JSON.", max_tokens=60, json_schema=schema))
    assert isinstance(body, ErrorReply)
    assert body.failure.category in (Category.SCHEMA, Category.POLICY)


def test_a_schema_that_the_engine_refuses_costs_the_constraint_and_not_the_answer(stack: InferenceStack) -> None:
    schema = {"$ref": "#small", "$defs": {"size": {"$anchor": "small", "enum": ["s", 1]}}}
    before = stack.figures("m")["schemas_open"]
    body = stack.ask("m", ask_for("Give JSON.", max_tokens=40, json_schema=schema))
    if isinstance(body, ErrorReply):
        assert (body.failure.category, body.failure.code) == (Category.SCHEMA, "answer.schema")
        assert "$ref" in body.failure.evidence["unconstrained"]
    else:
        assert isinstance(body, InferFinal)
        assert json.loads(body.text) in ("s", 1)
    assert stack.figures("m")["schemas_open"] == before + 1


def test_what_the_engine_refuses_is_a_policy_failure(stack: InferenceStack) -> None:
    body = stack.ask("m", ask_for("word " * 1_200))
    assert isinstance(body, ErrorReply)
    assert (body.failure.category, body.failure.code) == (Category.POLICY, "prompt.too_long")
    assert body.failure.evidence["context_tokens"] == 1024
    assert body.failure.evidence["prompt_tokens"] > 1_200
    body = stack.ask("m", ask_for("hi", grammar="root ::= nothing"))
    assert isinstance(body, ErrorReply)
    assert (body.failure.category, body.failure.code) == (Category.POLICY, "engine.refused")


def test_a_killed_engine_comes_back(stack: InferenceStack) -> None:
    before = stack.figures("m")
    pid = before["child_pid"]
    question = ask_for("Write an endless story.", max_tokens=900, grammar=ENDLESS)
    request = stack.hub.request("inference-m", "infer.request", question)
    stack.hub.pump_for(0.5)
    os.kill(pid, signal.SIGKILL)
    _, body, _ = stack.hub.collect(request)
    assert isinstance(body, ErrorReply)
    assert (body.failure.category, body.failure.code) == (Category.PEER, "engine.died")
    stack.hub.await_peer("inference-m", "degraded")
    stack.hub.await_peer("inference-m", "ready")
    assert isinstance(stack.ask("m", ask_for("Hi", max_tokens=3)), InferFinal)
    assert stack.figures("m")["respawns"] == before["respawns"] + 1


def test_the_same_key_is_generated_once(stack: InferenceStack) -> None:
    before = settled(stack)["tokens_predicted_total"]
    question = ask_for("Say hello.", max_tokens=20)
    finals = [
        stack.hub.collect(stack.hub.request("inference-m", "infer.request", question, key="same"))[1] for _ in range(2)
    ]
    assert isinstance(finals[0], InferFinal)
    assert finals[0] == finals[1]
    assert settled(stack)["tokens_predicted_total"] - before == finals[0].generated_tokens


def test_the_deadline_ends_a_long_answer(stack: InferenceStack) -> None:
    question = ask_for("Write an endless story.", max_tokens=900, grammar=ENDLESS)
    deadline = int((time.time() + 1) * 1000)
    request = stack.hub.request("inference-m", "infer.request", question, deadline=deadline)
    _, body, _ = stack.hub.collect(request)
    assert isinstance(body, ErrorReply)
    assert body.failure.category is Category.TIMEOUT
    settled(stack)


def test_the_engine_itself_stops_at_the_deadline_when_nobody_is_left_to_stop_it(stack: InferenceStack) -> None:
    child, service = stack.figures("m")["child_pid"], stack.hub.hellos["inference-m"].pid
    environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    key = next(item.partition(b"=")[2] for item in environ if item.startswith(b"LLAMA_API_KEY=")).decode()
    (listening,) = [one for one in psutil.Process(child).net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    question = ask_for("Write an endless story.", max_tokens=900, grammar=ENDLESS_LINES)
    deadline = int((time.time() + 3) * 1000)
    request = stack.hub.request("inference-m", "infer.request", question, deadline=deadline)
    with httpx.Client(base_url=f"http://127.0.0.1:{listening.laddr.port}", trust_env=False, timeout=60) as engine:

        def busy() -> int:
            slots = engine.get("/slots", headers={"Authorization": f"Bearer {key}"}).json()
            return sum(1 for slot in slots if slot["is_processing"])

        stack.hub.until(lambda: busy() == 1, "it is at work")
        os.kill(service, signal.SIGSTOP)
        try:
            assert busy() == 1
            until(lambda: busy() == 0, "t_max_predict_ms has reached it")
        finally:
            os.kill(service, signal.SIGCONT)
    deadline_s = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline_s:  # it may have to find the hub again after its sleep
        try:
            stack.hub.pump()
            if isinstance(stack.ask("m", ask_for("Hi", max_tokens=3), timeout_s=3), InferFinal):
                break
        except (TimeoutError, StrandPeer):
            continue
    else:
        raise AssertionError(f"{request}: the service did not come back")


def test_a_model_that_repeats_itself_is_stopped_long_before_its_tokens_are_spent(stack: InferenceStack) -> None:
    before = stack.figures("m")
    question = ask_for(
        "Write an endless story.",
        max_tokens=900,
        grammar=ENDLESS,
        sampling=Sampling(temperature=0, seed=1),
        early_abort=AbortLimits(repeated_chars=100),
    )
    body = stack.ask("m", question)
    assert isinstance(body, ErrorReply)
    assert (body.failure.category, body.failure.code) == (Category.EARLY_ABORT, "decoding.repetition")
    evidence = body.failure.evidence
    assert evidence["times"] >= 4
    assert evidence["repeated"] in evidence["repeated"] * 2
    assert evidence["generated_tokens"] < 700
    after = stack.await_figures("m", requests_processing=0)
    assert after["early_aborts"] == before["early_aborts"] + 1
    assert after["respawns"] == before["respawns"]


def test_the_engines_log_probabilities_are_understood(stack: InferenceStack) -> None:
    question = ask_for(
        "Write a long story about a journey.",
        max_tokens=200,
        sampling=Sampling(temperature=1, seed=1),
        early_abort=AbortLimits(entropy_nats=0.01, repetition=False),
    )
    body = stack.ask("m", question)
    assert isinstance(body, ErrorReply)
    assert body.failure.code == "decoding.entropy"
    assert 0.01 < body.failure.evidence["entropy_nats"] <= 2.4
    assert 64 <= body.failure.evidence["generated_tokens"] < 100


def test_other_users_of_the_machine_are_turned_away(stack: InferenceStack) -> None:
    child = psutil.Process(stack.figures("m")["child_pid"])
    (listening,) = [item for item in child.net_connections("tcp") if item.status == psutil.CONN_LISTEN]
    assert listening.laddr.ip == "127.0.0.1"
    with httpx.Client(base_url=f"http://127.0.0.1:{listening.laddr.port}", trust_env=False) as stranger:
        for path in ("/slots", "/metrics", "/props"):
            assert stranger.get(path).status_code == 401, path
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        assert stranger.post("/v1/chat/completions", json=chat).status_code == 401


def test_the_child_dies_with_the_service(stack: InferenceStack) -> None:
    pid = stack.figures("m")["child_pid"]
    os.kill(stack.hub.hellos["inference-m"].pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the engine is gone")


def test_an_engine_without_enough_memory_is_degraded_with_its_last_words_and_comes_back_with_more(
    tmp_path: Path,
) -> None:
    binary, model = native_binary(), load_home().models / DEMO_MODEL
    if binary is None or not model.is_file():
        pytest.skip("needs the demo model and a llama-server: deploy/fetch-model, deploy/build-native")
    limited = tmp_path / "llama-server"
    limited.write_text(f'#!/bin/sh\nulimit -v 250000\nexec {binary} "$@"\n')
    limited.chmod(0o755)
    with InferenceStack() as running:
        running.entry("m", path=str(model), slots=2, context_tokens=1024, engine="llama-server", binary=str(limited))
        running.start("m")
        running.hub.await_peer("inference-m", "degraded")
        reason = running.hub.pongs["inference-m"].reason
        assert reason is not None
        assert "died while loading" in reason
        assert "next try in" in reason
        body = running.ask("m", ask_for("Hi", max_tokens=3))
        assert isinstance(body, ErrorReply)
        assert (body.failure.category, body.failure.code) == (Category.RESOURCE, "engine.not_ready")
        limited.write_text(f'#!/bin/sh\nexec {binary} "$@"\n')
        running.hub.await_peer("inference-m", "ready")
        assert isinstance(running.ask("m", ask_for("Hi", max_tokens=3)), InferFinal)
        assert running.hub.credit["inference-m"] == 4, "two slots, and one for each call that has ended"
