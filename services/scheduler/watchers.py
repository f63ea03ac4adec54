"""Who follows which task: those who want every event, those who want the result only, and those who came late.

Late ones are told from the journal, a page at a time, until they have caught up: neither our memory nor their pipe
holds a whole history. Pure; it reads no journal, the driver does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.codec import pack_body
from protocol.header import Header
from protocol.messages.infer import InferPartial
from protocol.messages.result import TaskEvent, Watch
from services.scheduler import facts as f
from services.scheduler.calls import Call
from services.scheduler.events import LookUp, ReadEvents
from services.scheduler.outbox import Outbox
from services.scheduler.showing import Showing
from services.scheduler.tasks import TaskRecord
from services.scheduler.views import event

MAX_WATCHES: Final = 2_000
"""Of all clients; none may have more than are left for the others."""
MOST_OF_ONE_TASK: Final = 32
"""Of one client, with events: each event of the task is a message for every one of them."""
_RETRY_MS: Final = 1_000

_Requests = dict[tuple[bytes, str], Header]
"""(identity, request id) -> request."""


@dataclass(slots=True)
class Watchers:
    """See the module."""

    outbox: Outbox
    showing: Showing
    watched: set[str]
    """Tasks whose tokens somebody wants to see while they come; the engine asks for them."""
    find: Callable[[str], TaskRecord | None]
    """A task in memory by its id."""
    late: set[tuple[bytes, str]] = field(default_factory=set)
    """Watchers that are still being told what was before they came."""
    _events: dict[str, _Requests] = field(default_factory=dict)
    """Task -> those who want the events."""
    _results: dict[str, _Requests] = field(default_factory=dict)
    """Task -> those who want the result only."""

    def watch(self, identity: bytes, header: Header, query: Watch, task: TaskRecord) -> None:
        """Somebody wants to follow a task."""
        behind = not query.quiet and query.after_seq < task.seq
        if task.state.final and not behind:
            self.showing.result(identity, header, task)
            return
        objection = self._objection(identity, task.id, quiet=query.quiet)
        if objection is not None:
            self.outbox.refuse(identity, header, objection, _RETRY_MS)
            return
        if behind:
            self.late.add((identity, header.id))
            self.outbox.add(ReadEvents(identity, header, query))
            return
        tasks = self._results if query.quiet else self._events
        tasks.setdefault(task.id, {})[identity, header.id] = header
        if not query.quiet:
            self.watched.add(task.id)

    def _objection(self, identity: bytes, task_id: str, *, quiet: bool) -> str | None:
        watches = [who for tasks in (self._events, self._results) for requests in tasks.values() for who, _ in requests]
        watches += [who for who, _ in self.late]
        own = watches.count(identity)
        if own >= MAX_WATCHES - len(watches):
            return f"{len(watches)} watches are open, {own} of them yours"
        same = 0 if quiet else sum(who == identity for who, _ in self._events.get(task_id, ()))
        return f"you follow the events of {task_id} {same} times" if same >= MOST_OF_ONE_TASK else None

    def read(self, identity: bytes, header: Header, query: Watch, facts: list[tuple[int, f.Fact]]) -> None:
        """A page of the past for one who came late."""
        if (identity, header.id) not in self.late:
            return  # the watcher is gone
        self.late.discard((identity, header.id))
        for seq, fact in facts:
            self.outbox.push(identity, header, "task.event", event(fact, seq))
        rest = query if not facts else query.model_copy(update={"after_seq": facts[-1][0]})
        task = self.find(query.task_id)
        if task is None and not facts:
            self.outbox.add(LookUp(query.task_id, identity, header, pack_body(rest)))
        elif task is None:
            self.late.add((identity, header.id))
            self.outbox.add(ReadEvents(identity, header, rest))
        else:
            # In memory but not in the journal: retention has compacted it meanwhile.
            self.watch(identity, header, rest if facts else rest.model_copy(update={"after_seq": task.seq}), task)

    def tell(self, fact: f.Fact, seq: int) -> None:
        """Something has happened to a task; with its end everybody gets the result."""
        requests = self._events.get(fact.task)
        if requests:
            told = pack_body(event(fact, seq))
            for (identity, _), request in requests.items():
                self.outbox.push_packed(identity, request, "task.event", told)
        if isinstance(fact, f.TaskEnded):
            self._tell_result(fact.task)

    def tell_tokens(self, task: TaskRecord, call: Call, partial: InferPartial, at_ms: int) -> None:
        """A piece of an answer has come."""
        told = TaskEvent(
            task_id=task.id,
            seq=task.seq,
            at_ms=at_ms,
            event="step.tokens",
            step=call.step,
            attempt=call.attempt,
            fields={"generated_tokens": partial.generated_tokens, "text": partial.text},
        )
        body = pack_body(told)
        for (identity, _), request in self._events[task.id].items():
            self.outbox.push_packed(identity, request, "task.event", body)

    def sees_tokens(self, task_id: str) -> bool:
        """True if anybody follows this task's events."""
        return task_id in self._events

    def forget(self, identity: bytes) -> None:
        """A client is gone."""
        self.showing.forget(identity)
        self.late = {late for late in self.late if late[0] != identity}
        for tasks in (self._events, self._results):
            for task_id in list(tasks):
                requests = tasks[task_id]
                for key in [key for key in requests if key[0] == identity]:
                    del requests[key]
                if not requests:
                    del tasks[task_id]
                if task_id not in self._events:
                    self.watched.discard(task_id)

    def identities(self) -> set[bytes]:
        """Everybody who waits for something."""
        waiting = {who for tasks in (self._events, self._results) for requests in tasks.values() for who, _ in requests}
        return waiting | {who for who, _ in self.late}

    def _tell_result(self, task_id: str) -> None:
        self.watched.discard(task_id)
        waiting = self._events.pop(task_id, {}) | self._results.pop(task_id, {})
        task = self.find(task_id)
        if task is not None and waiting:
            self.showing.tell_result([(identity, request) for (identity, _), request in waiting.items()], task)
