"""The journal: every fact in SQLite, in order, before anybody is told.

One transaction per drained batch of messages. Batches that hold a promise to a client (accepted, ended) are synced
to the disk; the others survive kill -9 of the process through the WAL but not a power cut, after which their steps
run again. An index of tasks serves listings and the start-up, which reads unfinished tasks only, each from its newest
snapshot on. What becomes of tasks that are over is `retention.py`.
"""

from __future__ import annotations

import heapq
import itertools
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgpack

from protocol.codec import unpack_body
from protocol.errors import BadFrame
from protocol.messages.result import StepState, TaskState, TaskSummary, TaskView
from services.scheduler import facts as f
from services.scheduler import snapshot
from services.scheduler.effects import Record
from services.scheduler.effort import Effort
from services.scheduler.fact_rows import (
    FACTS_AT_ONCE,
    DamagedTask,
    NewRow,
    Row,
    fold_in_parts,
    read_rows,
    rows_of,
)
from services.scheduler.journal_file import open_journal
from services.scheduler.parts import Parts, finished
from services.scheduler.past import Past, Unavailable
from services.scheduler.personas import KeepPersona
from services.scheduler.tasks import TaskRecord

_DURATIONS: Final = "durations"
_EFFORT: Final = "effort"
_PAGE_BYTES: Final = 4 * 1024 * 1024
"""Facts read at once for a watcher: answers may hold a megabyte each."""
_PROMISES: Final = (f.TaskAccepted, f.TaskEnded)
_INSERT: Final = "INSERT INTO facts (task, seq, kind, data, seal) VALUES (?, ?, ?, ?, ?)"
_INDEXED: Final = frozenset(
    (
        f.TaskAccepted,
        f.TaskPlanned,
        f.PlanGrown,
        f.TaskReplanned,
        f.StepsAdded,
        f.StepExpanded,
        f.TaskEnded,
        f.OutcomesSettled,
    )
)
"""What changes the index of tasks. Most facts do not: how many steps of a running task are done is known in memory."""
Learned = list[tuple[list[str], float, float]]
"""What `LearnedDurations.state` gives."""


