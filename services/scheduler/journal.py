"""The journal: every fact in SQLite, in order, before anybody is told.

One transaction per drained batch of messages. Batches that hold a promise to a client (accepted, ended) are synced
to the disk; the others survive kill -9 of the process through the WAL but not a power cut, after which their steps
run again. A small index of tasks serves listings and the start-up, which reads unfinished tasks only.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from protocol.messages.result import TaskState, TaskSummary
from services.scheduler import facts as f
from services.scheduler.effects import Record
from services.scheduler.tasks import TaskRecord, fold

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS facts (
    task TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (task, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tasks (
    task TEXT PRIMARY KEY, state TEXT NOT NULL, settled INTEGER NOT NULL DEFAULT 0, task_type TEXT NOT NULL,
    objective TEXT NOT NULL, created_ms INTEGER NOT NULL, ended_ms INTEGER,
    steps_done INTEGER NOT NULL DEFAULT 0, steps_total INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_open ON tasks (settled, created_ms) WHERE settled = 0;
CREATE INDEX IF NOT EXISTS tasks_newest ON tasks (created_ms);
"""
VERSION: Final = 1


class JournalVersionError(Exception):
    """The file was written by a newer version."""


class Journal:
    """One SQLite file. Every method may raise sqlite3.Error; the hub then stops, since it cannot keep promises."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA wal_autocheckpoint = 4000")
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise JournalVersionError(
                f"{path} has journal version {found}, this build reads {VERSION}: use a newer one"
            )
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version = {VERSION}")
        path.chmod(0o600)
        self._synced: bool | None = None

    def append(self, records: Sequence[Record]) -> None:
        """Write facts in one transaction; synced to disk if one of them is a promise to a client."""
        if not records:
            return
        self._sync(any(isinstance(record.fact, f.TaskAccepted | f.TaskEnded) for record in records))
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT INTO facts (task, seq, kind, data) VALUES (?, ?, ?, ?)",
                [(one.fact.task, one.seq, type(one.fact).__name__, f.pack_fact(one.fact)) for one in records],
            )
            for record in records:
                self._index(record.fact)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def open_tasks(self, limit: int, *, final: bool) -> Iterator[TaskRecord]:
        """Tasks to take up again, oldest first: unfinished ones, or (`final`) ended ones memory does not know yet."""
        sign = "IN" if final else "NOT IN"
        ids = self._db.execute(
            f"SELECT task FROM tasks WHERE settled = 0 AND state {sign} ('succeeded', 'failed', 'cancelled') "  # noqa: S608  no input in it
            "ORDER BY created_ms LIMIT ?",
            (limit,),
        ).fetchall()
        for (task,) in ids:
            record = self.load(task)
            if record is not None:
                yield record

    def load(self, task_id: str) -> TaskRecord | None:
        """A task rebuilt from its facts; None if there is none with this id."""
        rows = self._db.execute("SELECT kind, data FROM facts WHERE task = ? ORDER BY seq", (task_id,)).fetchall()
        return fold(f.unpack_fact(kind, data) for kind, data in rows) if rows else None

    def newest(self, limit: int, states: Iterable[TaskState]) -> list[TaskSummary]:
        """Listing, newest first."""
        wanted = [state.value for state in states] or [state.value for state in TaskState]
        rows = self._db.execute(
            "SELECT task, state, task_type, objective, created_ms, ended_ms, steps_done, steps_total FROM tasks "
            "WHERE state IN (SELECT value FROM json_each(?)) ORDER BY created_ms DESC LIMIT ?",
            (json.dumps(wanted), limit),
        ).fetchall()
        return [
            TaskSummary(
                task_id=task,
                state=TaskState(state),
                task_type=kind,
                objective=objective,
                created_ms=created,
                ended_ms=ended,
                steps_done=done,
                steps_total=total,
            )
            for task, state, kind, objective, created, ended, done, total in rows
        ]

    def counts(self) -> dict[str, int]:
        """Number of tasks per state."""
        return dict(self._db.execute("SELECT state, COUNT(*) FROM tasks GROUP BY state").fetchall())

    def close(self) -> None:
        """Close the file; a clean close folds the WAL back in."""
        self._db.close()

    def _sync(self, full: bool) -> None:
        if self._synced is not full:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            self._synced = full

    def _index(self, fact: f.Fact) -> None:
        match fact:
            case f.TaskAccepted():
                self._db.execute(
                    "INSERT INTO tasks (task, state, task_type, objective, created_ms) VALUES (?, 'planning', ?, ?, ?)",
                    (fact.task, fact.ir["task_type"], fact.ir["objective"][:200], fact.at_ms),
                )
            case f.TaskPlanned():
                total = len(fact.ir["plan"]["steps"])
                self._db.execute(
                    "UPDATE tasks SET state = 'running', steps_total = ? WHERE task = ?", (total, fact.task)
                )
            case f.StepsAdded():
                self._add_steps(fact.task, len(fact.steps))
            case f.StepExpanded():
                self._add_steps(fact.task, len(fact.items))
            case f.StepDone():
                self._db.execute("UPDATE tasks SET steps_done = steps_done + 1 WHERE task = ?", (fact.task,))
            case f.TaskEnded():
                self._db.execute(
                    "UPDATE tasks SET state = ?, ended_ms = ? WHERE task = ?", (fact.state, fact.at_ms, fact.task)
                )
            case f.OutcomesSettled():
                self._db.execute("UPDATE tasks SET settled = 1 WHERE task = ?", (fact.task,))
            case _:
                pass

    def _add_steps(self, task: str, count: int) -> None:
        self._db.execute("UPDATE tasks SET steps_total = steps_total + ? WHERE task = ?", (count, task))
