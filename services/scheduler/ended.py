"""Tasks that are over and still in memory: the newest, bounded in number and weight. The journal has them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.scheduler.tasks import TaskRecord

_KEPT_ENDED: Final = 200
"""Ended tasks kept in memory; older ones are read from the journal when somebody asks."""
_KEPT_BYTES: Final = 4 * 1024 * 1024
"""What all ended tasks in memory may weigh (`occupancy.py`). Little, so that a large task is gone at its end: with ten
times as much a step cost the hub 1.15 times as much once older tasks made way for new ones (`tierline bench overhead`,
`history_growth`), probably since the memory of a new task then lay in the gaps that they left."""


@dataclass(slots=True)
class EndedTasks:
    """Ended tasks by id, oldest first."""

    _tasks: dict[str, tuple[TaskRecord, int]] = field(default_factory=dict)
    """With what they weigh."""
    _bytes: int = 0

    def get(self, task_id: str) -> TaskRecord | None:
        """A task that is still here."""
        kept = self._tasks.get(task_id)
        return None if kept is None else kept[0]

    def add(self, task: TaskRecord, weight: int) -> None:
        """Keep a task, which weighs so many bytes without its answers; `evict` makes room."""
        self.pop(task.id)
        sent = {one.name for one in task.ir.inputs}
        answers = (one.value for name, one in task.artefacts.items() if name not in sent)
        weight += sum(len(value) for value in answers if isinstance(value, str))
        self._tasks[task.id] = task, weight
        self._bytes += weight

    def pop(self, task_id: str) -> None:
        """Drop a task, if it is here."""
        kept = self._tasks.pop(task_id, None)
        if kept is not None:
            self._bytes -= kept[1]

    def evict(self) -> None:
        """Drop the oldest until the bounds hold."""
        while len(self._tasks) > _KEPT_ENDED or (self._bytes > _KEPT_BYTES and self._tasks):
            self.pop(next(iter(self._tasks)))

    def __len__(self) -> int:
        return len(self._tasks)
