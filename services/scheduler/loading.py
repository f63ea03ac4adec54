"""Joins the residency of models with the broker and the tasks: what services say goes in, what they are told comes out.

It gathers what is wanted (calls that run and wait, steps whose inputs come soon), lets `residency` decide, keeps closed
models from getting work, and ends calls that nobody will ever serve. Sending is the hub's. A stack without warm or cold
models pays nothing for it per step: there is nothing to gather.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.session import MemoryBudget, ModelReport, PeerState, Reside
from services.kit.logs import LogEvent
from services.kit.registry import Registry
from services.scheduler.broker import Broker
from services.scheduler.calls import Command
from services.scheduler.events import Noted, Send
from services.scheduler.foresight import needed_soon
from services.scheduler.peers import Peer
from services.scheduler.place import Demand, Place, State
from services.scheduler.ranks import Ranking
from services.scheduler.residency import TRUST_MS, Order, Residency
from services.scheduler.tasks import TaskRecord

MODEL_LOAD = LogEvent("model.load", "model why bytes free_bytes")
MODEL_UNLOAD = LogEvent("model.unload", "model why bytes free_bytes")

RESEND_MS: Final = 3_000
"""A word that its service has not confirmed for so long is said again."""
FORESIGHT_MS: Final = 500
"""How often the tasks are looked through for steps that will need a model."""
LOW_SHARE: Final = 0.03
LEAST_LOW_BYTES: Final = 128 * 1024 * 1024
"""The machine counts as short of memory below this share of the budget, and below this in any case."""

_MAKES_WAY: Final = "another model has waited for its memory"

#: What several processes of one model amount to: the first state that one of them has.
_STATES: Final[tuple[tuple[PeerState, State], ...]] = (
    (PeerState.READY, State.LOADED),
    (PeerState.LOADING, State.LOADING),
    (PeerState.DEGRADED, State.DEGRADED),
    (PeerState.UNLOADING, State.UNLOADING),
    (PeerState.DRAINING, State.UNLOADING),
    (PeerState.STARTING, State.LOADING),
    (PeerState.PARKED, State.PARKED),
)


@dataclass(slots=True)
class Loading:
    """See the module."""

    registry: Registry
    broker: Broker
    ranking: Ranking
    tasks: Mapping[str, TaskRecord]
    """Those that are alive."""
    message: Callable[[bytes, str, Message], Send]
    """Makes a message to the peer of this identity, of this kind and with this body."""
    residency: Residency = field(init=False)
    _models: dict[str, str] = field(default_factory=dict)
    """Capability -> model, of warm and cold models."""
    _others: dict[str, str] = field(default_factory=dict)
    """The same of hot ones, and of those that have left the registry and are in memory still."""
    _workers: dict[str, dict[str, Peer]] = field(default_factory=dict)
    """Capability of a model -> service -> its newest session."""
    _dirty: bool = False
    _unserved: tuple[str, ...] = ()
    """Capabilities that nobody served when it was decided last."""
    _soon: dict[str, int] = field(default_factory=dict)
    _soon_ms: int = 0
    """When `_soon` was made."""

    def __post_init__(self) -> None:
        """The budget is the broker's memory token."""
        self.residency = Residency(self.broker.tokens)

    def declare(self, registry: Registry) -> None:
        """Take over the models of a registry, at the start or when it has changed."""
        self.registry = registry
        self.residency.declare(registry)
        guests = self.residency.guests
        self._models = {f"infer.{name}": name for name in guests}
        others = [*self.residency.leaving, *(name for name in self.residency.places if name not in guests)]
        self._others = {f"infer.{name}": name for name in others}
        self._dirty = self.has_guests
        self._workers = {}
        for peer in self.broker.peers.values():
            for target, _ in self._models_of(peer):
                self._workers.setdefault(target, {})[peer.service] = peer

    # What happened

    def joined(self, peer: Peer, at_ms: int) -> None:
        """A worker has opened a session."""
        for target, model in self._models_of(peer):
            workers = self._workers.setdefault(target, {})
            workers[peer.service] = peer
            if len(workers) == 1:
                self.residency.joined(model)
            self._hear(target, model, at_ms)

    def ponged(self, peer: Peer, at_ms: int) -> None:
        """A worker has said how it is."""
        for target, model in self._models_of(peer):
            self._hear(target, model, at_ms)

    def gone(self, peer: Peer, at_ms: int, *, silent: bool) -> None:
        """A worker's session is over."""
        for target, model in self._models_of(peer):
            workers = self._workers.get(target, {})
            if workers.get(peer.service) is not peer:
                continue  # a later session of the same process, or of its next life, has taken its place
            del workers[peer.service]
            if workers:
                self._hear(target, model, at_ms)
            else:
                self.residency.gone(model, at_ms, silent=silent)
                self._dirty = True

    def ended(self, target: str) -> None:
        """A call for this capability is over."""
        if target in self._models or target.removeprefix("infer.") in self.residency.leaving:
            self._dirty = True

    def passed(self) -> None:
        """Time has passed."""
        self._dirty = self.has_guests

    def machine_memory(self, available_bytes: int) -> None:
        """What the machine, or its control group, has left."""
        low_bytes = max(LEAST_LOW_BYTES, int(LOW_SHARE * self.broker.tokens.memory_bytes))
        self.residency.machine_memory(available_bytes, low_bytes)
        self._dirty = self.has_guests

    # What is to be done

    @property
    def has_guests(self) -> bool:
        """Whether any model comes and goes at all."""
        return bool(self._models or self.residency.leaving)

    def wants_a_look(self) -> bool:
        """True if something has happened that may change what is decided."""
        if self._dirty or self.residency.wants_core:
            return True
        return self._unserved != tuple(target for target in self._models if target in self.broker.unserved)

    def look(self, at_ms: int) -> tuple[list[Noted | Send], list[Command]]:
        """Decide; returns what to write and to send, and the ends of calls that nobody will ever serve."""
        self._dirty = False
        broker, residency = self.broker, self.residency
        if at_ms - self._soon_ms >= FORESIGHT_MS:
            self._soon_ms = at_ms
            self._soon = needed_soon(
                self.tasks.values(),
                self.ranking,
                residency.guests,
                lambda model: self._ready_in_ms(model, at_ms),
                at_ms,
            )
        wanted = {
            model: self._demand(f"infer.{model}", model, at_ms) for model in (*residency.guests, *residency.leaving)
        }
        orders = residency.decide(wanted, at_ms)
        for order in orders:
            if order.loaded:
                broker.unserved.begin_anew(f"infer.{order.model}", at_ms)
        closed = {target for target, model in self._models.items() if residency.guests[model].closed}
        opened = broker.closed - closed
        broker.closed = closed
        broker.lines.touch([*opened, *broker.tokens.blocked()])
        refused: list[Command] = []
        for target, model in self._models.items():
            if residency.hopeless(model) and broker.lines.has_ready(target, at_ms):
                refused += broker.refuse_waiting(target, _cold(model), at_ms)
        self._unserved = tuple(target for target in self._models if target in broker.unserved)
        return [*self._noted(orders), *self._tell(at_ms)], refused

    def next_due_ms(self) -> int | None:
        """When a look will find something new if nothing happens before; None = never."""
        due = self.residency.due_ms
        parked = any(place.state is State.PARKED for place in self.residency.guests.values())
        if parked and any(not task.state.final for task in self.tasks.values()):
            look = self._soon_ms + FORESIGHT_MS
            due = look if due is None else min(due, look)
        return due

    def move(self, loaded: bool, model: str, at_ms: int) -> Failure | None:
        """Somebody wants this model in memory, or out of it; returns why that cannot be, None if it will be."""
        if model not in self.residency.guests:
            return self._not_movable(model)
        self._dirty = True
        if loaded:
            self.residency.ask(model, at_ms)
            return None
        demand = self._demand(f"infer.{model}", model, at_ms)
        if demand.running or demand.waiting:
            what = "calls run on it" if demand.running else "calls wait for it"
            message = f"{model} is needed: {what}; let them end, or cancel their tasks, then ask again"
            return Failure(code="model.busy", category=Category.RESOURCE, origin="scheduler", message=message)
        self.residency.ask_away(model)
        return None

    # What is said of it

    def reports(self, at_ms: int) -> list[ModelReport]:
        """Every model that takes memory."""
        return [self.report(model, at_ms) for model in (*self.residency.places, *self.residency.leaving)]

    def report(self, model: str, at_ms: int) -> ModelReport:
        """One model, as `tierline models` shows it."""
        place = self.residency.places.get(model) or self.residency.leaving[model]
        waits = place.wait_ms is not None or (place.state is State.LOADING and place.residency != "hot")
        return ModelReport(
            model=model,
            residency=place.residency,
            pinned=place.pinned,
            state=place.state.value,
            need_bytes=place.need_bytes,
            held_bytes=self.broker.tokens.held_by(model),
            measured_bytes=place.measured_bytes,
            used_ms=place.used_ms,
            loads=place.loads,
            waiting=self.reason(f"infer.{model}", at_ms) if waits else None,
            too_large=self._too_large(place) if self._is_too_large_guest(place) else None,
        )

    def budget(self) -> MemoryBudget:
        """The memory that all models share."""
        tokens, residency = self.broker.tokens, self.residency
        return MemoryBudget(
            budget_bytes=tokens.memory_bytes,
            held_bytes=tokens.held_bytes,
            available_bytes=residency.available_bytes,
            low=residency.low,
        )

    def reason(self, target: str, at_ms: int) -> str | None:
        """Why calls for this capability wait, as far as it is a matter of memory; else None."""
        place = self.residency.guests.get(self._models.get(target, ""))
        if place is None:
            return None
        model, since_s = place.model, max(0, at_ms - place.since_ms) / 1000
        if place.closing:
            over = -self.broker.tokens.free_bytes
            why = f"all models together hold {_gib(over)} more than the budget" if over > 0 else _MAKES_WAY
            return f"waits for {model}: it gets no new work, since {why}"
        match place.state:
            case State.LOADING:
                return f"waits for {model}: it loads since {since_s:.1f} s (last time {place.load_ms / 1000:.1f} s)"
            case State.UNLOADING:
                return f"waits for {model}: it is being unloaded, and loads again when there is room"
            case State.PARKED if self.residency.hopeless(model):
                return f"waits for {model}: it is cold; load it with: tierline models load {model}"
            case State.PARKED if place.pause_ms > at_ms:
                pause_s = (place.pause_ms - at_ms) / 1000
                return f"waits for {model}: loading it failed, next try in {pause_s:.0f} s; see: tierline tail"
            case State.PARKED if self.residency.too_large(place):
                return f"waits for memory: {model} {self._too_large(place)}"
            case State.PARKED:
                return f"waits for memory: {model} needs {_gib(place.need_bytes)}, {self._who_has_it()}"
            case _:
                return None

    def _is_too_large_guest(self, place: Place) -> bool:
        return place.model in self.residency.guests and self.residency.too_large(place)

    def _too_large(self, place: Place) -> str:
        needs = "was measured to need" if place.measured_bytes else "needs"
        return (
            f"{needs} {_gib(place.need_bytes)}, more than the budget of {_gib(self.broker.tokens.memory_bytes)} holds "
            "beside the models that stay (hot, pinned); it loads only alone, when all others have made way, if the "
            "machine has as much left: lower its context_tokens or slots in models.yaml, or raise memory_bytes in "
            "hardware.yaml"
        )

    def _who_has_it(self) -> str:
        tokens = self.broker.tokens
        parts = []
        for name, place in (self.residency.guests | self.residency.leaving).items():
            held = tokens.held_by(name)
            if held:
                calls = sum(len(peer.calls) for peer in self._peers(f"infer.{name}"))
                doing = f"{calls} calls run" if calls else "pinned" if place.pinned else place.state.value
                parts.append(f"{name} {_gib(held)} ({doing})")
        others = f"; in memory beside the hot models: {', '.join(parts)}" if parts else ""
        return f"{_gib(max(0, tokens.free_bytes))} of {_gib(tokens.memory_bytes)} are free{others}"

    # Inside

    def _models_of(self, peer: Peer) -> Iterable[tuple[str, str]]:
        for target in peer.capabilities:
            model = self._models.get(target) or self._others.get(target)
            if model is not None:
                yield target, model

    def _peers(self, target: str) -> Collection[Peer]:
        """Sessions that serve this capability; of a process that came back only the newest."""
        return self._workers.get(target, {}).values()

    def objection(self, target: str, at_ms: int) -> Failure | None:
        """Why nobody will ever work for this target: it is a model of no registry, and no worker offers it either. A
        hub that has just started does not object: who offers it may be about to come back.
        """
        kind, _, model = target.partition(".")
        if kind != "infer" or model in self.registry.models or at_ms < self.residency.trust_ms:
            return None
        offered = any(target in peer.capabilities for peer in self.broker.peers.values())
        return None if offered else self._unknown(model)

    def strangers(self, at_ms: int) -> list[Command]:
        """Ends of calls that waited when their model left the registry, or came to a hub that did not object yet. A
        worker that has just died may come back, so they wait for it as long as a hub that has just started does.
        """
        ends: list[Command] = []
        for target in self.broker.unserved.longer_than(TRUST_MS, at_ms):
            failure = self.objection(target, at_ms)
            if failure is not None:
                ends += self.broker.refuse_waiting(target, failure, at_ms)
        return ends

    def _hear(self, target: str, model: str, at_ms: int) -> None:
        peers = self._peers(target)
        states = {peer.state for peer in peers}
        state = next(ours for theirs, ours in _STATES if theirs in states)
        settled = all(peer.order >= peer.told for peer in peers)
        measured = sum(peer.model_bytes for peer in peers)
        if all(peer.registry in (None, self.registry.digest) for peer in peers):  # else of an entry that has changed
            self.residency.foretold(model, sum(peer.needs_bytes for peer in peers))
        self.residency.heard(model, state, measured, at_ms, settled=settled)
        self._dirty = self._dirty or target in self._models

    def _ready_in_ms(self, model: str, at_ms: int) -> int | None:
        place = self.residency.guests.get(model)
        if place is None or place.state is State.LOADED:
            return 0
        return max(0, place.load_ms - (at_ms - place.since_ms)) if place.state is State.LOADING else None

    def _demand(self, target: str, model: str, at_ms: int) -> Demand:
        return Demand(
            running=any(peer.calls for peer in self._peers(target)),
            waiting=self.broker.lines.has_ready(target, at_ms),
            soon_ms=self._soon.get(model),
        )

    def _noted(self, orders: Iterable[Order]) -> Iterator[Noted]:
        for order in orders:
            told = MODEL_LOAD if order.loaded else MODEL_UNLOAD
            free = self.broker.tokens.free_bytes
            yield Noted(told, {"model": order.model, "why": order.why, "bytes": order.bytes, "free_bytes": free})

    def _tell(self, at_ms: int) -> Iterator[Send]:
        """Whoever has not heard the newest word, or has not confirmed it for long."""
        for target, model in self._models.items():
            place = self.residency.guests[model]
            if place.wish is None:
                continue
            for peer in self._peers(target):
                late = peer.order < peer.told and at_ms - peer.told_ms >= RESEND_MS
                if peer.told < place.order or late:
                    peer.told, peer.told_ms = place.order, at_ms
                    yield self.message(peer.identity, "session.reside", Reside(loaded=place.wish, order=place.order))

    def _not_movable(self, model: str) -> Failure:
        if model not in self.registry.models:
            return self._unknown(model)
        message = f"{model} is hot: it is always in memory; set residency in models.yaml"
        return Failure(code="model.hot", category=Category.POLICY, origin="scheduler", message=message)

    def _unknown(self, model: str) -> Failure:
        message = f"models.yaml has no entry {model!r}; it has: {', '.join(self.registry.models)}"
        return Failure(code="model.unknown", category=Category.POLICY, origin="scheduler", message=message)


def _cold(model: str) -> Failure:
    message = f"the model {model} is cold and not in memory; load it with: tierline models load {model}"
    return Failure(code="model.cold", category=Category.RESOURCE, origin="scheduler", message=message)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
