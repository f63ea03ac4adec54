"""Facts as rows of the journal: sealed when written, checked when read, folded with the place of any damage named.

A flipped byte that still decodes would otherwise become state. The seal covers the place as well as the bytes, so a
row that was moved is damage too. It guards against accidents, not against somebody who writes to the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from services.scheduler import facts as f
from services.scheduler.fold import apply, begin
from services.scheduler.tasks import JournalError, TaskRecord

Row = tuple[int, str, bytes, int | None]
"""seq, kind, data, seal; no seal in rows of journal version 1."""


class DamagedTask(Exception):
    """The facts of one task cannot be read or contradict each other: set the task aside, go on with the others."""

    def __init__(self, task: str, seq: int, reason: str) -> None:
        super().__init__(f"task {task}, fact {seq}: {reason}")
        self.task = task
        self.seq = seq
        self.reason = reason


def seal(task: str, seq: int, kind: str, data: bytes) -> int:
    """CRC-32 over a fact and its place."""
    return zlib.crc32(data, zlib.crc32(f"{task}/{seq}/{kind}".encode()))


def read_rows(task: str, rows: Iterable[Row], after: int = 0) -> Iterator[tuple[int, f.Fact]]:
    """Decode the rows that follow fact number `after`. Raises DamagedTask at the first that is missing or damaged."""
    for seq, kind, data, sealed in rows:
        if seq != after + 1:
            raise DamagedTask(task, after + 1, f"is missing, the next one is {seq}")
        after = seq
        if sealed is not None and sealed != seal(task, seq, kind, data):
            raise DamagedTask(task, seq, f"its bytes are not those that were written ({kind})")
        try:
            fact = f.unpack_fact(kind, data)
        except ValueError as err:
            raise DamagedTask(task, seq, f"cannot be read ({kind}): {err or type(err).__name__}") from err
        if fact.task != task:
            raise DamagedTask(task, seq, f"is about task {fact.task}")
        yield seq, fact


def advance(record: TaskRecord | None, seq: int, fact: f.Fact) -> TaskRecord:
    """Apply one fact; None = it is the task's first. Raises DamagedTask if it cannot follow what was before."""
    try:
        if record is not None:
            apply(record, fact)
            return record
        if not isinstance(fact, f.TaskAccepted):
            raise JournalError(f"a task begins with {type(fact).__name__}")
        return begin(fact)
    except (JournalError, ValueError, TypeError, KeyError, AttributeError) as err:
        # The shapes inside a fact are not typed: damage shows as any of these, pydantic's error being a ValueError.
        raise DamagedTask(fact.task, seq, f"{type(fact).__name__} cannot follow: {err}") from err


def fold_rows(task: str, rows: Iterable[Row], record: TaskRecord | None = None) -> TaskRecord | None:
    """State after these rows, going on from `record`; None where there is neither. Raises DamagedTask."""
    for seq, fact in read_rows(task, rows, 0 if record is None else record.seq):
        record = advance(record, seq, fact)
    return record
