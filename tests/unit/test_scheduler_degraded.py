"""A model whose service cannot serve it, in virtual time: work waits for a bounded time, then ends with the reason."""

from __future__ import annotations

from protocol.messages.failure import Category
from protocol.messages.result import TaskState
from protocol.messages.session import PeerState
from services.kit import session as s
from services.scheduler import facts as f
from services.scheduler.simulation.world import World
from tests.unit.simulation import say, task_of
from tests.unit.test_scheduler_recovery import ONE, REGISTRY, lateral_registry, world_with
from tests.unit.test_scheduler_waiting import waiting

WAIT_MS = REGISTRY.failures.caps.degraded_wait_ms
PAUSES_MS = 1_000 + 2_000 + 4_000
WHY = "worker.gguf is damaged: no GGUF file"


def degrade(world: World, service: str = "inference-worker") -> None:
    world.peers[service].reason = WHY
    world.peers[service].feed(s.StateChanged(PeerState.DEGRADED))
    world.run_for(1_500)


def recover(world: World, state: PeerState = PeerState.READY) -> None:
    world.peers["inference-worker"].reason = None
    world.peers["inference-worker"].feed(s.StateChanged(state))


def test_a_step_of_a_degraded_model_says_why_it_waits_and_fails_with_that_reason_long_before_its_deadline() -> None:
    world = world_with()
    degrade(world)
    began = world.now
    task_id = world.submit(task_of([{"id": "S1", "timeout_s": 5}], deadline_s=3_600))
    world.run_for(WAIT_MS // 2)
    assert waiting(world, task_id) == [
        f"step S1 (role worker) waits for infer.worker: 0 of 1 workers ready (inference-worker degraded {WHY})"
    ]
    view = world.finish(task_id, 3_600_000)
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert (view.failure.code, view.failure.category) == ("model.degraded", Category.RESOURCE)
    assert WHY in view.failure.message
    assert 4 * WAIT_MS + PAUSES_MS <= world.now - began < 4 * WAIT_MS + PAUSES_MS + 10_000
    (attempt,) = view.steps[0].attempts
    assert [one.action for one in attempt.setbacks or []] == ["backoff"] * 3
    assert WHY in (attempt.setbacks or [])[0].message
    assert world.peers["inference-worker"].started == []


def test_a_model_that_is_repaired_while_its_step_waits_answers_it_in_the_same_attempt() -> None:
    world = world_with()
    degrade(world)
    task_id = world.submit(task_of(ONE, deadline_s=3_600))
    world.run_for(WAIT_MS + 20_000)
    recover(world)
    view = world.finish(task_id, 3_600_000)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert len(view.steps[0].attempts) == 1


def test_what_comes_later_waits_as_long_as_what_came_first() -> None:
    world = world_with()
    degrade(world)
    first = world.submit(task_of(ONE, deadline_s=3_600))
    world.run_for(WAIT_MS - 10_000)
    second = world.submit(task_of(ONE, deadline_s=3_600))
    world.run_for(20_000)
    lost = [[one for one in world.facts(task) if isinstance(one, f.AttemptLost)] for task in (first, second)]
    assert [len(one) for one in lost] == [1, 0]


def test_loading_and_a_service_that_is_gone_are_waited_for_whatever_was_before() -> None:
    for state in (PeerState.LOADING, None):
        world = world_with()
        degrade(world)
        task_id = world.submit(task_of(ONE, deadline_s=3_600))
        world.run_for(WAIT_MS // 2)
        if state is None:
            world.peers["inference-worker"].kill()
        else:
            recover(world, state)
        world.run_for(5 * WAIT_MS)
        assert not [one for one in world.facts(task_id) if isinstance(one, f.AttemptLost)]
        if state is None:
            world.peers["inference-worker"].start()
        else:
            recover(world)
        assert world.finish(task_id, 3_600_000).state is TaskState.SUCCEEDED


def test_one_of_two_services_that_is_well_is_enough() -> None:
    world = world_with(infer=say("fine", took_ms=3 * WAIT_MS))
    world.add("inference-worker-2", ("infer.worker",), say("fine", took_ms=3 * WAIT_MS), 1)
    degrade(world)
    ids = [world.submit(task_of([{"id": "S1", "timeout_s": 1_000}], deadline_s=3_600)) for _ in range(2)]
    assert [world.finish(task_id, 3_600_000).state for task_id in ids] == [TaskState.SUCCEEDED] * 2


def test_a_lateral_model_that_is_degraded_too_ends_the_wait_as_well() -> None:
    world = world_with(registry=lateral_registry())
    degrade(world)
    degrade(world, "inference-spare")
    view = world.finish(world.submit(task_of(ONE, deadline_s=3_600)), 3_600_000)
    assert view.failure is not None
    assert view.failure.code == "model.degraded"
    recovered = world_with(registry=lateral_registry())
    degrade(recovered)
    view = recovered.finish(recovered.submit(task_of(ONE, deadline_s=3_600)), 3_600_000)
    assert view.steps[0].attempts[0].model == "spare"
