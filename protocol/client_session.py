"""A client's side of its session with the hub, as a pure machine: events in, commands out.

Keeps: a request stays outstanding until it has its one ending or is dropped, whatever happens to the hub in between.
A hub that does not know us (it was restarted) gets HELLO and then every outstanding request again, with the same id
and key; a watch is asked again from the last event seen, so that its reader sees each journalled event once.
Leaves sockets, time, identifiers and deadlines to `protocol.client`.

A connection that broke and came back gets HELLO too, since its hub may be a new one. While something is outstanding and
the hub is silent without that, it is probed with `session.status`: a restarted hub answers that with `peer.unknown`, a
living one with its report, and neither disturbs the session as a second HELLO would.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from protocol.codec import pack_body, unpack_body
from protocol.errors import BadFrame
from protocol.header import Header
from protocol.kinds import BODIES, CANCELLABLE, HUB_REQUESTS, STEP_TOKENS, UNKNOWN_PEER, family
from protocol.limits import PROTOCOL_VERSION
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.result import TaskEvent, Watch
from protocol.messages.session import Goodbye, Hello, PeerState, Pong, Reject, StatusRequest, Welcome

PROBE_MS: Final = 2_000
"""Silence after which the hub is probed, and pause between two HELLOs that nobody answers."""


# Events


@dataclass(frozen=True, slots=True)
class Opened:
    """The socket is there."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Asked:
    """The program wants something; `header` has its id, kind, key and deadline."""

    at_ms: int
    header: Header
    body: bytes


@dataclass(frozen=True, slots=True)
class Dropped:
    """Nobody waits for the answer to request `id` any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Received:
    """One message came in."""

    at_ms: int
    header: Header
    body: bytes


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Reconnected:
    """The connection was broken and has come back: the hub may be a new one, and messages may be lost."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The program is done with this client."""


Event = Opened | Asked | Dropped | Received | Ticked | Reconnected | Closed


