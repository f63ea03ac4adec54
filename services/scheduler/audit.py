"""Whether a journal tells one story: every task folded, its state examined, the index and snapshots compared with it.

Pure over a database connection that nobody else writes to: `tierline replay --check` gives it a copy.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from protocol.codec import unpack_body
from protocol.errors import BadFrame
from protocol.messages.result import StepState, TaskView
from services.scheduler import snapshot
from services.scheduler.fact_rows import DamagedTask, advance, read_rows
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.views import summary


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Something in the journal that cannot be. `seq` is absent where it is about the task as a whole."""

    task: str
    seq: int | None
    message: str


def task_ids(database: sqlite3.Connection) -> list[str]:
    """Every task that the file mentions, in the order in which they were accepted, unknown ones last."""
    known = [task for (task,) in database.execute("SELECT task FROM tasks ORDER BY created_ms, task")]
    others = database.execute(
        "SELECT task FROM facts UNION SELECT task FROM views UNION SELECT task FROM snapshots"
    ).fetchall()
    return known + sorted({task for (task,) in others} - set(known))


def audit_task(database: sqlite3.Connection, task: str) -> list[Contradiction]:
    """Everything that is wrong with one task; reading stops at the first fact that cannot be read."""
    rows = database.execute("SELECT seq, kind, data, seal FROM facts WHERE task = ? ORDER BY seq", (task,))
    kept = database.execute("SELECT seq, fold, data FROM snapshots WHERE task = ?", (task,)).fetchone()
    record: TaskRecord | None = None
    found: list[Contradiction] = []
    try:
        for seq, fact in read_rows(task, rows):
            record = advance(record, seq, fact)
            if kept is not None and kept[:2] == (seq, snapshot.FOLD):
                found += _compare_snapshot(record, kept[2])
    except DamagedTask as err:
        return [*found, Contradiction(task, err.seq, err.reason)]
    index = database.execute(
        "SELECT state, settled, task_type, objective, created_ms, ended_ms, steps_done, steps_total, compacted "
        "FROM tasks WHERE task = ?",
        (task,),
    ).fetchone()
    if index is None:
        return [*found, Contradiction(task, None, "is not in the index of tasks")]
    if index[8]:
        return [*found, *_audit_compacted(database, task, index, record)]
    if record is None:
        return [*found, Contradiction(task, None, "has no facts")]
    found += [Contradiction(task, record.seq, message) for message in problems_of(record)]
    return found + _compare_index(record, index)


def audit_file(database: sqlite3.Connection) -> list[Contradiction]:
    """SQLite's own look at the file, its indexes included, and the counts per state against the index of tasks."""
    said = [line for (line,) in database.execute("PRAGMA integrity_check(20)") if line != "ok"]
    told = dict(database.execute("SELECT state, tasks FROM tallies WHERE tasks <> 0").fetchall())
    counted = dict(database.execute("SELECT state, COUNT(*) FROM tasks GROUP BY state").fetchall())
    found = [Contradiction("-", None, line) for line in said]
    for state in sorted(told.keys() | counted.keys()):
        if told.get(state, 0) != counted.get(state, 0):
            message = f"{told.get(state, 0)} tasks are counted as {state}, the index has {counted.get(state, 0)}"
            found.append(Contradiction("-", None, message))
    return found


def problems_of(task: TaskRecord) -> Iterator[str]:
    """Invariants of a task's state, as sentences about those that do not hold."""
    unfinished = sum(1 for step in task.steps.values() if not step.state.final)
    if unfinished != task.unfinished:
        yield f"{unfinished} steps are unfinished, the state says {task.unfinished}"
    if task.state.final and (unfinished or task.ended_ms is None):
        yield f"it has ended with {unfinished} unfinished steps"
    for name, step in task.steps.items():
        open_needs = {need for need in step.needs if not _is_over(task.steps[need])}
        if step.state is StepState.WAITING and step.waiting_for != open_needs:
            yield f"step {name} waits for {sorted(step.waiting_for)}, open are {sorted(open_needs)}"
        if step.attempts and open_needs:
            yield f"step {name} was begun before {sorted(open_needs)} were done"
        if [attempt.number for attempt in step.attempts] != list(range(1, len(step.attempts) + 1)):
            yield f"the attempts of step {name} are not numbered in order"
        if step.state is StepState.DONE:
            missing = [one.name for one in step.spec.outputs if one.name not in task.artefacts]
            if missing and not step.is_turn:  # a turn that called tools has made nothing else
                yield f"step {name} is done without {missing}"


def _is_over(step: StepRecord) -> bool:
    """Whether whoever needs this step may go on: after a failed assignment of a sub-agent, and after a failed turn."""
    gone = step.state.final if step.agent is not None else step.is_turn and step.state is StepState.FAILED
    return step.state is StepState.DONE or gone


def _compare_snapshot(record: TaskRecord, data: bytes) -> list[Contradiction]:
    kept = snapshot.unpack(data)
    if kept is None:
        return [Contradiction(record.id, record.seq, "the snapshot after this fact cannot be read")]
    if snapshot.plain(kept) != snapshot.plain(record):
        return [Contradiction(record.id, record.seq, "the snapshot after this fact differs from the fold")]
    return []


def _compare_index(record: TaskRecord, index: tuple[Any, ...]) -> list[Contradiction]:
    line = summary(record)
    folded: dict[str, Any] = {
        "state": line.state.value,
        "settled": int(record.settled),
        "task_type": line.task_type,
        "objective": line.objective,
        "created_ms": line.created_ms,
        "ended_ms": line.ended_ms,
        "steps_done": line.steps_done if record.state.final else index[6],  # it says nothing before the end
        "steps_total": line.steps_total,
    }
    return [
        Contradiction(record.id, None, f"the index says {name} = {told!r}, its facts say {folded[name]!r}")
        for name, told in zip(folded, index, strict=False)
        if told != folded[name]
    ]


def _audit_compacted(
    database: sqlite3.Connection, task: str, index: tuple[Any, ...], record: TaskRecord | None
) -> list[Contradiction]:
    if record is not None:
        return [Contradiction(task, None, "was compacted and still has facts")]
    row = database.execute("SELECT data FROM views WHERE task = ?", (task,)).fetchone()
    if row is None:
        return [Contradiction(task, None, "was compacted and has no view")]
    try:
        view = unpack_body(TaskView, row[0])
    except BadFrame as err:
        return [Contradiction(task, None, f"its view cannot be read: {err}")]
    if (view.task_id, view.state.value, view.created_ms, view.ended_ms) != (task, index[0], index[4], index[5]):
        return [Contradiction(task, None, "its view and its line in the index differ")]
    return []
