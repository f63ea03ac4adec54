"""Whatever is reloaded and measured, the hub's account of memory covers what the processes hold, and comes into order.

Processes here follow the registry as real ones do: one whose entry has changed, or that nobody needs any more, takes no
new calls, ends with the last one, and begins anew where its entry still is in the files.
"""

from __future__ import annotations

import random
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from protocol.header import Header
from protocol.messages.infer import ChatMessage, InferRequest
from protocol.messages.result import TaskState
from protocol.messages.session import PeerState
from services.kit import session as s
from services.kit.registry import Registry
from services.kit.registry.acceleration import Declared
from services.kit.registry.launch import Launch
from services.kit.registry.memory import memory_need_bytes
from services.scheduler import events as ev
from services.scheduler.events import Event
from services.scheduler.place import MIN_TURN_MS
from services.scheduler.simulation.tiers import memory_takes
from tests.unit.simulation import Answer, SimPeer, final_of, gates_pass, plan_as_given, task_of
from tests.unit.test_scheduler_batches import Asker
from tests.unit.test_scheduler_reload import edited, reload
from tests.unit.test_scheduler_residency import GB, Weather, registry_of

GUESTS = ("specialist", "worker")
LONGEST_CALL_MS = 4_000
LONGEST_LOAD_MS = 3_500
MEASURED_MS = 3_500
"""Until what is measured has arrived: it goes with a pong, one each second."""
RELIEVED_MS = MIN_TURN_MS + 2 * LONGEST_CALL_MS + 10_000
"""Over budget for a turn, then until the running calls have ended and the processes are gone."""
HUGE = {"specialist": 8.0}
"""Far more than the machine has."""
LARGE = {"specialist": 5.0, "worker": 5.0}
"""More than the budget has, for either of them, and no more than the machine has."""
MACHINE = 12 * GB
LARGE_MACHINE = 40 * GB


FILE = Declared(
    architecture="llama",
    parameters_b=1,
    file_bytes=GB // 2,
    context_tokens=65_536,
    vocabulary_tokens=32_000,
    kv_bytes_per_token=1_000_000,
)


