"""Facts as rows of the journal: sealed when written, checked when read, folded with the place of any damage named.

A row holds the facts of one task that were written together, since what a row costs does not depend on how many are
in it: the answer of a step in a chain is four facts and one row. Its `kind` names them in order, its `seq` is that of
the last one.

A flipped byte that still decodes would otherwise become state. The seal covers the place as well as the bytes, so a
row that was moved is damage too. It guards against accidents, not against somebody who writes to the file.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from services.scheduler import facts as f
from services.scheduler.effects import Record
from services.scheduler.fold import apply, begin
from services.scheduler.parts import Parts, finished
from services.scheduler.tasks import JournalError, TaskRecord

Row = tuple[int, str, bytes, int | None]
"""seq, kind, data, seal; no seal in rows of journal version 1."""
NewRow = tuple[str, int, str, bytes, int]
"""task, seq, kind, data, seal."""

COUNTED: Final = "SELECT TOTAL(LENGTH(kind) - LENGTH(REPLACE(kind, ' ', '')) + 1) FROM facts"
"""SQL for the number of facts in a journal."""
FACTS_AT_ONCE: Final = 128
"""Facts that are folded in one part, some 0.02 ms each."""
_ROW_BYTES: Final = 256 * 1024
"""Facts that are larger together go into rows of their own: whoever reads some need not read all of them."""


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


def rows_of(records: Iterable[Record]) -> list[NewRow]:
    """The rows that hold these facts, which are to be written in one transaction; those of a task are in order."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.fact.task, []).append(record)
    return [row for task, made in by_task.items() for row in _rows(task, made)]


def _rows(task: str, records: Sequence[Record]) -> list[NewRow]:
    data = f.pack_facts([record.fact for record in records])
    if len(data) > _ROW_BYTES and len(records) > 1:
        half = len(records) // 2
        return [*_rows(task, records[:half]), *_rows(task, records[half:])]
    kind = " ".join([type(record.fact).__name__ for record in records])
    seq = records[-1].seq
    return [(task, seq, kind, data, seal(task, seq, kind, data))]


def read_rows(task: str, rows: Iterable[Row], after: int = 0) -> Iterator[tuple[int, f.Fact]]:
    """Decode the facts that follow number `after`; the first row may hold some before. Raises DamagedTask at the first
    that is missing or damaged.
    """
    begun = False
    for last, kind, data, sealed in rows:
        first = last - kind.count(" ")
        if first > after + 1 or (begun and first != after + 1):
            raise DamagedTask(task, after + 1, f"is missing, the next one is {first}")
        begun = True
        if sealed is not None and sealed != seal(task, last, kind, data):
            raise DamagedTask(task, first, f"its bytes are not those that were written ({kind})")
        try:
            made = f.unpack_facts(kind, data)
        except ValueError as err:
            raise DamagedTask(task, first, f"cannot be read ({kind}): {err or type(err).__name__}") from err
        for seq, fact in enumerate(made, first):
            if fact.task != task:
                raise DamagedTask(task, seq, f"is about task {fact.task}")
            if seq > after:
                yield seq, fact
        after = last


def every_fact(database: sqlite3.Connection, task: str | None = None) -> Iterator[f.Fact]:
    """All facts of a journal, or of one task, task by task; for tools. Raises ValueError and sqlite3.Error."""
    which, values = ("", ()) if task is None else ("WHERE task = ?", (task,))
    rows = database.execute(f"SELECT kind, data FROM facts {which} ORDER BY task, seq", values)  # noqa: S608  constants
    for kind, data in rows:
        yield from f.unpack_facts(kind, data)


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
    return finished(fold_in_parts(task, rows, record))


def fold_in_parts(task: str, rows: Iterable[Row], record: TaskRecord | None = None) -> Parts[TaskRecord | None]:
    """The same, with a pause after every `FACTS_AT_ONCE`, and around those that hold a plan. Raises DamagedTask."""
    for seq, fact in read_rows(task, rows, 0 if record is None else record.seq):
        if record is None or isinstance(fact, f.TaskPlanned):
            yield
        record = advance(record, seq, fact)
        if not seq % FACTS_AT_ONCE or isinstance(fact, f.TaskPlanned):
            yield
    return record
