"""A task as clients see it. Pure: from the state to the message, nothing the other way."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from protocol.messages.gate import GateResult
from protocol.messages.memory import Episode
from protocol.messages.plan import AddedEdge, PlanShape, PlanVersion, RemovedEdge, RoutingDecision
from protocol.messages.result import (
    AttemptView,
    CriticalPath,
    PlanView,
    Segment,
    Setback,
    StepState,
    StepView,
    TaskEvent,
    TaskSummary,
    TaskView,
    Usage,
)
from protocol.plan_graph import final_artefacts
from services.scheduler import facts as f
from services.scheduler.critical_path import critical_path
from services.scheduler.feedback import told
from services.scheduler.swarm_views import swarm_views
from services.scheduler.tasks import PlanOrigin, Setbacks, StepRecord, TaskRecord

_MAX_INLINE_CHARS: Final = 4 * 1024 * 1024
"""Final artefacts that travel inside a view, in characters; `task.artefact` fetches the others."""


def view(task: TaskRecord) -> TaskView:
    """Everything about a task that fits one message."""
    steps = [step_view(step) for step in task.steps.values()]
    return frame(task, critical_path(task)).model_copy(update={"steps": steps})


def frame(task: TaskRecord, report: CriticalPath | None) -> TaskView:
    """A view without its steps; `report` is the task's `critical_path`."""
    return TaskView(
        task_id=task.id,
        state=task.state,
        objective=task.ir.objective,
        task_type=task.ir.task_type.value,
        priority=task.ir.priority.value,
        created_ms=task.created_ms,
        ended_ms=task.ended_ms,
        last_seq=task.seq,
        plan=_plan(task.plan, task.versions),
        artefacts=_final_artefacts(task),
        gates=task.gates,
        setbacks=_setbacks(task.setbacks),
        failure=task.failure,
        swarms=swarm_views(task) or None,
        usage=_usage(task),
        critical_path=report,
    )


def step_view(step: StepRecord) -> StepView:
    """A step with its attempts; only facts that set `StepRecord.changed` may change what is read here."""
    return StepView(
        id=step.spec.id,
        actor=step.spec.actor,
        action=step.spec.action[:500],
        state=step.state,
        persona=step.spec.persona,
        agent=step.agent,
        needs=sorted(step.needs),
        ready_ms=step.ready_ms,
        ended_ms=step.ended_ms,
        losses=step.losses,
        attempts=[_attempt(step, number) for number in range(len(step.attempts))],
        failure=step.failure,
    )


def summary(task: TaskRecord) -> TaskSummary:
    """One line of a listing."""
    return TaskSummary(
        task_id=task.id,
        state=task.state,
        task_type=task.ir.task_type.value,
        objective=task.ir.objective[:200],
        created_ms=task.created_ms,
        ended_ms=task.ended_ms,
        steps_done=sum(1 for step in task.steps.values() if step.state is StepState.DONE),
        steps_total=len(task.steps),
    )


def event(fact: f.Fact, seq: int) -> TaskEvent:
    """A fact as watchers see it: what happened, without the contents of artefacts."""
    return TaskEvent(
        task_id=fact.task,
        seq=seq,
        at_ms=fact.at_ms,
        event=fact.EVENT,
        step=fact.step,
        attempt=fact.number,
        fields=_event_fields(fact),
    )


