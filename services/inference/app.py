"""The service of one model entry: takes calls from the hub, hands them to the engine, sees that slots get free.

One slot of the engine is one credit. A call's credit goes back to the hub when its handler ends, so a handler that is
cancelled or late ends only when its slot is free. How the engine is kept alive is `supervisor`'s business, what one
answer is made of `generation`'s.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from typing import Final

from protocol.errors import CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal, InferRequest
from services.inference.generation import FIGURES, Generation
from services.inference.noop import noop_handler
from services.inference.supervisor import EngineSupervisor
from services.kit import children
from services.kit.config import Home
from services.kit.registry import ModelEntry
from services.kit.service import Call, Service

_LONGEST_CALL_S: Final = 3_600.0
"""Bound for a call without a deadline; the hub always sets one."""


def service_name(model: str) -> str:
    """Name of the process that serves a model entry."""
    return f"inference-{model}"


class InferenceService:
    """One entry of models.yaml as a peer of the hub."""

    def __init__(self, home: Home, entry: ModelEntry) -> None:
        self._entry = entry
        self._service = Service(
            home,
            service_name(entry.name),
            (f"infer.{entry.name}",),
            slots=entry.slots,
            load_deadline_s=entry.load_deadline_s,
        )
        self._engine: EngineSupervisor | None = None
        self._figures: Counter[str] = Counter(dict.fromkeys(FIGURES, 0))

    async def run(self) -> int:
        """Serve until SIGTERM; returns the exit status."""
        service = self._service
        if self._entry.engine == "noop":
            service.metrics = lambda: {"engine": "noop"}
            service.answer("infer.request", noop_handler(self._entry.name))
            return await service.run()
        engine = EngineSupervisor(self._entry, service.home, service.clock, service.log, service.set_state)
        self._engine = engine
        service.metrics = lambda: {**engine.figures(), **self._figures}
        service.resident_bytes = lambda: children.resident_bytes(os.getpid()) + engine.child_bytes()
        service.answer("infer.request", self._infer)
        try:
            status = await service.run(engine.start)
        finally:
            await engine.stop()
        return 1 if engine.crashed else status

    async def _infer(self, call: Call) -> InferFinal:
        request = call.read(InferRequest)
        engine = self._engine
        server = engine.server if engine is not None else None
        if engine is None or server is None:
            reason = engine.reason if engine is not None else None
            raise self._failed("engine.not_ready", Category.RESOURCE, reason or "the model is loading; try again later")
        left_s = call.seconds_left(self._service.clock.now_ms())
        generation = Generation(
            request,
            service=self._service.name,
            model=self._entry.name,
            engine=engine.engine_name,
            left_s=left_s,
            figures=self._figures,
        )
        engine.calls += 1
        try:
            async with asyncio.timeout(_LONGEST_CALL_S if left_s is None else left_s):
                return await generation.run(server, call.partial, engine.progressed)
        except TimeoutError as err:
            message = f"the deadline passed while {self._entry.name} was generating"
            raise self._failed("call.deadline", Category.TIMEOUT, message) from err
        finally:
            engine.calls -= 1
            if not generation.complete:
                await engine.free_slot(server)

    def _failed(self, code: str, category: Category, message: str) -> CallFailed:
        return CallFailed(Failure(code=code, category=category, origin=self._service.name, message=message))
