"""Tasks that are over and still in memory: the newest, bounded in number and in steps. The journal has them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.scheduler.tasks import TaskRecord

_KEPT_ENDED: Final = 200
"""Ended tasks kept in memory; older ones are read from the journal when somebody asks."""
_KEPT_ENDED_STEPS: Final = 500
"""Steps of all ended tasks kept in memory: what a task occupies grows with its steps. Few, so that a large task is
gone at its end: with 5,000, a step cost the hub 1.15 times as much once older tasks made way for new ones (`tierline
bench overhead`, `history_growth`), probably since the memory of a new task then lay in the gaps that they left."""


@dataclass(slots=True)
class EndedTasks:
    """Ended tasks by id, oldest first."""

    _tasks: dict[str, TaskRecord] = field(default_factory=dict)
    _steps: int = 0

    def get(self, task_id: str) -> TaskRecord | None:
        """A task that is still here."""
        return self._tasks.get(task_id)

    def add(self, task: TaskRecord) -> None:
        """Keep a task; `evict` makes room."""
        self.pop(task.id)
        self._tasks[task.id] = task
        self._steps += len(task.steps)

    def pop(self, task_id: str) -> None:
        """Drop a task, if it is here."""
        task = self._tasks.pop(task_id, None)
        if task is not None:
            self._steps -= len(task.steps)

    def evict(self) -> None:
        """Drop the oldest until the bounds hold."""
        while len(self._tasks) > _KEPT_ENDED or (self._steps > _KEPT_ENDED_STEPS and self._tasks):
            self.pop(next(iter(self._tasks)))

    def __len__(self) -> int:
        return len(self._tasks)
