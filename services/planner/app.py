"""Carries the planning machine's questions to the bus and their endings back; knows sockets only through the kit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from protocol.codec import unpack_body
from protocol.errors import BadFrame, CallError, CallFailed, CallRefused
from protocol.messages.base import Message
from protocol.messages.infer import InferFinal, InferPartial
from protocol.messages.memory import MemoryFinal, MemoryRequest
from protocol.messages.persona import Persona
from protocol.messages.plan import PlanFinal, PlanPartial, PlanRequest
from services.kit.following import RegistryFollower
from services.kit.logs import LogEvent
from services.kit.plan_check import problems_in
from services.kit.registry import Registry, with_own, with_trials
from services.kit.service import Call, Service
from services.planner.divide import Judge
from services.planner.machine import (
    AskAdvice,
    AskMemory,
    AskModel,
    Command,
    Event,
    Finish,
    MemoryAnswered,
    ModelAnswered,
    ModelOutcome,
    Planning,
    Refuse,
    Requested,
    Unanswered,
)

PLAN_MADE = LogEvent(
    "plan.made", "task source version template steps removed decisions similar model generated_tokens broke_off took_ms"
)
PLAN_REFUSED = LogEvent("plan.refused", "task code problems", "warning")
QUESTION_UNANSWERED = LogEvent("plan.unanswered", "task asked why", "warning")


class PlannerApp:
    """Answers `plan.request`; stateless between calls but for its counters."""

    def __init__(self, service: Service, registry: Registry, judge: Judge) -> None:
        self._service = service
        self._judge = judge
        self._registry = registry
        self._trials: list[Persona] = []
        self._counters: Counter[str] = Counter()
        service.answer("plan.request", self._plan)
        service.metrics = self.metrics
        service.on_trials = self._know_trials
        service.follower = RegistryFollower(service.home, service.log, registry, self._take_up)

    def metrics(self) -> dict[str, Any]:
        """Totals since the start: plans by source, what became of asking the model, questions without an answer."""
        return dict(self._counters)

    def _take_up(self, registry: Registry, _needed: bool) -> bool:
        """Plan with this registry from the next request on; a plan in the making keeps the one it began with."""
        self._registry = with_trials(registry, self._trials)
        return True

    def _know_trials(self, personas: list[Persona]) -> None:
        """These may be chosen too from the next request on."""
        self._trials = personas
        self._registry = with_trials(self._registry, personas)

    async def _plan(self, call: Call) -> Message:
        asked = call.read(PlanRequest)
        task = asked.task
        started_ms = self._service.clock.now_ms()
        planning = Planning(with_own(self._registry, asked.personas), self._judge)
        begun = tuple(asked.begun or ())
        command = planning.handle(Requested(started_ms, task, call.header.deadline, asked.revision, begun))
        while True:
            match command:
                case Finish(final):
                    version = 1 if asked.revision is None else asked.revision.version
                    self._note(final, version, planning.model_outcome, started_ms)
                    return final
                case Refuse(failure):
                    self._counters["refused"] += 1
                    problems = [str(problem) for problem in problems_in(failure.evidence)]
                    self._service.log.write(PLAN_REFUSED, task=task.task_id, code=failure.code, problems=problems)
                    raise CallFailed(failure)
                case AskMemory() | AskModel() | AskAdvice():
                    command = planning.handle(await self._ask(command, call, _Listener(planning, call)))

    async def _ask(self, command: AskMemory | AskModel | AskAdvice, call: Call, listener: _Listener) -> Event:
        asked = _target(command)
        try:
            answer = await self._send(command, call, listener)
        except (CallError, BadFrame) as err:
            # Going on is safe: the machine has a way without each answer, and says so in the plan's reason.
            why = _why(err)
            self._counters[f"unanswered_{asked.partition('.')[0]}"] += 1
            self._service.log.write(QUESTION_UNANSWERED, task=call.header.task, asked=asked, why=why)
            return Unanswered(self._service.clock.now_ms(), why)
        at_ms = self._service.clock.now_ms()
        match answer:
            case InferFinal():
                return ModelAnswered(at_ms, answer)
            case MemoryFinal():
                return MemoryAnswered(at_ms, answer)
            case _:
                return Unanswered(at_ms, f"a {type(answer).__name__} instead of an answer")

    async def _send(self, command: AskMemory | AskModel | AskAdvice, call: Call, listener: _Listener) -> Message:
        service, timeout_s, dst = self._service, command.timeout_s, _target(command)
        match command:
            case AskModel(request=request):
                try:
                    return await service.ask(
                        "infer.request", request, dst=dst, timeout_s=timeout_s, call=call, on_partial=listener.take
                    )
                finally:
                    self._counters["steps_offered_early"] += listener.offered
            case AskMemory(retrieve=retrieve):
                body = MemoryRequest(ask=retrieve)
            case AskAdvice(request=advise):
                body = MemoryRequest(ask=advise)
        return await service.ask("memory.request", body, dst=dst, timeout_s=timeout_s, call=call)

    def _note(self, final: PlanFinal, version: int, model: ModelOutcome, started_ms: int) -> None:
        self._counters[f"plans_{final.source}"] += 1
        self._counters[f"model_{model}"] += 1
        self._counters["revisions"] += version > 1
        self._counters["broke_off"] += final.broke_off is not None
        decisions = sum(len(item.ids) for item in final.decisions)
        self._counters["decisions"] += decisions
        for item in final.decisions:
            if item.advice is not None:
                self._counters[f"advice_{item.advice.won}"] += 1
        self._counters["removed_edges"] += len(final.removed_edges)
        self._service.log.write(
            PLAN_MADE,
            task=final.task.task_id,
            source=final.source,
            version=version,
            template=next((item.choice for item in final.decisions if item.subject == "decomposition"), None),
            steps=len(final.task.plan.steps) if final.task.plan is not None else 0,
            removed=len(final.removed_edges),
            decisions=decisions,
            similar=len(final.similar),
            model=model.value,
            generated_tokens=final.generated_tokens,
            broke_off=final.broke_off,
            took_ms=self._service.clock.now_ms() - started_ms,
        )


@dataclass(slots=True)
class _Listener:
    """Reads along while the model writes, and tells the hub of the steps that can start."""

    planning: Planning
    call: Call
    offered: int = 0
    unsent: PlanPartial | None = None

    def take(self, body: bytes) -> None:
        """A piece has come. One that cannot be read leaves a gap, after which nothing more starts early."""
        try:
            piece = unpack_body(InferPartial, body)
        except BadFrame:
            return
        ready = self.planning.hear(piece.text, piece.start_chars)
        if ready:
            self.offered = len(ready)
            self.unsent = PlanPartial(steps=ready, personas=self.planning.personas)
        if self.unsent is not None and self.call.partial(self.unsent):
            self.unsent = None


def _target(command: Command) -> str:
    return f"infer.{command.model}" if isinstance(command, AskModel) else "memory"


def _why(err: Exception) -> str:
    match err:
        case CallFailed(failure=failure):
            return failure.code
        case CallRefused():
            return "refused by the hub"
        case BadFrame(code=code):
            return code
        case _:
            return "deadline"
