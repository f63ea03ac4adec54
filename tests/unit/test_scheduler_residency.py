"""Models that come and go under one budget, with the real hub machine in virtual time."""

from __future__ import annotations

import random
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.result import TaskQuery, TaskState, TaskView
from protocol.messages.session import ModelQuery, ModelReport, PeerState
from services.kit.registry import Registry
from services.kit.registry.memory import expected_load_s
from services.scheduler import events as ev
from services.scheduler.durations import TokenSpeed
from services.scheduler.events import Event
from services.scheduler.place import MIN_RESIDENCE_MS, MIN_TURN_MS, RESIDENCE_LOADS, State
from services.scheduler.simulation.run import run_tasks, tiers_of
from services.scheduler.simulation.tiers import memory_takes
from tests.unit.simulation import (
    Answer,
    SimPeer,
    World,
    final_of,
    gates_pass,
    plan_as_given,
    say,
    shipped_registry,
    task_of,
)

GB = 1_000_000_000
LOAD_MS = 1_000


def registry_of(budget: int = 10 * GB, cores: int = 8, **models: dict[str, object]) -> Registry:
    """The shipped registry with other fields for some models; whatever is not named is hot and takes nothing."""
    shipped = shipped_registry()
    changed = {name: entry.model_copy(update=models.get(name, {})) for name, entry in shipped.models.items()}
    hardware = replace(shipped.hardware, cores=cores, memory_bytes=budget)
    return replace(shipped, models=MappingProxyType(changed), hardware=hardware)


def warm(size: int, **fields: object) -> dict[str, object]:
    return {"residency": "warm", "memory_bytes": size} | fields


class Stack(World):
    """A checked world: after every event the budget holds, and no model is unloaded under work."""

    def __init__(self, registry: Registry) -> None:
        self.most_held = self.most_in_memory = 0
        super().__init__(registry)

    def feed(self, event: Event) -> None:
        super().feed(event)
        if self.hub is not None:
            self.most_held = max(self.most_held, self.hub.broker.tokens.held_bytes)
            for peer in self.hub.broker.peers.values():
                place = self.hub.loading.residency.guests.get(peer.capabilities[0][6:] if peer.capabilities else "")
                unloads = place is not None and place.state is State.UNLOADING and peer.state is not PeerState.DRAINING
                assert not (peer.calls and unloads), "unloaded under work"
        self.most_in_memory = max(self.most_in_memory, self.in_memory())

    def in_memory(self) -> int:
        """What the processes really have in memory, whatever the hub believes."""
        total = 0
        for peer in self.peers.values():
            if peer.alive and peer.load_ms is not None and peer.session.state is not PeerState.PARKED:
                total += self.registry.models[peer.capabilities[0].removeprefix("infer.")].memory_bytes or 0
        return total

    def place(self, model: str) -> ModelReport:
        assert self.hub is not None
        return self.hub.loading.report(model, self.now)

    def ask(self, kind: str, model: str) -> ModelReport | Failure:
        _, body = self.client(kind, ModelQuery(model=model))
        if isinstance(body, ErrorReply):
            return body.failure
        assert isinstance(body, ModelReport)
        return body

    def show(self, task_id: str) -> TaskView:
        _, body = self.client("task.show", TaskQuery(task_id=task_id))
        assert isinstance(body, TaskView)
        return body


def stack(registry: Registry, answer: object = None) -> Stack:
    world = Stack(registry)
    world.add("planner", ("planner",), plan_as_given)
    world.add("gates", ("gate",), gates_pass)
    world.add("memory", ("memory",), memory_takes)
    for name, entry in registry.models.items():
        load_ms = None if entry.residency == "hot" else LOAD_MS
        world.add(f"inference-{name}", (f"infer.{name}",), answer or say("fine"), 2, load_ms)  # type: ignore[arg-type]
    world.run_for(50)
    return world


