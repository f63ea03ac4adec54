"""The service of one model entry: takes calls from the hub, hands them to the engine, sees that slots get free.

One slot of the engine is one credit. A call's credit goes back to the hub when its handler ends, so a handler that is
cancelled or late ends only when its slot is free. How the engine is kept alive is `supervisor`'s business, what one
answer is made of `generation`'s.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from protocol.errors import CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal, InferRequest
from services.inference.generation import FIGURES, Generation
from services.inference.llama_http import LlamaServer
from services.inference.noop import noop_handler
from services.inference.supervisor import EngineSupervisor
from services.kit import children
from services.kit.config import Home
from services.kit.following import RegistryFollower
from services.kit.registry import Registry
from services.kit.registry.launch import Launch
from services.kit.service import Call, Service

if TYPE_CHECKING:
    from services.inference.remote import RemoteEngine

_LONGEST_CALL_S: Final = 3_600.0
"""Bound for a call without a deadline; the hub always sets one."""


def service_name(model: str) -> str:
    """Name of the process that serves a model entry."""
    return f"inference-{model}"


class InferenceService:
    """One entry of models.yaml as a peer of the hub."""

    def __init__(self, home: Home, registry: Registry, launch: Launch) -> None:
        self._registry = registry
        self._launch = launch
        self._entry = entry = launch.entry
        self._service = Service(home, service_name(entry.name), (f"infer.{entry.name}",), slots=entry.slots)
        self._engine: EngineSupervisor | RemoteEngine | None = None
        self._service.follower = RegistryFollower(home, self._service.log, registry, self._take_up)
        self._leaving: asyncio.Task[None] | None = None
        self._wanted_again = asyncio.Event()
        self._figures: Counter[str] = Counter(dict.fromkeys(FIGURES, 0))

    async def run(self) -> int:
        """Serve until SIGTERM; returns the exit status."""
        service = self._service
        if self._entry.engine == "noop":
            service.metrics = lambda: {"engine": "noop"}
            service.answer("infer.request", noop_handler(self._entry.name))
            return await service.run()
        engine: EngineSupervisor | RemoteEngine
        if self._entry.engine == "openai":
            # Here, for its HTTP library costs every start 50 ms and 10 MB, and no engine of our own needs it.
            from services.inference.remote import RemoteEngine

            engine = RemoteEngine(self._entry, service.home, service.clock, service.log, service.set_state)
        else:
            engine = EngineSupervisor(
                self._registry, self._launch, service.home, service.clock, service.log, service.set_state
            )
            service.model_bytes = engine.model_bytes
            service.needs_bytes = engine.needs_bytes
            service.on_residence = engine.reside
        self._engine = engine
        service.metrics = lambda: {**engine.figures(), **self._figures}
        service.resident_bytes = lambda: children.resident_bytes(os.getpid()) + engine.child_bytes()
        service.answer("infer.request", self._infer)
        try:
            if self._entry.residency == "hot":
                status = await service.run(engine.start)
            else:
                await engine.start()  # PARKED at once, so that the first HELLO says so
                status = await service.run()
        finally:
            await engine.stop()
        return 1 if engine.crashed else status

    def _take_up(self, registry: Registry, needed: bool) -> bool:
        """Stay if our entry is what it was; else drain, then begin anew with the new one, or wait to be stopped."""
        entry = registry.models.get(self._entry.name)
        if self._leaving is not None:
            if entry is not None:
                self._wanted_again.set()
            return False
        if entry is not None and registry.launch(entry.name).same_as(self._launch):
            if isinstance(self._engine, EngineSupervisor):
                self._engine.needs.registry = registry
            return True
        if entry is None and needed:
            return False  # running work still uses it; the hub will say when they have ended
        self._leaving = asyncio.get_running_loop().create_task(self._leave(begin_anew=entry is not None))
        return False

    async def _leave(self, *, begin_anew: bool) -> None:
        """Finish what is here, then give the memory back."""
        service = self._service
        if service.follower is not None:
            service.follower.let_go()
        if begin_anew and service.home.supervised:
            await service.leave("its entry in models.yaml has changed: it begins anew when its calls have ended")
            service.end("registry")
            return
        if begin_anew:
            await service.leave("its entry in models.yaml has changed: start it again, since nobody else does")
        else:
            await service.leave("its entry has left models.yaml: it ends when its calls have ended")
        if self._engine is not None:
            await self._engine.stop()
        await self._wanted_again.wait()  # the entry is back before anybody has stopped us
        if service.home.supervised:
            service.end("registry")

    async def _infer(self, call: Call) -> InferFinal:
        request = call.read(InferRequest)
        engine = self._engine
        if engine is not None and not isinstance(engine, EngineSupervisor):
            return await self._infer_elsewhere(call, request, engine)
        server = await self._server(call, engine)
        if engine is None or server is None:
            reason = engine.reason if engine is not None else None
            raise self._failed(
                "engine.not_ready", Category.RESOURCE, reason or "the model is not loaded; try again later"
            )
        return await self._infer_here(call, request, engine, server)

    def _generation(
        self, request: InferRequest, engine: EngineSupervisor | RemoteEngine, left_s: float | None
    ) -> Generation:
        return Generation(
            request,
            service=self._service.name,
            model=self._entry.name,
            engine=engine.engine_name,
            due_s=None if left_s is None else asyncio.get_running_loop().time() + left_s,
            figures=self._figures,
            calls=lambda: engine.calls,
        )

    async def _infer_here(
        self, call: Call, request: InferRequest, engine: EngineSupervisor, server: LlamaServer
    ) -> InferFinal:
        left_s = call.seconds_left(self._service.clock.now_ms())
        generation = self._generation(request, engine, left_s)
        key = call.header.key or ""
        seat, final = None, None

        def progressed() -> None:
            if not generation.begun:
                engine.desk.begun(key)
            engine.progressed()

        engine.calls += 1
        running = engine.modes.began()
        try:
            async with asyncio.timeout(_LONGEST_CALL_S if left_s is None else left_s):
                seat = await engine.desk.enter(key, request.messages, server, watched=request.stream)
                final = await generation.run(seat.server, call.partial, progressed)
            return seat.true_figures(final)
        except TimeoutError as err:
            raise self._late(generation.spent_tokens) from err
        finally:
            engine.calls -= 1
            try:
                if not generation.complete:
                    await _to_its_end(engine.free_slot(server))
            finally:
                engine.desk.leave(key, seat, final, complete=generation.complete)
                engine.modes.ended(running, final)

    async def _infer_elsewhere(self, call: Call, request: InferRequest, engine: RemoteEngine) -> InferFinal:
        """A server elsewhere frees its slot when the stream is closed, and nobody here can see whether it has."""
        left_s = call.seconds_left(self._service.clock.now_ms())
        generation = self._generation(request, engine, left_s)
        engine.calls += 1
        try:
            async with asyncio.timeout(_LONGEST_CALL_S if left_s is None else left_s):
                return await generation.run(engine, call.partial, engine.progressed)
        except TimeoutError as err:
            raise self._late(generation.spent_tokens) from err
        finally:
            engine.calls -= 1

    async def _server(self, call: Call, engine: EngineSupervisor | None) -> LlamaServer | None:
        """The engine's API; waits, within the deadline, where the engine is only changing its mode."""
        try:
            left_s = call.seconds_left(self._service.clock.now_ms())
            async with asyncio.timeout(_LONGEST_CALL_S if left_s is None else left_s):
                return None if engine is None else await engine.serving()
        except TimeoutError as err:
            raise self._late() from err

    def _late(self, generated_tokens: int = 0) -> CallFailed:
        message = f"the deadline passed while {self._entry.name} was generating"
        return self._failed("call.deadline", Category.TIMEOUT, message, generated_tokens=generated_tokens)

    def _failed(self, code: str, category: Category, message: str, **evidence: Any) -> CallFailed:
        failure = Failure(code=code, category=category, origin=self._service.name, message=message, evidence=evidence)
        return CallFailed(failure)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Do this whoever cancels the call meanwhile: a deadline that has passed here has passed for the hub as well, whose
    cancel comes then, and a slot that was given back too early would still be decoding for nobody."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as err:
            cancelled = err
    task.result()
    if cancelled is not None:
        raise cancelled
