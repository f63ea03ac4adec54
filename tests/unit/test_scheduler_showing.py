"""Views of large tasks: made in parts, once for all that wait, whole and of one moment; unchanged steps not again."""

from __future__ import annotations

import random
from collections.abc import Generator

import pytest

from protocol.codec import pack_body, pack_map, unpack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.result import CancelQuery, StepState, TaskQuery, TaskView, Watch
from protocol.messages.session import Goodbye, Hello
from protocol.messages.task import Extend
from services.scheduler import events as ev
from services.scheduler import rendered as r
from services.scheduler.effects import Record
from services.scheduler.showing import MOST_AWAITED
from services.scheduler.tasks import TaskRecord
from services.scheduler.views import view
from tests.unit.simulation import Answer, World, final_of, say, stack, task_of

STEPS = 1_000
PARTS = -(-STEPS // r.ATTEMPTS_AT_ONCE)


class Asking:
    """Clients of the hub machine of a world; others are served, or the next part is made, when a test says so."""

    def __init__(self, world: World, names: tuple[str, ...] = ("ann",)) -> None:
        assert world.hub is not None
        self.world = world
        self.hub = world.hub
        self.told: list[tuple[str, str, bytes]] = []
        """Client, kind and body, in order."""
        self.put_off = False
        self.number = 0
        for name in names:
            self.ask("session.hello", Hello(service=name, protocol_min=1, protocol_max=1, pid=1), name)
        self.told.clear()

    def ask(self, kind: str, body: Message, client: str = "ann") -> None:
        self.number += 1
        frames = [pack_header(Header(kind=kind, id=f"r{self.number}")), pack_body(body)]
        self._handle(ev.FrameIn(client.encode(), frames, self.world.now))

    def parts(self) -> int:
        """Have everything made that waits; returns in how many parts."""
        made = 0
        while self.put_off:
            self.put_off = False
            made += 1
            self._handle(ev.OthersServed(self.world.now))
        return made

    def kinds(self) -> list[str]:
        return [kind for _, kind, _ in self.told]

    def _handle(self, event: ev.Event) -> None:
        for command in self.hub.handle(event):
            if isinstance(command, ev.ServeOthers):
                assert not self.put_off, "once is enough"
                self.put_off = True
            elif isinstance(command, Record):
                self.world._carry_out(command)
            elif isinstance(command, ev.LookUp):
                found = self.world.find(command.task_id)
                self._handle(ev.LookedUp(command.identity, command.header, command.body, found, self.world.now))
            elif isinstance(command, ev.Send):
                header = unpack_header(command.header)
                if header.kind != "session.ping" and command.identity.isalpha():
                    self.told.append((command.identity.decode(), header.kind, command.body))


def large_task(world: World, steps: int = STEPS) -> str:
    specs: list[dict[str, object]] = [{"id": f"S{i}"} for i in range(steps)]
    return world.submit(task_of(specs, budget={"max_steps": steps}))


def running(done: int, steps: int = STEPS) -> tuple[World, str, TaskRecord]:
    """A large task of which so many steps are done."""
    world = stack(say("fine"), slots=8)
    task_id = large_task(world, steps)
    assert world.hub is not None
    task = world.hub.engine.live[task_id]
    world.run(lambda: bool(task.steps) and sum(one.state is StepState.DONE for one in task.steps.values()) >= done)
    return world, task_id, task


def test_a_view_of_a_thousand_steps_is_made_in_parts_and_an_unchanged_step_is_not_encoded_again() -> None:
    world, task_id, task = running(0)
    asking = Asking(world)
    asking.ask("task.show", TaskQuery(task_id=task_id))
    assert asking.told == [], "not in the turn in which it was asked for"
    assert asking.parts() == PARTS
    assert asking.kinds() == ["task.detail"]
    asking.ask("task.show", TaskQuery(task_id=task_id))
    assert asking.parts() == 1, "nothing has changed: nothing is encoded"
    for number in range(r.ATTEMPTS_AT_ONCE + 1):
        asking.ask("task.cancel", CancelQuery(task_id=task_id, step=f"S{STEPS - 1 - number}"))
    asking.ask("task.show", TaskQuery(task_id=task_id))
    assert asking.parts() == 2, "no more than what has changed"
    shown = unpack_body(TaskView, asking.told[-1][2])
    assert shown.model_copy(update={"waiting": []}) == view(task)
    assert [step.id for step in shown.steps] == list(task.steps)
    assert shown.waiting, "why the others wait is said too"


def test_between_the_parts_others_are_served_and_the_view_is_of_one_moment() -> None:
    world, task_id, task = running(10)
    asking = Asking(world, ("ann", "ben"))
    asking.ask("task.show", TaskQuery(task_id=task_id))
    asking.ask("persona.list", Message(), "ben")
    assert asking.kinds() == ["persona.listing"]
    for number in (0, 5, STEPS - 1):  # of the first part and of the last one
        asking.put_off = False
        asking._handle(ev.OthersServed(world.now))
        asking.ask("task.cancel", CancelQuery(task_id=task_id, step=f"S{number}"), "ben")
    asking.parts()
    shown = unpack_body(TaskView, asking.told[-1][2])
    assert shown.model_copy(update={"waiting": []}) == view(task)
    assert shown.last_seq == task.seq


def test_all_that_wait_for_a_task_get_one_view_which_is_made_once() -> None:
    world, task_id, _ = running(20)
    asking = Asking(world, ("ann", "ben", "cid"))
    for name in ("ann", "ben", "cid"):
        asking.ask("task.watch", Watch(task_id=task_id, quiet=True), name)
        asking.ask("task.show", TaskQuery(task_id=task_id), name)
    assert asking.parts() == PARTS
    asking.told.clear()
    asking.ask("task.cancel", CancelQuery(task_id=task_id))
    made = asking.parts()
    assert PARTS <= made < 2 * PARTS, "all of its steps have changed, and its report is made, once for three"
    results = [body for _, kind, body in asking.told if kind == "task.result"]
    assert len(results) == 3
    assert all(body is results[0] for body in results)
    result = unpack_body(TaskView, results[0])
    assert result.critical_path is not None
    asking.told.clear()
    asking.ask("task.watch", Watch(task_id=task_id, quiet=True))
    assert asking.parts() == 1, "read from the journal again it is the same task, and its report is made already"
    again = unpack_body(TaskView, asking.told[0][2])
    assert again.model_copy(update={"last_seq": result.last_seq}) == result


def test_a_small_task_is_answered_at_once() -> None:
    world, task_id, task = running(2, steps=r.ATTEMPTS_AT_ONCE)
    asking = Asking(world)
    asking.ask("task.show", TaskQuery(task_id=task_id))
    assert not asking.put_off
    assert unpack_body(TaskView, asking.told[0][2]).model_copy(update={"waiting": []}) == view(task)


def test_one_client_may_wait_for_so_many_views_and_one_that_leaves_waits_for_none() -> None:
    world, task_id, _ = running(0)
    asking = Asking(world, ("ann", "ben"))
    for _ in range(MOST_AWAITED + 2):
        asking.ask("task.show", TaskQuery(task_id=task_id))
    assert asking.kinds() == ["refused", "refused"]
    asking.ask("task.show", TaskQuery(task_id=task_id), "ben")
    asking.ask("session.goodbye", Goodbye(reason="test"))
    asking.told.clear()
    assert asking.parts() == PARTS
    assert [name for name, _, _ in asking.told] == ["ben"]
    asking.ask("task.show", TaskQuery(task_id=task_id), "ben")
    asking.ask("session.goodbye", Goodbye(reason="test"), "ben")
    assert asking.parts() == 1
    assert len(asking.told) == 1, "nobody is left to tell"


def test_who_waits_for_more_than_it_reads_is_refused_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.scheduler.unread.MAX_UNREAD_PER_PEER", 1_000_000)
    monkeypatch.setattr("services.scheduler.unread.MAX_UNREAD", 1_000_000)
    monkeypatch.setattr("services.scheduler.unread.MARK_BYTES", 500_000)
    world, task_id, _ = running(0)
    asking = Asking(world)
    for _ in range(MOST_AWAITED):
        asking.ask("task.show", TaskQuery(task_id=task_id))
    asking.parts()
    assert len(asking.told) == MOST_AWAITED
    shown = asking.kinds().count("task.detail")
    size = len(asking.told[0][2])
    assert (shown - 1) * size < 1_000_000 < (shown + 1) * size
    assert asking.kinds()[shown:] == ["refused"] * (MOST_AWAITED - shown)


def made(parts: Generator[None, None, dict[str, object]]) -> bytes:
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return pack_map(end.value)


@pytest.mark.parametrize("seed", range(6))
def test_what_was_encoded_earlier_never_differs_from_the_task_as_it_stands(seed: int) -> None:
    """Retries, gates, lists, sub-steps, extensions, cancellations, dead workers and a killed hub; after every event."""
    chance = random.Random(seed)

    def infer(header: Header, body: bytes) -> Answer:
        took_ms = chance.randint(5, 300)
        if header.step == "L":
            return took_ms, final_of('["a", "b", "c"]')
        if chance.random() < 0.2:
            category = chance.choice([Category.CODE, Category.RESOURCE, Category.PEER, Category.FORMAT])
            return took_ms, Failure(code="x", category=category, origin="test", message="no")
        return took_ms, final_of("fine")

    def gates(header: Header, body: bytes) -> Answer:
        asked = unpack_body(GateRequest, body).gates
        verdict = Verdict.FAIL if chance.random() < 0.3 else Verdict.PASS
        results = [
            GateResult(gate=name, verdict=verdict, category=Category.CODE, started_ms=1, ended_ms=2) for name in asked
        ]
        return 20, GateFinal(results=results)

    world = stack(infer, slots=2)
    world.peers["gates"].answer = gates
    steps: list[dict[str, object]] = [
        {"id": "L", "outputs": [{"name": "items", "kind": "json"}]},
        {"id": "M", "map_over": "items", "outputs": [{"name": "parts"}]},
        {"id": "J", "inputs": ["parts", "S0.out"]},
        *({"id": f"S{i}", "inputs": [f"S{i - 1}.out"] if i % 3 else [], "gates": ["lint"]} for i in range(8)),
    ]
    task_id = world.submit(task_of(steps))
    rendered = r.Rendered()

    def same() -> bool:
        task = None if world.hub is None else world.hub.engine.find(task_id)
        if task is not None:
            assert made(rendered.body_in_parts(task)) == pack_body(view(task))
        return task_id in world.ended

    def disturb() -> None:
        what = chance.choice(["kill", "hub", "cancel", "extend"])
        if task_id in world.ended:
            return
        if what == "kill":
            world.peers["inference-worker"].kill()
            world.peers["inference-worker"].start()
        elif what == "hub":
            world.kill_hub()
            world.boot_hub()
        elif what == "cancel":
            world.client("task.cancel", CancelQuery(task_id=task_id, step=f"S{chance.randrange(8)}"))
        else:
            name = f"X{world.now}"
            more = {"id": name, "actor": "worker", "action": "more", "outputs": [{"name": f"{name}.out"}]}
            world.client("task.extend", Extend(task_id=task_id, steps=[more]))

    for number in range(4):
        world.later(chance.randint(1, 400) + 300 * number, disturb)
    world.run(same, 900_000)
    same()


def test_what_is_kept_is_bounded_and_the_task_asked_for_last_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    world = stack(say("fine"), slots=8)
    assert world.hub is not None
    tasks = [world.hub.engine.live[large_task(world, 100)] for _ in range(3)]
    world.run(lambda: all(task.steps for task in tasks))
    rendered = r.Rendered()
    size = len(made(rendered.body_in_parts(tasks[0])))
    monkeypatch.setattr(r, "_KEPT_BYTES", 2 * size)
    parts = {}
    for number in (0, 1, 2, 2, 1, 0):
        parts[number] = len(list(rendered.body_in_parts(tasks[number])))
    assert parts == {0: 3, 1: 0, 2: 0}