def segments(view: TaskView, step: int = 0) -> list[tuple[str, int]]:
    took = [(one.what, one.end_ms - one.start_ms) for one in view.steps[step].attempts[0].segments]
    return [(what, round(ms / 100) * 100) for what, ms in took if ms > 50]


def test_a_warm_model_is_parked_until_work_needs_it_and_its_loading_shows_on_the_critical_path() -> None:
    world = stack(registry_of(specialist=warm(4 * GB)))
    worker = world.peers["inference-specialist"]
    world.run_for(5_000)
    assert worker.session.state is PeerState.PARKED
    assert world.place("specialist").held_bytes == 0
    task = world.submit(task_of([{"id": "S1", "actor": "coder"}]))
    world.run_for(500)
    assert world.place("specialist").held_bytes == 4 * GB
    (why,) = world.show(task).waiting
    assert "waits for specialist: it loads since" in why
    result = world.finish(task)
    assert segments(result) == [("loading", 1_000), ("inference", 100)]
    assert result.critical_path is not None
    assert [one.what for one in result.critical_path.path if one.end_ms - one.start_ms > 500] == ["loading"]
    assert worker.loads == 1


def test_a_model_that_nobody_needs_is_unloaded_after_its_time_and_gives_its_memory_back() -> None:
    world = stack(registry_of(specialist=warm(4 * GB, idle_unload_s=20)))
    world.finish(world.submit(task_of([{"id": "S1", "actor": "coder"}])))
    world.run_for(19_000)
    assert world.place("specialist").state == "loaded"
    world.run_for(2_000)
    assert world.place("specialist").state == "parked"
    assert world.place("specialist").held_bytes == 0


def test_two_models_under_a_budget_for_one_take_turns_and_no_step_is_lost() -> None:
    world = stack(registry_of(specialist=warm(6 * GB), worker=warm(6 * GB)))
    steps: list[dict[str, object]] = [{"id": "A", "actor": "coder"}]
    steps.append({"id": "B", "actor": "worker", "inputs": ["A.out"]})
    steps.append({"id": "C", "actor": "coder", "inputs": ["B.out"]})
    result = world.finish(world.submit(task_of(steps)))
    assert result.state is TaskState.SUCCEEDED
    assert [world.peers[f"inference-{name}"].loads for name in ("specialist", "worker")] == [2, 1]
    assert world.most_held == 6 * GB
    (waited,) = [took for what, took in segments(result, 1) if what == "queueing"]
    assert MIN_RESIDENCE_MS - 300 <= waited <= MIN_RESIDENCE_MS + 300, "room comes after the minimum residence"
    assert ("loading", 1_000) in segments(result, 1)
    assert world.hub is not None
    assert world.hub.status({}, world.now).counters["loads"] == 3


def test_a_step_that_is_in_sight_finds_its_model_loaded() -> None:
    world = stack(registry_of(specialist=warm(4 * GB)), say("fine", 30_000))
    durations = world.hub.durations if world.hub is not None else None
    assert durations is not None
    steps: list[dict[str, object]] = [{"id": "A", "actor": "worker", "max_tokens": 900}]
    steps.append({"id": "B", "actor": "coder", "inputs": ["A.out"]})
    task = world.submit(task_of(steps))
    world.run_for(20_000)
    assert world.place("specialist").state == "parked", "not before it is needed"
    world.run_for(9_500)
    assert world.place("specialist").state == "loaded"
    result = world.finish(task)
    assert segments(result, 1) == [("inference", 30_000)]
    assert world.hub is not None
    assert world.hub.status({}, world.now).counters["loads_ahead"] == 1


def test_a_busy_model_makes_way_after_its_turn_and_comes_back() -> None:
    world = stack(registry_of(specialist=warm(6 * GB), worker=warm(6 * GB)), say("fine", 1_000))
    many = world.submit(task_of([{"id": f"W{i}"} for i in range(60)]))
    world.run_for(5_000)
    other = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    world.run_for(2_000)
    (why,) = world.show(other).waiting
    assert why.startswith("step S (role coder) waits for memory: specialist needs 5.6 GiB, 3.7 GiB of 9.3 GiB are free")
    assert "worker 5.6 GiB (2 calls run)" in why
    result = world.finish(other, limit_ms=20_000)
    assert result.ended_ms is not None
    assert result.ended_ms - result.created_ms <= MIN_TURN_MS + 3 * LOAD_MS
    assert world.finish(many, limit_ms=120_000).state is TaskState.SUCCEEDED
    assert world.peers["inference-worker"].loads == 2