def sized(size: int) -> dict[str, object]:
    """Fields of an entry that needs about so much, most of it for its context: what its file has says little."""
    return {"declared": FILE, "slots": 1, "context_tokens": (size - GB // 2) // 1_000_000}


class Reloads(Weather):
    """A registry that changes under processes that take more than it says."""

    def __init__(self, registry: Registry, draw: random.Random, trouble: float, surprise: dict[str, float]) -> None:
        self.files, self.surprise = registry, surprise
        self.launched: dict[str, Launch] = {}
        self.loaded: set[str] = set()
        """Services whose process has its model in memory."""
        self.uncovered_ms: dict[str, int] = {}
        self.over_ms: int | None = None
        self.strict = trouble == 0
        super().__init__(registry, draw, trouble)
        self.kinds = ("kill", "cut")
        self.machine_bytes = LARGE_MACHINE if surprise is LARGE else MACHINE
        self.later(0, self.read_memory)

    def read_memory(self) -> None:
        """The hub looks once a second at what the machine has left."""
        if self.hub is not None:
            self.feed(ev.MemorySeen(max(GB, self.machine_bytes - self.in_memory()), self.now))
        self.later(1_000, self.read_memory)

    # Processes

    def join(self, model: str, answer: Any, load_ms: int | None) -> None:
        peer = self.add(f"inference-{model}", (f"infer.{model}",), answer, 2, load_ms)
        peer.follow = lambda told: self.follow(peer, told)
        self.begin(peer)

    def begin(self, peer: SimPeer) -> None:
        """It was started from the files as they are; one whose entry is gone, from an earlier copy of it."""
        model = peer.service.removeprefix("inference-")
        if model in self.files.models:
            self.launched[model] = self.files.launch(model)
            peer.registry = self.files.digest
        peer.model_bytes = self.takes(model)
        self.loaded.discard(peer.service)

    def takes(self, model: str) -> int:
        launch = self.launched.get(model)
        return 0 if launch is None else int(memory_need_bytes(launch.entry) * self.surprise.get(model, 1.0))

    def revive(self, peer: SimPeer) -> None:
        self.begin(peer)
        super().revive(peer)

    def follow(self, peer: SimPeer, told: s.FollowRegistry) -> None:
        model = peer.service.removeprefix("inference-")
        there = model in self.files.models
        if peer.session.state is PeerState.DRAINING or (not there and told.needed):
            return
        if there and self.files.launch(model).same_as(self.launched[model]):
            peer.registry = self.files.digest
            return
        boot = peer.boots
        peer.feed(s.DrainAsked("its entry has changed"))

        def look() -> None:
            if not peer.alive or peer.boots != boot:
                return
            if peer.session.in_flight:
                self.later(50, look)
                return
            peer.kill()
            if model in self.files.models:
                self.later(200, lambda: self.revive(peer))

        self.later(50, look)

    def reload(self, registry: Registry) -> None:
        """Somebody edits the files and says `tierline reload`; whoever supervises starts what was not there before."""
        if self.hub is None:
            return
        self.past, self.registry, self.files = self.registry, registry, registry
        reload(self, registry)
        for model in GUESTS:
            peer = self.peers[f"inference-{model}"]
            if model in registry.models and not peer.alive:
                self.later(300, lambda peer=peer: None if peer.alive else self.revive(peer))  # type: ignore[misc]

    # What must hold

    def in_memory(self) -> int:
        return sum(self.holds(peer) for peer in self.peers.values())

    def holds(self, peer: SimPeer) -> int:
        """What this process really has in memory."""
        return self.takes(peer.service.removeprefix("inference-")) if peer.service in self.loaded else 0

    def feed(self, event: Event) -> None:
        super().feed(event)
        for peer in self.peers.values():
            if not peer.alive or peer.session.state is PeerState.PARKED:
                self.loaded.discard(peer.service)
            elif peer.session.state in (PeerState.LOADING, PeerState.READY) and peer.service.startswith("inference-"):
                self.loaded.add(peer.service)
        if self.hub is not None and self.strict:
            self.check_the_account()

    def check_the_account(self) -> None:
        assert self.hub is not None
        tokens = self.hub.broker.tokens
        for peer in self.peers.values():
            model = peer.service.removeprefix("inference-")
            if self.holds(peer) <= tokens.held_by(model):
                self.uncovered_ms.pop(model, None)
            elif peer.session.state is PeerState.DRAINING and self.surprise:
                assert tokens.held_by(model), f"{model} has memory that nobody booked"
            elif peer.session.state is PeerState.READY or not self.surprise:
                since = self.uncovered_ms.setdefault(model, self.now)
                assert self.surprise, f"{model} has memory that nobody booked"
                assert self.now - since <= MEASURED_MS, f"{model} has more memory than is booked"
        residency = self.hub.loading.residency
        assert all(place.load_ms <= LONGEST_LOAD_MS for place in residency.guests.values()), "none takes so long"
        holders = [one for one in (*residency.guests, *residency.leaving) if tokens.held_by(one)]
        if tokens.free_bytes >= 0 or len(holders) < 2:
            self.over_ms = None
            return
        self.over_ms = self.now if self.over_ms is None else self.over_ms
        assert self.now - self.over_ms <= RELIEVED_MS, f"too much is held: {residency.places}"


roles = st.sampled_from(["worker", "coder", "frontdoor"])
works = st.lists(roles, min_size=1, max_size=5)
sizes = st.sampled_from([2 * GB, 4 * GB, 6 * GB])
edits = st.tuples(
    st.integers(0, 15_000),
    st.sampled_from(["size", "size", "other", "remove", "back", "hot", "call", "last call", "mode"]),
    st.sampled_from(GUESTS),
    sizes,
)


def after(files: Registry, first: Registry, kind: str, model: str, size: int) -> Registry:
    """The files after an edit. Roles of a model that is not there have the front model."""
    models: dict[str, Any] = {}
    if kind == "size" and model in files.models:
        models[model] = files.models[model].model_copy(update=sized(size))
    elif kind == "other" and model in files.models:
        batch = files.models[model].ubatch_tokens
        models[model] = files.models[model].model_copy(update={"ubatch_tokens": 256 if batch != 256 else 512})
    elif kind == "hot":
        models["front"] = files.models["front"].model_copy(update={"memory_bytes": size // 4})
    elif kind == "remove":
        models[model] = None
    elif kind == "back":
        models[model] = first.models[model].model_copy(update=sized(size))
    there = {name for name in GUESTS if models.get(name, files.models.get(name)) is not None} | {"front"}
    roles = {
        name: role if role.model in there else role.model_copy(update={"model": "front"})
        for name, role in first.roles.items()
    }
    return edited(files, models=models, roles=roles)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    need=st.tuples(sizes, sizes),
    trouble=st.sampled_from([0.0, 0.0, 0.0, 0.1]),
    surprise=st.sampled_from([{}, {"front": 1.25, "specialist": 1.25}, {"worker": 0.5, "front": 1.25}, HUGE, LARGE]),
    arrivals=st.lists(
        st.tuples(st.integers(0, 8_000), st.lists(roles, min_size=1, max_size=5)), min_size=1, max_size=8
    ),
    edits=st.lists(edits, max_size=6),
    seed=st.integers(0, 2**32),
)
@example(  # busy guests, and a hot model that grows
    need=(4 * GB, 4 * GB), trouble=0.0, surprise={}, seed=1,
    arrivals=[(0, ["worker", "coder"] * 30)] * 3, edits=[(9_000, "hot", "worker", 9 * GB)],
)  # fmt: skip
@example(  # a program's call runs on a model that leaves
    need=(6 * GB, 6 * GB), trouble=0.0, surprise={}, seed=1,
    arrivals=[(3_000, ["coder"])], edits=[(0, "last call", "worker", 0)],
)  # fmt: skip
@example(  # one that cannot have its room is waited for
    need=(6 * GB, 2 * GB), trouble=0.0, surprise=HUGE, seed=1,
    arrivals=[(0, ["coder"]), (30_000, ["coder"]), (100, ["worker"])], edits=[(12_000, "mode", "worker", 0)],
)  # fmt: skip
@example(  # either of both only while alone, and both are busy
    need=(4 * GB, 4 * GB), trouble=0.0, surprise=LARGE, seed=1,
    arrivals=[(0, ["worker", "coder"] * 8), (4_000, ["worker"] * 5), (4_000, ["coder"] * 5)], edits=[],
)  # fmt: skip
@example(  # a change of mode
    need=(4 * GB, 4 * GB), trouble=0.0, surprise={}, seed=1,
    arrivals=[(0, ["worker"]), (30_000, ["worker"])], edits=[(8_000, "mode", "worker", 0)],
)  # fmt: skip
def test_whatever_is_reloaded_and_measured_the_account_covers_what_is_held_and_every_task_ends(
    need: tuple[int, int],
    trouble: float,
    surprise: dict[str, float],
    arrivals: list[tuple[int, list[str]]],
    edits: list[tuple[int, str, str, int]],
    seed: int,
) -> None:
    draw = random.Random(seed)
    guests = {model: {"residency": "warm"} | sized(size) for model, size in zip(GUESTS, need, strict=True)}
    first = registry_of(cores=3, front={"memory_bytes": GB}, **guests)
    world = Reloads(first, draw, trouble, surprise)

    def answer(_header: Header, _body: bytes) -> Answer:
        return draw.randint(0, LONGEST_CALL_MS), final_of("fine")

    world.add("planner", ("planner",), plan_as_given)
    world.add("gates", ("gate",), gates_pass)
    world.add("memory", ("memory",), memory_takes)
    world.join("front", answer, None)
    for name in GUESTS:
        world.join(name, answer, draw.choice([300, 1_000, 3_000]))
    world.run_for(50)

    def edit(kind: str, model: str, size: int) -> None:
        if world.hub is None:
            return
        peer = world.peers[f"inference-{model}"]
        if kind == "mode":
            if peer.session.state is PeerState.READY:
                peer.feed(s.StateChanged(PeerState.LOADING))
                world.later(draw.randint(100, 20_000), lambda: peer.feed(s.StateChanged(PeerState.READY)))
        elif kind.endswith("call"):
            request = InferRequest(role="test", messages=[ChatMessage(role="user", content="Hi")], max_tokens=4)
            Asker(world).infer(model, request, f"K{world.now}")
            if kind == "last call":
                world.later(draw.randint(0, 4_000), lambda: edit("remove", model, size))
        else:
            world.reload(after(world.files, first, kind, model, size))

    when_ms = 0
    for pause_ms, kind, model, size in edits:
        when_ms += pause_ms
        world.later(when_ms, lambda kind=kind, model=model, size=size: edit(kind, model, size))  # type: ignore[misc]
    ids: list[str] = []
    for pause_ms, actors in arrivals:
        world.run_for(pause_ms)
        world.run(lambda: world.hub is not None)
        chain = [f"S{index - 1}.out" if index and draw.random() < 0.6 else None for index in range(len(actors))]
        steps: list[dict[str, object]] = [
            {"id": f"S{index}", "actor": actor, "inputs": [chain[index]] if chain[index] else []}
            for index, actor in enumerate(actors)
        ]
        task = world.submit(task_of(steps))
        if surprise is not HUGE or "coder" not in actors:
            ids.append(task)
    world.run(lambda: world.hub is not None and all(one in world.ended for one in ids), 900_000)
    world.run_for(max(0, when_ms))
    if trouble == 0:
        tasks = world.recorded_tasks()
        assert all(tasks[one].state is TaskState.SUCCEEDED for one in ids)
    if surprise is HUGE:
        return  # its model may be waited for still
    world.run_for(400_000)
    assert world.hub is not None
    tokens = world.hub.broker.tokens
    assert tokens.held_bytes == tokens.held_by("front"), "all memory comes back"
    assert tokens.free_cores == 3
