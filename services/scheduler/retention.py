"""What becomes of tasks that are over: whole for a while, then their final view, at last only their id.

Runs as a process of its own (`python -m services.scheduler.retention JOURNAL`, started by the hub, or by `tierline
journal compact`), so that the hub's loop never waits for it: views are made without a lock, and each transaction
changes one task or a few small rows. It touches only tasks that have ended and whose outcomes memory has; nobody
else ever writes to those, and every transaction looks again.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from protocol.codec import pack_body
from services.scheduler.fact_rows import DamagedTask, fold_rows
from services.scheduler.journal_file import open_journal
from services.scheduler.views import view

_DAY_MS: Final = 86_400_000
_REMOVED_AT_ONCE: Final = 100
_PAGES_AT_ONCE: Final = 500
_BREATH_S: Final = 0.002
"""Between two transactions: lets a hub that waits for the lock have it."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How long what is kept; the only place where it is said. A number counts if it is reached before the days."""

    whole_days: float = 14
    """Events, every attempt and every artefact."""
    whole_tasks: int = 5_000
    view_days: float = 180
    """The result as `tierline show` prints it, with the final artefacts."""
    view_tasks: int = 50_000
    key_days: float = 400
    """The id, hence the idempotency key: submitted again within this time after its end, a task is not run again."""


@dataclass(slots=True)
class Done:
    """What one run did."""

    compacted: int = 0
    removed: int = 0
    forgotten: int = 0
    """Keys that may be used again."""
    damaged: int = 0
    """Tasks left as they are because their facts cannot be folded."""
    freed_bytes: int = 0
    """By which the file has become smaller."""


def keep(database: sqlite3.Connection, policy: Policy, now_ms: int) -> Done:
    """Apply the policy once. Raises sqlite3.Error; what was done until then stays done."""
    done = Done()
    for task in _over(database, "settled = 1 AND compacted = 0", policy.whole_days, policy.whole_tasks, now_ms):
        try:
            done.compacted += _compact(database, task)
        except DamagedTask:
            done.damaged += 1
        time.sleep(_BREATH_S)
    old = list(_over(database, "compacted = 1", policy.view_days, policy.view_tasks, now_ms))
    for at in range(0, len(old), _REMOVED_AT_ONCE):
        done.removed += _remove(database, old[at : at + _REMOVED_AT_ONCE])
        time.sleep(_BREATH_S)
    limit_ms = now_ms - int(policy.key_days * _DAY_MS)
    done.forgotten = database.execute("DELETE FROM removed WHERE ended_ms < ?", (limit_ms,)).rowcount
    done.freed_bytes = _shrink(database)
    return done


def _over(database: sqlite3.Connection, which: str, days: float, tasks: int, now_ms: int) -> Iterator[str]:
    """Ids of tasks beyond the days or beyond the number, oldest first, as they are when asked."""
    limit_ms = now_ms - int(days * _DAY_MS)
    extra = database.execute(
        f"SELECT ended_ms FROM tasks WHERE {which} ORDER BY ended_ms DESC LIMIT 1 OFFSET ?",  # noqa: S608  constants
        (tasks,),
    ).fetchone()
    if extra is not None:
        limit_ms = max(limit_ms, extra[0] + 1)
    rows = database.execute(
        f"SELECT task FROM tasks WHERE {which} AND ended_ms < ? ORDER BY ended_ms",  # noqa: S608  constants
        (limit_ms,),
    ).fetchall()
    return iter([task for (task,) in rows])


def _compact(database: sqlite3.Connection, task: str) -> int:
    """Put the final view in the place of a task's facts; 1 if this was done, 0 if another process was faster."""
    rows = database.execute("SELECT seq, kind, data, seal FROM facts WHERE task = ? ORDER BY seq", (task,))
    record = fold_rows(task, rows)
    if record is None or not record.state.final:
        return 0
    data = pack_body(view(record))
    with _Transaction(database):
        marked = database.execute(
            "UPDATE tasks SET compacted = 1 WHERE task = ? AND settled = 1 AND compacted = 0", (task,)
        ).rowcount
        if marked:
            database.execute("INSERT OR REPLACE INTO views (task, data) VALUES (?, ?)", (task, data))
            database.execute("DELETE FROM facts WHERE task = ?", (task,))
            database.execute("DELETE FROM snapshots WHERE task = ?", (task,))
    return marked


def _remove(database: sqlite3.Connection, tasks: list[str]) -> int:
    removed = 0
    with _Transaction(database):
        for task in tasks:
            row = database.execute(
                "SELECT state, ended_ms FROM tasks WHERE task = ? AND compacted = 1", (task,)
            ).fetchone()
            if row is None:
                continue
            database.execute("INSERT OR REPLACE INTO removed VALUES (?, ?, ?)", (task, *row))
            database.execute("DELETE FROM views WHERE task = ?", (task,))
            database.execute("DELETE FROM tasks WHERE task = ?", (task,))
            database.execute("UPDATE tallies SET tasks = tasks - 1 WHERE state = ?", (row[0],))
            removed += 1
    return removed


def _shrink(database: sqlite3.Connection) -> int:
    """Give free pages back to the file system, a few at a time. A file made by version 1 only reuses its own."""
    (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
    (before,) = database.execute("PRAGMA page_count").fetchone()
    (free,) = database.execute("PRAGMA freelist_count").fetchone()
    (mode,) = database.execute("PRAGMA auto_vacuum").fetchone()
    for _ in range(free // _PAGES_AT_ONCE + 1 if mode else 0):
        # `execute` would stop after the first page: the pragma frees one a step and returns no rows to ask for.
        database.executescript(f"PRAGMA incremental_vacuum({_PAGES_AT_ONCE})")
        time.sleep(_BREATH_S)
    (after,) = database.execute("PRAGMA page_count").fetchone()
    return int(max(0, before - after) * page_bytes)


class _Transaction:
    """Takes the write lock at once, so that what is read inside is what will be changed."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")


def main(argv: list[str]) -> int:
    """One run over the journal named on the command line; prints what it did as one JSON object."""
    database = open_journal(Path(argv[0]))
    try:
        done = keep(database, Policy(), time.time_ns() // 1_000_000)
    finally:
        database.close()
    sys.stdout.write(json.dumps(asdict(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