def test_a_pinned_model_stays_until_somebody_asks_it_away() -> None:
    world = stack(
        registry_of(specialist=warm(2 * GB, pinned=True, idle_unload_s=1), worker=warm(8 * GB, idle_unload_s=1))
    )
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    world.finish(world.submit(task_of([{"id": "W"}])))
    world.run_for(30_000)
    assert (world.place("specialist").state, world.place("worker").state) == ("loaded", "parked")
    report = world.ask("model.unload", "specialist")
    assert isinstance(report, ModelReport)
    world.run_for(200)
    assert world.place("specialist").held_bytes == 0


def test_a_cold_model_refuses_work_until_it_is_asked_for() -> None:
    world = stack(registry_of(specialist={"residency": "cold", "memory_bytes": 4 * GB}))
    failed = world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    assert failed.state is TaskState.FAILED
    assert failed.failure is not None
    assert (failed.failure.code, failed.failure.category) == ("model.cold", Category.RESOURCE)
    assert "tierline models load specialist" in failed.failure.message
    report = world.ask("model.load", "specialist")
    assert isinstance(report, ModelReport)
    assert report.state == "loading"
    world.run_for(LOAD_MS + 200)
    assert world.place("specialist").state == "loaded"
    assert world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}]))).state is TaskState.SUCCEEDED


def test_work_that_comes_while_a_cold_model_loads_waits_for_it() -> None:
    world = stack(registry_of(specialist={"residency": "cold", "memory_bytes": 4 * GB}))
    world.ask("model.load", "specialist")
    result = world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    assert result.state is TaskState.SUCCEEDED
    assert len(result.steps[0].attempts) == 1


@pytest.mark.parametrize(("model", "code"), [("front", "model.hot"), ("nosuch", "model.unknown")])
def test_what_cannot_be_moved_is_refused_with_the_reason(model: str, code: str) -> None:
    world = stack(registry_of(specialist=warm(4 * GB), front={"memory_bytes": GB}))
    for kind in ("model.load", "model.unload"):
        refusal = world.ask(kind, model)
        assert isinstance(refusal, Failure)
        assert refusal.code == code


def test_a_model_is_not_asked_away_from_its_work() -> None:
    world = stack(registry_of(specialist=warm(4 * GB)), say("fine", 5_000))
    task = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    world.run_for(2_000)
    refusal = world.ask("model.unload", "specialist")
    assert isinstance(refusal, Failure)
    assert refusal.code == "model.busy"
    assert world.finish(task).state is TaskState.SUCCEEDED


def test_what_is_measured_replaces_the_estimate_and_overdraft_unloads_the_idle() -> None:
    world = stack(registry_of(specialist=warm(4 * GB), worker=warm(4 * GB)))
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    world.peers["inference-specialist"].model_bytes = 5 * GB
    world.run_for(1_500)
    assert world.place("specialist").held_bytes == 5 * GB
    world.peers["inference-worker"].model_bytes = 6 * GB
    world.finish(world.submit(task_of([{"id": "W"}])))
    world.run_for(1_500)
    assert (world.place("specialist").state, world.place("worker").state) == ("parked", "loaded")
    assert world.place("worker").held_bytes == 6 * GB
    assert world.hub is not None
    assert world.hub.status({}, world.now).counters["unloads_pressure"] == 1


