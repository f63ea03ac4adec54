"""What a finished task teaches: one outcome per decision, and the episode itself.

A decision about a step is scored by what became of that step, a decision about the task by the task; one about its
decomposition says beside it how the steps were spread, for the staged reward. Faults of processes and resources teach
nothing (`quality_signal` in the failure table), and a cancelled task teaches nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from protocol.messages.memory import Cure, Episode, MemoryRequest, Outcome, RecordOutcomes
from protocol.messages.plan import RoutingDecision
from protocol.messages.result import StepState, TaskState
from services.kit.registry import Registry
from services.scheduler.failures import teaches
from services.scheduler.spread import spread_of
from services.scheduler.tasks import StepRecord, TaskRecord

_MAX_CURES: Final = 8  # bound of Outcome.cures
UNEMBEDDABLE: Final = "memory.unembeddable"
"""Memory's word for an objective without any word in it: such a task cannot be an episode."""


def outcomes_of(task: TaskRecord, registry: Registry, *, with_episode: bool = True) -> MemoryRequest | None:
    """The request that settles a finished task with memory; None where there is nothing to learn."""
    if task.plan is None or task.ended_ms is None or task.state is TaskState.CANCELLED:
        return None
    blameless = task.failure is not None and not teaches(registry, task.failure)
    outcomes = []
    for value in task.plan.decisions:
        decision = RoutingDecision.model_validate(value)
        step = task.steps.get(decision.step or "")
        outcome = _of_task(task, decision, blameless) if step is None else _of_step(step, decision, registry)
        if outcome is not None:
            outcomes.append(outcome)
    episode = _episode(task) if with_episode and not blameless else None
    if not outcomes and episode is None:
        return None
    return MemoryRequest(ask=RecordOutcomes(outcomes=outcomes, episode=episode))


def _of_task(task: TaskRecord, decision: RoutingDecision, blameless: bool) -> Outcome | None:
    if blameless or task.ended_ms is None:
        return None
    return Outcome(
        decision_id=decision.decision_id,
        reward=1.0 if task.state is TaskState.SUCCEEDED else 0.0,
        seconds=(task.ended_ms - task.created_ms) / 1000,
        attempts=1,
        failure_code=None if task.failure is None else task.failure.code,
        spread=spread_of(task) if decision.subject == "decomposition" and decision.alternatives else None,
        at_ms=task.ended_ms,
    )


def _of_step(step: StepRecord, decision: RoutingDecision, registry: Registry) -> Outcome | None:
    """Reward 1 if the role that was chosen solved the step itself; an escalation is its failure."""
    if step.ended_ms is None or step.ready_ms is None or step.state not in (StepState.DONE, StepState.FAILED):
        return None
    if decision.subject == "role" and any(one.moves for one in step.attempts):
        return None  # another model did it: that says nothing about the one that was chosen
    first = step.spec.actor
    if step.state is StepState.DONE:
        solved = not step.attempts or step.attempt.role == first  # a mapped step was solved by its sub-steps
    elif step.failure is not None and not teaches(registry, step.failure):
        return None
    else:
        solved = False
    failures = [one.failure.code for one in step.attempts if one.failure is not None and one.role == first]
    return Outcome(
        decision_id=decision.decision_id,
        reward=1.0 if solved else 0.0,
        seconds=(step.ended_ms - step.ready_ms) / 1000,
        attempts=max(1, len(step.attempts)),
        failure_code=failures[-1] if failures else None,
        cures=_cures(step, registry) if decision.subject == "role" and step.state is StepState.DONE else [],
        at_ms=step.ended_ms,
    )


def _cures(step: StepRecord, registry: Registry) -> list[Cure]:
    """What each failed attempt of a step that is done was followed by; lost workers and full disks are no lesson."""
    cures = []
    for one, following in pairwise(step.attempts):
        failure = one.failure
        if failure is None or not registry.failures.rules[failure.category].quality_signal:
            continue
        words = failure.findings[0].message if failure.findings else failure.message
        cures.append(
            Cure(
                failure_code=failure.code[:128],
                finding=" ".join(words.split())[:200],
                action="retry" if following.role == one.role else "escalate",
                role=step.attempt.role,
            )
        )
    return cures[:_MAX_CURES]


def _episode(task: TaskRecord) -> Episode:
    codes = {one.failure.code for step in task.steps.values() for one in step.attempts if one.failure is not None}
    return Episode(
        task_id=task.id,
        task_type=task.ir.task_type.value,
        objective=task.ir.objective,
        plan_source=task.plan.source if task.plan else "",
        steps=len(task.steps),
        succeeded=task.state is TaskState.SUCCEEDED,
        failure_codes=sorted(codes)[:64],
        seconds=((task.ended_ms or task.created_ms) - task.created_ms) / 1000,
        at_ms=task.ended_ms or 0,
    )
