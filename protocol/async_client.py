"""`AsyncClient`: the calls of a program inside an event loop, each with a deadline.

The edge around `protocol.client_session`: socket, timers, queues of answers. `protocol.client` is the place to import
from; it says what the calls promise and adds the blocking `Client`.
"""

from __future__ import annotations

import asyncio
import builtins
import math
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

from msgspec.structs import replace
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from protocol import client_session as s
from protocol.codec import pack_body
from protocol.errors import BadFrame, CallFailed, CallRefused, DeadlineExceeded, HubUnreachable, SendLater
from protocol.header import Header, pack_header, unpack_header
from protocol.limits import MAX_BODY_BYTES
from protocol.messages.artefact import Artefact
from protocol.messages.base import Message
from protocol.messages.batch import BatchFinal, BatchPartial, BatchRequest
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult
from protocol.messages.infer import InferFinal, InferPartial, InferRequest
from protocol.messages.memory import MemoryFinal, MemoryRequest
from protocol.messages.persona import MakePersona, Persona, PersonaListing, PersonaMade, PersonaQuery, PersonaView
from protocol.messages.plan import PlanFinal, PlanRequest
from protocol.messages.registry import Reload, Reloaded
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.result import (
    ArtefactQuery,
    ArtefactReply,
    Cancelled,
    CancelQuery,
    Listing,
    ListQuery,
    TaskEvent,
    TaskQuery,
    TaskState,
    TaskView,
    Watch,
)
from protocol.messages.session import ModelQuery, ModelReport, StatusReport, StatusRequest
from protocol.messages.task import Accepted, Extend, Extended, Step, Submit, TaskIR
from protocol.pieces import Pieces
from protocol.zmq_transport import ZmqDealer

_TICK_S: Final = 0.25

_BATCH_GRACE_S: Final = 2.0
"""After the deadline of a batch the hub still has to say what became of it."""

_LONGEST_S: Final = 366 * 86_400.0
"""The hub is told no later deadline than that, so that whoever waits for ever has one that a header can hold."""

M = TypeVar("M", bound=Message)


def default_address(environ: Mapping[str, str] | None = None) -> str:
    """Address of the hub of this user's stack: `$TIERLINE_HOME/run/hub.sock`, as the services choose it."""
    env = os.environ if environ is None else environ
    state = Path(env.get("XDG_STATE_HOME") or Path(env.get("HOME", "/")) / ".local" / "state")
    root = Path(env.get("TIERLINE_HOME") or state / "tierline").absolute()
    return f"ipc://{root}/run/hub.sock"


