"""A service's side of its session with the hub, as a pure machine: events in, commands out.

Keeps: a request is worked on once per key, however often it is delivered; a result is kept until it is old, so
that a hub which lost it can ask again; credit is a running total per epoch. Leaves sockets, time, randomness and
the work itself to `services.kit.service`.

After a restart of the hub, or a silence, the peer opens a fresh session and lists the keys it has in flight: the
hub re-attaches them. Nothing is computed again for want of a message.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec.structs import replace

from protocol.codec import pack_body, unpack_body
from protocol.errors import BadFrame
from protocol.header import Header
from protocol.kinds import CALL_REQUESTS, ENDINGS, UNKNOWN_PEER, family
from protocol.limits import PROTOCOL_VERSION
from protocol.messages.failure import Category, Failure
from protocol.messages.persona import Persona, PersonasOnTrial
from protocol.messages.registry import RegistryChanged
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Goodbye, Hello, PeerState, Ping, Reject, Reside, Welcome

_KEPT_RESULTS: Final = 512
"""Results kept for a hub that may ask again; more than any hub has in flight at one peer."""
_KEPT_REQUESTS: Final = 1_024
"""Ids of requests kept to recognise repeats; more than any hub has under way to one peer."""
_JOIN_TIMEOUT_MS: Final = 3_000
_SILENT_PINGS: Final = 3
_PROBE_PINGS: Final = 1.2
_BLOCKED_PINGS: Final = 1.5
"""A hub that is silent for so long may not read either: pieces of answers would only fill the pipe to it."""


# Events


class Opened(msgspec.Struct, frozen=True):
    """A fresh socket is there; `epoch` names the new session."""

    at_ms: int
    epoch: str


class Received(msgspec.Struct, frozen=True):
    """One message came in."""

    at_ms: int
    header: Header
    body: bytes


class Ticked(msgspec.Struct, frozen=True):
    """Time has passed."""

    at_ms: int


class Reconnected(msgspec.Struct, frozen=True):
    """The connection was broken and has come back: the hub may be a new one, and messages may be lost."""


class WorkEnded(msgspec.Struct, frozen=True):
    """The work for `key` has its ending."""

    key: str
    kind: str
    body: bytes


class PartialMade(msgspec.Struct, frozen=True):
    """A piece of a running answer; not sent while no hub reads, since the final repeats it."""

    at_ms: int
    key: str
    kind: str
    body: bytes


class Asked(msgspec.Struct, frozen=True):
    """This service wants something from another, through the hub."""

    header: Header
    body: bytes


class AskDropped(msgspec.Struct, frozen=True):
    """Nobody waits for that answer any more."""

    id: str


class StateChanged(msgspec.Struct, frozen=True):
    """The service became ready, degraded, and so on."""

    state: PeerState


class DrainAsked(msgspec.Struct, frozen=True):
    """Take no new work; finish what is there."""

    reason: str


Event = (
    Opened | Received | Ticked | Reconnected | WorkEnded | PartialMade | Asked | AskDropped | StateChanged | DrainAsked
)


# Commands


class Transmit(msgspec.Struct, frozen=True):
    """Send this message; the driver fills in epoch, src and seq, and the id where it is empty."""

    header: Header
    body: bytes


class Reopen(msgspec.Struct, frozen=True):
    """Close the socket, wait (backoff after `failures` vain tries), open a fresh one under a new epoch."""

    failures: int


class ReportState(msgspec.Struct, frozen=True):
    """Send a pong; the driver measures what goes into it."""

    corr: str | None
    credit: int


class StartWork(msgspec.Struct, frozen=True):
    """Do this; end with WorkEnded."""

    header: Header
    body: bytes


class CancelWork(msgspec.Struct, frozen=True):
    """Stop working on this key; WorkEnded is still expected."""

    key: str


class ChangeResidence(msgspec.Struct, frozen=True):
    """The hub says whether the model shall be in memory; the states that follow are reported with StateChanged."""

    loaded: bool


class Deliver(msgspec.Struct, frozen=True):
    """An answer (or a piece of one) to something this service asked."""

    header: Header
    body: bytes


class FollowRegistry(msgspec.Struct, frozen=True):
    """The hub works with the registry of this digest; `needed` as in `registry.changed`."""

    digest: str
    needed: bool


class KnowTrials(msgspec.Struct, frozen=True):
    """These personas are on trial, instead of those before."""

    personas: list[Persona]


class Stop(msgspec.Struct, frozen=True):
    """The hub refuses this peer for good; exit and say why."""

    reason: str


Command = (
    Transmit
    | Reopen
    | ReportState
    | StartWork
    | CancelWork
    | ChangeResidence
    | Deliver
    | FollowRegistry
    | KnowTrials
    | Stop
)


@dataclass(slots=True)
class PeerSession:
    """State of one peer's session. `handle` is the only door."""

    service: str
    capabilities: tuple[str, ...]
    slots: int
    pid: int
    state: PeerState = PeerState.STARTING
    epoch: str = ""
    joined: bool = False
    granted: int = 0
    failures: int = 0
    in_flight: dict[str, Header] = field(default_factory=dict)
    finished: OrderedDict[str, tuple[str, bytes, Header]] = field(default_factory=OrderedDict)
    asks: dict[str, Asked] = field(default_factory=dict)
    order: int = 0
    """Number of the newest `session.reside` of this epoch."""
    _slots_granted: bool = False
    """True once the idle slots were granted in this epoch; from then on only endings add to the total."""
    _unsent: list[Transmit] = field(default_factory=list)
    """Endings since the HELLO of this epoch: it listed their keys as in flight, so the hub waits for them."""
    _spent: int = 0
    """Requests of this epoch: so many of the granted slots the hub has used."""
    _requests: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Ids of the requests of this epoch, newest last: a repeat of one has spent no credit and is not work."""
    _heard_ms: int = 0
    _ping_ms: int = 1_000
    _probed: bool = False

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what to do, in order."""
        match event:
            case Opened():
                return self._on_opened(event)
            case Received():
                return self._on_received(event)
            case Ticked():
                return self._on_ticked(event)
            case Reconnected():
                self.joined = False  # a HELLO that was under way may be lost too, hence even where we had not joined
                return [Reopen(failures=0)]
            case WorkEnded():
                return self._on_work_ended(event)
            case PartialMade():
                header = self.in_flight.get(event.key)
                silence_ms = event.at_ms - self._heard_ms
                if header is None or not self.joined or silence_ms > self._ping_ms * _BLOCKED_PINGS:
                    return []
                return [Transmit(_answer(header, event.kind), event.body)]
            case Asked():
                self.asks[event.header.id] = event
                return [Transmit(event.header, event.body)] if self.joined else []
            case AskDropped():
                asked = self.asks.pop(event.id, None)
                if asked is None or not self.joined:
                    return []
                cancel = replace(asked.header, kind=f"{family(asked.header.kind)}.cancel", id="", corr=event.id)
                return [Transmit(cancel, b"\x80")]
            case StateChanged():
                return self._on_state_changed(event)
            case DrainAsked():
                self.state = PeerState.DRAINING
                goodbye = Header(kind="session.goodbye", id="")
                return [Transmit(goodbye, pack_body(Goodbye(reason=event.reason)))] if self.joined else []

    def _on_opened(self, event: Opened) -> list[Command]:
        self.epoch = event.epoch
        self.joined = False
        self.order = 0
        self._unsent.clear()
        self._requests.clear()
        self._spent = 0
        self._heard_ms = event.at_ms
        self.granted = self._free_slots()
        self._slots_granted = self._usable()
        return [self._hello()]

    def _usable(self) -> bool:
        return self.state in (PeerState.READY, PeerState.DEGRADED)

    def _free_slots(self) -> int:
        """Slots to grant in a new epoch: those that running work does not hold; each grants itself when it ends."""
        return max(0, self.slots - len(self.in_flight)) if self._usable() else 0

    def _hello(self) -> Transmit:
        body = Hello(
            service=self.service,
            protocol_min=PROTOCOL_VERSION,
            protocol_max=PROTOCOL_VERSION,
            capabilities=list(self.capabilities),
            state=self.state,
            pid=self.pid,
            in_flight=list(self.in_flight),
            finished=list(self.finished),
        )
        return Transmit(Header(kind="session.hello", id="", credit=self.granted), pack_body(body))

    def _on_received(self, event: Received) -> list[Command]:
        header = event.header
        self._heard_ms = event.at_ms
        self._probed = False
        try:
            if header.kind == "session.welcome":
                return self._on_welcome(unpack_body(Welcome, event.body))
            if header.kind == "session.reject":
                return self._on_reject(unpack_body(Reject, event.body))
            if header.kind == "session.ping":
                unpack_body(Ping, event.body)
                return [ReportState(corr=header.id, credit=self.granted)] if self.joined else []
            if header.kind == "registry.changed":
                told = unpack_body(RegistryChanged, event.body)
                return [FollowRegistry(told.digest, told.needed)]
            if header.kind == "persona.trials":
                return [KnowTrials(unpack_body(PersonasOnTrial, event.body).personas)]
            if header.kind == "session.reside":
                return self._on_reside(unpack_body(Reside, event.body))
            if header.kind == "error" and _is_unknown_peer(event.body):
                return self._rejoin()
        except BadFrame as err:
            # Our own hub does not send such bytes; whoever did is not one to stay connected to.
            return [Stop(f"the hub sent a {header.kind} that cannot be read: {err}")]
        if header.kind in CALL_REQUESTS:
            return self._on_request(event)
        if header.kind.endswith(".cancel"):
            return [CancelWork(header.key)] if header.key in self.in_flight else []
        if header.corr in self.asks:
            if header.kind in ENDINGS:
                del self.asks[header.corr]
            return [Deliver(header, event.body)]
        return []  # the late answer to a dropped question

    def _on_reside(self, reside: Reside) -> list[Command]:
        """Do what the hub says about the model, unless it is an old word, or it would take it from running work."""
        commands: list[Command] = []
        if reside.order > self.order:
            self.order = reside.order
            if reside.loaded or not self.in_flight:
                commands.append(ChangeResidence(reside.loaded))
        if self.joined:
            commands.append(ReportState(corr=None, credit=self.granted))
        return commands

    def _rejoin(self) -> list[Command]:
        """A new hub listens on our old connection: say HELLO again, under a new epoch, on a fresh socket."""
        if not self.joined:
            return []  # our HELLO is on its way
        self.joined = False
        return [Reopen(failures=0)]

    def _on_welcome(self, welcome: Welcome) -> list[Command]:
        self.joined = True
        self.failures = 0
        self._ping_ms = max(1, welcome.ping_ms)
        commands: list[Command] = [CancelWork(key) for key in welcome.drop if key in self.in_flight]
        commands.extend(self._ending(key) for key in welcome.resend if key in self.finished)
        settled = {*welcome.drop, *welcome.resend}
        unsent = [ending for ending in self._unsent if ending.header.key not in settled]
        commands.extend(Transmit(replace(ending.header, credit=self.granted), ending.body) for ending in unsent)
        self._unsent.clear()
        commands.extend(Transmit(asked.header, asked.body) for asked in self.asks.values())
        if welcome.registry is not None:
            commands.append(FollowRegistry(welcome.registry, needed=True))
        commands.append(ReportState(corr=None, credit=self.granted))  # it may have changed since the HELLO
        return commands

    def _on_reject(self, reject: Reject) -> list[Command]:
        self.joined = False
        if reject.code == "version":
            return [Stop(f"rejected by the hub: {reject.message}")]
        self.failures += 1
        return [Reopen(self.failures)]

    def _on_request(self, event: Received) -> list[Command]:
        header = event.header
        if header.id in self._requests:
            return []
        self._requests[header.id] = None
        self._spent += 1
        while len(self._requests) > _KEPT_REQUESTS:
            self._requests.popitem(last=False)
        key = header.key
        if key is None:
            self.granted += 1
            ending = _answer(header, "error", self.granted)
            return [Transmit(ending, _error(Category.POLICY, "call.no_key", "a call needs a key"))]
        if key in self.in_flight:
            self.in_flight[key] = header  # re-attached: the answer goes to the newest request
            self.granted += 1  # it takes no slot but the one the running work has, which grants itself when it ends
            return [ReportState(corr=None, credit=self.granted)] if self.joined else []
        if key in self.finished:
            kind, body, _ = self.finished[key]
            self.finished[key] = (kind, body, header)
            self.granted += 1
            return [self._ending(key)]
        refusal: bytes | None = None
        if self.state is PeerState.DRAINING:
            refusal = _error(Category.PEER, "peer.draining", f"{self.service} is shutting down")
        elif header.deadline is not None and header.deadline <= event.at_ms:
            refusal = _error(Category.TIMEOUT, "call.expired", "the deadline had passed before the work was begun")
        if refusal is not None:
            self.granted += 1
            return [Transmit(_answer(header, "error", self.granted), refusal)]
        self.in_flight[key] = header
        return [StartWork(header, event.body)]

    def _on_work_ended(self, event: WorkEnded) -> list[Command]:
        header = self.in_flight.pop(event.key, None)
        if header is None:
            return []
        self.granted += 1
        if event.kind == "error":
            # Not kept: a later try of the same key must run again. Lost with the hub, it is a key not re-attached.
            return self._when_joined(Transmit(_answer(header, "error", self.granted), event.body))
        self.finished[event.key] = (event.kind, event.body, header)
        while len(self.finished) > _KEPT_RESULTS:
            self.finished.popitem(last=False)
        return self._when_joined(self._ending(event.key))

    def _when_joined(self, ending: Transmit) -> list[Command]:
        if self.joined:
            return [ending]
        self._unsent.append(ending)
        return []

    def _ending(self, key: str) -> Transmit:
        kind, body, header = self.finished[key]
        return Transmit(_answer(header, kind, self.granted), body)

    def _on_state_changed(self, event: StateChanged) -> list[Command]:
        if self.state is PeerState.DRAINING or self.state is event.state:
            return []
        self.state = event.state
        if self._usable() and not self._slots_granted:
            # What ended before is among the free slots now; a hub that did not know yet may have spent some.
            self._slots_granted = True
            self.granted = max(self.granted, self._spent + self._free_slots())
        return [ReportState(corr=None, credit=self.granted)] if self.joined else []

    def _on_ticked(self, event: Ticked) -> list[Command]:
        silence = event.at_ms - self._heard_ms
        limit = self._ping_ms * _SILENT_PINGS if self.joined else _JOIN_TIMEOUT_MS
        if not self.epoch:
            return []
        if silence <= limit:
            if not self.joined or self._probed or silence <= self._ping_ms * _PROBE_PINGS:
                return []
            # One missed ping: a restarted hub cannot know this peer, but it answers whoever speaks.
            self._probed = True
            return [ReportState(corr=None, credit=self.granted)]
        self._heard_ms = event.at_ms
        self.joined = False
        self.failures += 1
        return [Reopen(self.failures)]

    def check_invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself; called by tests after every event."""
        both = self.in_flight.keys() & self.finished.keys()
        if both:
            raise AssertionError(f"in flight and finished at once: {sorted(both)}")
        if len(self.finished) > _KEPT_RESULTS:
            raise AssertionError("more results kept than the bound")


def _answer(request: Header, kind: str, credit: int | None = None) -> Header:
    """Header of a message that continues `request`, or ends it and grants the slot again."""
    return Header(
        kind=kind,
        id="",
        corr=request.id,
        key=request.key,
        task=request.task,
        step=request.step,
        attempt=request.attempt,
        credit=credit,
        trace=request.trace,
    )


def _is_unknown_peer(body: bytes) -> bool:
    try:
        return unpack_body(ErrorReply, body).failure.code == UNKNOWN_PEER
    except BadFrame:
        return False  # the hub hands on what another service wrote: whoever asked that one will find it unreadable


def _error(category: Category, code: str, message: str) -> bytes:
    return pack_body(ErrorReply(failure=Failure(code=code, category=category, origin="session", message=message)))
