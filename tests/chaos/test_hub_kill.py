"""kill -9 of the real scheduler under load, on a noop tier: promises, learned durations, bounded memory."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from protocol.messages.result import TaskState
from services.ctl.__main__ import main
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.overhead import NOOP_MODELS
from services.kit.children import resident_bytes
from services.scheduler.occupancy import MAX_UNSETTLED_BYTES
from tests.waiting import until

pytestmark = pytest.mark.chaos

KILLS = 5
SOAK_TASKS = 1_000
SOAK_CHUNK = 100
SOAK_BOUND_MB = 4.0
"""What 500 further tasks may add: 8 KB each. `tierline bench overhead` measures it after 100,000 steps."""


@pytest.fixture
def stack(short_folder: Path) -> Iterator[BareStack]:
    with BareStack(short_folder, models=NOOP_MODELS) as running:
        yield running


def small_task(index: int) -> dict[str, Any]:
    step = {"actor": "worker", "action": "answer", "gates": []}
    steps = [
        step | {"id": "S1", "outputs": [{"name": "one"}]},
        step | {"id": "S2", "inputs": ["one"], "outputs": [{"name": "two"}]},
    ]
    return {"objective": f"small task {index}", "idempotency_key": f"small-{index}", "plan": {"steps": steps}}


def rows(stack: BareStack, query: str) -> list[Any]:
    with sqlite3.connect(f"file:{stack.home.journal}/journal.sqlite?mode=ro", uri=True) as database:
        return database.execute(query).fetchall()


def test_whatever_was_accepted_ends_once_however_often_the_hub_is_killed(
    stack: BareStack, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted: list[str] = []
    index = 0
    for _ in range(KILLS):
        began = time.monotonic()
        while time.monotonic() - began < 0.7:
            accepted.append(stack.client.submit(small_task(index), timeout_s=100).task_id)
            index += 1
        stack.restart("scheduler")
    for task in accepted:
        assert stack.client.result(task, timeout_s=200).state is TaskState.SUCCEEDED
    assert len(set(accepted)) == index
    written = rows(stack, "SELECT task, kind FROM facts")
    effects = Counter((task, kind) for task, kinds in written for kind in kinds.split(" "))
    assert {effects[task, "TaskEnded"] for task in accepted} == {1}
    assert {effects[task, "StepDone"] for task in accepted} == {2}
    capsys.readouterr()
    assert main(["replay", str(stack.home.journal), "--check", "--json"]) == 0, capsys.readouterr().out
    assert json.loads(capsys.readouterr().out)["tasks"] == index


def test_durations_that_were_learned_outlive_kill_9(stack: BareStack) -> None:
    def observed() -> float:
        kept = rows(stack, "SELECT data FROM learned WHERE name = 'durations'")
        levels = {tuple(level): count for level, _, count in msgpack.unpackb(kept[0][0])} if kept else {}
        return levels.get(("worker",), 0.0)

    def wait_for(count: float) -> None:
        until(lambda: observed() >= count, f"{count} steps are learned from")
        assert observed() == count

    for index in range(3):
        stack.client.run(small_task(index), timeout_s=100)
    wait_for(6)
    stack.restart("scheduler")
    stack.wait_ready()
    stack.client.run(small_task(99), timeout_s=100)
    wait_for(8)


def test_resident_memory_does_not_grow_with_the_number_of_tasks(stack: BareStack) -> None:
    pid = stack.client.status().hub_pid
    sizes: list[float] = []
    for first in range(0, SOAK_TASKS, SOAK_CHUNK):
        tasks = [
            stack.client.submit(small_task(index), timeout_s=100, wait_if_refused=True).task_id
            for index in range(first, first + SOAK_CHUNK)
        ]
        for task in tasks:
            assert stack.client.result(task, timeout_s=200).state is TaskState.SUCCEEDED
        sizes.append(resident_bytes(pid) / 1024**2)
    half = len(sizes) // 2
    assert stack.client.status().tasks == {"succeeded": SOAK_TASKS}
    assert max(sizes[half:]) - max(sizes[:half]) < SOAK_BOUND_MB, sizes


def test_ended_tasks_that_memory_cannot_be_told_of_do_not_stay_in_the_hub(stack: BareStack) -> None:
    fanout = {
        "objective": "many small answers",
        "plan": {
            "steps": [
                {"id": f"S{i}", "actor": "worker", "action": "answer", "gates": [], "outputs": [{"name": f"o{i}"}]}
                for i in range(1_000)
            ]
        },
    }
    unsettled = "SELECT COUNT(*) FROM tasks WHERE settled = 0"
    pid = stack.client.status().hub_pid
    assert stack.client.run(fanout, timeout_s=200).state is TaskState.SUCCEEDED
    # Killed between writing and answering, memory is told again and stores nothing the second time.
    until(lambda: rows(stack, unsettled) == [(0,)], "memory was told of the first", within_s=120)
    stack.kill("memory")
    sizes: list[float] = []
    for _ in range(20):
        assert stack.client.run(fanout, timeout_s=200).state is TaskState.SUCCEEDED
        sizes.append(resident_bytes(pid) / 1024**2)
    assert max(sizes) - sizes[0] < 1.5 * MAX_UNSETTLED_BYTES / 1024**2, sizes
    stack.start("memory")
    until(lambda: rows(stack, unsettled) == [(0,)], "memory was told of all of them", within_s=120)
    kinds = rows(stack, "SELECT task, kind FROM facts WHERE kind LIKE '%AttemptMoved%'")
    # What a step says of its role is not learned where a busy machine had another model do it.
    moved = Counter(task for task, kind in kinds for one in kind.split() if one == "AttemptMoved")
    settled = rows(stack, "SELECT task, data FROM facts WHERE kind = 'OutcomesSettled'")
    stored = Counter(msgpack.unpackb(data)["stored"] + 2 * moved[task] for task, data in settled)
    assert list(stored.values()) == [21], (stored, moved)