# Commands


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send this message; the driver fills in epoch, src and seq, and the id where it is empty."""

    header: Header
    body: bytes


@dataclass(frozen=True, slots=True)
class Deliver:
    """A piece of the answer to request `id`, or its ending where `ends`."""

    id: str
    body: Message
    ends: bool


Command = Transmit | Deliver


@dataclass(slots=True)
class _Request:
    header: Header
    body: bytes
    last_seq: int = 0
    """Of a watch: the newest event delivered."""


@dataclass(slots=True)
class ClientSession:
    """State of one client's session. `handle` is the only door."""

    service: str
    pid: int
    boot: str
    """Identifier of this client's life; the epoch of a session is made from it."""
    joined: bool = False
    outstanding: dict[str, _Request] = field(default_factory=dict)
    _epochs: int = 1
    _heard_ms: int = 0
    _said_ms: int = 0
    """When the last HELLO or probe was sent."""
    _probing: bool = False
    _rejected: Failure | None = None
    """Set once the hub has refused this client for good."""

    @property
    def epoch(self) -> str:
        """Name of the present session."""
        return f"{self.boot}-{self._epochs}"

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what to do, in order."""
        match event:
            case Opened(at_ms):
                return [self._hello(at_ms)]
            case Asked():
                return self._on_asked(event)
            case Dropped(ident):
                return self._on_dropped(ident)
            case Received():
                return self._on_received(event)
            case Ticked(at_ms):
                return self._on_ticked(at_ms)
            case Reconnected(at_ms):
                return [] if self._rejected is not None else [self._hello(at_ms)]
            case Closed():
                goodbye = Header(kind="session.goodbye", id="")
                return [Transmit(goodbye, pack_body(Goodbye(reason="closed")))] if self.joined else []

    def _hello(self, at_ms: int) -> Transmit:
        self.joined = False
        self._probing = False
        self._said_ms = self._heard_ms = at_ms
        body = Hello(service=self.service, protocol_min=PROTOCOL_VERSION, protocol_max=PROTOCOL_VERSION, pid=self.pid)
        return Transmit(Header(kind="session.hello", id=""), pack_body(body))

    def _on_asked(self, event: Asked) -> list[Command]:
        if self._rejected is not None:
            return [Deliver(event.header.id, ErrorReply(failure=self._rejected), ends=True)]
        if not self.outstanding:
            self._heard_ms = max(self._heard_ms, event.at_ms)  # until now there was nothing to hear
        request = _Request(event.header, event.body)
        if event.header.kind == "task.watch":
            request.last_seq = unpack_body(Watch, event.body).after_seq
        self.outstanding[event.header.id] = request
        return [Transmit(event.header, event.body)] if self.joined else []

    def _on_dropped(self, ident: str) -> list[Command]:
        request = self.outstanding.pop(ident, None)
        if request is None or not self.joined or request.header.kind not in CANCELLABLE:
            return []
        cancel = replace(request.header, kind=f"{family(request.header.kind)}.cancel", id="", corr=ident)
        return [Transmit(cancel, b"\x80")]

    def _on_received(self, event: Received) -> list[Command]:
        header = event.header
        self._heard_ms = event.at_ms
        if header.kind == "session.welcome":
            return self._on_welcome(event)
        if header.kind == "session.reject":
            return self._on_reject(event)
        if header.kind == "error" and _is_unknown_peer(event.body):
            # One such error per message that we sent; the first one counts, HELLO answers them all.
            return [self._hello(event.at_ms)] if self.joined else []
        if header.kind == "session.ping":
            # The hub wants to know how far we have read.
            pong = Pong(state=PeerState.READY, in_flight=len(self.outstanding), loop_lag_ms=0, rss_bytes=0)
            return [Transmit(Header(kind="session.pong", id="", corr=header.id), pack_body(pong))]
        request = self.outstanding.get(header.corr or "")
        if request is not None:
            return self._on_answer(request, event)
        if header.kind == "session.report" and self._probing:
            # The hub lives and knows us, yet was silent: an answer may have been lost with a broken connection. What
            # the hub answers itself may be asked twice; calls of workers are left to their deadline.
            self._probing = False
            return [self._again(waiting) for waiting in self._outstanding_at_hub()]
        return []  # the late answer to a dropped request

    def _outstanding_at_hub(self) -> list[_Request]:
        return [request for request in self.outstanding.values() if request.header.kind in HUB_REQUESTS]

    def _on_welcome(self, event: Received) -> list[Command]:
        try:
            unpack_body(Welcome, event.body)
        except BadFrame:
            return []  # not a hub of ours; HELLO is said again when it stays silent
        if self.joined:
            return []  # the answer to an earlier HELLO that waited in the pipe together with the one that counted
        self.joined = True
        return [self._again(request) for request in self.outstanding.values()]

    def _again(self, request: _Request) -> Transmit:
        if request.header.kind == "task.watch":
            watch = unpack_body(Watch, request.body)
            request.body = pack_body(watch.model_copy(update={"after_seq": request.last_seq}))
        return Transmit(request.header, request.body)

    def _on_reject(self, event: Received) -> list[Command]:
        try:
            reject = unpack_body(Reject, event.body)
        except BadFrame:
            return []
        self.joined = False
        if reject.code != "version":
            self._epochs += 1  # fenced or replaced: the next tick that finds us silent says HELLO as somebody new
            return []
        self._rejected = _failure("session.version", Category.POLICY, f"rejected by the hub: {reject.message}")
        endings: list[Command] = [
            Deliver(ident, ErrorReply(failure=self._rejected), ends=True) for ident in self.outstanding
        ]
        self.outstanding.clear()
        return endings

    def _on_answer(self, request: _Request, event: Received) -> list[Command]:
        ident, kind = request.header.id, event.header.kind
        ends, continues = _answers_to(request.header.kind)
        if kind not in ends and kind != continues:
            return self._broken(ident, f"the hub answered {request.header.kind} with {kind}")
        try:
            body = unpack_body(BODIES[kind], event.body)
        except BadFrame as err:
            return self._broken(ident, f"the answer to {request.header.kind} cannot be read: {err}")
        if isinstance(body, TaskEvent) and body.event != STEP_TOKENS:
            if body.seq <= request.last_seq:
                return []  # seen before the watch was repeated
            request.last_seq = body.seq
        if kind in ends:
            del self.outstanding[ident]
        return [Deliver(ident, body, ends=kind in ends)]

    def _broken(self, ident: str, message: str) -> list[Command]:
        del self.outstanding[ident]
        failure = _failure("answer.invalid", Category.PEER, message[:8_000])
        return [Deliver(ident, ErrorReply(failure=failure), ends=True)]

    def _on_ticked(self, at_ms: int) -> list[Command]:
        if self._rejected is not None or at_ms - self._said_ms < PROBE_MS:
            return []
        if not self.joined:
            return [self._hello(at_ms)]
        if not self.outstanding or at_ms - self._heard_ms < PROBE_MS:
            return []
        self._said_ms = at_ms
        self._probing = True
        return [Transmit(Header(kind="session.status", id=""), pack_body(StatusRequest()))]


def _answers_to(request: str) -> tuple[frozenset[str], str]:
    """Kinds that end a request, and the kind that continues it."""
    final = HUB_REQUESTS.get(request, f"{family(request)}.final")
    continues = "task.event" if request == "task.watch" else f"{family(request)}.partial"
    return frozenset({final, "error", "refused"}), continues


def _is_unknown_peer(body: bytes) -> bool:
    try:
        return unpack_body(ErrorReply, body).failure.code == UNKNOWN_PEER
    except BadFrame:
        return False  # then it is the unreadable answer to a request, and is treated as one


def _failure(code: str, category: Category, message: str) -> Failure:
    return Failure(code=code, category=category, origin="client", message=message)
