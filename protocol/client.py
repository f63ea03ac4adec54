"""How a Python program uses Tierline: `AsyncClient` inside an event loop, `Client` anywhere else.

    with Client() as tierline:
        view = tierline.run({"objective": "Compare the two files", "inputs": [...]}, timeout_s=600)

Every call has a deadline, in seconds, and ends with its value or with one of

* `CallFailed`: a typed failure; `.failure.category` says whether the same call can ever succeed,
* `CallRefused`: the hub is full; nothing was accepted, `.retry_after_ms` says when to ask again,
* `DeadlineExceeded` (`HubUnreachable` where no hub was there at all): asking again is safe, see below.

A hub that is restarted in between is noticed within seconds and asked again; the caller sees nothing of it but time.
`submit` may be repeated with the same `idempotency_key`: it is one task, for 400 days after it has ended. What a
session is and how it is mended is in `protocol.client_session`; which messages there are, in `protocol/README.md`.
"""

from __future__ import annotations

import asyncio
import builtins
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from protocol.async_client import AsyncClient, default_address
from protocol.messages.artefact import Artefact
from protocol.messages.batch import BatchFinal, BatchPartial
from protocol.messages.gate import GateRequest, GateResult
from protocol.messages.infer import InferFinal, InferPartial, InferRequest
from protocol.messages.memory import MemoryFinal, MemoryRequest
from protocol.messages.persona import Persona, PersonaMade, PersonaView
from protocol.messages.plan import PlanFinal
from protocol.messages.registry import Reloaded
from protocol.messages.result import Cancelled, Listing, TaskEvent, TaskState, TaskView
from protocol.messages.session import ModelReport, StatusReport
from protocol.messages.task import Accepted, Extended, Step, TaskIR

__all__ = ["AsyncClient", "Client", "default_address"]

_CLOSE_S: Final = 2.0
T = TypeVar("T")


