"""The life of a service process: one event loop that drives the session machine, the socket and the work.

A service registers what it answers (`answer`), may ask others (`ask`), reports its state (`set_state`) and runs
until SIGTERM (`run`), after which it takes no new work, finishes what it has within a bound, and leaves. Pings are
answered by this same loop, so that a stuck loop is a silent peer. What the work is, each service knows itself.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import psutil
from msgspec.structs import replace

from protocol.codec import pack_body, unpack_body
from protocol.errors import BadFrame, CallFailed, CallRefused, DeadlineExceeded, SendLater
from protocol.header import Header, pack_header, unpack_header
from protocol.kinds import BODIES, family
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.persona import Persona
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.session import PeerState, Pong
from protocol.zmq_transport import ZmqDealer
from services.kit import session as s
from services.kit.children import die_with_parent
from services.kit.clock import SteadyClock
from services.kit.config import Home
from services.kit.following import RegistryFollower
from services.kit.identity import boot_id, work_key
from services.kit.logs import Log, LogEvent

SERVICE_STARTED = LogEvent("service.started", "pid capabilities slots")
SERVICE_STATE = LogEvent("service.state", "state reason")
SERVICE_STOPPED = LogEvent("service.stopped", "reason unfinished")
SESSION_OPENED = LogEvent("session.opened", "epoch failures")
FRAME_REFUSED = LogEvent("frame.refused", "code reason", "warning")
CALL_STARTED = LogEvent("call.started", "task step attempt kind key", "debug")
CALL_ENDED = LogEvent("call.ended", "task step attempt kind key code reason took_ms", "debug")
CALL_FAILED = LogEvent("call.failed", "task step attempt kind key code reason took_ms")
CALL_BUG = LogEvent("call.bug", "task step attempt kind key error", "error")

_TICK_S: Final = 0.25
_BACKOFF_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_OF_BACKENDS: Final = frozenset({Category.PEER, Category.RESOURCE})
"""What a failure of these says is about processes and machines, so it is logged; others may quote an answer."""
M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class Call:
    """One request being worked on."""

    header: Header
    body: bytes
    _service: Service

    def read(self, model: type[M]) -> M:
        """The validated body; raises BadFrame, which ends the call with an error naming the field."""
        return unpack_body(model, self.body)

    def partial(self, body: Message) -> bool:
        """Send a piece of the answer; it may get lost, so the final repeats everything.

        False where it was not sent since the hub does not read: keep it, and join it with the next one.
        """
        kind = f"{family(self.header.kind)}.partial"
        return self._service.hand_on(self.header.key or "", kind, body)

    def seconds_left(self, now_ms: int) -> float | None:
        """Seconds until the deadline, None without one; may be negative."""
        return None if self.header.deadline is None else (self.header.deadline - now_ms) / 1000


Handler = Callable[[Call], Awaitable[Message] | Message]


class Service:
    """One peer of the hub.

    `capabilities` are the targets it answers (`infer.worker`, `gate`, …), `slots` how many calls it takes at once.
    """

    def __init__(
        self,
        home: Home,
        name: str,
        capabilities: tuple[str, ...] = (),
        *,
        slots: int = 1,
        drain_s: float = 10,
    ) -> None:
        self.home = home
        self.name = name
        self.clock = SteadyClock()
        self.log = Log(home.logs, name, self.clock, level=home.log_level)
        self.metrics: Callable[[], dict[str, Any]] = dict
        self.on_residence: Callable[[bool], None] = lambda _loaded: None
        """Called when the hub wants the model in memory, or out of it; services without a model ignore it."""
        self.on_trials: Callable[[list[Persona]], None] = lambda _personas: None
        """Called with the personas that are on trial, when the service joins and when they change; only planners are
        told."""
        self.model_bytes: Callable[[], int] = lambda: 0
        self.needs_bytes: Callable[[], int] = lambda: 0
        self.resident_bytes: Callable[[], int] = lambda: psutil.Process().memory_info().rss
        self._drain_s = drain_s
        self._boot = boot_id()
        self._epochs = 0
        self._seq = 0
        self._session = s.PeerSession(service=name, capabilities=capabilities, slots=slots, pid=os.getpid())
        self._reason: str | None = None
        self._handlers: dict[str, tuple[Handler, bool]] = {}
        """Kind -> who works on it, and whether that takes a task of its own."""
        self._work: dict[str, asyncio.Task[None]] = {}
        self._waiting: dict[str, asyncio.Queue[tuple[Header, bytes]]] = {}
        self._socket: ZmqDealer | None = None
        self._unsent: list[tuple[bytes, bytes]] = []
        self._receiving = False
        self._loop_lag_ms = 0.0
        self._stopping = asyncio.Event()
        self.follower: RegistryFollower | None = None
        """Keeps the registry of a service that works with one."""
        self._stop_reason = "SIGTERM"
        self._ended = False
        """True where it ends by itself, and in peace."""

    def answer(self, kind: str, handler: Handler) -> None:
        """Register who works on requests of this kind. The handler returns the final or raises CallFailed."""
        self._handlers[kind] = handler, inspect.iscoroutinefunction(handler)

    def set_state(self, state: PeerState, reason: str | None = None) -> None:
        """Tell the hub; only a READY peer is given work. `reason` says why it is not."""
        if state is not self._session.state or reason != self._reason:
            self.log.write(SERVICE_STATE, state=state.value, reason=reason)
        self._reason = reason
        self.feed(s.StateChanged(state))

    @property
    def state(self) -> PeerState:
        """Present state of the life cycle."""
        return self._session.state

    def feed(self, event: s.Event) -> None:
        """Put an event into the session machine and carry out what it commands."""
        for command in self._session.handle(event):
            self._carry_out(command)

    def hand_on(self, key: str, kind: str, body: Message) -> bool:
        """Send a piece of a running answer unless something still waits to be sent; see Call.partial."""
        if self._unsent:
            return False
        commands = self._session.handle(s.PartialMade(self.clock.now_ms(), key, kind, pack_body(body)))
        for command in commands:
            self._carry_out(command)
        return bool(commands)

    async def run(self, load: Callable[[], Awaitable[None]] | None = None) -> int:
        """Serve until SIGTERM or SIGINT; `load` runs first, as LOADING, while the hub already knows this peer.

        Returns the exit status: 0 after a drain, 1 if loading failed for good or the hub refused this peer.
        """
        loop = asyncio.get_running_loop()
        if self.home.supervised:
            die_with_parent(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        self.log.write(
            SERVICE_STARTED, pid=os.getpid(), capabilities=list(self._session.capabilities), slots=self._session.slots
        )
        self._open(0)
        ticker = asyncio.create_task(self._tick())
        status = 0
        try:
            if load is not None:
                self.set_state(PeerState.LOADING)
                loading = asyncio.ensure_future(load())
                stopping = asyncio.create_task(self._stopping.wait())
                await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if not loading.done():
                    loading.cancel()
                    await asyncio.gather(loading, return_exceptions=True)
                else:
                    loading.result()
            # What was made to begin with stays: to walk over it takes the garbage collector 40 ms beside busy cores.
            gc.collect()
            gc.freeze()
            if self._session.state in (PeerState.STARTING, PeerState.LOADING):
                self.set_state(PeerState.READY)
            await self._stopping.wait()
            status = 0 if self._ended or self._stop_reason == "SIGTERM" else 1
            await self._drain()
        finally:
            ticker.cancel()
            self.log.write(SERVICE_STOPPED, reason=self._stop_reason, unfinished=len(self._work))
            self._close()
            self.log.close()
        return status

    async def leave(self, reason: str) -> None:
        """Take no new work and return when all that is here has ended; deadlines bound that. The process stays."""
        self._reason = reason
        self.log.write(SERVICE_STATE, state=PeerState.DRAINING.value, reason=reason)
        self.feed(s.DrainAsked(reason))
        while self._work:
            await asyncio.wait(list(self._work.values()))

    def end(self, reason: str) -> None:
        """End the process as SIGTERM would; its supervisor starts it again."""
        self._stop_reason = reason
        self._ended = True
        self._stopping.set()

    async def ask(
        self,
        kind: str,
        body: Message,
        *,
        dst: str,
        timeout_s: float,
        call: Call | None = None,
        key: str | None = None,
        on_partial: Callable[[bytes], None] | None = None,
    ) -> Message:
        """Ask another service through the hub and return the validated final.

        `call` is the request during which this one is made: its task, priority and trace go along, and it is
        cancelled with it. Raises CallFailed, CallRefused, DeadlineExceeded; BadFrame if the answer is invalid.
        """
        packed = pack_body(body)
        parent = call.header if call else None
        deadline = self.clock.now_ms() + int(timeout_s * 1000)
        if parent and parent.deadline is not None:
            deadline = min(deadline, parent.deadline)
        header = Header(
            kind=kind,
            id=f"{self._boot}-a{self._next()}",
            dst=dst,
            key=key or work_key(kind, dst, parent.key if parent else self._boot, packed),
            deadline=deadline,
            task=parent.task if parent else None,
            parent=parent.key if parent else None,
            prio=parent.prio if parent else None,
            trace=parent.trace if parent else None,
        )
        answers: asyncio.Queue[tuple[Header, bytes]] = asyncio.Queue()
        self._waiting[header.id] = answers
        self.feed(s.Asked(header, packed))
        try:
            async with asyncio.timeout(max(0.0, (deadline - self.clock.now_ms()) / 1000)):
                while True:
                    answer, data = await answers.get()
                    if not answer.kind.endswith(".partial"):
                        return _outcome(answer, data)
                    if on_partial is not None:
                        on_partial(data)
        except TimeoutError as err:
            raise DeadlineExceeded(f"no answer from {dst} within {timeout_s:g} s") from err
        finally:
            del self._waiting[header.id]
            self.feed(s.AskDropped(header.id))

    # The edge: socket, timers, children of the loop.

    def _open(self, failures: int) -> None:
        self._close()
        self._epochs += 1
        epoch = f"{self._boot}-{self._epochs}"
        self._socket = ZmqDealer(self.home.hub_address)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._receive_all)
        self.log.write(SESSION_OPENED, epoch=epoch, failures=failures)
        self.feed(s.Opened(self.clock.now_ms(), epoch))

    def _close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._unsent.clear()

    def _receive_all(self) -> None:
        """Empty the socket: its descriptor signals changes only, so nothing may be left behind."""
        self._receiving = True
        try:
            self._receive()
        finally:
            self._receiving = False

    def _receive(self) -> None:
        while self._socket is not None and (frames := self._socket.receive()) is not None:
            if len(frames) != 2:
                self.log.write(FRAME_REFUSED, code="frames", reason=f"{len(frames)} frames, expected 2")
                continue
            try:
                header = unpack_header(frames[0])
            except BadFrame as err:
                self.log.write(FRAME_REFUSED, code=err.code, reason=str(err))
                continue
            self.feed(s.Received(self.clock.now_ms(), header, frames[1]))

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self._loop_lag_ms = max(self._loop_lag_ms, (loop.time() - due) * 1000)
            # Read first: after a pause of this process the hub's pings are waiting, and it is not the hub's silence.
            self._flush()
            self._receive_all()
            if self._socket is not None and self._socket.reconnected():
                self.feed(s.Reconnected())
            self.feed(s.Ticked(self.clock.now_ms()))

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _transmit(self, header: Header, body: bytes) -> None:
        seq = self._next()
        ident = header.id or f"{self._boot}-{seq}"
        filled = replace(header, id=ident, src=self.name, epoch=self._session.epoch, seq=seq)
        self._unsent.append((pack_header(filled), body))
        self._flush()

    def _flush(self) -> None:
        while self._unsent and self._socket is not None:
            try:
                self._socket.send(*self._unsent[0])
            except SendLater:
                return  # the next tick tries again; credit bounds how much can wait here
            del self._unsent[0]
        if not self._receiving:  # else whoever is at it goes on until nothing is left
            # Sending may swallow the signal that something arrived.
            asyncio.get_running_loop().call_soon(self._receive_all)

    def _carry_out(self, command: s.Command) -> None:
        match command:
            case s.Transmit(header, body):
                self._transmit(header, body)
            case s.ReportState(corr, credit):
                self._transmit(Header(kind="session.pong", id="", corr=corr, credit=credit), pack_body(self._pong()))
            case s.StartWork(header, body):
                self._start(Call(header, body, self))
            case s.CancelWork(key):
                if key in self._work:
                    self._work[key].cancel()
            case s.ChangeResidence(loaded):
                self.on_residence(loaded)
            case s.Deliver(header, body):
                if header.corr in self._waiting:
                    self._waiting[header.corr].put_nowait((header, body))
            case s.Reopen(failures):
                self._close()
                pause = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)] * (0.5 + random.random())  # noqa: S311  jitter
                asyncio.get_running_loop().call_later(pause, self._reopen, failures)
            case s.KnowTrials(personas):
                self.on_trials(personas)
            case s.FollowRegistry(digest, needed):
                if self.follower is not None:
                    self.follower.told(digest, needed=needed)
            case s.Stop(reason):
                self._stop_reason = reason
                self._stopping.set()

    def _reopen(self, failures: int) -> None:
        if not self._stopping.is_set():
            self._open(failures)

    def _pong(self) -> Pong:
        lag, self._loop_lag_ms = self._loop_lag_ms, 0.0
        return Pong(
            state=self._session.state,
            reason=self._reason,
            in_flight=len(self._session.in_flight),
            loop_lag_ms=lag,
            rss_bytes=self.resident_bytes(),
            metrics=self.metrics(),
            registry=None if self.follower is None else self.follower.digest,
            model_bytes=self.model_bytes(),
            needs_bytes=self.needs_bytes(),
            order=self._session.order,
        )

    def _start(self, call: Call) -> None:
        header = call.header
        key = header.key or ""
        known = self._handlers.get(header.kind)
        if known is None:
            failure = _failure(
                "call.unknown_kind", Category.POLICY, self.name, f"{self.name} does not do {header.kind}"
            )
            self.feed(s.WorkEnded(key, "error", pack_body(ErrorReply(failure=failure))))
            return
        handler, takes_time = known
        if self.log.keeps(CALL_STARTED):
            self.log.write(
                CALL_STARTED, task=header.task, step=header.step, attempt=header.attempt, kind=header.kind, key=key
            )
        started = self.clock.now_ms()
        if takes_time:
            work = self._work[key] = asyncio.create_task(self._work_on(call, handler, started))
            work.add_done_callback(lambda _: self._work_over(work, call, started))
            return
        try:
            result = handler(call)
        except (CallFailed, BadFrame) as err:
            self._end(call, _as_failure(err, self.name), started)
        else:
            if not isinstance(result, Message):
                raise TypeError(f"the handler of {header.kind} returned {type(result).__name__}, not a message")
            self._end(call, result, started)

    async def _work_on(self, call: Call, handler: Handler, started: int) -> None:
        ending: Message | Failure
        try:
            result = handler(call)
            ending = await result if not isinstance(result, Message) else result
        except (CallFailed, CallRefused, DeadlineExceeded, BadFrame) as err:
            ending = _as_failure(err, self.name)
        except asyncio.CancelledError:
            ending = self._cancelled()
        except Exception as err:  # noqa: BLE001  a bug in one call must not take the others down; it is logged as one
            ending = self._bug(call, err)
        del self._work[call.header.key or ""]
        self._end(call, ending, started)

    def _work_over(self, work: asyncio.Task[None], call: Call, started: int) -> None:
        """End a call that was cancelled before its first line ran: then none did, that of its ending included."""
        if work.cancelled():
            del self._work[call.header.key or ""]
            self._end(call, self._cancelled(), started)

    def _cancelled(self) -> Failure:
        return _failure("call.cancelled", Category.PEER, self.name, "cancelled by the hub or by a shutdown")

    def _bug(self, call: Call, err: Exception) -> Failure:
        self.log.write(CALL_BUG, kind=call.header.kind, key=call.header.key, task=call.header.task, error=repr(err))
        return _failure("internal.bug", Category.RESOURCE, self.name, f"bug in {self.name}: {err!r}"[:1_000])

    def _end(self, call: Call, ending: Message | Failure, started_ms: int) -> None:
        header = call.header
        try:
            kind, body = _packed(header, ending)
        except (ValueError, OverflowError) as err:  # a call without an ending would keep its slot for ever
            ending = self._bug(call, err)
            kind, body = _packed(header, ending)
        failure = ending if isinstance(ending, Failure) else None
        told = CALL_ENDED if failure is None else CALL_FAILED
        if self.log.keeps(told):
            self.log.write(
                told,
                task=header.task,
                step=header.step,
                attempt=header.attempt,
                kind=header.kind,
                key=header.key,
                code=None if failure is None else failure.code,
                reason=failure.message if failure is not None and failure.category in _OF_BACKENDS else None,
                took_ms=self.clock.now_ms() - started_ms,
            )
        self.feed(s.WorkEnded(header.key or "", kind, body))

    async def _drain(self) -> None:
        self.feed(s.DrainAsked(self._stop_reason))
        if self._work:
            await asyncio.wait(list(self._work.values()), timeout=self._drain_s)
        for task in list(self._work.values()):
            task.cancel()
        if self._work:
            await asyncio.gather(*self._work.values(), return_exceptions=True)
        self._flush()


def _outcome(header: Header, data: bytes) -> Message:
    """Turn the ending of a request into its value or its exception."""
    if header.kind == "error":
        raise CallFailed(unpack_body(ErrorReply, data).failure)
    if header.kind == "refused":
        refused = unpack_body(Refused, data)
        raise CallRefused(refused.reason, refused.retry_after_ms)
    return unpack_body(BODIES[header.kind], data)


def _packed(header: Header, ending: Message | Failure) -> tuple[str, bytes]:
    """Kind and body of the message that ends a call. Raises ValueError and OverflowError for what cannot be sent."""
    if isinstance(ending, Failure):
        return "error", pack_body(ErrorReply(failure=ending))
    return f"{family(header.kind)}.final", pack_body(ending)


def _failure(code: str, category: Category, origin: str, message: str) -> Failure:
    return Failure(code=code, category=category, origin=origin, message=message)


def _as_failure(err: Exception, origin: str) -> Failure:
    match err:
        case CallFailed(failure=failure):
            return failure
        case BadFrame(code=code):
            return _failure(code, Category.POLICY, origin, str(err)[:8_000])
        case CallRefused():
            return _failure("call.refused", Category.RESOURCE, origin, str(err))
        case _:
            return _failure("call.deadline", Category.TIMEOUT, origin, str(err))
