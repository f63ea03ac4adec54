"""What was before a failure, as the failure table needs it, and the facts about work that came to nothing. Pure."""

from __future__ import annotations

from protocol.messages.failure import Category, Failure
from services.kit.identity import work_key
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.effort import EffortRecord
from services.scheduler.failures import Action, History, Past, Work, kills
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.versions import replans_left


def step_history(
    task: TaskRecord, step: StepRecord, work: Work, failure: Failure, registry: Registry, effort: EffortRecord
) -> History:
    """What was before this failure of the newest attempt of a step, or of its gates."""
    mode = registry.failures.caps.think_harder
    return History(
        past=[Past(one.role, one.failure.category) for one in step.attempts if one.failure is not None],
        repeats=step.attempt.setbacks.count(work, failure.category),
        losses=step.losses + kills(registry, failure),
        max_level=task.ir.escalation.max_level,
        replans_left=0 if step.agent is not None else replans_left(task, registry),  # its parent hears of it instead
        harder_pays=effort.pays(mode, step.attempt.role, task.ir.task_type.value, work_key(task.id, step.spec.id)),
    )


def task_history(task: TaskRecord, work: Work, failure: Failure, registry: Registry) -> History:
    """What was before this failure of the task's plan, of its final checks, or of what memory is told."""
    return History(
        past=[
            Past(work, Category(one.category)) for one in task.setbacks.newest if is_retry(one.work, one.action, work)
        ],
        repeats=task.setbacks.count(work, failure.category),
        losses=task.losses.get(work, 0) + kills(registry, failure),
        replans_left=replans_left(task, registry),
    )


def is_retry(work: str, action: str, wanted: Work) -> bool:
    """Whether a setback ended an attempt of the task's own work, rather than being the same attempt again."""
    return (work, action) == (wanted, "retry")


def attempt_lost(
    task: TaskRecord, step: StepRecord, work: Work, failure: Failure, action: Action, at_ms: int, *, paused: bool
) -> f.AttemptLost:
    """A run of the newest attempt, or of its gates, came to nothing. `paused` = it goes on after the action's delay."""
    return f.AttemptLost(
        task=task.id,
        at_ms=at_ms,
        step=step.spec.id,
        number=step.attempt.number,
        code=failure.code,
        message=failure.message,
        blame=action.blame,
        category=failure.category.value,
        work=work.value,
        action=action.kind,
        rule=action.rule,
        delay_ms=action.delay_ms or None if paused else None,
    )


def task_setback(
    task: TaskRecord, work: Work, failure: Failure, action: Action, at_ms: int, *, paused: bool
) -> f.TaskSetback:
    """The same of the task's own work, also where it is given up."""
    return f.TaskSetback(
        task=task.id,
        at_ms=at_ms,
        work=work.value,
        failure=failure.model_dump(mode="json", exclude_none=True),
        action=action.kind,
        rule=action.rule,
        blame=action.blame,
        delay_ms=action.delay_ms or None if paused else None,
    )


def poisoned(last: Failure, losses: int, what: str) -> Failure:
    """So many workers died with it that it is taken to be what kills them."""
    message = f"{losses} workers died with this {what}; the last: {last.message}"
    return last.model_copy(update={"code": f"{what}.poisoned", "message": message[:8_000]})
