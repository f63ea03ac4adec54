"""Tells memory what became of a task's decisions, and lets the task go when memory has it.

Exactly once as far as the hub can see: the request's key follows from the task, so a repeat is the same call, and
memory counts each decision's outcome once. Pure; what a failure of memory leads to is the failure table's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.codec import pack_body, unpack_body
from protocol.messages.failure import Failure
from protocol.messages.memory import MemoryFinal
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.outcomes import UNEMBEDDABLE, outcomes_of
from services.scheduler.own_calls import Wanted
from services.scheduler.personas import Personas
from services.scheduler.tasks import TaskRecord

MEMORY: Final = "memory"


@dataclass(slots=True)
class Settling:
    """See the module. `registry` gives the one in force."""

    personas: Personas
    registry: Callable[[], Registry]
    emit: Callable[[TaskRecord, f.Fact], None]
    ask: Callable[[TaskRecord, Wanted, int, int], None]
    """Queue a call about the task; not before the second time."""
    failed: Callable[[TaskRecord, Failure, int], None]
    """Memory could not take it."""
    let_go: Callable[[TaskRecord], None]
    """The task is over for good, or for now."""
    may_wait: Callable[[str], bool]
    """Whether this ended task has a place beside the others."""
    waiting: set[str] = field(default_factory=set)
    """Ended tasks whose outcomes are on their way to memory."""
    deferred: bool = False
    """Some ended tasks are only in the journal and still to be told to memory."""

    def begin(self, task: TaskRecord, at_ms: int, hold_until_ms: int = 0, *, with_episode: bool = True) -> None:
        """Tell memory; a task with nothing to learn from is settled at once."""
        request = outcomes_of(task, self.registry(), with_episode=with_episode)
        if request is None:
            self.end(task, 0, "nothing to learn", at_ms)
            return
        if task.id not in self.waiting and not self.may_wait(task.id):
            self.deferred = True  # memory is away for long: the journal keeps it, and it is restored later
            self._let_go(task)
            return
        self.waiting.add(task.id)
        parts = ("outcomes", "episode" if with_episode else "bare")
        self.ask(task, Wanted("memory.request", MEMORY, parts, pack_body(request)), at_ms, hold_until_ms)

    def on_answer(self, task: TaskRecord, body: bytes, failure: Failure | None, at_ms: int) -> None:
        """Memory has stored it, or not. Raises BadFrame for an answer that cannot be read."""
        if failure is None:
            self.end(task, unpack_body(MemoryFinal, body).stored, "", at_ms)
        elif failure.code == UNEMBEDDABLE and task.plan is not None and task.plan.decisions:
            self.begin(task, at_ms, with_episode=False)  # the outcomes still teach
        else:
            self.failed(task, failure, at_ms)

    def end(self, task: TaskRecord, stored: int, reason: str, at_ms: int) -> None:
        """Nothing more will be told: `stored` outcomes are in memory, or there is a reason why not."""
        self.emit(task, f.OutcomesSettled(task=task.id, at_ms=at_ms, stored=stored, reason=reason))
        if task.personas and stored:
            self.personas.settled()
        self._let_go(task)

    def _let_go(self, task: TaskRecord) -> None:
        self.waiting.discard(task.id)
        self.let_go(task)
