"""Answers that are stopped, mended or held back, by a real service on the scripted engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import AbortLimits, ChatMessage, InferFinal, InferPartial, InferRequest
from protocol.messages.reply import ErrorReply
from tests.system.inference_stack import FAKE_BINARY, InferenceStack, ask_for

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
LOOP = {"text": "I am a model and I do. ", "repeat": 500, "token_s": 0.002}
LIMITS = AbortLimits()


@pytest.fixture(scope="module")
def running() -> Iterator[InferenceStack]:
    """One service for the whole file: no test here costs the engine its life."""
    with InferenceStack() as stack:
        stack.entry("m", binary=str(FAKE_BINARY), engine="llama-server", slots=2, context_tokens=8192)
        stack.script("m", {})
        stack.start("m")
        stack.hub.await_peer("inference-m")
        yield stack


@pytest.fixture
def stack(running: InferenceStack) -> Iterator[InferenceStack]:
    yield running
    assert running.await_figures("m", requests_processing=0)["respawns"] == 0, "every slot is free again"


def failure_of(body: Message) -> Failure:
    assert isinstance(body, ErrorReply), body
    return body.failure


class Recorded:
    """What the engine was asked since this was made."""

    def __init__(self, stack: InferenceStack, name: str, script: dict[str, Any]) -> None:
        self._path = stack.root / f"{name}.jsonl"
        stack.script("m", script | {"record": str(self._path)})

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text("utf-8").splitlines()]


def test_a_loop_is_stopped_with_its_evidence_and_its_slot_is_free_at_once(stack: InferenceStack) -> None:
    stack.script("m", {"rules": [{"match": "loop", "answers": [LOOP]}]})
    before = stack.figures("m")["early_aborts"]
    failure = failure_of(stack.ask("m", ask_for("loop", max_tokens=4_000, early_abort=LIMITS)))
    assert (failure.category, failure.code) == (Category.EARLY_ABORT, "decoding.repetition")
    evidence = failure.evidence
    assert "I am a model and I do." in evidence["repeated"] * 2
    assert evidence["times"] >= 10
    assert 100 <= evidence["generated_tokens"] <= 300
    assert evidence["answer"].startswith("I am a model")
    assert failure.findings[0].category is Category.EARLY_ABORT
    assert stack.hub.credit["inference-m"] >= 2
    for _ in range(3):
        assert isinstance(stack.ask("m", ask_for("hi")), InferFinal)
    assert stack.figures("m")["early_aborts"] == before + 1


def test_without_limits_the_same_loop_goes_to_its_end(stack: InferenceStack) -> None:
    stack.script("m", {"default": {**LOOP, "token_s": 0, "repeat": 60}})
    final = stack.ask("m", ask_for("loop", max_tokens=1_000))
    assert isinstance(final, InferFinal)
    assert final.generated_tokens == 420


def test_an_engine_that_ignores_max_tokens_is_stopped(stack: InferenceStack) -> None:
    text = " ".join(f"w{number}" for number in range(400))
    stack.script("m", {"default": {"text": text, "fault": "unbounded"}})
    failure = failure_of(stack.ask("m", ask_for("go", max_tokens=50, early_abort=LIMITS)))
    assert (failure.category, failure.code) == (Category.EARLY_ABORT, "decoding.runaway")
    assert failure.evidence["max_tokens"] == 50


def test_entropy_is_asked_for_where_it_is_watched_and_only_there(stack: InferenceStack) -> None:
    text = " ".join(f"w{number}" for number in range(200))
    lost = {"text": text, "top_logprobs": [-2.302585] * 10}
    recorded = Recorded(stack, "entropy", {"default": lost})
    limits = AbortLimits(entropy_nats=1.5)
    failure = failure_of(stack.ask("m", ask_for("go", max_tokens=300, early_abort=limits)))
    assert failure.code == "decoding.entropy"
    assert failure.evidence["entropy_nats"] == pytest.approx(2.303, abs=0.01)
    assert isinstance(stack.ask("m", ask_for("go", max_tokens=300, early_abort=LIMITS)), InferFinal)
    first, second = recorded.requests()
    assert first["body"]["top_logprobs"] == 10
    assert "logprobs" not in second["body"]


def test_the_deadline_goes_to_the_engine_as_its_time_limit(stack: InferenceStack) -> None:
    recorded = Recorded(stack, "deadline", {"default": "ok"})
    deadline = int((time.time() + 20) * 1000)
    stack.hub.collect(stack.hub.request("inference-m", "infer.request", ask_for("go"), deadline=deadline))
    stack.ask("m", ask_for("go"))
    bounded, free = recorded.requests()
    assert 10_000 < bounded["body"]["t_max_predict_ms"] <= 20_000
    assert "t_max_predict_ms" not in free["body"]


def test_a_broken_answer_is_mended_once_with_its_findings(stack: InferenceStack) -> None:
    rules = [
        {"match": "was not accepted", "answers": ['{"n": 3}']},
        {"match": "count", "answers": ['{"n": "three"}']},
    ]
    recorded = Recorded(stack, "repair", {"rules": rules})
    before = stack.figures("m")
    final = stack.ask("m", ask_for("count", json_schema=SCHEMA))
    assert isinstance(final, InferFinal)
    assert (final.text, final.repaired) == ('{"n": 3}', True)
    assert final.generated_tokens == 4, "both answers were paid for"
    first, second = recorded.requests()
    assert [turn["role"] for turn in second["body"]["messages"]] == ["user", "assistant", "user"]
    assert second["body"]["messages"][1]["content"] == '{"n": "three"}'
    assert "'three' is not of type 'integer'" in second["body"]["messages"][2]["content"]
    assert second["body"]["response_format"] == first["body"]["response_format"]
    assert second["body"]["max_tokens"] == 98
    after = stack.figures("m")
    assert after["repairs_begun"] - before["repairs_begun"] == after["repairs_done"] - before["repairs_done"] == 1


def test_a_repair_in_vain_is_one_schema_failure_with_the_cost_of_both(stack: InferenceStack) -> None:
    recorded = Recorded(stack, "vain", {"default": "no JSON at all"})
    failure = failure_of(stack.ask("m", ask_for("go", json_schema=SCHEMA)))
    assert (failure.category, failure.code) == (Category.SCHEMA, "answer.schema")
    assert failure.evidence["generated_tokens"] == 8
    assert "repair" in failure.evidence
    assert len(recorded.requests()) == 2


@pytest.mark.parametrize(("max_tokens", "left_s"), [(5, 60.0), (100, 5.0)])
def test_nothing_is_mended_without_tokens_or_time(stack: InferenceStack, max_tokens: int, left_s: float) -> None:
    recorded = Recorded(
        stack, f"none{max_tokens}", {"default": {"text": "no JSON at all", "token_s": 0.8 if left_s < 10 else 0}}
    )
    body = ask_for("go", json_schema=SCHEMA, max_tokens=max_tokens)
    deadline = int((time.time() + left_s) * 1000)
    request = stack.hub.request("inference-m", "infer.request", body, deadline=deadline)
    failure = failure_of(stack.hub.collect(request)[1])
    assert failure.category is Category.SCHEMA, "what is known, and not a timeout of a repair"
    assert len(recorded.requests()) == 1


def test_json_that_nothing_constrains_is_taken_from_its_fence_or_mended(stack: InferenceStack) -> None:
    rules = [
        {"match": "was not accepted", "answers": ["[1, 2]"]},
        {"match": "fenced", "answers": ['```json\n{"a": 1}\n```']},
        {"match": "prose", "answers": ["Sure! Here is your list: 1, 2"]},
    ]
    stack.script("m", {"rules": rules})
    fenced = stack.ask("m", ask_for("fenced", json_output=True))
    mended = stack.ask("m", ask_for("prose", json_output=True))
    assert isinstance(fenced, InferFinal)
    assert isinstance(mended, InferFinal)
    assert (fenced.repaired, mended.repaired, mended.text) == (False, True, "[1, 2]")


def test_half_a_character_from_the_engine_does_not_cost_the_answer(stack: InferenceStack) -> None:
    stack.script("m", {"default": "a\ud800b"})
    final = stack.ask("m", ask_for("go"))
    assert isinstance(final, InferFinal)
    assert final.text == "a?b"


def test_grammar_and_schema_together_are_refused_with_the_reason(stack: InferenceStack) -> None:
    body = InferRequest.model_construct(
        role="t",
        messages=[ChatMessage(role="user", content="go")],
        max_tokens=5,
        grammar='root ::= "x"',
        json_schema=SCHEMA,
    )
    failure = failure_of(stack.ask("m", body))
    assert failure.category is Category.POLICY
    assert "exclude each other" in failure.message


def test_a_hub_that_does_not_read_gets_one_joined_piece_later_and_the_whole_answer(stack: InferenceStack) -> None:
    text = "".join(f"w{number} " for number in range(400))
    stack.script("m", {"default": {"text": text, "token_s": 0.01}})
    before = stack.figures("m")
    request = stack.hub.request("inference-m", "infer.request", ask_for("go", max_tokens=600, stream=True))
    time.sleep(2.6)  # neither pings nor reading, though not for so long that the service looks for another hub
    _, final, partials = stack.hub.collect(request)
    assert isinstance(final, InferFinal)
    assert final.text == text
    pieces = [piece for piece in partials if isinstance(piece, InferPartial)]
    assert text.startswith("".join(piece.text for piece in pieces)), "nothing between them is missing"
    after = stack.figures("m")
    assert after["partials_held"] - before["partials_held"] >= 5
    assert after["partials_sent"] - before["partials_sent"] == len(pieces)
    assert max(len(piece.text) for piece in pieces) > 200, "what was held came as one"
