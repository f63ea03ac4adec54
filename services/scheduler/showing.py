"""Who waits for a task's view, and when the next part of it is made.

Small tasks are answered at once. A large one is made in parts (`rendered.py`): after each part everybody else is served
(`ServeOthers`), so that a view delays no step by more than a few ms. One task is made at a time, in the order in which
they were asked for, and once for all that wait for it: each gets the view as it is when the last part is made, whole
and of one moment. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from protocol.codec import pack_body, pack_map
from protocol.header import Header
from services.scheduler.events import OthersServed, ServeOthers
from services.scheduler.outbox import Outbox
from services.scheduler.parts import Parts
from services.scheduler.rendered import ATTEMPTS_AT_ONCE, Rendered
from services.scheduler.tasks import TaskRecord
from services.scheduler.unread import RETRY_AFTER_MS
from services.scheduler.views import view

MOST_AWAITED: Final = 64
"""Views of large tasks that one client may ask for at once; results at the end of a watch are not among them."""

Kind = Literal["task.detail", "task.result"]


@dataclass(slots=True)
class _Making:
    task: TaskRecord
    parts: Parts[dict[str, object]]
    askers: list[tuple[bytes, Header, Kind]] = field(default_factory=list)


@dataclass(slots=True)
class Showing:
    """See the module."""

    outbox: Outbox
    waiting: Callable[[TaskRecord, int], list[str]]
    """Why what could run does not, at this time; empty for a task that has ended."""
    _rendered: Rendered = field(default_factory=Rendered)
    _making: dict[str, _Making] = field(default_factory=dict)
    """By task, in the order in which they were asked for."""

    def detail(self, identity: bytes, header: Header, task: TaskRecord, at_ms: int) -> None:
        """Answer `task.show`."""
        self._asked(identity, header, "task.detail", task, at_ms)

    def result(self, identity: bytes, header: Header, task: TaskRecord) -> None:
        """Answer a watch of a task that has ended."""
        self._asked(identity, header, "task.result", task, task.ended_ms or 0)

    def tell_result(self, waiting: Iterable[tuple[bytes, Header]], task: TaskRecord) -> None:
        """A task has ended that these have watched."""
        self._make(task, [(identity, header, "task.result") for identity, header in waiting], task.ended_ms or 0)

    def on_served(self, served: OthersServed) -> None:
        """Go on with the first view that is in the making."""
        task_id = next(iter(self._making), None)
        if task_id is None:
            return
        making = self._making[task_id]
        try:
            if making.askers:
                next(making.parts)
            else:
                del self._making[task_id]  # all that waited for it are gone
        except StopIteration as end:
            del self._making[task_id]
            values = end.value | ({"waiting": self.waiting(making.task, served.at_ms)})
            self._tell(pack_map(values), making.askers)
        if self._making:
            self.outbox.add(ServeOthers())

    def forget(self, identity: bytes) -> None:
        """A client is gone."""
        for making in self._making.values():
            making.askers = [asker for asker in making.askers if asker[0] != identity]

    def _asked(self, identity: bytes, header: Header, kind: Kind, task: TaskRecord, at_ms: int) -> None:
        awaited = sum(asker[0] == identity for making in self._making.values() for asker in making.askers)
        if awaited >= MOST_AWAITED:
            self.outbox.refuse(identity, header, f"you wait for {awaited} views of large tasks", RETRY_AFTER_MS)
        else:
            self._make(task, [(identity, header, kind)], at_ms)

    def _make(self, task: TaskRecord, askers: list[tuple[bytes, Header, Kind]], at_ms: int) -> None:
        if sum(len(step.attempts) or 1 for step in task.steps.values()) <= ATTEMPTS_AT_ONCE:
            shown = view(task).model_copy(update={"waiting": self.waiting(task, at_ms)})
            self._tell(pack_body(shown), askers)
            return
        if not self._making:
            self.outbox.add(ServeOthers())
        making = self._making.get(task.id)
        if making is None:
            making = self._making[task.id] = _Making(task, self._rendered.body_in_parts(task))
        making.askers += askers

    def _tell(self, body: bytes, askers: list[tuple[bytes, Header, Kind]]) -> None:
        for identity, header, kind in askers:
            objection = self.outbox.unread.objection(identity) if kind == "task.detail" else None
            if objection is not None:  # what it was sent while it waited
                self.outbox.refuse(identity, header, objection, RETRY_AFTER_MS)
            else:
                self.outbox.push_packed(identity, header, kind, body)
