"""Nothing in the hub grows with what it has done: only with what it is doing."""

from __future__ import annotations

import pytest

from services.scheduler import broker as b
from services.scheduler import calls as c
from services.scheduler import ended
from services.scheduler.occupancy import STEP_BYTES
from services.scheduler.resources import Tokens
from tests.unit.simulation import say, stack, task_of

ONE_STEP: list[dict[str, object]] = [{"id": "S1"}]


def test_deadlines_of_ended_calls_do_not_pile_up() -> None:
    broker = b.Broker(Tokens(cores=4))
    for index in range(20_000):
        broker.ask(c.Call(f"k{index}", "infer.request", "infer.worker", queued_ms=0, outer_ms=600_000 + index))
        if index >= 10:
            broker.cancel(f"k{index - 10}")
    assert len(broker.calls) == 10
    assert len(broker._deadlines) < 2_000
    ended_keys = {command.call.key for command in broker.on_tick(700_000) if isinstance(command, c.Ended)}
    assert len(ended_keys) == 10, "no deadline that still matters is lost"


TEXT = "x" * 10 * STEP_BYTES


@pytest.mark.parametrize(
    ("steps", "fields", "answer"),
    [
        (10, {}, "fine"),
        (1, {"inputs": [{"name": "long", "value": TEXT[::2]}]}, "fine"),
        (1, {}, TEXT),
    ],
    ids=["steps", "inputs", "answers"],
)
def test_ended_tasks_in_memory_are_bounded_by_their_weight(
    monkeypatch: pytest.MonkeyPatch, steps: int, fields: dict[str, object], answer: str
) -> None:
    monkeypatch.setattr(ended, "_KEPT_BYTES", 25 * STEP_BYTES)
    world = stack(say(answer, took_ms=1), slots=64)
    assert world.hub is not None
    tasks = [world.submit(task_of([{"id": f"S{index}"} for index in range(steps)], **fields)) for _ in range(5)]
    for task in tasks:
        world.finish(task)
    world.run_for(200)
    kept = world.hub.engine.ended
    assert len(kept) == 2
    assert [task for task in tasks if kept.get(task) is not None] == tasks[-2:]


def test_watchers_hear_the_end_of_every_task_even_when_many_end_at_once() -> None:
    world = stack(say("too late", took_ms=60_000))
    tasks = [world.submit(task_of(ONE_STEP, deadline_s=2, objective=f"task {index}")) for index in range(300)]
    for task in tasks:
        world.watch(task)
    world.run_for(4_000)
    told = {getattr(body, "task_id", "") for header, body in world.client_inbox if header.kind == "task.result"}
    assert told == set(tasks)


def test_a_watcher_that_leaves_while_it_is_told_the_past_is_forgotten() -> None:
    world = stack(say("fine", took_ms=5_000))
    task = world.submit(task_of(ONE_STEP))
    world.run_for(500)
    world.page = 2
    world.watch(task)
    assert world.hub is not None
    assert world.hub.watchers.late == set()
    events = [body for header, body in world.client_inbox if header.kind == "task.event"]
    assert [getattr(event, "seq", 0) for event in events] == list(range(1, len(events) + 1))
    world.run_for(6_000)
    after = [getattr(body, "seq", 0) for header, body in world.client_inbox if header.kind == "task.event"]
    assert after == list(range(1, len(after) + 1))
    assert world.client_inbox[-1][0].kind == "task.result"
