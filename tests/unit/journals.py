"""Journals for tests: real files with facts that the real hub has made in virtual time."""

from __future__ import annotations

from pathlib import Path

from services.scheduler import facts as f
from services.scheduler.effects import Record
from services.scheduler.fact_rows import advance
from services.scheduler.journal import Journal
from services.scheduler.tasks import TaskRecord
from tests.unit.simulation import stack, task_of

TWO_STEPS: list[dict[str, object]] = [{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]


def records_of(count: int = 1) -> dict[str, list[Record]]:
    """All facts of so many finished tasks of two steps, by task."""
    world = stack()
    tasks = [world.submit(task_of(TWO_STEPS, idempotency_key=f"key-{index}")) for index in range(count)]
    for task in tasks:
        world.finish(task)
    world.run(lambda: sum(1 for _, _, kind, _ in world.journal if kind == "OutcomesSettled") == count)
    made: dict[str, list[Record]] = {task: [] for task in tasks}
    for task, seq, kind, data in world.journal:
        made[task].append(Record(f.unpack_fact(kind, data), seq))
    return made


def write_long_task(journal: Journal, count: int, *, snapshots: bool) -> TaskRecord:
    """A running task with at least `count` facts: its step goes back and forth between two workers."""
    [records] = records_of().values()
    cut = next(i for i, record in enumerate(records) if isinstance(record.fact, f.AttemptStarted)) + 1
    task: TaskRecord | None = None
    batch = records[:cut]
    started = batch[-1].fact
    while True:
        for record in batch:
            task = advance(task, record.seq, record.fact)
        assert task is not None
        journal.append(batch)
        for task_id in journal.take_long_tasks():
            assert task_id == task.id
            if snapshots:
                journal.keep_snapshot(task)
        if task.seq >= count:
            return task
        batch = []
        for number in range(250):
            base = {"task": task.id, "at_ms": 2_000_000 + task.seq, "step": started.step, "number": 1}
            lost = f.AttemptLost(**base, code="peer.draining", message="gave it back", blame=False)  # type: ignore[arg-type]
            again = f.AttemptStarted(**base, worker=f"w{number}")  # type: ignore[arg-type]
            batch += [Record(lost, task.seq + len(batch) + 1), Record(again, task.seq + len(batch) + 2)]


def write_journal(path: Path, count: int, together: int = 1) -> dict[str, list[Record]]:
    """A file with so many finished tasks, closed; so many facts of a task were written at once, and share a row."""
    made = records_of(count)
    journal = Journal(path)
    for records in made.values():
        for first in range(0, len(records), together):
            journal.append(records[first : first + together])
    journal.close()
    return made