def test_a_machine_short_of_memory_unloads_idle_models_and_loads_none_ahead() -> None:
    world = stack(registry_of(specialist=warm(2 * GB), worker=warm(2 * GB)), say("fine", 3_000))
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    running = world.submit(task_of([{"id": "W"}, {"id": "X", "actor": "coder", "inputs": ["W.out"]}]))
    world.run_for(2_000)
    world.feed(ev.MemorySeen(100_000_000, world.now))
    world.run_for(200)
    assert (world.place("specialist").state, world.place("worker").state) == ("parked", "loaded")
    world.run_for(1_500)
    assert world.place("specialist").state == "parked"
    world.feed(ev.MemorySeen(5 * GB, world.now))
    assert world.finish(running).state is TaskState.SUCCEEDED


def test_a_new_hub_takes_over_what_is_in_memory_and_gives_it_to_nobody_else() -> None:
    world = stack(registry_of(specialist=warm(6 * GB), worker=warm(6 * GB)), say("fine", 8_000))
    first = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    world.run_for(2_000)
    second = world.submit(task_of([{"id": "W"}]))
    world.run_for(500)
    world.kill_hub()
    world.run_for(300)
    world.boot_hub()
    world.run_for(200)
    assert world.hub is not None
    assert world.hub.loading.residency.places["specialist"].state is State.ABSENT
    for _ in range(100):
        world.run_for(100)
        assert world.in_memory() <= 6 * GB
    assert world.finish(first).state is TaskState.SUCCEEDED
    assert world.finish(second).state is TaskState.SUCCEEDED
    assert world.peers["inference-specialist"].loads == 1


def test_the_memory_of_a_killed_process_comes_back_with_its_next_life() -> None:
    world = stack(registry_of(specialist=warm(6 * GB), worker=warm(6 * GB)), say("fine", 60_000))
    task = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    world.run_for(500)
    victim = world.peers["inference-specialist"]
    victim.kill()  # while it loads
    world.run_for(2_000)
    assert world.place("specialist").held_bytes == 6 * GB, "its process may come back with the model in memory"
    world.run_for(4_000)
    assert world.place("specialist").held_bytes == 0
    victim.start()
    assert world.finish(task, limit_ms=90_000).state is TaskState.SUCCEEDED
    assert victim.loads == 2


class Weather(Stack):
    """Processes and the hub die, freeze and lose connections, until it clears up."""

    def __init__(self, registry: Registry, draw: random.Random, trouble: float) -> None:
        self.draw, self.trouble, self.kinds = draw, trouble, ("kill", "cut", "freeze")
        super().__init__(registry)
        self.clear_ms = self.now + 30_000
        self.later(1_000, self.blow)

    def blow(self) -> None:
        bad = self.now < self.clear_ms
        for peer in self.peers.values():
            if peer.frozen and (not bad or self.draw.random() < 0.3):
                peer.thaw()
            elif bad and peer.alive and not peer.frozen and self.draw.random() < self.trouble:
                self.hit(peer)
        if bad and self.hub is not None and self.draw.random() < self.trouble / 2:
            self.kill_hub()
            self.later(self.draw.randint(100, 2_000), self.boot_hub)
        self.later(1_000, self.blow)

    def revive(self, peer: SimPeer) -> None:
        peer.start()

    def hit(self, peer: SimPeer) -> None:
        kind = self.draw.choice(self.kinds)
        if kind == "kill":
            peer.kill()
            self.later(self.draw.randint(100, 2_000), lambda: self.revive(peer))
        elif kind == "cut":
            peer.disconnect()
        else:
            peer.frozen = True


