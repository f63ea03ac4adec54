"""What the engine has decided since it was last asked, in order, and which calls of each task are open because of it.

The one place where a fact meets the state: it is applied the moment it is ordered to be written, so that state and
journal cannot differ. Pure; what is decided is the engine's and its hands' business, who carries it out the machine's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler import facts as f
from services.scheduler.calls import Call
from services.scheduler.effects import Ask, Drop, Effect, Record
from services.scheduler.fold import apply
from services.scheduler.occupancy import Occupancy
from services.scheduler.own_calls import Wanted, service_call
from services.scheduler.ranks import Ranking
from services.scheduler.tasks import StepRecord, TaskRecord


@dataclass(slots=True)
class Orders:
    """See the module."""

    ranking: Ranking
    occupancy: Occupancy
    effects: list[Effect] = field(default_factory=list)
    """Whoever carries them out leaves an empty list."""
    _open: dict[str, set[str]] = field(default_factory=dict)
    """Task -> keys of its calls at the broker."""

    def emit(self, task: TaskRecord, fact: f.Fact) -> None:
        """Something has happened to a task."""
        before = len(task.steps)
        apply(task, fact)
        if len(task.steps) != before:
            self.occupancy.grew(task.id, len(task.steps))
        self.effects.append(Record(fact, task.seq))

    def ask(self, task: TaskRecord, call: Call) -> None:
        """Queue a call for a task."""
        self._open.setdefault(task.id, set()).add(call.key)
        self.effects.append(Ask(call))

    def ask_service(
        self, task: TaskRecord, step: StepRecord | None, wanted: Wanted, at_ms: int, hold_until_ms: int = 0
    ) -> None:
        """Ask a service other than inference, about one step or the whole task; not before the second time."""
        rank_s = 0.0 if step is None else self.ranking.rank_s(task, step, at_ms)
        self.ask(task, service_call(task, step, wanted, rank_s, at_ms, hold_until_ms))

    def ask_for_task(self, task: TaskRecord, wanted: Wanted, at_ms: int, hold_until_ms: int = 0) -> None:
        """The same about the whole task."""
        self.ask_service(task, None, wanted, at_ms, hold_until_ms)

    def drop(self, key: str) -> None:
        """Cancel a call, if it is still there."""
        self.effects.append(Drop(key))

    def drop_all(self, task_id: str) -> None:
        """Cancel every call of a task."""
        for key in sorted(self._open.pop(task_id, ())):
            self.effects.append(Drop(key))

    def has_ended(self, call: Call) -> None:
        """A call is over."""
        self._open.get(call.task or "", set()).discard(call.key)

    def forget(self, task_id: str) -> None:
        """The task is gone."""
        self._open.pop(task_id, None)
