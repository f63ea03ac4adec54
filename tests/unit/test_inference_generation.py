"""Structured output where the engine cannot take the schema, against a server that refuses on purpose."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

from protocol.errors import CallFailed
from protocol.messages.failure import Category
from protocol.messages.infer import AbortLimits, ChatMessage, InferFinal, InferRequest
from services.inference.generation import Generation
from services.inference.llama_http import Piece, RequestInvalid, Usage

SCHEMA = {"type": "array", "prefixItems": [{"type": "integer"}], "items": False}


class Refusing:
    """Refuses every schema that says anything, or whatever it is asked; else gives its answers in turn.

    With `late` it says so in the middle of an answer, as the content filter of a server elsewhere does.
    """

    def __init__(self, *answers: str, everything: bool = False, late: bool = False) -> None:
        self._late = late
        self.asked: list[Mapping[str, Any]] = []
        self._answers = list(answers)
        self._everything = everything

    async def chat(self, payload: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        self.asked.append(payload)
        if self._late:
            yield Piece("[", None, None)
        if self._everything or payload.get("response_format", {}).get("json_schema", {}).get("schema"):
            raise RequestInvalid(f"refusal {len(self.asked)}")
        yield Piece(self._answers.pop(0), None, None)
        yield Piece("", "stop", Usage(9, 0, 4, 1.0, 1.0))


def made(request: InferRequest, figures: Counter[str] | None = None, due_s: float | None = None) -> Generation:
    counts = Counter[str]() if figures is None else figures
    return Generation(
        request, service="inference-m", model="m", engine="fake", due_s=due_s, figures=counts, calls=lambda: 1
    )


def generated(server: Refusing, request: InferRequest, figures: Counter[str]) -> InferFinal:
    return asyncio.run(made(request, figures).run(server, lambda partial: True, lambda: None))


def asking(schema: dict[str, Any] | None = None, grammar: str | None = None) -> InferRequest:
    return InferRequest(
        role="worker",
        messages=[ChatMessage(role="user", content="One number.")],
        max_tokens=100,
        json_schema=schema,
        grammar=grammar,
    )


def test_a_schema_that_the_engine_refuses_is_told_to_the_model_and_checked_here() -> None:
    server, figures = Refusing("[7]"), Counter[str]()
    final = generated(server, asking(SCHEMA), figures)
    assert (final.text, final.repaired) == ("[7]", False)
    refused, taken = server.asked
    assert refused["response_format"]["json_schema"]["schema"] == SCHEMA
    assert taken["response_format"]["json_schema"]["schema"] == {}, "still JSON"
    assert json.dumps(SCHEMA) in taken["messages"][-1]["content"]
    assert figures["schemas_open"] == 1


def test_its_wrong_answer_is_mended_once_and_then_the_evidence_says_what_the_engine_refused() -> None:
    server, figures = Refusing("[7, 8]", "[7]"), Counter[str]()
    assert generated(server, asking(SCHEMA), figures).repaired
    with pytest.raises(CallFailed) as failed:
        generated(Refusing("[7, 8]", "[8, 9]"), asking(SCHEMA), figures)
    failure = failed.value.failure
    assert (failure.category, failure.code) == (Category.SCHEMA, "answer.schema")
    assert "refusal 1" in failure.evidence["unconstrained"]
    assert failure.evidence["repair"] == "tried once, in vain"


@pytest.mark.parametrize(
    ("request_", "times"), [(asking(SCHEMA), 2), (asking({}), 1), (asking(), 1), (asking(grammar="root ::= x"), 1)]
)
def test_what_is_refused_for_another_reason_fails_with_that(request_: InferRequest, times: int) -> None:
    server = Refusing(everything=True)
    with pytest.raises(CallFailed) as failed:
        generated(server, request_, Counter[str]())
    assert failed.value.failure.code == "engine.refused"
    assert "refusal 1" in failed.value.failure.message
    assert len(server.asked) == times


def test_an_answer_that_was_begun_is_not_asked_for_again() -> None:
    server = Refusing(everything=True, late=True)
    with pytest.raises(CallFailed, match="refusal 1"):
        generated(server, asking(SCHEMA), Counter[str]())
    assert len(server.asked) == 1


class Thinking:
    """Says its thoughts, then its answer, then ends."""

    def __init__(self, *thoughts: str, answer: str = "42") -> None:
        self._thoughts, self._answer = thoughts, answer
        self.asked: list[Mapping[str, Any]] = []

    async def chat(self, payload: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        self.asked.append(payload)
        for thought in self._thoughts:
            yield Piece("", None, None, thought=thought)
        yield Piece(self._answer, None, None)
        yield Piece("", "stop", Usage(9, 0, 4, 1.0, 1.0))


def test_thoughts_are_no_part_of_the_answer() -> None:
    generation = made(asking())
    final = asyncio.run(generation.run(Thinking("Let me ", "see"), lambda partial: True, lambda: None))
    assert (final.text, final.generated_tokens, generation.begun) == ("42", 4, True)


def test_thoughts_that_go_round_in_circles_are_stopped_like_an_answer_would_be() -> None:
    request = asking().model_copy(update={"early_abort": AbortLimits(), "max_tokens": 4_000})
    generation = made(request)
    with pytest.raises(CallFailed) as failed:
        asyncio.run(
            generation.run(Thinking(*["wait, let me think again. "] * 2_000), lambda partial: True, lambda: None)
        )
    assert failed.value.failure.category is Category.EARLY_ABORT
    assert 0 < generation.spent_tokens < 1_000


def test_as_many_equal_entries_as_were_asked_for_are_an_answer_and_without_a_question_a_loop() -> None:
    answer = "".join(f"{n}. Not mentioned in the contract.\n" for n in range(1, 81))

    def answered(prompt: str) -> InferFinal:
        request = asking().model_copy(
            update={
                "early_abort": AbortLimits(),
                "max_tokens": 4_000,
                "messages": [ChatMessage(role="user", content=prompt)],
            }
        )
        return asyncio.run(made(request).run(Thinking(answer=answer), lambda partial: True, lambda: None))

    assert answered("What is said of each?\n" + "".join(f"{n}. Clause {n * 7}\n" for n in range(1, 81))).text == answer
    with pytest.raises(CallFailed) as failed:
        answered("Say what you know.")
    assert failed.value.failure.category is Category.EARLY_ABORT


def test_a_schema_that_turns_out_to_be_none_is_nothing_to_try_again_for() -> None:
    server = Refusing("[7]")
    with pytest.raises(CallFailed) as failed:
        generated(server, asking({"$ref": "#/$defs/missing"}), Counter[str]())
    failure = failed.value.failure
    assert (failure.category, failure.code) == (Category.POLICY, "schema.invalid")
    assert failure.evidence["generated_tokens"] == 4


def test_time_that_passes_before_the_slot_is_free_is_no_time_for_decoding() -> None:
    async def asked_late() -> Mapping[str, Any]:
        server = Thinking()
        generation = made(asking(), due_s=asyncio.get_running_loop().time() + 100.0)
        await asyncio.sleep(0.05)
        await generation.run(server, lambda partial: True, lambda: None)
        return server.asked[0]

    assert 0 < asyncio.run(asked_late())["t_max_predict_ms"] <= 99_950