roles = st.sampled_from(["worker", "coder", "frontdoor"])
sizes = st.sampled_from([2 * GB, 4 * GB, 6 * GB, 9 * GB])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    need=st.tuples(sizes, sizes, sizes),
    cores=st.integers(1, 3),
    trouble=st.sampled_from([0.0, 0.0, 0.05, 0.15]),
    arrivals=st.lists(
        st.tuples(st.integers(0, 8_000), st.lists(roles, min_size=1, max_size=5)),
        min_size=1,
        max_size=8,
    ),
    seed=st.integers(0, 2**32),
    freezes=st.booleans(),
)
def test_whatever_is_asked_and_whoever_dies_the_budget_holds_and_every_task_ends(
    need: tuple[int, int, int],
    cores: int,
    trouble: float,
    arrivals: list[tuple[int, list[str]]],
    seed: int,
    freezes: bool,
) -> None:
    draw = random.Random(seed)
    registry = registry_of(
        cores=cores, front=warm(need[0]), specialist=warm(need[1], exclusive="heavy"), worker=warm(need[2])
    )
    world = Weather(registry, draw, trouble)
    if not freezes:
        world.kinds = ("kill", "cut")

    def answer(_header: Header, _body: bytes) -> Answer:
        return draw.randint(0, 4_000), final_of("fine")

    world.add("planner", ("planner",), plan_as_given)
    world.add("gates", ("gate",), gates_pass)
    world.add("memory", ("memory",), memory_takes)
    for name in registry.models:
        world.add(f"inference-{name}", (f"infer.{name}",), answer, 2, draw.choice([300, 1_000, 5_000]))
    world.run_for(50)
    ids: list[str] = []
    began = world.now
    for pause_ms, actors in arrivals:
        world.run_for(pause_ms)
        world.run(lambda: world.hub is not None)
        steps: list[dict[str, object]] = []
        for index, actor in enumerate(actors):
            inputs = [f"S{index - 1}.out"] if index and draw.random() < 0.6 else []
            steps.append({"id": f"S{index}", "actor": actor, "inputs": inputs})
        ids.append(world.submit(task_of(steps)))
    world.run(lambda: world.hub is not None and all(one in world.ended for one in ids), 900_000)
    spent = world.now - began
    if trouble == 0 or not freezes:  # a new hub cannot know what a frozen process has in memory
        assert world.most_in_memory <= 10 * GB
    if trouble == 0:
        assert world.most_held <= 10 * GB
        tasks = world.recorded_tasks()
        assert all(tasks[one].state is TaskState.SUCCEEDED for one in ids)
        for name, peer in world.peers.items():
            if peer.load_ms is not None:
                assert peer.loads <= 1 + spent / (peer.load_ms + MIN_RESIDENCE_MS), f"{name} is loaded again and again"
    world.run_for(400_000)
    assert world.hub is not None
    assert world.hub.broker.tokens.held_bytes == 0, "all memory comes back"
    assert world.hub.broker.tokens.free_cores == cores


def test_stacks_without_warm_models_never_look() -> None:
    world = stack(registry_of())
    assert world.hub is not None
    assert not world.hub.loading.has_guests
    world.finish(world.submit(task_of([{"id": "S"}])))
    assert world.hub.loading._soon_ms == 0


def test_a_simulated_run_knows_that_warm_models_must_load() -> None:
    hot = registry_of(specialist={"memory_bytes": 6 * GB}, worker={"memory_bytes": 6 * GB}, budget=20 * GB)
    both = registry_of(specialist=warm(6 * GB), worker=warm(6 * GB), budget=20 * GB)
    tight = registry_of(specialist=warm(6 * GB), worker=warm(6 * GB))
    steps: list[dict[str, object]] = [{"id": "A", "actor": "coder", "max_tokens": 300}]
    steps.append({"id": "B", "actor": "worker", "inputs": ["A.out"], "max_tokens": 300})
    took = {}
    for name, registry in (("hot", hot), ("both", both), ("tight", tight)):
        run = run_tasks([task_of(steps)], registry, tiers_of(registry), TokenSpeed(30), TokenSpeed(30))
        took[name] = run.outcome.makespan_s
    load_s = expected_load_s(both.models["worker"])
    assert took["hot"] == pytest.approx(20, abs=0.1)
    assert took["both"] == pytest.approx(20 + load_s, abs=0.2), "the second is loaded while the first works"
    residence_s = max(0.0, RESIDENCE_LOADS * load_s - 10)
    assert took["tight"] == pytest.approx(20 + 2 * load_s + residence_s, abs=0.3)