def _event_fields(fact: f.Fact) -> dict[str, Any]:
    match fact:
        case f.TaskPlanned():
            steps = [{"id": step["id"], "actor": step["actor"]} for step in fact.ir["plan"]["steps"]]
            return {"source": fact.source, "reason": fact.reason, "steps": steps}
        case f.PersonasMade():
            return {"personas": [one["name"] for one in fact.personas]}
        case f.StepExpanded():
            return {"items": len(fact.items)}
        case f.SwarmTurned():
            kept = [call for call in fact.calls if "code" not in call]
            refused = [{"agent": call["agent"], "code": call["code"]} for call in fact.calls if "code" in call]
            return {
                "turn": fact.turn,
                "agents": [call["agent"] for call in kept if "step" not in call],
                "assigned": [call["step"] for call in kept if "step" in call],
                "refused": refused,
                "closing": fact.closing or None,
            }
        case f.StepsAdded() | f.PlanGrown():
            return {"steps": [{"id": step["id"], "actor": step["actor"]} for step in fact.steps]}
        case f.ReplanAsked():
            asked = {"version": fact.version, "trigger": fact.trigger, "reason": fact.reason}
            return asked | {"held": fact.held, "rule": fact.rule}
        case f.TaskReplanned():
            steps = [{"id": step["id"], "actor": step["actor"]} for step in fact.added]
            told = {"version": fact.version, "trigger": fact.trigger, "source": fact.source, "reason": fact.reason}
            return told | {"kept": fact.kept, "dropped": fact.dropped, "steps": steps}
        case f.ReplanAbandoned():
            return {"version": fact.version, "reason": fact.reason}
        case f.AttemptQueued():
            return {"role": fact.role, "model": fact.model}
        case f.AttemptStarted():
            return {"worker": fact.worker, "reattached": fact.reattached}
        case f.AttemptLost():
            why = {"code": fact.code, "message": fact.message, "category": fact.category, "work": fact.work}
            return why | {"action": fact.action, "rule": fact.rule}
        case f.AttemptMoved():
            return {"model": fact.model, "reason": fact.reason}
        case f.TaskSetback():
            why = {"code": fact.failure["code"], "category": fact.failure["category"], "work": fact.work}
            return why | {"message": fact.failure["message"][:500], "action": fact.action, "rule": fact.rule}
        case f.AttemptAnswered():
            return {"generated_tokens": fact.generated_tokens, "outputs": [one["name"] for one in fact.artefacts]}
        case f.AttemptChecked() | f.TaskChecked():
            return {"verdicts": {gate["gate"]: gate["verdict"] for gate in fact.gates}}
        case f.AttemptFailed():
            failure = fact.failure
            return {
                "code": failure["code"],
                "category": failure["category"],
                "message": failure["message"][:500],
                "action": fact.action,
                "rule": fact.rule,
            }
        case f.StepFailed():
            return {"code": fact.failure["code"], "message": fact.failure["message"][:500]}
        case f.StepDropped():
            return {"state": fact.state, "reason": fact.reason}
        case f.TaskEnded():
            return {"state": fact.state}
        case f.OutcomesSettled():
            return {"stored": fact.stored, "reason": fact.reason}
        case _:
            return {}


def _plan(plan: PlanOrigin | None, versions: list[PlanVersion]) -> PlanView | None:
    if plan is None:
        return None
    as_run = None if plan.as_run is None else PlanShape.model_validate(plan.as_run)
    return PlanView(
        source=plan.source,
        reason=plan.reason,
        removed_edges=[RemovedEdge.model_validate(edge) for edge in plan.removed_edges],
        decisions=[RoutingDecision.model_validate(one) for one in plan.decisions],
        similar=[Episode.model_validate(one) for one in plan.similar],
        lessons=list(plan.lessons),
        added_edges=[AddedEdge.model_validate(edge) for edge in plan.added_edges] or None,
        as_written=as_run if plan.as_written is None else PlanShape.model_validate(plan.as_written),
        as_run=as_run,
        versions=versions if len(versions) > 1 else None,
    )


def _setbacks(kept: Setbacks) -> list[Setback] | None:
    return [Setback(**asdict(one)) for one in kept.newest] or None


def _attempt(step: StepRecord, index: int) -> AttemptView:
    attempt = step.attempts[index]
    gates: list[GateResult] = attempt.gates
    stretches = attempt.timeline.stretches(attempt.ended_ms or step.ended_ms, failed=attempt.failure is not None)
    return AttemptView(
        number=attempt.number,
        role=attempt.role,
        model=attempt.model,
        key=attempt.key,
        queued_ms=attempt.queued_ms,
        started_ms=attempt.started_ms,
        inferred_ms=attempt.inferred_ms,
        ended_ms=attempt.ended_ms,
        worker=attempt.worker,
        prompt_tokens=attempt.prompt_tokens,
        cached_tokens=attempt.cached_tokens,
        generated_tokens=attempt.generated_tokens,
        first_token_ms=attempt.first_token_ms,
        repaired=attempt.repaired,
        draft_tokens=attempt.draft_tokens,
        accepted_tokens=attempt.accepted_tokens,
        tokens_per_s=round(attempt.generated_tokens * 1000 / attempt.generate_ms, 1) if attempt.generate_ms else 0.0,
        gates=gates,
        failure=attempt.failure,
        action=attempt.action,
        arm=attempt.arm,
        told=told(step.attempts[:index], attempt.role, attempt.told_chars) or None if index else None,
        setbacks=_setbacks(attempt.setbacks),
        segments=[Segment(what=what, start_ms=begin, end_ms=end) for what, begin, end in stretches],
    )


def _final_artefacts(task: TaskRecord) -> list[Any]:
    if task.ir.plan is None:
        return []
    chosen, room = [], _MAX_INLINE_CHARS
    for name in final_artefacts(task.ir.plan):
        artefact = task.artefacts.get(name)
        if artefact is None:
            continue
        room -= len(artefact.text())
        if room >= 0:
            chosen.append(artefact)
    return chosen


def _usage(task: TaskRecord) -> Usage:
    attempts = [attempt for step in task.steps.values() for attempt in step.attempts]
    return Usage(
        prompt_tokens=sum(attempt.prompt_tokens for attempt in attempts),
        cached_tokens=sum(attempt.cached_tokens for attempt in attempts),
        generated_tokens=task.generated_tokens,
        attempts=len(attempts),
    )
