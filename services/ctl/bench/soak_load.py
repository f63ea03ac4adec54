"""Clients under full load for `bench soak`: each keeps a window of small tasks under way and keeps its own books.

A client honours `refused`, repeats a submit whose answer was lost under the same key, and waits for every task that was
accepted. It knows nothing of kills: what it sees of them is time.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

from protocol.async_client import AsyncClient
from protocol.errors import CallRefused, DeadlineExceeded
from protocol.messages.result import TaskState, TaskView

WINDOW: Final = 4
"""Tasks that one client has under way."""
_SUBMIT_S: Final = 5.0
_RESULT_S: Final = 10.0
#: Two workers, a join elsewhere, a continuation: every tier takes part, and some steps wait for others.
_STEPS: Final[tuple[dict[str, Any], ...]] = (
    {"id": "S1", "actor": "worker", "outputs": [{"name": "one"}]},
    {"id": "S2", "actor": "worker", "outputs": [{"name": "two"}]},
    {"id": "S3", "actor": "writer", "inputs": ["one", "two"], "outputs": [{"name": "both"}]},
    {"id": "S4", "actor": "coder", "inputs": ["both"], "outputs": [{"name": "end"}]},
)


@dataclass(slots=True)
class LoadClient:
    """One client in a thread of its own; read its books after `join`."""

    address: str
    number: int
    accepted: dict[str, str] = field(default_factory=dict)
    """Task id -> idempotency key of what the hub has promised to finish."""
    states: Counter[str] = field(default_factory=Counter)
    """How the accepted tasks ended."""
    wrong: list[str] = field(default_factory=list)
    """Results that are not exactly what the plan makes."""
    refused: int = 0
    replies_s: list[float] = field(default_factory=list)
    """Unix time of every reply."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _until_s: float = float("inf")

    def start(self) -> None:
        """Begin to submit."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()), name=f"load-{self.number}")
        self._thread.start()

    def drain(self, within_s: float) -> None:
        """Submit nothing new; wait so long for what was accepted."""
        self._until_s = time.monotonic() + within_s
        self._stop.set()

    def join(self) -> None:
        """Wait for the end; bounded by the time given to `drain`, and one call."""
        if self._thread is not None:
            self._thread.join()

    async def _work(self) -> None:
        async with AsyncClient(self.address, name=f"soak-{self.number}") as client:
            await asyncio.gather(*(self._lane(client, lane) for lane in range(WINDOW)))

    async def _lane(self, client: AsyncClient, lane: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            key = f"soak-{self.number}-{lane}-{count}"
            task_id = await self._submit(client, key)
            if task_id is not None:
                await self._finish(client, task_id)

    async def _submit(self, client: AsyncClient, key: str) -> str | None:
        """Until it is accepted; None when the drain began and nothing was promised.

        An unanswered submit is asked again during the drain too, so that its promise is in the books.
        """
        steps = [{"action": "answer", "gates": [], **step} for step in _STEPS]
        task = {"idempotency_key": key, "objective": f"Soak {key}.", "plan": {"steps": steps}}
        while time.monotonic() < self._until_s:
            try:
                accepted = await client.submit(task, timeout_s=_SUBMIT_S)
            except CallRefused as full:
                self.refused += 1
                if self._stop.is_set():
                    return None
                # Spread, as any polite client does: all of them were told the same time.
                await asyncio.sleep(full.retry_after_ms / 1000 * (1 + random.random()))  # noqa: S311  jitter
            except DeadlineExceeded:
                continue
            else:
                self.replies_s.append(time.time())
                self.accepted[accepted.task_id] = key
                return accepted.task_id
        return None

    async def _finish(self, client: AsyncClient, task_id: str) -> None:
        while time.monotonic() < self._until_s:
            try:
                view = await client.result(task_id, _RESULT_S)
            except DeadlineExceeded:
                continue
            except CallRefused as full:
                self.refused += 1
                await asyncio.sleep(full.retry_after_ms / 1000)
                continue
            self.replies_s.append(time.time())
            self.states[view.state.value] += 1
            self._check(view)
            return

    def _check(self, view: TaskView) -> None:
        if view.state is TaskState.SUCCEEDED and {one.name for one in view.artefacts} != {"end"}:
            self.wrong.append(f"{view.task_id}: artefacts {[one.name for one in view.artefacts]}")