class AsyncClient:
    """One client of one hub, used as `async with AsyncClient() as tierline`; calls may run side by side.

    `address` is the hub's, by default that of `$TIERLINE_HOME`; `name` appears in the hub's logs. Entering does not
    wait for the hub: services and clients start in any order. Raises ValueError for a name or an address that is none.
    """

    def __init__(self, address: str | None = None, name: str = "client") -> None:
        self.address = address or default_address()
        self._boot = secrets.token_hex(6)
        service = f"{name}-{self._boot}"
        if _objection(Header(kind="session.hello", id=self._boot, src=service)) is not None:
            raise ValueError(f"name {name!r}: only letters, digits and _ . : - may be in it, at most 115 of them")
        self._session = s.ClientSession(service=service, pid=os.getpid(), boot=self._boot)
        self._seq = 0
        self._socket: ZmqDealer | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._unsent: deque[tuple[bytes, bytes]] = deque()
        self._answers: dict[str, Pieces] = {}

    async def __aenter__(self) -> AsyncClient:
        self._socket = ZmqDealer(self.address)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._receive_all)
        self._feed(s.Opened(_steady_ms()))
        self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Say goodbye and close the socket. Calls that are still waiting end at their deadlines."""
        if self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None
        if self._socket is not None:
            self._feed(s.Closed())
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # Tasks

    async def submit(
        self, task: TaskIR | Mapping[str, Any], *, timeout_s: float = 10, wait_if_refused: bool = False
    ) -> Accepted:
        """Hand over a task; once this returns it will be finished, whatever is killed from then on.

        The hub validates the task and names every problem (CallFailed, category SCHEMA or POLICY). A task without
        an `idempotency_key` gets a random one, so that what is repeated inside this call is one task; pass your own
        to be able to repeat the call. With `wait_if_refused`, a full hub is asked again while the time lasts.
        """
        fields = task.model_dump(mode="json", exclude_none=True) if isinstance(task, BaseModel) else dict(task)
        if not fields.get("idempotency_key"):
            fields["idempotency_key"] = secrets.token_hex(16)
        until = time.monotonic() + timeout_s
        while True:
            try:
                return await self.ask(
                    "task.submit", Submit(task=fields), Accepted, timeout_s=max(0.0, until - time.monotonic())
                )
            except CallRefused as refused:
                pause_s = max(0.01, refused.retry_after_ms / 1000)
                if not wait_if_refused or time.monotonic() + pause_s >= until:
                    raise
                await asyncio.sleep(pause_s)

    async def watch(
        self, task_id: str, *, after_seq: int = 0, timeout_s: float
    ) -> AsyncGenerator[TaskEvent | TaskView, None]:
        """Yield the events of a task after number `after_seq`, each journalled one once, then its result.

        `step.tokens` events are for progress displays: they may be joined or lost.
        """
        until = time.monotonic() + timeout_s
        with self._request("task.watch", Watch(task_id=task_id, after_seq=after_seq), timeout_s) as answers:
            while True:
                answer = await self._next(answers, "task.watch", until, timeout_s)
                if answer.ends:
                    yield _value(answer.body, TaskView)
                    return
                if isinstance(answer.body, TaskEvent):
                    yield answer.body

    async def result(self, task_id: str, timeout_s: float) -> TaskView:
        """Wait until the task has ended; `state` tells how. Raises DeadlineExceeded, and the task goes on."""
        until = time.monotonic() + timeout_s
        view = await self.show(task_id, timeout_s=timeout_s)
        if view.state.final:
            return view
        left_s = max(0.0, until - time.monotonic())
        watch = Watch(task_id=task_id, after_seq=view.last_seq, quiet=True)
        return await self.ask("task.watch", watch, TaskView, timeout_s=left_s)

    async def run(self, task: TaskIR | Mapping[str, Any], timeout_s: float) -> TaskView:
        """Submit a task, waiting while the hub is full, and wait for its result."""
        until = time.monotonic() + timeout_s
        accepted = await self.submit(task, timeout_s=timeout_s, wait_if_refused=True)
        return await self.result(accepted.task_id, max(0.0, until - time.monotonic()))

    async def show(self, task_id: str, *, timeout_s: float = 10) -> TaskView:
        """The task as it stands."""
        return await self.ask("task.show", TaskQuery(task_id=task_id), TaskView, timeout_s=timeout_s)

    async def list(self, *, limit: int = 50, states: tuple[TaskState, ...] = (), timeout_s: float = 10) -> Listing:
        """The newest tasks, all or those in the given states."""
        return await self.ask("task.list", ListQuery(limit=limit, states=[*states]), Listing, timeout_s=timeout_s)

    async def cancel(
        self, task_id: str, *, step: str | None = None, reason: str = "", timeout_s: float = 10
    ) -> Cancelled:
        """Cancel a task, or one step with all that needs it, and free what it runs on; what was finished stays."""
        query = CancelQuery(task_id=task_id, step=step, reason=reason)
        return await self.ask("task.cancel", query, Cancelled, timeout_s=timeout_s)

    async def extend(
        self, task_id: str, steps: Sequence[Step | Mapping[str, Any]], *, timeout_s: float = 10
    ) -> Extended:
        """Add steps to a running task, within its budget; they may use its artefacts and wait for its steps.

        Not repeated blindly: a step id that the task has already is refused, so asking twice adds nothing twice.
        """
        values = [step.model_dump(mode="json", exclude_none=True) if isinstance(step, Step) else step for step in steps]
        body = Extend(task_id=task_id, steps=[dict(value) for value in values])
        return await self.ask("task.extend", body, Extended, timeout_s=timeout_s)

    async def artefact(self, task_id: str, name: str, *, timeout_s: float = 10) -> Artefact:
        """One artefact of a task by name, intermediate ones included."""
        query = ArtefactQuery(task_id=task_id, name=name)
        return (await self.ask("task.artefact", query, ArtefactReply, timeout_s=timeout_s)).artefact

    # The system and its services

    async def status(self, *, timeout_s: float = 10) -> StatusReport:
        """The hub's view of the system."""
        return await self.ask("session.status", StatusRequest(), StatusReport, timeout_s=timeout_s)

    async def reload_registry(self, digest: str | None = None, *, timeout_s: float = 60) -> Reloaded:
        """Have the hub read its registry again; with a digest, only that one. Raises CallFailed with every problem."""
        return await self.ask("registry.reload", Reload(digest=digest), Reloaded, timeout_s=timeout_s)

    async def make_persona(
        self, persona: Persona, *, task_id: str | None = None, rename: bool = False, timeout_s: float = 10
    ) -> PersonaMade:
        """Have a persona from now on; steps name it as the answer says. See MakePersona.

        Raises CallFailed where it is not valid, or its name is taken by another prompt and `rename` is False.
        """
        body = MakePersona(persona=persona, task_id=task_id, rename=rename)
        return await self.ask("persona.make", body, PersonaMade, timeout_s=timeout_s)

    async def personas(self, *, timeout_s: float = 10) -> builtins.list[PersonaView]:
        """All personas, declared and made at run time, with what has become of each."""
        return (await self.ask("persona.list", PersonaQuery(), PersonaListing, timeout_s=timeout_s)).personas

    async def load_model(self, model: str, *, timeout_s: float = 10) -> ModelReport:
        """Have a warm or cold model loaded as soon as there is room; returns at once, `status` tells when it is."""
        return await self.ask("model.load", ModelQuery(model=model), ModelReport, timeout_s=timeout_s)

    async def unload_model(self, model: str, *, timeout_s: float = 10) -> ModelReport:
        """Have a warm or cold model unloaded. Raises CallFailed with `model.busy` while work needs it."""
        return await self.ask("model.unload", ModelQuery(model=model), ModelReport, timeout_s=timeout_s)

    async def infer(
        self,
        model: str,
        request: InferRequest,
        timeout_s: float,
        *,
        key: str | None = None,
        on_partial: Callable[[InferPartial], None] | None = None,
    ) -> InferFinal:
        """One generation by the model entry of that name, outside any task.

        With the same `key` a repeated call takes the place of the running one, which ends with `call.superseded`.
        `on_partial` gets the pieces of a request with `stream`; it runs in the event loop and must not block. Raises
        CallFailed with `model.unknown` for a name that the registry does not have, and what else `ask` raises.
        """

        def hand_on(piece: Message) -> None:
            if on_partial is not None and isinstance(piece, InferPartial):
                on_partial(piece)

        return await self.ask(
            "infer.request",
            request,
            InferFinal,
            timeout_s=timeout_s,
            dst=f"infer.{model}",
            key=key,
            on_piece=hand_on,
        )

    async def llm_batch(
        self,
        role: str,
        prompts: Sequence[str],
        *,
        timeout_s: float,
        max_tokens: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        grammar: str | None = None,
        concurrency: int | None = None,
        interactive: bool = False,
        key: str | None = None,
        on_progress: Callable[[BatchPartial], None] | None = None,
    ) -> BatchFinal:
        """Many prompts for one role, spread over its slots; the answers come in the order of the prompts.

        A prompt that fails has its `failure` in its place, and the others go on; so has one that is not answered within
        `timeout_s`. Waits behind interactive work unless `interactive`. `on_progress` runs in the event loop. Raises
        ValueError for what no hub would take, CallRefused while the hub has too many batches. The same batch again
        under the same `key`, while it runs, gets its answers, and whoever waited before gets CallFailed with
        `call.superseded`; another one under that key gets CallFailed with `call.key_taken`.
        """
        if isinstance(prompts, str):  # a sequence of its characters: each would be answered as a prompt of its own
            raise ValueError("prompts is one text: put it into a list")
        request = BatchRequest(
            role=role,
            prompts=[*prompts],
            max_tokens=max_tokens,
            json_schema=None if json_schema is None else dict(json_schema),
            grammar=grammar,
            concurrency=concurrency,
        )

        def hand_on(piece: Message) -> None:
            if on_progress is not None and isinstance(piece, BatchPartial):
                on_progress(piece)

        return await self.ask(
            "batch.request",
            request,
            BatchFinal,
            timeout_s=timeout_s + _BATCH_GRACE_S,
            grace_s=_BATCH_GRACE_S,
            key=key or secrets.token_hex(16),
            prio="interactive" if interactive else "batch",
            on_piece=hand_on,
        )

    async def plan(self, task: TaskIR, *, timeout_s: float) -> PlanFinal:
        """What the planner would make of a task; nothing is executed."""
        return await self.ask("plan.request", PlanRequest(task=task), PlanFinal, timeout_s=timeout_s, dst="planner")

    async def memory(self, request: MemoryRequest, *, timeout_s: float = 10) -> MemoryFinal:
        """Ask the memory service, for example what is known about a decision."""
        return await self.ask("memory.request", request, MemoryFinal, timeout_s=timeout_s, dst="memory")

    async def gates(
        self, request: GateRequest, timeout_s: float, *, cores: int | None = None
    ) -> builtins.list[GateResult]:
        """Run gates on artefacts outside any task; results in the order asked for.

        `cores` is how many its gates could use at the same time; the hub reserves one, and more if they are free.
        """
        final = await self.ask("gate.request", request, GateFinal, timeout_s=timeout_s, dst="gate", cores=cores)
        return final.results

    async def ask(
        self,
        kind: str,
        body: Message,
        final: type[M],
        *,
        timeout_s: float,
        dst: str | None = None,
        key: str | None = None,
        cores: int | None = None,
        prio: Literal["interactive", "batch"] | None = None,
        grace_s: float = 0,
        on_piece: Callable[[Message], None] | None = None,
    ) -> M:
        """Send any request and wait for its final; the methods above are this one with names.

        `dst` names the capability for a call to a service; the hub is told a deadline that is `grace_s` before ours.
        Raises CallFailed, CallRefused, DeadlineExceeded.
        """
        until = time.monotonic() + timeout_s
        with self._request(kind, body, timeout_s - grace_s, dst=dst, key=key, prio=prio, cores=cores) as answers:
            while True:
                answer = await self._next(answers, kind, until, timeout_s)
                if answer.ends:
                    return _value(answer.body, final)
                if on_piece is not None:
                    on_piece(answer.body)

    # The edge: socket, timers, queues.

    @contextmanager
    def _request(
        self,
        kind: str,
        body: Message,
        timeout_s: float,
        *,
        dst: str | None = None,
        key: str | None = None,
        cores: int | None = None,
        prio: Literal["interactive", "batch"] | None = None,
    ) -> Iterator[Pieces]:
        """An outstanding request and what is answered to it; dropped at the end."""
        if self._socket is None:
            raise RuntimeError("the client is not open: use it inside `async with AsyncClient() as …`")
        if math.isnan(timeout_s):
            raise ValueError("timeout_s is not a number")
        packed = _pack(body)
        header = Header(
            kind=kind,
            id=f"{self._boot}-{self._next_seq()}",
            dst=dst,
            key=key or (secrets.token_hex(16) if dst is not None else None),
            deadline=_now_ms() + int(min(max(0.0, timeout_s), _LONGEST_S) * 1000),
            cores=cores,
            prio=prio,
        )
        objection = _objection(header)
        if objection is not None:
            raise _unsendable("header.field", objection)
        answers = Pieces()
        self._answers[header.id] = answers
        self._feed(s.Asked(_steady_ms(), header, packed))
        try:
            yield answers
        finally:
            del self._answers[header.id]
            self._feed(s.Dropped(header.id))

    async def _next(self, answers: Pieces, kind: str, until: float, timeout_s: float) -> s.Deliver:
        """The next piece; raises DeadlineExceeded at the monotonic time `until`."""
        try:
            # Not wait_for: on Python 3.11 it can swallow a cancellation that comes together with the answer.
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                return await answers.get()
        except TimeoutError as err:
            if not self._session.joined:
                raise HubUnreachable(
                    f"no hub answered at {self.address} within {timeout_s:g} s: start it (tierline up), look at it "
                    "(tierline status), or set TIERLINE_HOME to where it runs"
                ) from err
            raise DeadlineExceeded(f"{kind} was not answered within {timeout_s:g} s; asking again is safe") from err

    def _feed(self, event: s.Event) -> None:
        for command in self._session.handle(event):
            match command:
                case s.Transmit(header, body):
                    self._transmit(header, body)
                case s.Deliver():
                    self._deliver(command)

    def _deliver(self, piece: s.Deliver) -> None:
        answers = self._answers.get(piece.id)
        if answers is not None:
            answers.put(piece)

    def _transmit(self, header: Header, body: bytes) -> None:
        seq = self._next_seq()
        filled = replace(
            header,
            id=header.id or f"{self._boot}-{seq}",
            src=self._session.service,
            epoch=self._session.epoch,
            seq=seq,
        )
        self._unsent.append((pack_header(filled), body))
        self._flush()

    def _flush(self) -> None:
        while self._unsent and self._socket is not None:
            try:
                self._socket.send(*self._unsent[0])
            except SendLater:
                return  # the next tick tries again; as many wait as this program has calls
            self._unsent.popleft()
        # Sending may swallow the signal that something arrived.
        asyncio.get_running_loop().call_soon(self._receive_all)

    def _receive_all(self) -> None:
        """Empty the socket: its descriptor signals changes only, so nothing may be left behind."""
        while self._socket is not None and (frames := self._socket.receive()) is not None:
            try:
                header = unpack_header(frames[0])
            except BadFrame:
                continue  # not a message; whoever waits for one is held to its deadline, and the hub is probed
            if len(frames) == 2:
                self._feed(s.Received(_steady_ms(), header, frames[1]))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._flush()
            self._receive_all()
            if self._socket is not None and self._socket.reconnected():
                self._feed(s.Reconnected(_steady_ms()))
            self._feed(s.Ticked(_steady_ms()))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq


def _value(body: Message, final: type[M]) -> M:
    """Turn the ending of a request into its value or its exception."""
    match body:
        case ErrorReply(failure=failure):
            raise CallFailed(failure)
        case Refused(reason=reason, retry_after_ms=retry_after_ms):
            raise CallRefused(reason, retry_after_ms)
    if not isinstance(body, final):
        raise TypeError(f"asked for {final.__name__}, but this kind of request ends in {type(body).__name__}")
    return body


def _pack(body: Message) -> bytes:
    """Encode, refusing here what the hub would not even read. Raises CallFailed."""
    try:
        packed = pack_body(body)
    except (PydanticSerializationError, TypeError, ValueError, OverflowError) as err:
        raise _unsendable("body.not_json", f"only JSON's types can be sent: {err}") from err
    if len(packed) > MAX_BODY_BYTES:
        raise _unsendable("body.too_large", f"{len(packed)} bytes, at most {MAX_BODY_BYTES} can be sent at once")
    return packed


def _objection(header: Header) -> str | None:
    """Why no hub could read this header; it would not even answer, since it cannot know to whom or what."""
    try:
        unpack_header(pack_header(header))
    except (BadFrame, TypeError, ValueError, OverflowError) as err:
        return str(err)
    return None


def _unsendable(code: str, message: str) -> CallFailed:
    return CallFailed(Failure(code=code, category=Category.POLICY, origin="client", message=message[:8_000]))


def _now_ms() -> int:
    """Unix time in milliseconds, for deadlines that other processes read."""
    return time.time_ns() // 1_000_000


def _steady_ms() -> int:
    """Milliseconds that never go back, for measuring silence."""
    return time.monotonic_ns() // 1_000_000
