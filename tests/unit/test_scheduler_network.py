"""Whatever network and processes do, within what a bus can do: every task ends once, in order, and no slot leaks.

Messages may be lost, one by one or with all that was under way on their connection, be repeated, and overtake each
other, at any time in both directions. Real connections that live lose nothing; a peer that drops a request or an answer
looks the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codec import pack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import ChatMessage, InferRequest
from protocol.messages.result import CancelQuery, StepState, TaskState
from protocol.messages.session import Hello, PeerState, Pong
from services.scheduler import facts as f
from services.scheduler.simulation.tiers import memory_takes
from services.scheduler.tasks import TaskRecord
from tests.unit.simulation import Answer, World, final_of, gates_pass, plan_as_given, say, stack, task_of

LIMIT_MS = 300_000


@dataclass(frozen=True)
class Weather:
    """How bad it is: chances per message, or per second and process."""

    lose: float
    repeat: float
    overtake: float
    cut: float
    kill: float
    freeze: float
    fail: float
    hub: float
    until_ms: int = 20_000
    """After that the weather is fine, so that the end must come."""


class Storm(World):
    """A world with weather. All chances are drawn from `draw`, so that a run can be repeated."""

    def __init__(self, weather: Weather, draw: random.Random) -> None:
        self.weather = weather
        self.draw = draw
        super().__init__()
        self.calm_from_ms = self.now + weather.until_ms
        self.later(1_000, self.blow)

    def chance(self, share: float) -> bool:
        return self.now < self.calm_from_ms and self.draw.random() < share

    def carry_to_hub(self, identity: bytes, frames: list[bytes]) -> None:
        for delay_ms in self.copies():
            self.later(delay_ms, lambda: self.arrives_at_hub(identity, frames))

    def arrives_at_hub(self, identity: bytes, frames: list[bytes]) -> None:
        # What was under way on a connection that is gone is gone with it.
        if identity in self.identities:
            self.to_hub(identity, frames)

    def carry_to_peer(self, identity: bytes, header: bytes, body: bytes) -> None:
        for delay_ms in self.copies():
            self.later(delay_ms, lambda: self.to_peer(identity, header, body))

    def copies(self) -> list[int]:
        """Delays of the copies of one message: none of one that is lost."""
        if self.chance(self.weather.lose):
            return []
        count = 2 if self.chance(self.weather.repeat) else 1
        return [self.draw.randint(1, 400) if self.chance(self.weather.overtake) else 1 for _ in range(count)]

    def blow(self) -> None:
        for peer in self.peers.values():
            if not peer.alive:
                continue
            if peer.frozen:
                if self.chance(0.2) or self.now >= self.calm_from_ms:
                    peer.thaw()
            elif self.chance(self.weather.cut):
                peer.disconnect()
            elif self.chance(self.weather.kill):
                peer.kill()
                self.later(self.draw.randint(100, 3_000), peer.start)
            elif self.chance(self.weather.freeze):
                peer.frozen = True
        if self.hub is not None and self.chance(self.weather.hub):
            self.kill_hub()
            self.later(self.draw.randint(100, 2_000), self.boot_hub)
        self.later(1_000, self.blow)


def storm(weather: Weather, seed: int) -> Storm:
    draw = random.Random(seed)
    world = Storm(weather, draw)

    def answer(header: Header, body: bytes) -> Answer:
        took = draw.randint(0, 3_000)
        if world.chance(weather.fail):
            category = draw.choice([one for one in Category if one is not Category.PEER])
            return took, Failure(code="made.up", category=category, origin="test", message="made up")
        return took, final_of("fine")

    world.add("planner", ("planner",), plan_as_given)
    world.add("gates", ("gate",), gates_pass)
    world.add("memory", ("memory",), memory_takes)
    for model in world.registry.models:
        for number in range(2):
            world.add(f"inference-{model}-{number}", (f"infer.{model}",), answer, 2)
    world.run_for(50)
    return world


chances = st.sampled_from([0.0, 0.05, 0.3])
weathers = st.builds(
    Weather,
    lose=chances,
    repeat=chances,
    overtake=chances,
    cut=chances,
    kill=st.sampled_from([0.0, 0.05]),
    freeze=st.sampled_from([0.0, 0.05]),
    fail=st.sampled_from([0.0, 0.1]),
    hub=st.sampled_from([0.0, 0.1]),
)


@st.composite
def plans(draw: st.DrawFn) -> list[dict[str, object]]:
    steps: list[dict[str, object]] = []
    for index in range(draw(st.integers(1, 9))):
        needs = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        actor = draw(st.sampled_from(["worker", "writer", "coder"]))
        gates = draw(st.sampled_from([[], ["format"], ["unit"]]))
        steps.append(
            {"id": f"S{index}", "inputs": [f"S{one}.out" for one in sorted(needs)], "actor": actor, "gates": gates}
        )
    return steps


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(weather=weathers, jobs=st.lists(plans(), min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_every_task_ends_once_in_order_and_all_slots_come_back(
    weather: Weather, jobs: list[list[dict[str, object]]], seed: int
) -> None:
    world = storm(weather, seed)
    ids = [world.submit(task_of(steps)) for steps in jobs]
    world.run(lambda: world.hub is not None and all(one in world.ended for one in ids), LIMIT_MS)
    world.run_for(60_000)
    tasks = world.recorded_tasks()
    for task_id, steps in zip(ids, jobs, strict=True):
        check_facts(world, task_id)
        check_order(tasks[task_id])
        assert len(tasks[task_id].steps) in (0, len(steps))
        if weather.lose == weather.fail == weather.kill == weather.freeze == weather.cut == 0:
            assert tasks[task_id].state is TaskState.SUCCEEDED, tasks[task_id].failure
    check_credit(world)


def test_a_final_that_a_pong_has_overtaken_still_ends_its_call() -> None:
    world = stack(say("fine", took_ms=500))
    held: list[tuple[bytes, list[bytes]]] = []
    carry = world.carry_to_hub

    def carry_finals_late(identity: bytes, frames: list[bytes]) -> None:
        if unpack_header(frames[0]).kind == "infer.final" and not held:
            held.append((identity, frames))
            world.later(1_500, lambda: world.to_hub(identity, frames))
        else:
            carry(identity, frames)

    world.carry_to_hub = carry_finals_late  # type: ignore[method-assign]
    result = world.finish(world.submit(task_of([{"id": "S1"}])), limit_ms=5_000)
    assert held
    assert result.state is TaskState.SUCCEEDED


@pytest.mark.parametrize("kind", ["infer.request", "infer.final"])
def test_a_single_lost_message_costs_seconds_and_neither_an_attempt_nor_a_slot(kind: str) -> None:
    world = stack(say("fine", took_ms=500))
    worker = world.peers["inference-worker"]
    lost: list[str] = []

    def is_lost(header: Header) -> bool:
        if header.kind == kind and not lost:
            lost.append(header.kind)
            return True
        return False

    to_hub, to_peer = world.carry_to_hub, world.carry_to_peer
    world.carry_to_hub = (  # type: ignore[method-assign]
        lambda identity, frames: None if is_lost(unpack_header(frames[0])) else to_hub(identity, frames)
    )
    world.carry_to_peer = (  # type: ignore[method-assign]
        lambda identity, header, body: None if is_lost(unpack_header(header)) else to_peer(identity, header, body)
    )
    view = world.finish(world.submit(task_of([{"id": "S1"}])), limit_ms=5_000)
    assert lost == [kind]
    assert view.state is TaskState.SUCCEEDED
    assert len(worker.started) == len(view.steps[0].attempts) == 1
    assert view.steps[0].losses == 0
    world.run_for(1_000)  # memory is told
    check_credit(world)


def test_an_answer_that_never_gets_through_ends_with_the_time_of_its_work() -> None:
    world = stack(say("fine", took_ms=500))
    world.add("inference-worker-2", ("infer.worker",), say("fine", took_ms=500), 4)
    carry = world.carry_to_hub

    def without_finals(identity: bytes, frames: list[bytes]) -> None:
        if unpack_header(frames[0]).kind != "infer.final":
            carry(identity, frames)

    world.carry_to_hub = without_finals  # type: ignore[method-assign]
    task = world.submit(task_of([{"id": "S1", "timeout_s": 20}]))
    world.run_for(30_000)
    failure = world.view(task).steps[0].attempts[0].failure
    assert failure is not None
    assert failure.category is Category.TIMEOUT


def test_a_request_that_was_lost_and_then_cancelled_keeps_no_slot() -> None:
    world = stack(say("fine", took_ms=500))
    carry = world.carry_to_peer
    world.carry_to_peer = (  # type: ignore[method-assign]
        lambda identity, header, body: (
            None if unpack_header(header).kind == "infer.request" else carry(identity, header, body)
        )
    )
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(100)
    world.client("task.cancel", CancelQuery(task_id=task))
    world.run_for(5_000)
    check_credit(world)


def test_a_worker_that_works_loses_no_session_however_short_its_calls_are() -> None:
    world = stack(say("fine", took_ms=7))
    before = {name: peer.identity for name, peer in world.peers.items()}
    for _ in range(3):
        world.finish(world.submit(task_of([{"id": f"S{number}"} for number in range(400)])))
    assert world.now > 1_002_000, "some pings were answered meanwhile"
    assert {name: peer.identity for name, peer in world.peers.items()} == before


def test_a_repeated_hello_does_not_take_the_running_work_of_its_session() -> None:
    world = stack(say("fine", took_ms=500))
    hellos: list[tuple[bytes, list[bytes]]] = []
    carry = world.carry_to_hub

    def keep_hellos(identity: bytes, frames: list[bytes]) -> None:
        if unpack_header(frames[0]).kind == "session.hello":
            hellos.append((identity, frames))
        carry(identity, frames)

    world.carry_to_hub = keep_hellos  # type: ignore[method-assign]
    worker = world.peers["inference-worker"]
    worker.kill()
    worker.start()
    world.run_for(2_000)  # the hub finds out at its next ping that the old session is over
    task_id = world.submit(task_of([{"id": "S1"}]))
    world.run_for(100)
    for identity, frames in hellos:
        world.to_hub(identity, frames)
    view = world.finish(task_id)
    assert len(worker.started) == 1
    assert view.steps[0].losses == 0


def check_facts(world: Storm, task_id: str) -> None:
    """One terminal result, no answer twice, and nothing after the end but what memory and duplicates leave."""
    facts = [f.unpack_fact(kind, data) for task, _, kind, data in world.journal if task == task_id]
    assert [seq for task, seq, _, _ in world.journal if task == task_id] == list(range(1, len(facts) + 1))
    ends = [index for index, fact in enumerate(facts) if isinstance(fact, f.TaskEnded)]
    assert len(ends) == 1
    assert all(isinstance(fact, f.OutcomesSettled | f.DuplicateSeen | f.TaskSetback) for fact in facts[ends[0] + 1 :])
    answered = [(fact.step, fact.number) for fact in facts if isinstance(fact, f.AttemptAnswered)]
    assert len(answered) == len(set(answered))


def check_order(task: TaskRecord) -> None:
    """No step became ready before everything it needs was done."""
    for step in task.steps.values():
        if step.ready_ms is None:
            continue
        for other in step.needs:
            before = task.steps[other]
            assert before.state is StepState.DONE
            assert before.ended_ms is not None
            assert before.ended_ms <= step.ready_ms


def check_credit(world: World) -> None:
    """The system is idle: every slot of every process and every core is free, and nobody has more than there are."""
    assert world.hub is not None
    broker = world.hub.broker
    assert not broker.calls
    for peer in world.peers.values():
        known = broker.peers[peer.identity]
        assert known.state is PeerState.READY
        assert known.granted - known.used == peer.slots, peer.service
        assert not peer.session.in_flight
    assert broker.tokens.free_cores == broker.tokens.cores
    assert not broker.tokens.blocked()


def test_a_client_with_fewer_requests_than_before_has_lost_nothing() -> None:
    world = stack(say("fine", took_ms=60_000))
    deliver = world._deliver
    pongs: list[str] = []

    def answer(identity: bytes, header: bytes, body: bytes) -> None:
        read = unpack_header(header)
        if identity != b"asker":
            deliver(identity, header, body)
        elif read.kind == "session.ping":
            pongs.append(read.id)
            open_ones = 5 if len(pongs) == 1 else 1
            send("session.pong", Pong(state=PeerState.READY, in_flight=open_ones, loop_lag_ms=0, rss_bytes=0), read.id)

    def send(kind: str, body: Message, corr: str | None = None) -> None:
        header = Header(
            kind=kind, id=f"a{world.now}-{kind}", corr=corr, key="a-call" if corr is None else None, dst="infer.worker"
        )
        world.carry_to_hub(b"asker", [pack_header(header), pack_body(body)])

    world._deliver = answer  # type: ignore[method-assign]
    send("session.hello", Hello(service="asker-1", protocol_min=1, protocol_max=1, pid=1))
    messages = [ChatMessage(role="user", content="go on")]
    send("infer.request", InferRequest(role="worker", messages=messages, max_tokens=9))
    world.run_for(6_000)
    assert len(pongs) >= 4
    assert world.hub is not None
    assert b"asker" in world.hub.broker.peers
    assert "a-call" in world.hub.broker.calls
