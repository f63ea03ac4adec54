"""What waits for a slow reader: joined texts, and everything else as it came."""

from __future__ import annotations

import asyncio

from protocol.client_session import Deliver
from protocol.kinds import STEP_TOKENS
from protocol.messages.base import Message
from protocol.messages.batch import BatchPartial
from protocol.messages.infer import InferPartial
from protocol.messages.result import TaskEvent
from protocol.pieces import Pieces


def tokens(step: str, text: str, count: int) -> TaskEvent:
    fields = {"text": text, "generated_tokens": count}
    return TaskEvent(task_id="T", seq=1, at_ms=1, event=STEP_TOKENS, step=step, attempt=1, fields=fields)


def event(seq: int) -> TaskEvent:
    return TaskEvent(task_id="T", seq=seq, at_ms=seq, event="step.done", step="S1")


async def read_all(*bodies: Message) -> list[Message]:
    pieces = Pieces()
    for body in bodies:
        pieces.put(Deliver("r", body, ends=False))
    return [(await pieces.get()).body for _ in range(len(pieces))]


async def test_pieces_of_one_answer_wait_as_one_and_nothing_of_the_text_is_lost() -> None:
    parts = [InferPartial(text=f"w{number} ", generated_tokens=number) for number in range(5_000)]
    (joined,) = await read_all(*parts)
    assert joined == InferPartial(text="".join(part.text for part in parts), generated_tokens=4_999)


async def test_texts_of_steps_that_run_side_by_side_are_joined_each_by_itself() -> None:
    parts = [tokens(step, f"{step}{number} ", number) for number in range(3) for step in ("S1", "S2")]
    assert await read_all(*parts) == [tokens("S1", "S10 S11 S12 ", 2), tokens("S2", "S20 S21 S22 ", 2)]


async def test_no_text_overtakes_an_event_and_no_event_is_joined() -> None:
    parts = [tokens("S1", "a", 1), event(2), tokens("S1", "b", 2), tokens("S1", "c", 3), event(3), event(4)]
    assert await read_all(*parts) == [tokens("S1", "a", 1), event(2), tokens("S1", "bc", 3), event(3), event(4)]


async def test_of_progress_only_the_newest_waits() -> None:
    told = [BatchPartial(done=done, failed=0, running=1, total=9, generated_tokens=done) for done in range(1, 5)]
    assert await read_all(*told) == [told[-1]]


async def test_a_reader_that_waits_gets_each_piece_at_once() -> None:
    pieces = Pieces()
    reading = asyncio.create_task(pieces.get())
    await asyncio.sleep(0)
    assert not reading.done()
    pieces.put(Deliver("r", event(1), ends=False))
    assert (await asyncio.wait_for(reading, 1)).body == event(1)
