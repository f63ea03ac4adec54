"""A task that makes no progress says why, to whoever asks for it."""

from __future__ import annotations

from datetime import UTC, datetime

from protocol.messages.result import TaskQuery, TaskView
from services.scheduler.simulation import tiers
from tests.unit.simulation import World, plan_as_given, say, stack, task_of


def waiting(world: World, task_id: str) -> list[str]:
    _, body = world.client("task.show", TaskQuery(task_id=task_id))
    assert isinstance(body, TaskView)
    return body.waiting


def test_without_a_worker_it_says_which_is_missing_and_since_when() -> None:
    world = stack()
    task_id = world.submit(task_of([{"id": "S1"}]))
    world.peers["inference-worker"].kill()
    world.run_for(20_000)
    (reason,) = waiting(world, task_id)
    words, since = reason.rsplit(" ", 1)
    assert words == "step S1 (role worker) waits for infer.worker: 0 workers alive since"
    gone = datetime.strptime(since, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    assert world.now / 1000 - 25 < gone.timestamp() < world.now / 1000


def test_a_worker_that_is_silent_is_named() -> None:
    world = stack()
    world.peers["inference-worker"].frozen = True
    world.run_for(5_000)
    task_id = world.submit(task_of([{"id": "S1"}]))
    world.run_for(500)
    assert waiting(world, task_id) == [
        "step S1 (role worker) waits for infer.worker: 0 of 1 workers ready (inference-worker suspect)"
    ]


def test_what_waits_for_a_slot_says_so_and_what_runs_says_nothing() -> None:
    world = stack(say("fine", took_ms=5_000), slots=1)
    task_id = world.submit(task_of([{"id": "S1"}, {"id": "S2"}, {"id": "S3"}]))
    world.run_for(500)
    assert waiting(world, task_id) == [
        f"step {step} (role worker) waits for a slot of infer.worker: all are busy, 2 calls wait"
        for step in ("S2", "S3")
    ]
    world.finish(task_id)
    assert waiting(world, task_id) == []


def test_a_plan_and_the_gates_of_a_step_wait_by_name() -> None:
    world = World()
    task_id = world.submit(task_of([{"id": "S1", "gates": ["lint"]}]))
    (reason,) = waiting(world, task_id)
    assert reason.startswith("planning waits for planner: 0 workers alive since ")
    world.add("planner", ("planner",), plan_as_given)
    world.add("inference-worker", ("infer.worker",), say("fine"))
    world.add("memory", ("memory",), tiers.memory_takes)
    world.run_for(2_000)
    (reason,) = waiting(world, task_id)
    assert reason.startswith("the gate run of step S1 waits for gate: 0 workers alive since ")
