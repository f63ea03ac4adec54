"""The journal on a real file: order, reopening, listings, versions."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest

from protocol.messages.result import TaskState
from services.scheduler import facts as f
from services.scheduler.effects import Record
from services.scheduler.fact_rows import COUNTED, every_fact
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
    other = Record(msgspec.structs.replace(records[0].fact, task="another"), 1)
    with pytest.raises(sqlite3.IntegrityError):
        journal.append([other, records[1]])
    assert journal.load("another") is None
    task = journal.load(records[0].fact.task)
    assert task is not None
    assert task.seq == 2


def test_facts_of_a_task_that_are_written_together_share_a_row_and_are_read_from_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    records = recorded()
    other = Record(msgspec.structs.replace(records[0].fact, task="another"), 1)
    journal = Journal(path)
    journal.append([*records[:3], other, *records[3:5]])
    journal.append(records[5:])
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT COUNT(*) FROM facts").fetchone() == (3,)
        assert database.execute(COUNTED).fetchone() == (len(records) + 1,)
        assert list(every_fact(database, records[0].fact.task)) == [record.fact for record in records]
    for after in range(len(records) + 1):
        for limit in (1, 2, 100):
            expected = [(record.seq, record.fact) for record in records[after : after + limit]]
            assert journal.events(records[0].fact.task, after, limit) == expected
    journal.close()


def test_facts_that_are_large_together_have_rows_of_their_own(tmp_path: Path) -> None:
    records = recorded()
    said = "x" * 200_000
    large = [
        Record(f.DuplicateSeen(task=records[0].fact.task, at_ms=1, key=said, worker="w"), records[-1].seq + number)
        for number in range(1, 9)
    ]
    journal = Journal(tmp_path / "j.sqlite")
    journal.append(records + large)
    with sqlite3.connect(tmp_path / "j.sqlite") as database:
        sizes = [size for (size,) in database.execute("SELECT LENGTH(data) FROM facts")]
    assert len(sizes) > 4
    assert max(sizes) < 2 * len(said)
    task = journal.load(records[0].fact.task)
    assert task is not None
    assert task.seq == large[-1].seq


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
