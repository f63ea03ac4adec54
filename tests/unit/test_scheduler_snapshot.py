"""Start-up does not grow with history: neither with that of one task nor with tasks that are over."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from services.scheduler import facts as f
from services.scheduler import snapshot
from services.scheduler.audit import audit_file, audit_task, task_ids
from services.scheduler.effects import Record
from services.scheduler.fact_rows import advance
from services.scheduler.journal import Journal
from tests.unit.journals import records_of, write_long_task


def test_a_task_with_100_000_facts_restarts_from_its_snapshot_in_a_fraction_of_the_time(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    task = write_long_task(journal, 100_000, snapshots=True)
    journal.close()
    took = {}
    for way in ("snapshot", "facts"):
        if way == "facts":
            with sqlite3.connect(path) as database:
                assert database.execute("DELETE FROM snapshots").rowcount == 1
        reopened = Journal(path)
        began = time.process_time()
        loaded = reopened.load(task.id)
        took[way] = time.process_time() - began
        reopened.close()
        assert loaded is not None
        assert snapshot.plain(loaded) == snapshot.plain(task)
    assert took["snapshot"] < took["facts"] / 5, took


def test_no_restart_folds_more_facts_than_the_bound(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    task = write_long_task(journal, 10_000, snapshots=True)
    journal.close()
    with sqlite3.connect(tmp_path / "j.sqlite") as database:
        [(kept,)] = database.execute("SELECT seq FROM snapshots").fetchall()
    assert task.seq - kept < 4_096 + 500  # the batch that reaches the bound is written whole


def test_a_snapshot_of_other_code_or_of_damaged_bytes_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    task = write_long_task(journal, 5_000, snapshots=True)
    for change in (
        "UPDATE snapshots SET fold = 'another'",
        f"UPDATE snapshots SET fold = '{snapshot.FOLD}', data = x'7b'",
    ):
        with sqlite3.connect(path) as database:
            assert database.execute(change).rowcount == 1
        loaded = journal.load(task.id)
        assert loaded is not None
        assert snapshot.plain(loaded) == snapshot.plain(task)


def test_a_snapshot_is_not_taken_before_all_facts_of_the_task_are_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    task = write_long_task(journal, 5_000, snapshots=False)
    task.seq += 1
    assert not journal.keep_snapshot(task)
    task.seq -= 1
    assert journal.keep_snapshot(task)
    assert not journal.keep_snapshot(task), "one is enough until there are as many facts again"


def test_every_state_of_a_task_survives_packing() -> None:
    [records] = records_of().values()
    task = None
    for record in records:
        task = advance(task, record.seq, record.fact)
        kept = snapshot.unpack(snapshot.pack(task))
        assert kept is not None
        assert snapshot.plain(kept) == snapshot.plain(task)


@pytest.mark.parametrize("query", ["open_tasks", "counts", "newest"])
def test_what_is_read_at_start_and_for_listings_goes_through_an_index(tmp_path: Path, query: str) -> None:
    path = tmp_path / "j.sqlite"
    journal = Journal(path)
    said: list[str] = []
    journal._db.set_trace_callback(said.append)
    if query == "open_tasks":
        journal.open_tasks(10, final=False)
        journal.open_tasks(10, final=True)
    elif query == "counts":
        journal.counts()
    else:
        journal.newest(10, [])
    journal.close()
    assert said
    with sqlite3.connect(path) as database:
        for statement in said:
            plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]
            assert not [step for step in plan if "SCAN tasks" in step and "USING" not in step], plan
            assert not [step for step in plan if "TEMP B-TREE" in step], plan


def write_singly(path: Path, records: list[Record]) -> None:
    """One fact a row, as before version 3."""
    journal = Journal(path)
    for record in records:
        journal.append([record])
    journal.close()


def test_a_journal_of_version_2_is_taken_over_with_what_it_had_counted(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    [records] = records_of().values()
    cut = next(i for i, record in enumerate(records) if isinstance(record.fact, f.StepDone)) + 1
    write_singly(path, records[:cut])
    with sqlite3.connect(path) as old:
        old.execute("UPDATE tasks SET steps_done = 1")  # it counted at every step
        old.execute("PRAGMA user_version = 2")
    journal = Journal(path)
    [task] = journal.open_tasks(10, final=False)
    assert journal.newest(1, [])[0].steps_done == 0, "not before the hub has taken up the task"
    assert journal.load(task) is not None
    assert journal.newest(1, [])[0].steps_done == 1
    journal.append(records[cut:])
    assert journal.newest(1, [])[0].steps_done == 2
    journal.close()
    with sqlite3.connect(path) as database:
        assert audit_task(database, task) == []


def test_a_journal_of_version_1_is_taken_over_with_all_its_tasks(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    made = records_of(2)
    first, second = made
    write_singly(path, [*made[first], *made[second][:4]])
    with sqlite3.connect(path) as old:  # what the earlier version would have left
        for index in ("unfinished", "unsettled", "whole", "compacted", "by_state"):
            old.execute(f"DROP INDEX tasks_{index}")
        for table in ("tallies", "snapshots", "views", "removed", "learned"):
            old.execute(f"DROP TABLE {table}")
        old.execute("ALTER TABLE facts RENAME TO facts_of_2")
        old.execute(
            "CREATE TABLE facts (task TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL,"
            " PRIMARY KEY (task, seq)) WITHOUT ROWID"
        )
        old.execute("INSERT INTO facts SELECT task, seq, kind, data FROM facts_of_2")
        old.execute("DROP TABLE facts_of_2")
        old.execute("ALTER TABLE tasks DROP COLUMN compacted")
        old.execute("CREATE INDEX tasks_open ON tasks (settled, created_ms) WHERE settled = 0")
        old.execute("CREATE INDEX tasks_newest ON tasks (created_ms)")
        old.execute("PRAGMA user_version = 1")
    journal = Journal(path)
    assert journal.open_tasks(10, final=False) == [second]
    assert journal.counts() == {"succeeded": 1, "running": 1}
    journal.append(made[second][4:])
    assert journal.counts() == {"succeeded": 2}
    journal.close()
    with sqlite3.connect(path) as database:
        assert [one for task in task_ids(database) for one in audit_task(database, task)] == []
        assert audit_file(database) == []


def test_learned_durations_are_kept_when_they_have_changed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.sqlite")
    assert journal.durations() == []
    state = [(["worker"], 1.5, 3.0), (["worker", "chat"], 0.5, 1.0)]
    assert journal.keep_learned(state, [])
    assert not journal.keep_learned(state, [])
    journal.close()
    reopened = Journal(tmp_path / "j.sqlite")
    assert reopened.durations() == state
    reopened._db.execute("UPDATE learned SET data = x'c1'")
    assert reopened.durations() == []
