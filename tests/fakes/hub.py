"""A hub for tests of one peer: welcomes every peer, sends what the test asks for, collects what comes back.

For tests of a service the test drives it (`await_peer`, `request`, `collect`); for tests of a client it runs by itself
in a thread (`serving`) and answers requests by script (`answer`). Like the real hub it tells a peer that has not said
HELLO so, and pings services only. It does no scheduling; tests of the real hub start `python -m services.scheduler`.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from protocol.codec import pack_body, unpack_body
from protocol.errors import StrandPeer
from protocol.header import Header, pack_header, unpack_header
from protocol.kinds import BODIES, ENDINGS, UNKNOWN_PEER
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Hello, Ping, Pong, Welcome
from protocol.zmq_transport import ZmqRouter
from tests.waiting import WITHIN_S

Script = Callable[[Header, bytes], Iterable[tuple[str, Message]]]
"""Takes a request; gives the messages to answer with, each as kind and body. May be empty: the hub stays silent."""

_PING_EVERY_S = 0.2
"""Often, since a test sees a service change by its pongs only."""


class ScriptedHub:
    """Bound ROUTER; `await_peer`, `request`, `collect`. Every wait has a deadline and raises TimeoutError."""

    def __init__(self, address: str, epoch: str = "scripted") -> None:
        self.port = ZmqRouter(address)
        self.epoch = epoch
        self.known: set[bytes] = set()
        """Identities that have said HELLO."""
        self.peers: dict[str, bytes] = {}
        """Service name -> identity of its newest session."""
        self.hellos: dict[str, Hello] = {}
        self.pongs: dict[str, Pong] = {}
        self.credit: dict[str, int] = {}
        self.received: list[tuple[bytes, Header, bytes]] = []
        """Everything that is not session traffic, in order of arrival."""
        self._answers: dict[str, list[tuple[Header, bytes]]] = defaultdict(list)
        self._scripts: dict[str, Script] = {}
        self._pinged = 0.0
        self._ponged: set[str | None] = set()
        """Ids of the pings that were answered."""

    def answer(self, kind: str, script: Script) -> None:
        """From now on, answer requests of this kind by script."""
        self._scripts[kind] = script

    @contextmanager
    def serving(self) -> Iterator[ScriptedHub]:
        """Run in a thread until the block ends, then close; nothing but attributes may be used from outside."""
        stopping = threading.Event()
        crash: list[BaseException] = []

        def run() -> None:
            try:
                while not stopping.is_set():
                    self.pump(20)
            except BaseException as err:  # noqa: BLE001  raised again in the test's own thread
                crash.append(err)

        thread = threading.Thread(target=run, name="scripted-hub", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopping.set()
            thread.join(5)
            self.close()
        if crash:
            raise crash[0]

    def seen(self, kind: str) -> list[tuple[Header, bytes]]:
        """Messages of this kind that came in, in order."""
        return [(header, body) for _, header, body in list(self.received) if header.kind == kind]

    def close(self) -> None:
        self.port.close()

    def pump(self, timeout_ms: int = 50) -> None:
        """Answer sessions, ping now and then, file the rest."""
        if time.monotonic() - self._pinged > _PING_EVERY_S:
            self._pinged = time.monotonic()
            for service, identity in self.peers.items():
                if self.hellos[service].capabilities:
                    with suppress(StrandPeer):  # its process has ended, or is about to begin a new session
                        self.send(identity, "session.ping", Ping(at_ms=int(time.time() * 1000)))
        self.port.wait(timeout_ms)
        while (message := self.port.receive()) is not None:
            identity, frames = message
            header = unpack_header(frames[0])
            if header.credit is not None and header.src:
                self.credit[header.src] = header.credit
            if header.kind == "session.hello":
                hello = unpack_body(Hello, frames[1])
                self.peers[hello.service] = identity
                before, self.hellos[hello.service] = self.hellos.get(hello.service), hello
                if before is not None and before.pid != hello.pid:
                    self.pongs.pop(hello.service, None)  # of a process before; this one has reported nothing yet
                self.known.add(identity)
                welcome = Welcome(protocol=1, hub_epoch=self.epoch, ping_ms=1_000)
                self.send(identity, "session.welcome", welcome, corr=header.id)
            elif identity not in self.known:
                self._reply(identity, header, "error", ErrorReply(failure=_UNKNOWN))
            elif header.kind == "session.pong":
                if self.peers.get(header.src or "") == identity:  # else of a process that has ended meanwhile
                    self.pongs[header.src or ""] = unpack_body(Pong, frames[1])
                    self._ponged.add(header.corr)
            else:
                self.received.append((identity, header, frames[1]))
                if header.corr:
                    self._answers[header.corr].append((header, frames[1]))
                if header.kind in self._scripts:
                    for kind, body in self._scripts[header.kind](header, frames[1]):
                        self._reply(identity, header, kind, body)

    def _reply(self, identity: bytes, request: Header, kind: str, body: Message) -> None:
        with suppress(StrandPeer):  # whoever asked has left meanwhile
            self.send(identity, kind, body, corr=request.id, key=request.key)

    def send(self, identity: bytes, kind: str, body: Message, **fields: object) -> str:
        ident = uuid.uuid4().hex
        self.port.send(identity, pack_header(Header(kind=kind, id=ident, **fields)), pack_body(body))  # type: ignore[arg-type]
        return ident

    def until(self, holds: Callable[[], object], what: str, within_s: float = WITHIN_S) -> None:
        """Pump until `holds` gives something true."""
        deadline = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {within_s:g} s: {what}; pongs: {self.pongs}")
            self.pump()

    def pump_for(self, seconds: float) -> None:
        """Pump for a while: to let time pass, never to let something come to hold."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.pump()

    def await_peer(self, service: str, state: str = "ready", timeout_s: float = WITHIN_S) -> Hello:
        """Wait until that service has said HELLO and reported this state."""

        def reached() -> bool:
            pong = self.pongs.get(service)
            return service in self.peers and pong is not None and pong.state.value == state

        self.until(reached, f"{service} is {state}", timeout_s)
        return self.hellos[service]

    def newest_pong(self, service: str) -> Pong:
        """Ping the service now and wait for its answer to that."""
        ping = self.send(self.peers[service], "session.ping", Ping(at_ms=int(time.time() * 1000)))
        self.until(lambda: ping in self._ponged, f"{service} answers a ping")
        return self.pongs[service]

    def request(self, service: str, kind: str, body: Message, **fields: object) -> str:
        """Send a request; returns its id for `collect`. A key is made where none is given.

        A service that heard nothing for some seconds, since the test was busy elsewhere, may have begun a new session.
        """
        fields.setdefault("key", uuid.uuid4().hex)
        end = time.monotonic() + WITHIN_S
        while True:
            self.pump(0)
            try:
                return self.send(self.peers[service], kind, body, **fields)
            except StrandPeer:
                if time.monotonic() > end:
                    raise

    def collect(self, request_id: str, timeout_s: float = WITHIN_S) -> tuple[Header, Message, list[Message]]:
        """Wait for the ending of a request: its header, its body, and the partials before it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answers = self._answers[request_id]
            if answers and answers[-1][0].kind in ENDINGS:
                *partials, (header, data) = answers
                pieces = [unpack_body(BODIES[head.kind], piece) for head, piece in partials]
                return header, unpack_body(BODIES[header.kind], data), pieces
            self.pump()
        raise TimeoutError(f"no ending for {request_id}: {self._answers[request_id]}")

    def ask(self, service: str, kind: str, body: Message, timeout_s: float = WITHIN_S, **fields: object) -> Message:
        """Request and collect; returns the body of the ending, whatever it is."""
        return self.collect(self.request(service, kind, body, **fields), timeout_s)[1]


_UNKNOWN = Failure(code=UNKNOWN_PEER, category=Category.PEER, origin="scripted hub", message="say HELLO first")
