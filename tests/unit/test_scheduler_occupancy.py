"""What tasks occupy of the hub's memory: bounded by number and by weight, and given back whatever becomes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.reply import Refused
from protocol.messages.result import TaskState
from protocol.messages.task import Extend, Submit, TaskIR
from services.scheduler import occupancy as o
from services.scheduler.facts import OutcomesSettled
from tests.unit.simulation import World, say, stack, task_of

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["took", "grew", "over", "gone"]),
        st.sampled_from("abcd"),
        st.integers(0, 9),
        st.integers(0, 50),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_comes_is_given_back(events: list[tuple[str, str, int, int]]) -> None:
    held = o.Occupancy()
    for what, task, size, steps in events:
        match what:
            case "took":
                held.took(task, f"client-{task in 'ab'}", size, steps)
            case "grew":
                held.grew(task, steps)
            case "over":
                held.over(task)
            case _:
                held.gone(task)
    for task in "abcd":
        held.gone(task)
    assert held == o.Occupancy()


def test_one_client_may_weigh_half_and_a_newcomer_finds_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(o, "MAX_ACTIVE_BYTES", 10 * o.STEP_BYTES)
    held = o.Occupancy()
    assert held.objection("greedy", 0, 6) is None, "5 is half, but nobody else has any"
    held.took("t1", "greedy", 0, 3)
    assert held.objection("greedy", 0, 4) is None
    assert "yours 0" in (held.objection("greedy", 0, 5) or "")
    assert held.objection("modest", 0, 7) is None
    held.grew("t1", 9)
    assert held.objection("modest", 0, 2) is not None
    held.over("t1")
    assert held.objection("modest", 0, 10) is None, "what waits for memory is bounded by itself"


def submitted(world: World, task: TaskIR) -> Refused | None:
    header, body = world.client("task.submit", Submit(task=task.model_dump(mode="json")))
    assert header.kind in ("task.accepted", "refused")
    return body if isinstance(body, Refused) else None


def test_a_long_text_weighs_as_much_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(o, "MAX_ACTIVE_BYTES", 1_000_000)
    world = stack(say("fine", took_ms=60_000))
    long = task_of([{"id": "S1"}], inputs=[{"name": "long", "value": "x" * 200_000}])
    assert submitted(world, long) is None
    refused = submitted(world, long)
    assert refused is not None
    assert "of the hub's memory" in refused.reason
    assert submitted(world, task_of([{"id": "S1"}])) is None


def test_steps_that_came_later_count(monkeypatch: pytest.MonkeyPatch) -> None:
    world = stack(say("fine", took_ms=60_000))
    task = world.submit(task_of([{"id": "S1"}]))
    monkeypatch.setattr(o, "MAX_ACTIVE_BYTES", 40 * o.STEP_BYTES)
    assert submitted(world, task_of([{"id": "S1"}])) is None
    step = {"actor": "worker", "action": "more", "gates": []}
    added = [step | {"id": f"N{i}", "outputs": [{"name": f"n{i}"}]} for i in range(20)]
    world.run_for(50)
    assert world.client("task.extend", Extend(task_id=task, steps=added))[0].kind == "task.extended"
    assert submitted(world, task_of([{"id": "S1"}])) is not None


def test_while_memory_is_away_ended_tasks_wait_in_the_journal_and_are_told_of_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(o, "MAX_UNSETTLED_BYTES", 25 * o.STEP_BYTES)
    world = stack()
    world.peers["memory"].kill()
    tasks = [world.submit(task_of([{"id": f"S{i}"} for i in range(10)])) for _ in range(9)]
    for task in tasks:
        assert world.finish(task).state is TaskState.SUCCEEDED
    assert world.hub is not None
    assert len(world.hub.engine.live) == 3, "the third begins to wait when two weigh less than the bound"
    assert not any(isinstance(world.facts(task)[-1], OutcomesSettled) for task in tasks)
    world.peers["memory"].start()
    world.run(lambda: all(isinstance(world.facts(task)[-1], OutcomesSettled) for task in tasks), 600_000)
    assert world.hub.engine.live == {}
