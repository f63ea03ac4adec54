"""One simulated process: a real session machine in front of work that takes virtual time.

It can be killed, frozen, thawed and started again. What it answers, and after how long, is a function of the request;
see `tiers.py` for ordinary ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec.structs import replace

from protocol.codec import pack_body
from protocol.header import Header, pack_header
from protocol.kinds import family
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.session import PeerState, Pong
from services.kit import session as s

Answer = tuple[int, "Message | Failure | bytes"]
"""How many ms the work takes, and its ending; bytes are the body of a final that was packed before."""
_REOPEN_MS = 50
"""Time until a process has a fresh socket, the shortest of a real one's back-offs."""


class SimulationError(Exception):
    """The simulated system did what no system in order does: a defect of the machines or of the scenario."""


class Network(Protocol):
    """What a peer needs of its world."""

    now: int
    identities: dict[bytes, SimPeer]

    def later(self, delay_ms: int, action: Callable[[], object]) -> None:
        """Do this after so many ms."""
        ...

    def carry_to_hub(self, identity: bytes, frames: list[bytes]) -> None:
        """Move a message towards the hub; it may take time, or never arrive."""
        ...


class SimPeer:
    """See the module. `started` lists the keys of all work ever begun, over all boots."""

    def __init__(
        self,
        world: Network,
        service: str,
        capabilities: tuple[str, ...],
        slots: int,
        answer: Callable[[Header, bytes], Answer],
        load_ms: int | None = None,
    ) -> None:
        self.world = world
        self.service = service
        self.capabilities = capabilities
        self.slots = slots
        self.answer = answer
        self.load_ms = load_ms
        """How long its model takes to load when the hub says so; None = it is in memory from the start."""
        self.loads = 0
        self.model_bytes = 0
        """What it says its loaded model takes."""
        self.needs_bytes = 0
        """What it says its model will take."""
        self.reason: str | None = None
        """Why it is in its state, as its pongs say."""
        self._loading = 0
        """Which loading is the current one."""
        self.alive = False
        self.frozen = False
        self.boots = 0
        self.started: list[str] = []
        self.registry: str | None = None
        """Digest that its pongs name."""
        self.follow: Callable[[s.FollowRegistry], object] | None = None
        """What it does when it is told of another registry; None = nothing."""
        self._inbox: list[s.Event] = []
        """What happened to a frozen process: it notices when it thaws."""
        self._working: dict[str, int] = {}
        """Key -> which beginning of that work is the current one."""
        self._epochs = 0
        self._seq = 0
        self.identity = b""
        self.session = s.PeerSession(service, capabilities, slots, pid=1)

    def start(self) -> None:
        """Boot: a new life, nothing of an earlier one is left."""
        self.boots += 1
        self.alive, self.frozen = True, False
        self._epochs = self._seq = 0
        self._inbox.clear()
        self._working.clear()
        self.session = s.PeerSession(self.service, self.capabilities, self.slots, pid=1)
        self.session.state = PeerState.READY if self.load_ms is None else PeerState.PARKED
        self._loading += 1
        self._open()

    def kill(self) -> None:
        """End at once, as kill -9 does; the hub finds out when it sends."""
        self.alive = False
        self.world.identities.pop(self.identity, None)

    def thaw(self) -> None:
        """Go on after `frozen`: what came in meanwhile is read now."""
        self.frozen = False
        inbox, self._inbox = self._inbox, []
        for event in inbox:
            self.feed(replace(event, at_ms=self.world.now) if isinstance(event, s.Received) else event)

    def receive(self, header: Header, body: bytes) -> None:
        """One message of the hub has arrived."""
        self.feed(s.Received(self.world.now, header, body))

    def feed(self, event: s.Event) -> None:
        """Give the session an event and do what it says; a frozen process does so when it thaws."""
        if self.frozen:
            self._inbox.append(event)
            return
        for command in self.session.handle(event):
            self._carry_out(command)

    def disconnect(self) -> None:
        """Break the connection: what is under way on it in either direction is lost, and a fresh one is opened."""
        self.session.joined = False
        self._reopen()

    def _open(self) -> None:
        self._epochs += 1
        self.identity = f"{self.service}/{self.boots}/{self._epochs}".encode()
        self.world.identities[self.identity] = self
        self.feed(s.Opened(self.world.now, f"{self.service}{self.boots}-{self._epochs}"))

    def _reopen(self) -> None:
        boot = self.boots
        self.world.identities.pop(self.identity, None)

        def open_again() -> None:
            if self._lives(boot):
                self._open()

        self.world.later(_REOPEN_MS, open_again)

    def _lives(self, boot: int) -> bool:
        return self.alive and self.boots == boot

    def _carry_out(self, command: s.Command) -> None:
        match command:
            case s.Transmit(header, body):
                self._transmit(header, body)
            case s.ReportState(corr, credit):
                pong = Pong(
                    state=self.session.state,
                    reason=self.reason,
                    in_flight=len(self.session.in_flight),
                    loop_lag_ms=0,
                    rss_bytes=0,
                    registry=self.registry,
                    model_bytes=self.model_bytes if self.session.state is PeerState.READY else 0,
                    needs_bytes=self.needs_bytes,
                    order=self.session.order,
                )
                self._transmit(Header(kind="session.pong", id="", corr=corr, credit=credit), pack_body(pong))
            case s.StartWork(header, body):
                self._work(header, body)
            case s.CancelWork(key):
                self._end_early(key, "call.cancelled", Category.PEER)
            case s.ChangeResidence(loaded):
                self._change_residence(loaded=loaded)
            case s.Reopen():
                self._reopen()
            case s.FollowRegistry():
                if self.follow is not None:
                    self.follow(command)
            case s.Deliver():
                pass  # these peers ask nobody anything
            case s.Stop(reason):
                raise SimulationError(f"{self.service} was told to stop: {reason}")

    def _work(self, header: Header, body: bytes) -> None:
        key = header.key or ""
        self.started.append(key)
        beginning = self._working[key] = len(self.started)
        took, ending = self.answer(header, body)
        left = took if header.deadline is None else header.deadline - self.world.now
        if left < took:
            self._later(left, key, beginning, lambda: self._end_early(key, "call.deadline", Category.TIMEOUT))
            return
        if isinstance(ending, Failure):
            done = s.WorkEnded(key, "error", pack_body(ErrorReply(failure=ending)))
        else:
            packed = ending if isinstance(ending, bytes) else pack_body(ending)
            done = s.WorkEnded(key, f"{family(header.kind)}.final", packed)
        self._later(took, key, beginning, lambda: self._end(done))

    def _change_residence(self, *, loaded: bool) -> None:
        """Load within `load_ms`, or unload at once; one without a loading time has nothing to load."""
        if self.load_ms is None or loaded == (self.session.state in (PeerState.LOADING, PeerState.READY)):
            return
        self._loading += 1
        if not loaded:
            self.feed(s.StateChanged(PeerState.PARKED))
            return
        self.loads += 1
        boot, loading = self.boots, self._loading

        def loaded_now() -> None:
            if self._lives(boot) and self._loading == loading:
                self.feed(s.StateChanged(PeerState.READY))

        self.feed(s.StateChanged(PeerState.LOADING))
        self.world.later(self.load_ms, loaded_now)

    def _later(self, delay_ms: int, key: str, beginning: int, action: Callable[[], None]) -> None:
        """Do this unless that beginning of the work has ended by then, or its process."""
        boot = self.boots

        def unless_over() -> None:
            if self._lives(boot) and self._working.get(key) == beginning:
                action()

        self.world.later(delay_ms, unless_over)

    def _end(self, done: s.WorkEnded) -> None:
        del self._working[done.key]
        self.feed(done)

    def _end_early(self, key: str, code: str, category: Category) -> None:
        if key in self._working:
            failure = Failure(code=code, category=category, origin=self.service, message="the work was stopped")
            self._end(s.WorkEnded(key, "error", pack_body(ErrorReply(failure=failure))))

    def _transmit(self, header: Header, body: bytes) -> None:
        self._seq += 1
        ident = header.id or f"{self.service}-{self._seq}"
        filled = replace(header, id=ident, src=self.service, seq=self._seq, epoch=self.session.epoch)
        self.world.carry_to_hub(self.identity, [pack_header(filled), body])
