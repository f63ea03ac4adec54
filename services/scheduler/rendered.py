"""Large tasks as clients see them, in bytes, made a part at a time and kept as long as nothing changes.

A view of a thousand steps takes tens of milliseconds, in which nobody else is served. So steps are encoded a few at a
time, and what was encoded is used again until a fact changes that step (`StepRecord.changed`), which for a step that
is over is never. The bytes are those of `pack_body(view(task))`. Pure; whom they are for and when the next part is
made is `showing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from msgspec import Raw

from protocol.codec import pack_body
from protocol.messages.result import CriticalPath
from services.scheduler.critical_path import critical_path_in_parts
from services.scheduler.parts import Parts
from services.scheduler.tasks import TaskRecord
from services.scheduler.views import frame, step_view

ATTEMPTS_AT_ONCE: Final = 32
"""Attempts that are encoded in one part, some 0.05 ms each; a step without any counts as one."""
_KEPT_BYTES: Final = 16 * 1024 * 1024
"""Of all tasks together; one task may have more while nobody asks for another."""


@dataclass(slots=True)
class _Kept:
    steps: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Step -> its `changed` when it was encoded, and its bytes."""
    size_bytes: int = 0
    report: CriticalPath | None = None
    """Once the task has ended: nothing in it changes any more."""


@dataclass(slots=True)
class Rendered:
    """See the module."""

    _tasks: dict[str, _Kept] = field(default_factory=dict)
    """By id, what was asked for last at the end. A task that was read from the journal again is the same task."""
    _bytes: int = 0

    def body_in_parts(self, task: TaskRecord) -> Parts[dict[str, object]]:
        """The fields of the view, as they are when the last part is made; let others be served after each of the rest.

        It comes to an end, since a task has only so many facts, and all is made anew that changes meanwhile.
        """
        kept = self._take(task.id)
        while not self._render(task, kept):
            yield
        if task.ended_ms is not None and kept.report is None:
            kept.report = yield from critical_path_in_parts(task)
            yield
        values = frame(task, kept.report).model_dump(mode="json", exclude_none=True)
        return values | {"steps": [Raw(kept.steps[name][1]) for name in task.steps]}

    def _take(self, task_id: str) -> _Kept:
        kept = self._tasks.pop(task_id, None) or _Kept()
        self._tasks[task_id] = kept
        return kept

    def _render(self, task: TaskRecord, kept: _Kept) -> bool:
        """Encode some of the steps that have changed; True if there are no more."""
        room = ATTEMPTS_AT_ONCE
        for name, step in task.steps.items():
            before = kept.steps.get(name)
            if before is not None and before[0] == step.changed:
                continue
            if room <= 0:
                return False
            room -= len(step.attempts) or 1
            data = pack_body(step_view(step))
            kept.steps[name] = step.changed, data
            self._grow(kept, len(data) - (0 if before is None else len(before[1])))
        return True

    def _grow(self, kept: _Kept, more_bytes: int) -> None:
        kept.size_bytes += more_bytes
        self._bytes += more_bytes
        while self._bytes > _KEPT_BYTES and len(self._tasks) > 1:
            self._bytes -= self._tasks.pop(next(iter(self._tasks))).size_bytes