class Journal:
    """One SQLite file. Every method may raise sqlite3.Error; the hub then stops, since it cannot keep promises."""

    def __init__(self, path: Path) -> None:
        self._db = open_journal(path)
        self._synced: bool | None = None
        self.commits = 0
        """Transactions with facts so far."""
        self.syncs = 0
        """How many of them were synced to the disk."""
        self._written: dict[str, int] = {}
        """Newest fact on file of the tasks that are not over."""
        self._snapped: dict[str, int] = {}
        """Fact after which their newest snapshot was taken."""
        self._done: Counter[str] = Counter()
        """Steps that are done, of the tasks that are not over; the index has them when a task ends."""
        self._long: set[str] = set()
        self._learned: dict[str, bytes] = {}

    # Writing

    def append(self, records: Sequence[Record], personas: Sequence[KeepPersona] = ()) -> None:
        """Write facts and rows of personas in one transaction; synced to disk if one is a promise to a client."""
        if not records and not personas:
            return
        full = bool(personas) or any(isinstance(record.fact, _PROMISES) for record in records)
        self._sync(full)
        rows = rows_of(records)
        indexed = [record.fact for record in records if type(record.fact) in _INDEXED]
        for record in records:
            if isinstance(record.fact, f.StepDone):
                self._done[record.fact.task] += 1
        if len(rows) == 1 and not indexed and not personas:
            self._db.execute(_INSERT, rows[0])  # a transaction of its own: two statements less for most batches
        else:
            self._write(rows, indexed, personas)
        self.commits += 1
        self.syncs += full
        newest = {record.fact.task: record for record in records}
        for task, record in newest.items():
            if isinstance(record.fact, f.TaskEnded | f.OutcomesSettled):
                self._written.pop(task, None)
                self._snapped.pop(task, None)
                self._done.pop(task, None)
                continue
            self._written[task] = record.seq
            if snapshot.may_be_due(record.seq - self._snapped.get(task, 0)):
                self._long.add(task)

    def take_long_tasks(self) -> set[str]:
        """Tasks written to since the last call that may be due for `keep_snapshot`."""
        tasks, self._long = self._long, set()
        return tasks

    def keep_snapshot(self, record: TaskRecord) -> bool:
        """Write the state of a task if it is time to; True if it was. All its facts must be on file."""
        if self._written.get(record.id) != record.seq:
            return False
        if not snapshot.is_due(record, self._snapped.get(record.id, 0)):
            return False
        self._sync(False)  # it can be made again
        self._db.execute(
            "INSERT OR REPLACE INTO snapshots (task, seq, fold, data) VALUES (?, ?, ?, ?)",
            (record.id, record.seq, snapshot.FOLD, snapshot.pack(record)),
        )
        self._snapped[record.id] = record.seq
        return True

    # Reading

    def open_tasks(self, limit: int, *, final: bool) -> list[str]:
        """Ids of tasks to take up again, oldest first: unfinished, or (`final`) ended without memory knowing."""
        which = "ended_ms IS NOT NULL AND settled = 0" if final else "ended_ms IS NULL"
        rows = self._db.execute(
            f"SELECT task FROM tasks WHERE {which} ORDER BY created_ms LIMIT ?",  # noqa: S608  no input in it
            (limit,),
        )
        return [task for (task,) in rows]

    def load(self, task_id: str) -> TaskRecord | None:
        """A task rebuilt from its snapshot, if it has one, and its facts; None if no facts are there.

        Raises DamagedTask if they cannot be folded.
        """
        return finished(self._load_in_parts(task_id))

    def _load_in_parts(self, task_id: str) -> Parts[TaskRecord | None]:
        start = None
        kept = self._db.execute(
            "SELECT data FROM snapshots WHERE task = ? AND fold = ?", (task_id, snapshot.FOLD)
        ).fetchone()
        if kept is not None:
            start = snapshot.unpack(kept[0])
        after = 0 if start is None else start.seq
        rows = self._db.execute(
            "SELECT seq, kind, data, seal FROM facts WHERE task = ? AND seq > ? ORDER BY seq", (task_id, after)
        ).fetchall()  # a cursor that stays open between parts would keep the WAL from being folded back
        record = yield from fold_in_parts(task_id, rows, start)
        if record is not None and not record.state.final:
            self._written[task_id] = record.seq
            self._snapped[task_id] = after
            self._done[task_id] = sum(1 for step in record.steps.values() if step.state is StepState.DONE)
        return record

    def knows(self, task_id: str) -> bool:
        """True if `find` would find something."""
        return any(
            self._db.execute(f"SELECT 1 FROM {table} WHERE task = ? LIMIT 1", (task_id,)).fetchone()  # noqa: S608  constants
            for table in ("facts", "views", "removed")
        )

    def is_long(self, task_id: str) -> bool:
        """True if `find` would have more to fold than is folded at once."""
        [last] = self._db.execute("SELECT MAX(seq) FROM facts WHERE task = ?", (task_id,)).fetchone()
        return last is not None and last > FACTS_AT_ONCE

    def find(self, task_id: str) -> TaskRecord | Past | None:
        """Whatever is known of a task; None if there never was one with this id, or its id is forgotten."""
        return finished(self.find_in_parts(task_id))

    def find_in_parts(self, task_id: str) -> Parts[TaskRecord | Past | None]:
        """The same, a part at a time."""
        try:
            record = yield from self._load_in_parts(task_id)
        except DamagedTask as err:
            return Unavailable("task.damaged", f"{err}; `tierline replay --check` says more")
        return record if record is not None else self._past(task_id)

    def events(self, task_id: str, after_seq: int, limit: int) -> list[tuple[int, f.Fact]]:
        """The next facts of a task, at most `limit` and some MiB; none of a task that was compacted.

        Raises DamagedTask.
        """
        rows: list[Row] = []
        room = _PAGE_BYTES
        for row in self._db.execute(
            "SELECT seq, kind, data, seal FROM facts WHERE task = ? AND seq > ? ORDER BY seq LIMIT ?",
            (task_id, after_seq, limit),
        ):
            rows.append(row)
            room -= len(row[2])
            if room <= 0:
                break
        return list(itertools.islice(read_rows(task_id, rows, after_seq), limit))

    def newest(self, limit: int, states: Iterable[TaskState]) -> list[TaskSummary]:
        """Listing, newest first."""
        # One walk per state along its index: a rare state is found without a scan of all the others.
        lists = [
            self._db.execute(
                "SELECT task, state, task_type, objective, created_ms, ended_ms, steps_done, steps_total FROM tasks "
                "WHERE state = ? ORDER BY created_ms DESC LIMIT ?",
                (state.value, limit),
            ).fetchall()
            for state in (set(states) or set(TaskState))
        ]
        rows = heapq.nlargest(limit, (row for rows in lists for row in rows), key=lambda row: (row[4], row[0]))
        return [
            TaskSummary(
                task_id=task,
                state=TaskState(state),
                task_type=kind,
                objective=objective,
                created_ms=created,
                ended_ms=ended,
                steps_done=self._done.get(task, 0) if ended is None else done,
                steps_total=total,
            )
            for task, state, kind, objective, created, ended, done, total in rows
        ]

    def personas(self) -> list[bytes]:
        """Rows of the personas that were made at run time."""
        return [data for (data,) in self._db.execute("SELECT data FROM personas")]

    def counts(self) -> dict[str, int]:
        """Number of tasks per state."""
        return dict(self._db.execute("SELECT state, tasks FROM tallies WHERE tasks > 0").fetchall())

    # What was learned

    def keep_learned(self, durations: Learned, effort: Effort) -> bool:
        """Write what was learned of durations and of larger budgets, if it has changed; True if it was written."""
        written = False
        for name, state in ((_DURATIONS, durations), (_EFFORT, effort)):
            data: bytes = msgpack.packb(state)
            if data != self._learned.get(name):
                self._sync(False)  # a power cut may cost some seconds of learning
                self._db.execute("INSERT OR REPLACE INTO learned (name, data) VALUES (?, ?)", (name, data))
                self._learned[name] = data
                written = True
        return written

    def durations(self) -> Learned:
        """What was learned when it was last kept; empty where there is nothing, or nothing that can be read."""
        return read_learned(self._db)

    def effort(self) -> Effort:
        """The same of `EffortRecord.state`."""
        rows = _read(self._db, _EFFORT)
        try:
            return [
                ([str(part) for part in name], float(tried), float(solved), float(seconds))
                for name, tried, solved, seconds in rows
                if len(name) == 3
            ]
        except (ValueError, TypeError):
            return []

    def close(self) -> None:
        """Close the file; a clean close folds the WAL back in."""
        self._db.close()

    # Inside

    def _past(self, task_id: str) -> Past | None:
        row = self._db.execute("SELECT data FROM views WHERE task = ?", (task_id,)).fetchone()
        if row is not None:
            try:
                return unpack_body(TaskView, row[0])
            except BadFrame as err:
                return Unavailable("task.damaged", f"the kept view of task {task_id} cannot be read: {err}")
        row = self._db.execute("SELECT state, ended_ms FROM removed WHERE task = ?", (task_id,)).fetchone()
        if row is None:
            return None
        day = datetime.fromtimestamp(row[1] / 1000, UTC).date().isoformat()
        return Unavailable(
            "task.removed", f"task {task_id} ended as {row[0]} on {day}; it is so old that only its id is kept"
        )

    def _sync(self, full: bool) -> None:
        if self._synced is not full:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            self._synced = full

    def _write(self, rows: Sequence[NewRow], indexed: Iterable[f.Fact], personas: Iterable[KeepPersona]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(_INSERT, rows)
            for fact in indexed:
                self._index(fact)
            for persona in personas:
                if persona.data is None:
                    self._db.execute("DELETE FROM personas WHERE name = ?", (persona.name,))
                else:
                    self._db.execute("INSERT OR REPLACE INTO personas VALUES (?, ?)", (persona.name, persona.data))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _index(self, fact: f.Fact) -> None:
        match fact:
            case f.TaskAccepted():
                self._db.execute(
                    "INSERT INTO tasks (task, state, task_type, objective, created_ms) VALUES (?, ?, ?, ?, ?)",
                    (fact.task, TaskState.PLANNING, fact.ir["task_type"], fact.ir["objective"][:200], fact.at_ms),
                )
                self._tally(TaskState.PLANNING, 1)
            case f.TaskPlanned():
                total = len(fact.ir["plan"]["steps"])
                self._move(fact.task, TaskState.RUNNING, "steps_total = ?", total)
            case f.PlanGrown():
                self._move(fact.task, TaskState.RUNNING, "steps_total = steps_total + ?", len(fact.steps))
            case f.TaskReplanned():
                self._add_steps(fact.task, len(fact.added))
            case f.StepsAdded():
                self._add_steps(fact.task, len(fact.steps))
            case f.StepExpanded():
                self._add_steps(fact.task, len(fact.items))
            case f.TaskEnded():
                done = self._done.get(fact.task, 0)
                self._move(fact.task, TaskState(fact.state), "ended_ms = ?, steps_done = ?", fact.at_ms, done)
            case f.OutcomesSettled(task=task):
                self._db.execute("UPDATE tasks SET settled = 1 WHERE task = ?", (task,))
            case _:
                raise TypeError(f"{type(fact).__name__} changes nothing in the index")

    def _move(self, task: str, state: TaskState, assignment: str, *values: int) -> None:
        before = self._db.execute("SELECT state FROM tasks WHERE task = ?", (task,)).fetchone()
        if before is None:
            raise sqlite3.IntegrityError(f"the index has lost task {task}; see `tierline replay --check`")
        self._tally(TaskState(before[0]), -1)
        self._tally(state, 1)
        self._db.execute(f"UPDATE tasks SET state = ?, {assignment} WHERE task = ?", (state, *values, task))  # noqa: S608  `assignment` is one of the constants above

    def _add_steps(self, task: str, count: int) -> None:
        self._db.execute("UPDATE tasks SET steps_total = steps_total + ? WHERE task = ?", (count, task))

    def _tally(self, state: TaskState, change: int) -> None:
        self._db.execute(
            "INSERT INTO tallies VALUES (?1, ?2) ON CONFLICT (state) DO UPDATE SET tasks = tasks + ?2", (state, change)
        )


def read_learned(database: sqlite3.Connection) -> Learned:
    """What a hub has learned of durations, from its journal; see `Journal.durations`. Raises sqlite3.Error."""
    try:
        return [
            ([str(part) for part in level], float(log_s), float(count))
            for level, log_s, count in _read(database, _DURATIONS)
        ]
    except (ValueError, TypeError):
        return []  # estimates only: they are learned again


def _read(database: sqlite3.Connection, name: str) -> list[Any]:
    row = database.execute("SELECT data FROM learned WHERE name = ?", (name,)).fetchone()
    try:
        return [] if row is None else list(msgpack.unpackb(row[0], raw=False))
    except (ValueError, TypeError, msgpack.UnpackException):
        return []
