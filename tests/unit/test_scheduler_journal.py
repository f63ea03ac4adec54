"""The journal on a real file: order, reopening, listings, versions."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from protocol.messages.result import TaskState
from services.scheduler import facts as f
from services.scheduler.effects import Record
from services.scheduler.fold import fold
from services.scheduler.journal import Journal
from services.scheduler.journal_file import JournalVersionError
from services.scheduler.tasks import JournalError
from tests.unit.simulation import stack, task_of


def recorded() -> list[Record]:
    """All facts of one finished task, out of the simulated stack."""
    world = stack()
    task = world.submit(task_of([{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]))
    world.finish(task)
    return [Record(f.unpack_fact(kind, data), seq) for _, seq, kind, data in world.journal]


def test_a_task_is_the_fold_of_its_facts_after_reopening(tmp_path: Path) -> None:
    records = recorded()
    journal = Journal(tmp_path / "j.sqlite")
    for record in records:
        journal.append([record])
    before = journal.load(records[0].fact.task)
    journal.close()
    reopened = Journal(tmp_path / "j.sqlite")
    after = reopened.load(records[0].fact.task)
    assert before == after
    assert after is not None
    assert after.state is TaskState.SUCCEEDED
    assert [fact for _, fact in reopened.events(after.id, 0, 1_000)] == [record.fact for record in records]
    assert [seq for seq, _ in reopened.events(after.id, 3, 2)] == [4, 5]


def test_unfinished_tasks_are_found_again_and_finished_ones_are_not(tmp_path: Path) -> None:
    records = recorded()
    journal = Journal(tmp_path / "j.sqlite")
    cut = next(i for i, record in enumerate(records) if isinstance(record.fact, f.StepDone)) + 1
    journal.append(records[:cut])
    assert journal.open_tasks(10, final=False) == [records[0].fact.task]
    [line] = journal.newest(10, [])
    assert (line.state, line.steps_done, line.steps_total) == (TaskState.RUNNING, 1, 2)
    journal.append(records[cut:])
    assert journal.open_tasks(10, final=False) == []
    assert journal.counts() == {"succeeded": 1}
    assert journal.newest(10, [TaskState.FAILED]) == []


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    records = recorded()
    journal = Journal(tmp_path / "j.sqlite")
    journal.append(records[:2])
    with pytest.raises(sqlite3.IntegrityError):
        journal.append([records[2], records[1]])
    task = journal.load(records[0].fact.task)
    assert task is not None
    assert task.seq == 2


def test_a_journal_of_a_newer_version_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    Journal(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalVersionError, match="99"):
        Journal(path)


def test_facts_that_contradict_each_other_stop_the_hub() -> None:
    facts = [record.fact for record in recorded()]
    done = next(fact for fact in facts if isinstance(fact, f.StepDone))
    with pytest.raises(JournalError):
        fold([*facts[: facts.index(done) + 1], done])
    with pytest.raises(JournalError):
        fold(facts[1:])


def test_every_fact_survives_its_encoding_and_an_unknown_one_is_named() -> None:
    for record in recorded():
        assert f.unpack_fact(type(record.fact).__name__, f.pack_fact(record.fact)) == record.fact
    with pytest.raises(ValueError, match="StepDreamt"):
        f.unpack_fact("StepDreamt", b"\x80")
