"""Old tasks: what is kept of them, for how long, and what a client hears about them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from protocol.messages.result import ArtefactQuery, Cancelled, TaskQuery, TaskState, TaskView, Watch
from protocol.messages.task import Accepted, Submit
from services.scheduler import facts as f
from services.scheduler.journal import Journal
from services.scheduler.journal_file import open_journal
from services.scheduler.past import Unavailable, answer_past
from services.scheduler.retention import Done, Policy, keep
from services.scheduler.views import view
from tests.unit.journals import TWO_STEPS, records_of, write_journal
from tests.unit.simulation import stack, task_of

DAY_MS = 86_400_000
NOW_MS = 1_000_000  # when the virtual tasks end, to a second


def kept(path: Path, policy: Policy, days: float) -> Done:
    database = open_journal(path)
    try:
        return keep(database, policy, NOW_MS + int(days * DAY_MS))
    finally:
        database.close()


def test_an_old_task_keeps_its_view_then_its_id_then_nothing(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    made = write_journal(path, 3)
    policy = Policy(whole_days=10, view_days=20, key_days=30)
    assert kept(path, policy, 9) == Done()
    journal = Journal(path)
    before = {task: journal.load(task) for task in made}
    done = kept(path, policy, 11)
    assert (done.compacted, done.removed, done.forgotten) == (3, 0, 0)
    for task, record in before.items():
        assert record is not None
        assert journal.find(task) == view(record)
        assert journal.events(task, 0, 100) == []
    assert journal.counts() == {"succeeded": 3}
    assert len(journal.newest(10, [])) == 3
    done = kept(path, policy, 21)
    assert (done.compacted, done.removed, done.forgotten) == (0, 3, 0)
    gone = journal.find(next(iter(made)))
    assert isinstance(gone, Unavailable)
    assert "succeeded" in gone.message
    assert journal.counts() == {}
    assert journal.newest(10, []) == []
    done = kept(path, policy, 31)
    assert done.forgotten == 3
    assert journal.find(next(iter(made))) is None


def test_beyond_the_number_the_oldest_go_first(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    write_journal(path, 6)
    done = kept(path, Policy(whole_tasks=4, view_tasks=1), 0)
    # Tasks that ended in the same millisecond as the last one too many go with it.
    assert done.compacted >= 2
    with sqlite3.connect(path) as database:
        whole = [ms for (ms,) in database.execute("SELECT ended_ms FROM tasks WHERE compacted = 0")]
        old = [ms for (ms,) in database.execute("SELECT ended_ms FROM tasks WHERE compacted = 1")]
    assert len(whole) <= 4
    assert len(old) <= 1
    assert not whole or not old or max(old) < min(whole)


def test_tasks_that_run_or_still_have_to_teach_are_never_touched(tmp_path: Path) -> None:
    made = records_of(2)
    running, untaught = made.values()
    journal = Journal(tmp_path / "j.sqlite")
    journal.append(running[:5])
    journal.append([record for record in untaught if not isinstance(record.fact, f.OutcomesSettled)])
    assert kept(tmp_path / "j.sqlite", Policy(0, 0, 0, 0, 0), 1_000) == Done()
    assert journal.open_tasks(10, final=False) == [running[0].fact.task]
    assert journal.open_tasks(10, final=True) == [untaught[0].fact.task]


def test_a_hub_that_writes_meanwhile_is_neither_blocked_nor_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    made = records_of(8)
    journal = Journal(path)
    old, new = list(made.values())[:4], list(made.values())[4:]
    for records in old:
        journal.append(records)
    database = open_journal(path)
    for records in new:
        journal.append(records[:3])
        keep(database, Policy(whole_days=0), NOW_MS + DAY_MS)
        journal.append(records[3:])
    for records in new:
        task = journal.load(records[0].fact.task)
        assert task is None or task.seq == records[-1].seq
    assert journal.counts() == {"succeeded": 8}
    database.close()


def test_a_damaged_task_is_left_for_people_and_the_others_are_compacted(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    made = write_journal(path, 3)
    bad = list(made)[1]
    with sqlite3.connect(path) as database:
        database.execute("UPDATE facts SET data = x'00' WHERE task = ? AND seq = 3", (bad,))
    done = kept(path, Policy(whole_days=0), 1)
    assert (done.compacted, done.damaged) == (2, 1)


def test_a_file_gives_its_space_back(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    write_journal(path, 40)
    before = path.stat().st_size
    done = kept(path, Policy(whole_days=0, view_days=0), 1)
    assert done.freed_bytes > before // 3
    open_journal(path).close()
    assert path.stat().st_size < before


def test_a_client_hears_of_an_old_task_what_is_kept() -> None:
    world = stack()
    task = world.submit(task_of(TWO_STEPS))
    past = world.finish(task)
    assert answer_past("task.show", b"", past) == ("task.detail", past)
    assert answer_past("task.watch", b"", past) == ("task.result", past)
    assert answer_past("task.cancel", b"", past)[1] == Cancelled(task_id=task, state=TaskState.SUCCEEDED)


@pytest.mark.parametrize("days", [11.0, 21.0])
def test_the_hub_answers_about_a_compacted_and_a_removed_task(tmp_path: Path, days: float) -> None:
    """The path from the hub's lookup to the client, with the real journal behind the simulated stack."""
    path = tmp_path / "j.sqlite"
    made = write_journal(path, 1)
    policy = Policy(whole_days=10, view_days=20, key_days=30)
    kept(path, policy, 11)
    kept(path, policy, days)
    journal = Journal(path)
    world = stack()
    world.find = journal.find
    task = next(iter(made))
    again = Submit(task=task_of(TWO_STEPS, idempotency_key="key-0").model_dump(mode="json", exclude_none=True))
    assert world.client("task.submit", again)[1] == Accepted(task_id=task, duplicate=True)
    header, shown = world.client("task.show", TaskQuery(task_id=task))
    watched, result = world.client("task.watch", Watch(task_id=task))
    if days < 20:
        assert isinstance(shown, TaskView)
        assert (watched.kind, result) == ("task.result", shown)
        assert world.client("task.artefact", ArtefactQuery(task_id=task, name="S2.out"))[0].kind == "task.content"
        assert world.client("task.artefact", ArtefactQuery(task_id=task, name="S1.out"))[0].kind == "error"
    else:
        assert header.kind == watched.kind == "error"
        assert "task.removed" in str(shown)


def test_no_limit_outlives_the_one_after_it() -> None:
    policy = Policy()
    assert policy.whole_days <= policy.view_days <= policy.key_days
    assert policy.whole_tasks <= policy.view_tasks
