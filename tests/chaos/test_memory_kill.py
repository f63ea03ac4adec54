"""kill -9 of the memory service while it writes: what was acknowledged is there, nothing is there twice.

Six rounds; `pytest tests/chaos/test_memory_kill.py --memory-kills 50` is the long form.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import pytest

from protocol.kinds import ENDINGS
from protocol.messages.memory import (
    DecisionRecord,
    Episode,
    Explain,
    MemoryRequest,
    Outcome,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
    Stats,
)
from tests.system.test_memory_service import MemoryStand, started_stand

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1_800)]

TASKS_A_ROUND = 120
STEPS = 3


@pytest.fixture
def stand() -> Iterator[MemoryStand]:
    with started_stand() as made:
        yield made


def decisions(task: str) -> RecordDecisions:
    return RecordDecisions(
        decisions=[
            DecisionRecord(
                decision_id=f"{task}.{step}",
                task_id=task,
                subject="role",
                choice="worker",
                propensity=1.0,
                task_type="doc",
            )
            for step in range(STEPS)
        ]
    )


def outcomes(task: str) -> RecordOutcomes:
    return RecordOutcomes(
        outcomes=[
            Outcome(
                decision_id=f"{task}.{step}",
                reward=0.0 if step == 0 else 1.0,
                seconds=1.0,
                attempts=1,
                failure_code="gate.unit" if step == 0 else None,
                at_ms=1,
            )
            for step in range(STEPS)
        ],
        episode=Episode(
            task_id=task, task_type="doc", objective=f"Compare contract {task}", succeeded=True, seconds=1.0
        ),
    )


def acknowledged(stand: MemoryStand, waiting: dict[str, str]) -> set[str]:
    """Those of the tasks in `waiting` (request -> task) whose outcomes it has taken."""
    return {
        waiting[header.corr]
        for _, header, _ in stand.hub.received
        if header.corr in waiting and header.kind in ENDINGS and header.kind != "error"
    }


def test_no_acknowledged_outcome_is_lost_and_none_applied_twice(
    stand: MemoryStand, request: pytest.FixtureRequest
) -> None:
    rounds: int = request.config.getoption("--memory-kills")
    chance = random.Random(11)
    caught_working = 0
    for number in range(rounds):
        tasks = [f"r{number}t{task}" for task in range(TASKS_A_ROUND)]
        waiting: dict[str, str] = {}
        kill_after = chance.randint(1, TASKS_A_ROUND // 3)
        for task in tasks:
            stand.hub.request("memory", "memory.request", MemoryRequest(ask=decisions(task)))
            waiting[stand.hub.request("memory", "memory.request", MemoryRequest(ask=outcomes(task)))] = task
            stand.hub.pump(1)
            if len(acknowledged(stand, waiting)) >= kill_after:
                break
        stand.hub.until(lambda n=kill_after, told=waiting: len(acknowledged(stand, told)) >= n, "it acknowledges")
        stand.end(signal.SIGKILL)
        del stand.hub.peers["memory"]  # pinging the dead one would fail
        for _ in range(5):
            stand.hub.pump(10)  # answers that it had sent before it died
        before_the_kill = acknowledged(stand, waiting)
        caught_working += 0 < len(before_the_kill) < len(waiting)
        stand.start()
        # Those of earlier rounds are counted at the end.
        ids = [f"{task}.{step}" for task in sorted(before_the_kill) for step in range(STEPS)]
        told = stand.final(Explain(decision_ids=ids))
        assert len(told.explained) == len(ids)
        assert all(each.outcome is not None for each in told.explained)
        # The hub does not know what arrived, so it tells everything of the round again.
        for task in tasks:
            stand.final(decisions(task))
            stand.final(outcomes(task))
    assert caught_working > rounds / 2, "most kills must have come between two acknowledgements"

    everything = rounds * TASKS_A_ROUND
    found = stand.final(Retrieve(text="Compare contract", k=3)).episodes  # waits for the projections, as Stats does not
    assert [each.failure_codes for each in found] == [["gate.unit"]] * 3
    stats = stand.final(Stats()).stats
    assert stats["decisions"] == stats["outcomes"] == everything * STEPS
    assert stats["episodes"] == stats["vectors"] == everything
    assert stats["log_seq"] == stats["vectors_seq"] == stats["graph_seq"] == everything * (2 * STEPS + 1)
    (value,) = stand.final(Explain(decision_ids=[f"{tasks[0]}.0"])).explained[0].values
    assert value.count == everything * STEPS