class Client:
    """The same calls, blocking, for programs without an event loop; used as `with Client() as tierline`.

    Its loop runs in a thread of its own, so several threads may share one client. What is called back there must not
    call the client in turn, which raises RuntimeError: it would wait for itself. It does not survive a fork: open one
    in the child. `close` takes at most 4 seconds.
    """

    def __init__(self, address: str | None = None, name: str = "client") -> None:
        self._client = AsyncClient(address, name)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tierline-client", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.__aenter__())
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye and end the thread; calls of other threads are cancelled. Closing twice does no harm."""
        if self._loop.is_closed():
            return
        self._refuse_own_thread()
        try:
            asyncio.run_coroutine_threadsafe(_shut(self._client), self._loop).result(_CLOSE_S)
        finally:
            self._stop()

    def submit(
        self, task: TaskIR | Mapping[str, Any], *, timeout_s: float = 10, wait_if_refused: bool = False
    ) -> Accepted:
        """See AsyncClient.submit."""
        return self._wait(self._client.submit(task, timeout_s=timeout_s, wait_if_refused=wait_if_refused))

    def watch(self, task_id: str, *, after_seq: int = 0, timeout_s: float) -> Iterator[TaskEvent | TaskView]:
        """See AsyncClient.watch."""
        pieces = self._client.watch(task_id, after_seq=after_seq, timeout_s=timeout_s)
        try:
            while (piece := self._wait(_next_or_none(pieces))) is not None:
                yield piece
        finally:
            self._wait(_end(pieces))

    def result(self, task_id: str, timeout_s: float) -> TaskView:
        """See AsyncClient.result."""
        return self._wait(self._client.result(task_id, timeout_s))

    def run(self, task: TaskIR | Mapping[str, Any], timeout_s: float) -> TaskView:
        """See AsyncClient.run."""
        return self._wait(self._client.run(task, timeout_s))

    def show(self, task_id: str, *, timeout_s: float = 10) -> TaskView:
        """See AsyncClient.show."""
        return self._wait(self._client.show(task_id, timeout_s=timeout_s))

    def list(self, *, limit: int = 50, states: tuple[TaskState, ...] = (), timeout_s: float = 10) -> Listing:
        """See AsyncClient.list."""
        return self._wait(self._client.list(limit=limit, states=states, timeout_s=timeout_s))

    def cancel(self, task_id: str, *, step: str | None = None, reason: str = "", timeout_s: float = 10) -> Cancelled:
        """See AsyncClient.cancel."""
        return self._wait(self._client.cancel(task_id, step=step, reason=reason, timeout_s=timeout_s))

    def extend(self, task_id: str, steps: Sequence[Step | Mapping[str, Any]], *, timeout_s: float = 10) -> Extended:
        """See AsyncClient.extend."""
        return self._wait(self._client.extend(task_id, steps, timeout_s=timeout_s))

    def artefact(self, task_id: str, name: str, *, timeout_s: float = 10) -> Artefact:
        """See AsyncClient.artefact."""
        return self._wait(self._client.artefact(task_id, name, timeout_s=timeout_s))

    def status(self, *, timeout_s: float = 10) -> StatusReport:
        """See AsyncClient.status."""
        return self._wait(self._client.status(timeout_s=timeout_s))

    def reload_registry(self, digest: str | None = None, *, timeout_s: float = 60) -> Reloaded:
        """See AsyncClient.reload_registry."""
        return self._wait(self._client.reload_registry(digest, timeout_s=timeout_s))

    def make_persona(
        self, persona: Persona, *, task_id: str | None = None, rename: bool = False, timeout_s: float = 10
    ) -> PersonaMade:
        """See AsyncClient.make_persona."""
        return self._wait(self._client.make_persona(persona, task_id=task_id, rename=rename, timeout_s=timeout_s))

    def personas(self, *, timeout_s: float = 10) -> builtins.list[PersonaView]:
        """See AsyncClient.personas."""
        return self._wait(self._client.personas(timeout_s=timeout_s))

    def load_model(self, model: str, *, timeout_s: float = 10) -> ModelReport:
        """See AsyncClient.load_model."""
        return self._wait(self._client.load_model(model, timeout_s=timeout_s))

    def unload_model(self, model: str, *, timeout_s: float = 10) -> ModelReport:
        """See AsyncClient.unload_model."""
        return self._wait(self._client.unload_model(model, timeout_s=timeout_s))

    def infer(
        self,
        model: str,
        request: InferRequest,
        timeout_s: float,
        *,
        key: str | None = None,
        on_partial: Callable[[InferPartial], None] | None = None,
    ) -> InferFinal:
        """See AsyncClient.infer; `on_partial` runs in the client's thread."""
        return self._wait(self._client.infer(model, request, timeout_s, key=key, on_partial=on_partial))

    def gates(self, request: GateRequest, timeout_s: float, *, cores: int | None = None) -> builtins.list[GateResult]:
        """See AsyncClient.gates."""
        return self._wait(self._client.gates(request, timeout_s, cores=cores))

    def llm_batch(
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
        """See AsyncClient.llm_batch; `on_progress` runs in the client's thread."""
        call = self._client.llm_batch(
            role,
            prompts,
            timeout_s=timeout_s,
            max_tokens=max_tokens,
            json_schema=json_schema,
            grammar=grammar,
            concurrency=concurrency,
            interactive=interactive,
            key=key,
            on_progress=on_progress,
        )
        return self._wait(call)

    def plan(self, task: TaskIR, *, timeout_s: float) -> PlanFinal:
        """See AsyncClient.plan."""
        return self._wait(self._client.plan(task, timeout_s=timeout_s))

    def memory(self, request: MemoryRequest, *, timeout_s: float = 10) -> MemoryFinal:
        """See AsyncClient.memory."""
        return self._wait(self._client.memory(request, timeout_s=timeout_s))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a call in the thread; the call itself keeps the deadline. An interrupt cancels it."""
        try:
            self._refuse_own_thread()
            if self._loop.is_closed():
                raise RuntimeError("this client is closed")
        except RuntimeError:
            call.close()
            raise
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _refuse_own_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback cannot call its own client: hand what it was told to another thread")

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _shut(client: AsyncClient) -> None:
    """Close, and end what still waits: once the loop stops, nobody would ever wake it."""
    await client.close()
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def _next_or_none(pieces: AsyncGenerator[TaskEvent | TaskView, None]) -> TaskEvent | TaskView | None:
    return await anext(pieces, None)


async def _end(pieces: AsyncGenerator[TaskEvent | TaskView, None]) -> None:
    await pieces.aclose()
