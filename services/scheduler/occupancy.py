"""What tasks occupy of the hub's memory, by client, and which further ones have a place. Pure bookkeeping.

A place for a task says little: one has three steps, the next a thousand, or megabytes of inputs. So they are weighed as
well: what was sent to submit one, and for each of its steps what the hub keeps about it. Models' answers are not in it,
which come at the pace of models and count against a task's own budget. When whoever was refused should come again is
measured in `admission.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from protocol.messages.task import TaskIR
from services.scheduler.tasks import TaskRecord

MAX_ACTIVE_TASKS: Final = 2_000
"""Tasks that are not over. Of these, as of the bytes below, nobody may have more than are left for the others: one
client alone gets half of them, two a third each, and a newcomer finds a place."""
MAX_ACTIVE_BYTES: Final = 1024 * 1024 * 1024
"""What they weigh together."""
STEP_BYTES: Final = 6_500
"""What one step that is done adds to the hub's resident memory, measured with fan-outs of a thousand."""
SENT_COPIES: Final = 2
"""How often the hub has what was sent: as it was submitted, and as the planner gave it back."""
MAX_UNSETTLED: Final = 200
"""Ended tasks that wait for memory at once; further ones wait in the journal."""
MAX_UNSETTLED_BYTES: Final = 64 * 1024 * 1024
"""What these may weigh before one more comes in."""


@dataclass(slots=True)
class _Held:
    client: str
    sent_bytes: int
    steps: int
    over: bool = False

    @property
    def weight(self) -> int:
        """In bytes."""
        return self.sent_bytes * SENT_COPIES + self.steps * STEP_BYTES


@dataclass(slots=True)
class Occupancy:
    """Every task in `Engine.live`."""

    active: Counter[str] = field(default_factory=Counter)
    """Client -> its tasks that are not over. Clients without any leave no trace: they come and go under new names."""
    _held: dict[str, _Held] = field(default_factory=dict)
    _bytes: Counter[str] = field(default_factory=Counter)
    """Client -> what its tasks weigh that are not over."""
    _all_bytes: int = 0
    _unsettled: int = 0
    _unsettled_bytes: int = 0

    def objection(self, client: str, sent_bytes: int, steps: int) -> str | None:
        """Why a further task of this client has no place; None if it has one."""
        active, own = self.active.total(), self.active[client]
        if own >= MAX_ACTIVE_TASKS - active:
            return f"{active} tasks are active, {own} of them yours"
        own_bytes = self._bytes[client]
        if own_bytes + _Held(client, sent_bytes, steps).weight > MAX_ACTIVE_BYTES - self._all_bytes:
            return (
                f"active tasks hold {_mib(self._all_bytes)} of {_mib(MAX_ACTIVE_BYTES)} MiB of the hub's memory, "
                f"yours {_mib(own_bytes)}; one client alone may have half, and each step counts as {STEP_BYTES:,} bytes"
            )
        return None

    def took(self, task_id: str, client: str, sent_bytes: int, steps: int) -> None:
        """A task that is not over is here, or still here."""
        self.gone(task_id)
        held = self._held[task_id] = _Held(client, sent_bytes, steps)
        self.active[client] += 1
        self._book(held, held.weight)

    def grew(self, task_id: str, steps: int) -> None:
        """A task has so many steps now."""
        held = self._held.get(task_id)
        if held is not None and not held.over:
            before = held.weight
            held.steps = max(steps, held.steps)
            self._book(held, held.weight - before)

    def over(self, task_id: str) -> None:
        """A task has ended; it stays until memory has been told."""
        held = self._held.get(task_id)
        if held is not None and not held.over:
            self._leave(held)
            held.over = True
            self._unsettled += 1
            self._unsettled_bytes += held.weight

    def gone(self, task_id: str) -> int:
        """A task is no longer here; returns what it weighed."""
        held = self._held.pop(task_id, None)
        if held is None:
            return 0
        if held.over:
            self._unsettled -= 1
            self._unsettled_bytes -= held.weight
        else:
            self._leave(held)
        return held.weight

    def may_wait(self, task_id: str) -> bool:
        """Whether there was room for an ended task beside the others that wait for memory, whatever it weighs."""
        others = self._unsettled_bytes - self._held[task_id].weight
        return self._unsettled <= MAX_UNSETTLED and others < MAX_UNSETTLED_BYTES

    @property
    def has_room(self) -> bool:
        """A task that waits in the journal may come back. Half of the room is kept for those that end meanwhile."""
        return self._unsettled < MAX_UNSETTLED // 2 and self._unsettled_bytes < MAX_UNSETTLED_BYTES // 2

    def check_invariants(self, live: Collection[TaskRecord]) -> None:
        """Raise AssertionError if this is not about the tasks that are live; called by tests after every event."""
        if self.active != Counter(task.client for task in live if not task.state.final):
            raise AssertionError(f"other tasks are active than these: {self.active}")
        if {task.id: (task.state.final, max(len(task.steps), self._held[task.id].steps)) for task in live} != {
            name: (held.over, held.steps) for name, held in self._held.items()
        }:
            raise AssertionError(f"what is held does not agree with the tasks: {self._held}")
        active = [held for held in self._held.values() if not held.over]
        if self._all_bytes != sum(held.weight for held in active) or self._all_bytes != self._bytes.total():
            raise AssertionError("what active tasks weigh does not add up")
        over = [held.weight for held in self._held.values() if held.over]
        if (self._unsettled, self._unsettled_bytes) != (len(over), sum(over)):
            raise AssertionError("what waits for memory does not add up")

    def _book(self, held: _Held, weight: int) -> None:
        self._bytes[held.client] += weight
        self._all_bytes += weight

    def _leave(self, held: _Held) -> None:
        self._book(held, -held.weight)
        self.active[held.client] -= 1
        if not self.active[held.client]:
            del self.active[held.client], self._bytes[held.client]


def steps_in(ir: TaskIR) -> int:
    """How many steps a task comes with, before anybody has planned it."""
    return 0 if ir.plan is None else len(ir.plan.steps)


def _mib(size: int) -> str:
    return f"{size / 1024**2:,.0f}"
