"""What the hub answers itself: submit, show, cancel, extend, batches, models, status; each request ends in one answer.

Checks what clients send, admits tasks within the bounds, and asks the driver for what only the journal or the disk
knows. Who a peer is and which call goes where is the machine's business; how tasks go on, the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocol.codec import unpack_body
from protocol.errors import BadFrame
from protocol.header import Header
from protocol.messages.failure import Category
from protocol.messages.persona import MakePersona, PersonaListing
from protocol.messages.registry import Reload
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.result import ArtefactQuery, ArtefactReply, Cancelled, CancelQuery, ListQuery, Watch
from protocol.messages.session import ModelQuery
from protocol.messages.task import Accepted, Extend, Extended, TaskIR
from services.kit.identity import work_key
from services.kit.logs import LogEvent
from services.scheduler.admission import DrainRate
from services.scheduler.batches import Batches
from services.scheduler.broker import Broker
from services.scheduler.engine import Engine
from services.scheduler.events import LookUp, ReadListing, ReadRegistry, ReadStatus
from services.scheduler.growth import checked_extension
from services.scheduler.loading import Loading
from services.scheduler.occupancy import steps_in
from services.scheduler.outbox import Outbox
from services.scheduler.past import Known, Past, answer_past
from services.scheduler.reloading import Registries
from services.scheduler.requested import read_task, task_asked_for
from services.scheduler.showing import Showing
from services.scheduler.tasks import TaskRecord
from services.scheduler.unread import RETRY_AFTER_MS
from services.scheduler.watchers import Watchers

_SHORT_ANSWERS: Final = frozenset({"task.submit", "task.cancel", "task.extend"})
"""Requests whose answers are a few bytes: taken from a peer that is behind with reading, too."""

TASK_REFUSED = LogEvent("task.refused", "peer reason retry_after_ms", "warning")


@dataclass(slots=True)
class ClientRequests:
    """See the module."""

    outbox: Outbox
    showing: Showing
    watchers: Watchers
    broker: Broker
    engine: Engine
    loading: Loading
    batches: Batches
    registries: Registries
    drain: DrainRate
    """How fast tasks end: behind `retry_after_ms`."""
    settle: Callable[[int], None]
    """Has the machine carry out what a request has led to, at this time."""

    def on_request(self, identity: bytes, header: Header, body: bytes, at_ms: int) -> None:
        """A request that the hub answers itself. Raises BadFrame for a body that is wrong."""
        objection = self.outbox.unread.objection(identity)
        if objection is not None and header.kind not in _SHORT_ANSWERS:
            self.outbox.refuse(identity, header, objection, RETRY_AFTER_MS)
            return
        match header.kind:
            case "session.status":
                self.outbox.add(ReadStatus(identity, header))
            case "registry.reload":
                self.outbox.add(ReadRegistry(identity, header, unpack_body(Reload, body).digest))
            case "task.list":
                self.outbox.add(ReadListing(identity, header, unpack_body(ListQuery, body)))
            case "task.submit":
                self._on_submit(identity, header, body, at_ms)
            case "model.load" | "model.unload":
                self._on_model(identity, header, unpack_body(ModelQuery, body).model, at_ms)
            case "batch.request":
                self._on_batch(identity, header, body, at_ms)
            case "persona.make":
                self._on_make_persona(identity, header, unpack_body(MakePersona, body), at_ms)
            case "persona.list":
                listing = PersonaListing(personas=self.engine.personas.listing())
                self.outbox.answer(identity, header, "persona.listing", listing)
            case _:
                task_id = task_asked_for(header.kind, body)
                known = self.engine.find(task_id)
                if known is None:
                    self.outbox.add(LookUp(task_id, identity, header, body))
                else:
                    self._answer_about(identity, header, body, known, at_ms)

    def _on_model(self, identity: bytes, header: Header, model: str, at_ms: int) -> None:
        """Somebody wants a model in memory, or out of it."""
        refusal = self.loading.move(header.kind == "model.load", model, at_ms)
        self.settle(at_ms)
        if refusal is not None:
            self.outbox.answer(identity, header, "error", ErrorReply(failure=refusal))
        else:
            self.outbox.answer(identity, header, "model.report", self.loading.report(model, at_ms))

    def _on_submit(self, identity: bytes, header: Header, body: bytes, at_ms: int) -> None:
        ir = read_task(body, self.registries.declared)
        if ir.idempotency_key is None:
            task_id = f"t-{work_key('task', self.outbox.epoch, self.outbox.sent, at_ms)[:16]}"
        else:
            task_id = f"t-{work_key('task', ir.idempotency_key)[:16]}"
        if self.engine.find(task_id) is not None:
            self.outbox.answer(identity, header, "task.accepted", Accepted(task_id=task_id, duplicate=True))
        elif ir.idempotency_key is not None:
            self.outbox.add(LookUp(task_id, identity, header, body, whole=False))
        else:
            self._accept(identity, header, ir, task_id, len(body), at_ms)

    def _on_make_persona(self, identity: bytes, header: Header, asked: MakePersona, at_ms: int) -> None:
        task = None if asked.task_id is None else self.engine.live.get(asked.task_id)
        if asked.task_id is not None and (task is None or task.state.final):
            raise BadFrame("task.not_running", f"there is no task {asked.task_id!r} that has not ended")
        client = self.broker.peers[identity].service
        made = self.engine.casting.make(asked.persona, made_by=client, at_ms=at_ms, task=task, rename=asked.rename)
        self.settle(at_ms)
        self.outbox.answer(identity, header, "persona.made", made)

    def _on_batch(self, identity: bytes, header: Header, body: bytes, at_ms: int) -> None:
        objection = self.batches.objection(identity, header, len(body))
        if objection is not None:
            self.outbox.refuse(identity, header, objection, self.batches.retry_after_ms(at_ms))
            return
        self.batches.ask(identity, header, body, self.broker.peers[identity].service, at_ms)
        self.settle(at_ms)

    def _accept(self, identity: bytes, header: Header, ir: TaskIR, task_id: str, sent: int, at_ms: int) -> None:
        client = self.broker.peers[identity].service
        refused = self.admit(ir, task_id, client, sent, at_ms)
        if refused is not None:
            self.outbox.note(TASK_REFUSED, peer=client, reason=refused.reason, retry_after_ms=refused.retry_after_ms)
            self.outbox.answer(identity, header, "refused", refused)
            return
        self.outbox.answer(identity, header, "task.accepted", Accepted(task_id=task_id))

    def admit(self, ir: TaskIR, task_id: str, client: str, sent_bytes: int, at_ms: int) -> Refused | None:
        """Take a task that has been checked and begin with it; returns why not, if there is no place for it."""
        objection = self.engine.occupancy.objection(client, sent_bytes, steps_in(ir))
        if objection is not None:
            return Refused(reason=objection, retry_after_ms=self.drain.retry_after_ms(at_ms))
        accepted = ir.model_copy(update={"task_id": task_id, "created_at": at_ms})
        self.engine.submit(task_id, accepted, client, sent_bytes, at_ms)
        self.settle(at_ms)
        return None

    def on_looked_up(
        self, identity: bytes, header: Header, body: bytes, task: TaskRecord | Past | Known | None, at_ms: int
    ) -> None:
        """What the journal knows of the task that a request is about."""
        if identity not in self.broker.peers:
            return
        try:
            if header.kind == "task.submit":
                ir = read_task(body, self.registries.declared)
                task_id = f"t-{work_key('task', ir.idempotency_key)[:16]}"
                if task is not None or self.engine.find(task_id) is not None:
                    accepted = Accepted(task_id=task_id, duplicate=True)
                    self.outbox.answer(identity, header, "task.accepted", accepted)
                else:
                    self._accept(identity, header, ir, task_id, len(body), at_ms)
            elif task is None or isinstance(task, Known):
                wanted = task_asked_for(header.kind, body)
                raise BadFrame("task.unknown", f"there is no task {wanted!r}; `tierline list` shows them")
            elif not isinstance(task, TaskRecord):
                self.outbox.answer(identity, header, *answer_past(header.kind, body, task))
            else:
                self._answer_about(identity, header, body, task, at_ms)
        except BadFrame as err:
            self.outbox.error(identity, header, err.code, Category.POLICY, str(err), err.evidence)

    def _answer_about(self, identity: bytes, header: Header, body: bytes, task: TaskRecord, at_ms: int) -> None:
        match header.kind:
            case "task.show":
                self.showing.detail(identity, header, task, at_ms)
            case "task.cancel":
                query = unpack_body(CancelQuery, body)
                if query.step is None:
                    self.engine.cancel(task.id, query.reason, at_ms)
                elif query.step in task.steps:
                    self.engine.cancel_step(task.id, query.step, query.reason, at_ms)
                else:
                    raise BadFrame("step.unknown", f"task {task.id} has no step {query.step!r}")
                self.settle(at_ms)
                cancelled = Cancelled(task_id=task.id, state=task.state)
                self.outbox.answer(identity, header, "task.cancelled", cancelled)
            case "task.extend":
                steps = checked_extension(task, unpack_body(Extend, body).steps, self.registries.in_force)
                self.engine.extend(task, steps, self.broker.peers[identity].service, at_ms)
                self.settle(at_ms)
                extended = Extended(task_id=task.id, steps_total=len(task.steps))
                self.outbox.answer(identity, header, "task.extended", extended)
            case "task.artefact":
                name = unpack_body(ArtefactQuery, body).name
                if name not in task.artefacts:
                    have = ", ".join(sorted(task.artefacts)[:50]) or "none yet"
                    raise BadFrame("artefact.unknown", f"task {task.id} has no artefact {name!r}; it has: {have}")
                self.outbox.answer(identity, header, "task.content", ArtefactReply(artefact=task.artefacts[name]))
            case _:
                self.watchers.watch(identity, header, unpack_body(Watch, body), task)
