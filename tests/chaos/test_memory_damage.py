"""The memory's files are flipped, deleted, or find no room: nothing acknowledged is lost, nothing wrong is answered.

A flip of every file in turn is in `test_memory_crashes.py`.
"""

from __future__ import annotations

import resource
import shutil
import signal
import sqlite3
from collections.abc import Iterator

import pytest

from protocol.messages.base import Message
from protocol.messages.memory import (
    DecisionRecord,
    Episode,
    Explain,
    MemoryFinal,
    Outcome,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
    Stats,
)
from protocol.messages.reply import ErrorReply
from tests.system.test_memory_service import OBJECTIVES, MemoryStand, started_stand, teach

pytestmark = pytest.mark.chaos


@pytest.fixture
def stand() -> Iterator[MemoryStand]:
    with started_stand() as made:
        yield made


@pytest.mark.parametrize(
    ("ended", "name", "places"),
    [(signal.SIGTERM, "log.sqlite", (3, 18, 99, 0.3, 0.7)), (signal.SIGKILL, "log.sqlite-wal", (0.2, 0.6))],
    ids=["log after a clean stop", "write-ahead log after kill -9"],
)
def test_a_flipped_byte_in_the_log_is_mended_from_its_copy(
    stand: MemoryStand, ended: signal.Signals, name: str, places: tuple[float, ...]
) -> None:
    teach(stand)
    expected = stand.answers()
    stand.end(ended)
    backup = stand.home / "backup"
    shutil.copytree(stand.folder, backup)
    for place in places:
        shutil.rmtree(stand.folder)
        shutil.copytree(backup, stand.folder)
        data = bytearray((stand.folder / name).read_bytes())
        data[int(place * len(data)) if place < 1 else int(place)] ^= 0x40
        (stand.folder / name).write_bytes(bytes(data))
        stand.start()
        assert stand.answers() == expected, f"after a flipped bit at {place}"
        stand.end(signal.SIGKILL)
    assert stand.events("memory.log_restored")


def test_a_row_that_changes_under_the_running_service_is_not_served_and_is_right_again_after_its_restart(
    stand: MemoryStand,
) -> None:
    teach(stand)
    expected = stand.answers()
    db = sqlite3.connect(stand.folder / "log.sqlite", isolation_level=None)
    changed = db.execute("UPDATE outcomes SET record = replace(record, '\"reward\":1', '\"reward\":0')").rowcount
    db.close()
    assert changed > 0
    answer = stand.ask(Explain(decision_ids=["t0-0"]))
    assert isinstance(answer, ErrorReply)
    assert answer.failure.code == "memory.log_damaged"
    assert answer.failure.category == "RESOURCE"
    assert stand.process is not None
    stand.process.wait(timeout=90)
    assert stand.events("memory.log_damaged")
    stand.start()
    assert stand.answers() == expected
    assert stand.events("memory.log_restored")


def test_deleted_projections_are_rebuilt_after_any_stop(stand: MemoryStand) -> None:
    teach(stand)
    expected = stand.answers()
    for ended in (signal.SIGTERM, signal.SIGKILL):
        stand.end(ended)
        for path in [*stand.folder.glob("vectors*"), *stand.folder.glob("graph*")]:
            path.unlink()
        before = len(stand.events("memory.projection_rebuilt"))
        stand.start()
        assert stand.answers() == expected
        assert len(stand.events("memory.projection_rebuilt")) == before + 2


def test_a_full_disk_refuses_writes_loses_nothing_and_is_over_when_there_is_room(stand: MemoryStand) -> None:
    teach(stand)
    assert stand.process is not None
    pid = stand.process.pid
    wal = stand.folder / "log.sqlite-wal"
    room = wal.stat().st_size + 200_000
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    acknowledged: list[str] = []
    refused: list[Message] = []
    for number in range(60):
        task = f"full{number}"
        for body in told_of(task):
            answer = stand.ask(body)
            if isinstance(answer, MemoryFinal):
                acknowledged += [task] if isinstance(body, RecordOutcomes) else []
            else:
                refused.append(answer)
                break
    assert acknowledged
    assert refused, "the limit was reached"
    assert all(isinstance(each, ErrorReply) and each.failure.category == "RESOURCE" for each in refused)
    assert all(isinstance(each, ErrorReply) and "free disk space" in each.failure.message for each in refused)
    explained = stand.final(Explain(decision_ids=[f"{task}-0" for task in acknowledged])).explained
    assert all(each.outcome is not None for each in explained)

    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for body in told_of("room"):
        assert isinstance(stand.ask(body), MemoryFinal)
    stand.restart(signal.SIGKILL)
    explained = stand.final(Explain(decision_ids=[f"{task}-0" for task in [*acknowledged, "room"]])).explained
    assert len(explained) == len(acknowledged) + 1
    assert all(each.outcome is not None for each in explained)
    assert stand.final(Stats()).stats["episodes"] == len(OBJECTIVES) + len(acknowledged) + 1
    assert stand.final(Retrieve(text=OBJECTIVES[0], k=16)).episodes


def told_of(task: str) -> tuple[RecordDecisions, RecordOutcomes]:
    decision = DecisionRecord(
        decision_id=f"{task}-0",
        task_id=task,
        subject="role",
        choice="worker",
        propensity=1.0,
        task_type="doc",
        rule="x" * 4_000,
    )
    outcome = Outcome(decision_id=f"{task}-0", reward=1.0, seconds=1.0, attempts=1, at_ms=1)
    episode = Episode(
        task_id=task, task_type="doc", objective=f"Compare {task} " + "word " * 800, succeeded=True, seconds=1.0
    )
    return RecordDecisions(decisions=[decision]), RecordOutcomes(outcomes=[outcome], episode=episode)
