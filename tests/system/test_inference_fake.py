"""The inference service as a real process on the scripted engine: every answer and every fault that can be chosen."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.kinds import Empty
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import AbortLimits, InferFinal, InferPartial
from protocol.messages.reply import ErrorReply
from tests.fakes.gguf_files import write_tiny_gguf
from tests.system.inference_stack import FAKE_BINARY, InferenceStack, ask_for
from tests.waiting import until

SCRIPT = {"default": "hello from the fake"}
ROOM_KIB = 1_500_000
"""Address space in which the scripted engine serves without trouble."""
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture
def stack() -> Iterator[InferenceStack]:
    """For tests that start a service of their own, since they harm it or its files."""
    with InferenceStack() as made:
        made.entry("m", binary=str(FAKE_BINARY), engine="llama-server", slots=2, context_tokens=512)
        made.script("m", SCRIPT)
        yield made


@pytest.fixture(scope="module")
def running() -> Iterator[InferenceStack]:
    with InferenceStack() as made:
        made.entry("m", binary=str(FAKE_BINARY), engine="llama-server", slots=2, context_tokens=512)
        made.script("m", SCRIPT)
        made.start("m")
        made.hub.await_peer("inference-m")
        yield made


@pytest.fixture
def shared(running: InferenceStack) -> InferenceStack:
    """One service for all tests after which it is as well as before.

    They stand together: a hub that nobody pumps is silent, and a service leaves it.
    """
    running.script("m", SCRIPT)
    return running


def failure_of(body: object) -> Failure:
    assert isinstance(body, ErrorReply), body
    return body.failure


def assert_both_slots_work(stack: InferenceStack, *, ended: int) -> None:
    """After a fault: as many credits as slots and ended calls, and two answers that need both slots at once."""
    assert stack.hub.credit["inference-m"] == 2 + ended
    stack.script("m", {"default": {"text": "a b c", "together": 2}})
    requests = [stack.hub.request("inference-m", "infer.request", ask_for("both")) for _ in range(2)]
    finals = [stack.hub.collect(request)[1] for request in requests]
    assert all(isinstance(final, InferFinal) for final in finals), "neither is given before both are at work"
    assert stack.hub.credit["inference-m"] == 4 + ended


def test_an_answer_comes_with_its_figures(shared: InferenceStack) -> None:
    assert shared.hub.hellos["inference-m"].capabilities == ["infer.m"]
    credit = shared.hub.credit["inference-m"]
    assert credit >= 2
    final = shared.ask("m", ask_for("hi there"))
    assert isinstance(final, InferFinal)
    assert (final.text, final.finish_reason, final.engine) == ("hello from the fake", "stop", "llama-server")
    assert (final.prompt_tokens, final.generated_tokens) == (2, 4)
    assert final.first_token_ms > 0
    assert shared.hub.credit["inference-m"] == credit + 1


def test_partials_are_joined_and_the_final_repeats_everything(shared: InferenceStack) -> None:
    text = "".join(f"w{number} " for number in range(60))
    shared.script("m", {"default": {"text": text, "token_s": 0.01}})
    request = shared.hub.request("inference-m", "infer.request", ask_for("go", stream=True))
    _, final, partials = shared.hub.collect(request)
    assert isinstance(final, InferFinal)
    assert final.text == text
    pieces = [piece for piece in partials if isinstance(piece, InferPartial)]
    assert 3 <= len(pieces) < 60, "joined"
    assert text.startswith("".join(piece.text for piece in pieces))
    assert [piece.generated_tokens for piece in pieces] == sorted(piece.generated_tokens for piece in pieces)
    assert pieces[-1].generated_tokens > 30


@pytest.mark.parametrize(
    ("second", "watched", "begins"), [("long " * 300, True, False), ("short", True, True), ("long " * 300, False, True)]
)
def test_long_prompts_that_somebody_watches_are_read_one_after_the_other(
    second: str, watched: bool, begins: bool, shared: InferenceStack
) -> None:
    record, hold = shared.root / "read.jsonl", shared.root / "hold"
    for file in (record, hold):
        file.unlink(missing_ok=True)
    rules = [{"match": "first", "answers": [{"text": "a b c", "hold": str(hold)}]}]
    shared.script("m", {**SCRIPT, "record": str(record), "rules": rules})

    def read() -> list[str]:
        lines = record.read_text().splitlines() if record.exists() else []
        return [json.loads(line)["prompt"].split()[0] for line in lines]

    one = shared.hub.request("inference-m", "infer.request", ask_for("first " * 300, stream=True))
    shared.hub.until(lambda: read() == ["first"], "the first is read")
    two = shared.hub.request("inference-m", "infer.request", ask_for(second, stream=watched))
    if begins:
        shared.hub.until(lambda: len(read()) == 2, "the second is read beside it")
    else:
        shared.hub.pump_for(1)
        assert read() == ["first"]
    hold.touch()
    for request in (one, two):
        _, final, _ = shared.hub.collect(request)
        assert isinstance(final, InferFinal), final
    assert read() == ["first", second.split()[0]]


def test_the_next_prompt_is_read_once_the_one_before_has_its_first_word(shared: InferenceStack) -> None:
    record, hold = shared.root / "words.jsonl", shared.root / "first-word"
    for file in (record, hold):
        file.unlink(missing_ok=True)
    talks = {"text": "on and ", "repeat": 200, "token_s": 0.5, "hold": str(hold)}
    shared.script("m", {**SCRIPT, "record": str(record), "rules": [{"match": "first", "answers": [talks]}]})

    def read() -> int:
        return len(record.read_text().splitlines()) if record.exists() else 0

    asked = ask_for("first " * 300, stream=True, max_tokens=150)
    one = shared.hub.request("inference-m", "infer.request", asked, key="talks")
    shared.hub.until(lambda: read() == 1, "the first is read")
    two = shared.hub.request("inference-m", "infer.request", ask_for("second " * 300, stream=True))
    shared.hub.pump_for(0.5)
    assert read() == 1
    hold.touch()
    _, final, _ = shared.hub.collect(two)
    assert isinstance(final, InferFinal), final
    shared.hub.send(shared.hub.peers["inference-m"], "infer.cancel", Empty(), corr=one, key="talks")
    _, ended, pieces = shared.hub.collect(one)
    assert failure_of(ended).code == "call.cancelled", "it was still talking when the second had ended"
    assert pieces


@pytest.mark.parametrize(
    "answer", ["no JSON at all", '{"n": "three"}', '{"n": 1, "extra": 2}', '{"n": 1', "[" * 100_000]
)
def test_an_answer_that_breaks_its_schema_is_a_schema_failure(shared: InferenceStack, answer: str) -> None:
    shared.script("m", {"default": answer})
    failure = failure_of(shared.ask("m", ask_for("go", json_schema=SCHEMA)))
    assert (failure.category, failure.code) == (Category.SCHEMA, "answer.schema")
    assert failure.findings
    assert failure.findings[0].category is Category.SCHEMA
    assert failure.evidence["answer"] == answer[:500]


_DOUBLING = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)}


@pytest.mark.parametrize(
    "evil",
    [{"type": "string", "pattern": "^(a+)+$"}, {"$defs": {**_DOUBLING, "a60": {}}, "$ref": "#/$defs/a0"}],
    ids=["expression", "references"],
)
def test_a_schema_that_can_be_checked_for_ever_does_not_stop_the_service(
    shared: InferenceStack, evil: dict[str, object]
) -> None:
    shared.script("m", {"rules": [{"match": "evil", "answers": [json.dumps("a" * 40 + "!")]}], "default": "fine"})
    deadline = int((time.time() + 3) * 1000)
    slow = shared.hub.request("inference-m", "infer.request", ask_for("evil", json_schema=evil), deadline=deadline)
    assert isinstance(shared.ask("m", ask_for("go")), InferFinal)
    failure = failure_of(shared.hub.collect(slow)[1])
    assert failure.category in (Category.SCHEMA, Category.TIMEOUT)


def test_a_remote_reference_in_a_schema_is_not_fetched(shared: InferenceStack) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.3)
        shared.script("m", {"default": "1"})
        schema = {"$ref": f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"}
        assert failure_of(shared.ask("m", ask_for("go", json_schema=schema))).code == "schema.invalid"
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    ("fault", "code"),
    [("500", "engine.faulty"), ("garbage", "engine.faulty"), ("cut", "engine.died"), ("disconnect", "engine.died")],
)
def test_a_fault_of_the_engine_is_a_peer_failure_and_the_next_call_works(
    shared: InferenceStack, fault: str, code: str
) -> None:
    ended = shared.hub.credit["inference-m"] - 2
    shared.script("m", {"rules": [{"match": "bad", "answers": [{"text": "a b c d", "fault": fault}]}]})
    failure = failure_of(shared.ask("m", ask_for("bad")))
    assert (failure.category, failure.code) == (Category.PEER, code)
    assert isinstance(shared.ask("m", ask_for("good")), InferFinal)
    assert shared.figures("m")["respawns"] == 0
    assert_both_slots_work(shared, ended=ended + 2)


@pytest.mark.parametrize(
    "figures",
    [
        {"usage": {"prompt_tokens": 10**30, "completion_tokens": 2**64}},
        {"timings": {"prompt_ms": float("inf"), "predicted_ms": 1e308}},
        {"timings": {"prompt_ms": float("nan"), "predicted_ms": 10**400, "draft_n": -1, "draft_n_accepted": "many"}},
        {"top_logprobs": [10**400, float("-inf"), float("nan"), "x", -1.0]},
    ],
)
def test_figures_that_no_message_can_carry_cost_neither_the_answer_nor_its_slot(
    shared: InferenceStack, figures: dict[str, object]
) -> None:
    ended = shared.hub.credit["inference-m"] - 2
    shared.script("m", {"default": {"text": "a b c d", **figures}})
    final = shared.ask("m", ask_for("go", early_abort=AbortLimits(entropy_nats=5.0)))
    assert isinstance(final, InferFinal), final
    assert final.text == "a b c d"
    assert_both_slots_work(shared, ended=ended + 1)


@pytest.mark.parametrize(
    "text", ["llamacpp:requests_processing -.-\n", "llamacpp:tokens_predicted_total 1e999\n", "\0"]
)
def test_metrics_that_are_no_numbers_cost_the_service_nothing(shared: InferenceStack, text: str) -> None:
    pid = shared.hub.hellos["inference-m"].pid
    shared.script("m", {"default": "ok", "metrics": text})
    shared.hub.pump_for(2.5)  # it asks once a second
    assert isinstance(shared.ask("m", ask_for("go")), InferFinal)
    shared.figures("m")
    assert shared.hub.hellos["inference-m"].pid == pid
    log = (shared.root / "logs" / "inference-m.jsonl").read_text()
    assert '"engine.bug"' not in log


def test_what_an_engine_says_of_its_failure_is_told_and_logged_half_characters_included(
    shared: InferenceStack,
) -> None:
    shared.script("m", {"default": {"fault": "500", "message": "no \ud800 room"}})
    failure = failure_of(shared.ask("m", ask_for("go")))
    assert (failure.category, failure.code) == (Category.PEER, "engine.faulty")
    assert "no ? room" in failure.message
    lines = (shared.root / "logs" / "inference-m.jsonl").read_text().splitlines()
    ended = [json.loads(line) for line in lines if '"call.failed"' in line]
    assert "no ? room" in ended[-1]["reason"]


def test_an_answer_that_was_refused_is_not_logged(shared: InferenceStack) -> None:
    shared.script("m", {"default": "the secret of the harbour"})
    assert failure_of(shared.ask("m", ask_for("go", json_schema=SCHEMA))).category is Category.SCHEMA
    assert "harbour" not in (shared.root / "logs" / "inference-m.jsonl").read_text()


def test_the_deadline_of_a_call_is_a_timeout_and_frees_its_slot(shared: InferenceStack) -> None:
    shared.script("m", {"rules": [{"match": "slow", "answers": [{"text": "x", "fault": "hang"}]}]})
    deadline = int((time.time() + 0.5) * 1000)
    request = shared.hub.request("inference-m", "infer.request", ask_for("slow"), deadline=deadline)
    _, body, _ = shared.hub.collect(request)
    assert failure_of(body).category is Category.TIMEOUT
    for _ in range(3):
        assert isinstance(shared.ask("m", ask_for("good")), InferFinal)
    assert shared.figures("m")["respawns"] == 0


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(shared: InferenceStack) -> None:
    failure = failure_of(shared.ask("m", ask_for("word " * 600)))
    assert (failure.category, failure.code) == (Category.POLICY, "prompt.too_long")
    assert failure.evidence == {"prompt_tokens": 600, "context_tokens": 512}


def test_an_answer_without_end_is_cut_off(shared: InferenceStack) -> None:
    shared.script("m", {"default": {"text": "x" * 20_000 + " ", "repeat": 100}})
    failure = failure_of(shared.ask("m", ask_for("go", max_tokens=400)))
    assert (failure.category, failure.code) == (Category.FORMAT, "answer.too_large")
    shared.script("m", {"default": "short"})
    assert isinstance(shared.ask("m", ask_for("go")), InferFinal)


def test_the_same_key_sent_twice_is_generated_once(shared: InferenceStack) -> None:
    shared.script("m", {"record": str(shared.root / "requests.jsonl"), "default": {"text": "a b c", "token_s": 0.2}})
    first = shared.hub.request("inference-m", "infer.request", ask_for("go"), key="k1")
    shared.hub.pump(100)
    second = shared.hub.request("inference-m", "infer.request", ask_for("go"), key="k1")
    shared.hub.collect(second)
    third = shared.hub.request("inference-m", "infer.request", ask_for("go"), key="k1")
    _, body, _ = shared.hub.collect(third)
    assert isinstance(body, InferFinal)
    assert len((shared.root / "requests.jsonl").read_text().splitlines()) == 1
    assert first != second


def test_the_api_key_is_needed_and_nowhere_to_be_read(shared: InferenceStack) -> None:
    child = shared.figures("m")["child_pid"]
    environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    key = next(item.partition(b"=")[2] for item in environ if item.startswith(b"LLAMA_API_KEY="))
    assert len(key) >= 32
    assert key not in Path(f"/proc/{child}/cmdline").read_bytes()
    for file in (shared.root / "logs").iterdir():
        assert key not in file.read_bytes(), file


def test_a_dying_engine_ends_its_calls_and_comes_back(stack: InferenceStack) -> None:
    stack.script("m", {"rules": [{"match": "bad", "answers": [{"text": "a b c d", "fault": "die"}]}]})
    stack.start("m")
    stack.hub.await_peer("inference-m")
    failure = failure_of(stack.ask("m", ask_for("bad")))
    assert (failure.category, failure.code) == (Category.PEER, "engine.died")
    stack.hub.await_peer("inference-m", "degraded")
    reason = stack.hub.pongs["inference-m"].reason
    assert reason is not None
    assert "SIGKILL" in reason
    stack.hub.await_peer("inference-m", "ready")
    assert isinstance(stack.ask("m", ask_for("good")), InferFinal)
    assert stack.figures("m")["respawns"] == 1
    assert_both_slots_work(stack, ended=2)


def test_an_engine_that_runs_out_of_memory_in_the_middle_of_an_answer_ends_its_calls_and_comes_back(
    stack: InferenceStack,
) -> None:
    """A real limit of the kernel, met while two answers are streamed."""
    poor = stack.root / "llama-server"
    poor.write_text(f'#!/bin/sh\nulimit -v {ROOM_KIB}\nexec {FAKE_BINARY} "$@"\n')
    poor.chmod(0o755)
    stack.entry("m", binary=str(poor), engine="llama-server", slots=2, context_tokens=512)
    greedy = {"match": "greedy", "answers": [{"text": "a b c d", "fault": "hoard", "together": 2, "token_s": 0.2}]}
    beside = {"match": "beside", "answers": [{"text": "e f g h", "together": 2, "token_s": 2}]}
    stack.script("m", {"rules": [greedy, beside], "default": "fine"})
    stack.start("m")
    stack.hub.await_peer("inference-m")
    assert f"{ROOM_KIB * 1024} " in Path(f"/proc/{stack.figures('m')['child_pid']}/limits").read_text()
    asked = [
        stack.hub.request("inference-m", "infer.request", ask_for(word, stream=True)) for word in ("greedy", "beside")
    ]
    told = [stack.hub.collect(one) for one in asked]
    assert [failure_of(body).code for _, body, _ in told] == ["engine.died"] * 2
    assert [failure_of(body).category for _, body, _ in told] == [Category.PEER] * 2
    assert all(any(isinstance(one, InferPartial) and one.text for one in pieces) for _, _, pieces in told), (
        "it had begun"
    )
    stack.hub.await_peer("inference-m", "degraded")
    reason = stack.hub.pongs["inference-m"].reason or ""
    assert "the engine died: SIGABRT" in reason
    assert "std::bad_alloc" in reason
    stack.hub.await_peer("inference-m", "ready")
    assert isinstance(stack.ask("m", ask_for("good")), InferFinal)
    assert stack.figures("m")["respawns"] == 1
    assert_both_slots_work(stack, ended=3)


def test_an_engine_whose_metrics_do_not_say_what_it_works_on_is_asked_for_its_slots(stack: InferenceStack) -> None:
    """Unknown is not idle: a slot that works for nobody is found all the same."""
    slots = [{"id": number, "n_ctx": 256, "is_processing": number == 0} for number in range(2)]
    stack.script("m", {**SCRIPT, "metrics": "llamacpp:tokens_predicted_total 7\n", "slots": slots})
    stack.start("m")
    stack.hub.await_peer("inference-m")
    stack.await_figures("m", requests_processing=1, tokens_predicted_total=7)
    stack.hub.await_peer("inference-m", "degraded")
    assert "1 slots are busy for 0 calls" in (stack.hub.pongs["inference-m"].reason or "")
    stack.script("m", SCRIPT)
    stack.await_figures("m", respawns=1, requests_processing=0)


def test_an_engine_whose_slots_do_not_say_whether_they_work_is_none_of_ours(stack: InferenceStack) -> None:
    """Their end could not be seen: a slot would be given away while it still works for a call that was cancelled."""
    stack.entry("m", binary=str(FAKE_BINARY), engine="llama-server", slots=2, context_tokens=512, load_deadline_s=1)
    stack.script("m", {**SCRIPT, "slots": [{"id": 0, "state": 1}, {"id": 1, "state": 0}]})
    stack.start("m")
    stack.hub.await_peer("inference-m", "degraded")
    stack.hub.until(lambda: "is_processing" in (stack.hub.pongs["inference-m"].reason or ""), "it says what is missing")
    stack.script("m", SCRIPT)
    stack.hub.await_peer("inference-m", "ready")


def test_a_frozen_engine_is_killed_and_replaced(stack: InferenceStack) -> None:
    stack.script("m", {"rules": [{"match": "bad", "answers": [{"text": "a b c d", "fault": "freeze"}]}]})
    stack.start("m")
    stack.hub.await_peer("inference-m")
    failure = failure_of(stack.ask("m", ask_for("bad")))
    assert failure.category is Category.PEER
    stack.hub.await_peer("inference-m", "ready")
    assert isinstance(stack.ask("m", ask_for("good")), InferFinal)
    assert_both_slots_work(stack, ended=2)


def test_an_engine_that_fails_its_health_checks_is_left_to_work_as_long_as_tokens_come(stack: InferenceStack) -> None:
    """Like one whose cores are all taken by a long batch."""
    stack.start("m")
    stack.hub.await_peer("inference-m")
    pid = stack.figures("m")["child_pid"]
    stack.script("m", {"load_s": 1_000, "default": {"text": "word " * 50, "token_s": 0.3}})  # unwell, 15 s of tokens
    final = stack.ask("m", ask_for("go"))
    assert isinstance(final, InferFinal), final
    assert final.generated_tokens == 50
    assert stack.figures("m")["child_pid"] == pid
    stack.hub.await_peer("inference-m", "degraded")
    assert "no answer and no token" in (stack.hub.pongs["inference-m"].reason or "")


def test_a_long_output_of_earlier_engines_is_put_aside_at_the_next_launch(stack: InferenceStack) -> None:
    output = stack.root / "logs" / "inference-m.engine.out"
    output.parent.mkdir(exist_ok=True)
    output.write_bytes(b"x" * (17 * 1024**2))
    stack.start("m")
    stack.hub.await_peer("inference-m")
    assert output.stat().st_size < 1024**2
    assert output.with_suffix(".out.1").stat().st_size == 17 * 1024**2


@pytest.mark.parametrize("cancelled_too", [False, True])
def test_a_slot_that_stays_busy_costs_the_engine_its_life(stack: InferenceStack, cancelled_too: bool) -> None:
    """A deadline passes for the hub as it does for the service: its cancel comes while the slot is being freed."""
    stack.script("m", {"rules": [{"match": "bad", "answers": [{"text": "a b c d", "fault": "stuck"}]}]})
    stack.start("m")
    stack.hub.await_peer("inference-m")
    pid = stack.figures("m")["child_pid"]
    deadline = int((time.time() + 2) * 1000)
    request = stack.hub.request("inference-m", "infer.request", ask_for("bad"), deadline=deadline, key="bad")
    if cancelled_too:
        stack.hub.pump_for(deadline / 1000 - time.time() + 0.3)
        stack.hub.send(stack.hub.peers["inference-m"], "infer.cancel", Empty(), corr=request, key="bad")
    _, body, _ = stack.hub.collect(request)
    assert failure_of(body).code == ("call.cancelled" if cancelled_too else "call.deadline")
    assert cancelled_too or failure_of(body).evidence["generated_tokens"] > 0, "they were paid for"
    stack.hub.await_peer("inference-m", "degraded")
    assert "left its slot busy" in (stack.hub.pongs["inference-m"].reason or "")  # seen before the slot was given back
    stack.hub.await_peer("inference-m", "ready")
    assert stack.figures("m")["child_pid"] != pid
    assert_both_slots_work(stack, ended=1)


def test_a_missing_model_is_a_reason_and_is_cured_without_a_restart(stack: InferenceStack) -> None:
    model = stack.model_path("m")
    model.unlink()
    stack.start("m")
    stack.hub.await_peer("inference-m", "degraded")
    reason = stack.hub.pongs["inference-m"].reason
    assert reason is not None
    assert str(model) in reason
    assert "No such file" in reason
    write_tiny_gguf(model)
    stack.hub.await_peer("inference-m", "ready")


def test_a_pipe_in_the_models_place_is_a_reason_and_nothing_that_is_waited_for(stack: InferenceStack) -> None:
    model = stack.model_path("m")
    model.unlink()
    os.mkfifo(model)
    stack.start("m")
    stack.hub.await_peer("inference-m", "degraded")
    assert "no regular file" in (stack.hub.pongs["inference-m"].reason or "")
    model.unlink()
    write_tiny_gguf(model)
    stack.hub.await_peer("inference-m", "ready")


@pytest.mark.parametrize("keep", [2, 20, 300])
def test_a_truncated_model_is_a_reason(stack: InferenceStack, keep: int) -> None:
    model = stack.model_path("m")
    model.write_bytes(model.read_bytes()[:keep])
    stack.start("m")
    stack.hub.await_peer("inference-m", "degraded")
    reason = stack.hub.pongs["inference-m"].reason
    assert reason is not None
    assert str(model) in reason
    assert "fetch" in reason


def test_a_taken_port_is_a_reason(stack: InferenceStack) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        stack.entry("m", binary=str(FAKE_BINARY), engine="llama-server", slots=2, context_tokens=512, port=port)
        stack.start("m")
        stack.hub.await_peer("inference-m", "degraded")
        reason = stack.hub.pongs["inference-m"].reason
        assert reason is not None
        assert f"port {port}" in reason
    stack.hub.await_peer("inference-m", "ready")


def test_a_model_that_loads_too_long_is_a_reason(stack: InferenceStack) -> None:
    stack.entry("m", binary=str(FAKE_BINARY), engine="llama-server", load_deadline_s=1.0)
    stack.script("m", {"load_s": 60})
    stack.start("m")
    stack.hub.await_peer("inference-m", "loading")
    stack.hub.await_peer("inference-m", "degraded")
    reason = stack.hub.pongs["inference-m"].reason
    assert reason is not None
    assert "load_deadline_s" in reason


@pytest.mark.parametrize(
    ("slots", "words"), [([{}] * 7, "has 7 slots instead of 1"), ({"no": "list"}, "/slots is not a list of slots")]
)
def test_an_engine_that_is_not_what_was_asked_for_is_a_reason(stack: InferenceStack, slots: object, words: str) -> None:
    stack.entry("m", binary=str(FAKE_BINARY), engine="llama-server", load_deadline_s=1.0)
    stack.script("m", {"slots": slots})
    stack.start("m")
    stack.hub.await_peer("inference-m", "degraded")
    assert words in (stack.hub.pongs["inference-m"].reason or "")
    stack.script("m", {})
    stack.hub.await_peer("inference-m", "ready")


def test_a_binary_without_our_flags_is_a_reason(stack: InferenceStack) -> None:
    stack.entry("m", binary="/bin/true", engine="llama-server")
    stack.start("m")
    stack.hub.await_peer("inference-m", "degraded")
    reason = stack.hub.pongs["inference-m"].reason
    assert reason is not None
    assert "--ctx-size" in reason


def test_a_refused_registry_is_exit_status_2_with_file_and_line(stack: InferenceStack) -> None:
    (stack.registry / "models.yaml").write_text("models:\n  m:\n    tier: A\n    slots: 0\n")
    process = stack.start("m")
    assert process.wait(90) == 2
    assert "models.yaml:4" in stack.stderr("m")
    assert '"launch.refused"' in (stack.root / "logs" / "inference-m.jsonl").read_text()


def test_an_unknown_model_is_exit_status_2_with_the_names(stack: InferenceStack) -> None:
    process = stack.start("nobody")
    assert process.wait(90) == 2
    assert "no entry 'nobody'" in stack.stderr("nobody")


def test_the_engine_dies_with_the_service(stack: InferenceStack) -> None:
    process = stack.start("m")
    stack.hub.await_peer("inference-m")
    child = stack.figures("m")["child_pid"]
    process.send_signal(signal.SIGKILL)
    process.wait(90)
    until(lambda: not Path(f"/proc/{child}").exists(), "the engine is gone")


def test_sigterm_ends_service_and_engine(stack: InferenceStack) -> None:
    process = stack.start("m")
    stack.hub.await_peer("inference-m")
    child = stack.figures("m")["child_pid"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_noop_engine_answers_at_once(stack: InferenceStack) -> None:
    stack.entry("n", engine="noop", slots=8)
    stack.start("n")
    stack.hub.await_peer("inference-n")
    plain = stack.ask("n", ask_for("hi"))
    shaped = stack.ask("n", ask_for("hi", json_schema=SCHEMA))
    assert isinstance(plain, InferFinal)
    assert isinstance(shaped, InferFinal)
    assert (plain.text, shaped.text, plain.engine) == ("ok", "{}", "noop")
