"""Several requests under one key: the newest gets the answer, and each has exactly one ending."""

from __future__ import annotations

import pytest

from protocol.messages.batch import BatchFinal, BatchPartial
from protocol.messages.failure import Category
from protocol.messages.infer import ChatMessage, InferFinal, InferRequest
from tests.unit.test_scheduler_batches import Asker, echo, world_with


def question(text: str) -> InferRequest:
    return InferRequest(role="worker", messages=[ChatMessage(role="user", content=text)], max_tokens=9)


def test_the_same_key_again_joins_the_batch_that_is_there_and_the_request_before_is_told() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    first = asker.ask(["a", "b"])
    world.run_for(100)
    again = asker.ask(["a", "b"])
    assert asker.failure(first).code == "call.superseded"
    assert [answer.text for answer in asker.finish(again).answers] == ["A", "B"]
    assert len(world.peers["inference-worker"].started) == 2
    assert len(asker.said(first)) == 1


@pytest.mark.parametrize("took_ms", [300, 2_500], ids=["some wait at the old deadline", "all run at the old deadline"])
def test_the_deadline_of_a_displaced_request_ends_nothing_that_the_newer_one_wants(took_ms: int) -> None:
    world = world_with(echo(took_ms))
    asker = Asker(world)
    prompts = [f"p{index}" for index in range(8 if took_ms < 500 else 2)]
    first = asker.ask(prompts, deadline_ms=500)
    world.run_for(100)
    second = asker.ask(prompts, deadline_ms=60_000)
    assert asker.failure(first).code == "call.superseded"
    assert [answer.text for answer in asker.finish(second).answers] == [prompt.upper() for prompt in prompts]


def test_a_newer_request_with_an_earlier_deadline_has_its_answer_by_then() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    asker.ask(["a", "b"], deadline_ms=60_000)
    final = asker.finish(asker.ask(["a", "b"], deadline_ms=500), limit_ms=1_000)
    assert [answer.failure is not None and answer.failure.category for answer in final.answers] == [
        Category.TIMEOUT
    ] * 2


def test_a_cancel_of_the_request_that_was_displaced_leaves_the_batch_to_the_newer_one() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    first, second = asker.ask(["a", "b"]), asker.ask(["a", "b"])
    asker.cancel(corr=first)
    assert [answer.text for answer in asker.finish(second).answers] == ["A", "B"]
    third = asker.ask(["a", "b"])
    asker.cancel(corr=third)
    world.run_for(3_000)
    assert not asker.said(third)


def test_other_prompts_under_the_key_of_a_running_batch_are_refused() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    first = asker.ask(["a", "b"])
    other, harder = asker.ask(["a", "c"]), asker.ask(["a", "b"], max_tokens=7)
    for refused in (other, harder):
        assert (asker.failure(refused).code, asker.failure(refused).category) == ("call.key_taken", Category.POLICY)
    assert [answer.text for answer in asker.finish(first).answers] == ["A", "B"]


def test_a_request_that_is_repeated_after_a_lost_connection_is_answered_once() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    ident = asker.ask(["a", "b"])
    world.run_for(100)
    asker.repeat()
    asker.finish(ident)
    world.run_for(3_000)
    assert [type(body) for body in asker.said(ident) if not isinstance(body, BatchPartial)] == [BatchFinal]


def test_a_call_under_the_key_of_a_running_one_takes_its_place_and_the_one_before_is_told() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    first = asker.infer("worker", question("a"), "K")
    world.run_for(100)
    second = asker.infer("worker", question("a"), "K")
    assert asker.failure(first).code == "call.superseded"
    asker.cancel("infer.cancel", corr=first)
    asker.repeat()
    world.run_for(3_000)
    (final,) = asker.said(second)
    assert isinstance(final, InferFinal)
    assert final.text == "A"
    assert len(world.peers["inference-worker"].started) == 1
    assert len(asker.said(first)) == 1


def test_a_call_that_is_repeated_after_a_lost_connection_is_answered_once() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    ident = asker.infer("worker", question("a"), "K")
    asker.repeat()
    world.run_for(3_000)
    (final,) = asker.said(ident)
    assert isinstance(final, InferFinal)


def test_another_question_under_the_key_of_a_running_call_is_refused() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    first = asker.infer("worker", question("a"), "K")
    for refused in (asker.infer("worker", question("b"), "K"), asker.infer("front", question("a"), "K")):
        assert (asker.failure(refused).code, asker.failure(refused).category) == ("call.key_taken", Category.POLICY)
    world.run_for(3_000)
    (final,) = asker.said(first)
    assert isinstance(final, InferFinal)
    assert final.text == "A"
