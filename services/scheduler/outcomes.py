"""What a finished task teaches: one outcome per decision, and the episode itself.

A decision about a step is scored by what became of that step, a decision about the task by the task; one about its
decomposition says beside it how the steps were spread, for the staged reward. Faults of processes and resources teach
nothing (`quality_signal` in the failure table), and a cancelled task teaches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from protocol.messages.memory import Cure, DecisionRecord, Episode, MemoryRequest, Outcome, RecordOutcomes
from protocol.messages.plan import RoutingDecision
from protocol.messages.result import StepState, TaskState
from services.kit.identity import work_key
from services.kit.registry import Registry, with_own
from services.kit.registry.versions import versions
from services.scheduler.failures import teaches
from services.scheduler.spread import spread_of
from services.scheduler.tasks import StepRecord, TaskRecord

_MAX_CURES: Final = 8  # bound of Outcome.cures
_MAX_TEXT_CHARS: Final = 4_000
"""Of the objective, as what decisions are about: as much as the planner asks about."""
_RECORDED: Final = set(DecisionRecord.model_fields) & set(RoutingDecision.model_fields)
MAX_ADDED_DECISIONS: Final = 1_000
"""Of steps that were added while the task ran."""
UNEMBEDDABLE: Final = "memory.unembeddable"
"""Memory's word for an objective without any word in it: such a task cannot be an episode."""


def outcomes_of(task: TaskRecord, registry: Registry, *, with_episode: bool = True) -> MemoryRequest | None:
    """The request that settles a finished task with memory; None where there is nothing to learn."""
    if task.plan is None or task.ended_ms is None or task.state is TaskState.CANCELLED:
        return None
    blameless = task.failure is not None and not teaches(registry, task.failure)
    outcomes: list[Outcome] = []
    taken: list[DecisionRecord] = []
    # Without the advice, which is most of a decision and teaches nothing.
    planned = [RoutingDecision.model_validate({**value, "advice": None}) for value in task.plan.decisions]
    later = _taken_without_planner(task, planned, registry)
    for decision in (*planned, *later):
        shared = decision.model_dump(include=_RECORDED)
        for about, ident in decision.ids.items():
            step = task.steps.get(about)
            if step is not None and step.agent is not None and task.steps[step.swarm or ""].state is not StepState.DONE:
                step = None  # what it contributed to came to nothing: the task's word counts for it, too
            if step is None:
                outcome = _of_task(task, ident, decision, blameless)
            else:
                outcome = _of_step(step, ident, decision, registry)
            if outcome is not None:
                outcomes.append(outcome)
                taken.append(DecisionRecord(decision_id=ident, task_id=task.id, step=about or None, **shared))
    episode = _episode(task) if with_episode and not blameless else None
    if not outcomes and episode is None:
        return None
    text = task.ir.objective[:_MAX_TEXT_CHARS]
    return MemoryRequest(ask=RecordOutcomes(decisions=taken, text=text, outcomes=outcomes, episode=episode))


def _taken_without_planner(
    task: TaskRecord, planned: Sequence[RoutingDecision], registry: Registry
) -> list[RoutingDecision]:
    """The personas of steps that were added while the task ran, and of sub-agents: no planner has seen them, and they
    teach as well."""
    plan = task.ir.plan
    if plan is None:
        return []
    registry = with_own(registry, task.personas.values())
    known = {step for one in planned for step in one.ids}
    found = []
    by_plan = {spec.id for spec in plan.steps}
    agents = [step.spec for step in task.steps.values() if step.agent is not None]
    for spec in (*plan.steps, *agents):
        name = spec.persona
        if name is None or spec.id in known:
            continue
        found.append(
            RoutingDecision(
                ids={spec.id: work_key("decision", task.id, spec.id, "persona", name)},
                subject="persona",
                choice=name,
                propensity=1.0,
                rule="the step names it" if spec.id in by_plan else "a planning model made the sub-agent",
                task_type=task.ir.task_type.value,
                cluster=spec.actor,
                registry_digest=registry.digest,
                prompt=versions("persona", name, registry)[1],
            )
        )
    return found[:MAX_ADDED_DECISIONS]


def _of_task(task: TaskRecord, ident: str, decision: RoutingDecision, blameless: bool) -> Outcome | None:
    if blameless or task.ended_ms is None:
        return None
    # A plan whose rest had to be made anew did not do it: the version that did was not what was decided on.
    given_up = decision.subject == "decomposition" and any(
        one.trigger in ("failed", "contradicted") and one.adopted_ms is not None for one in task.versions
    )
    return Outcome(
        decision_id=ident,
        reward=1.0 if task.state is TaskState.SUCCEEDED and not given_up else 0.0,
        seconds=(task.ended_ms - task.created_ms) / 1000,
        attempts=1,
        failure_code=None if task.failure is None else task.failure.code,
        spread=spread_of(task) if decision.subject == "decomposition" and decision.alternatives else None,
        at_ms=task.ended_ms,
    )


def _of_step(step: StepRecord, ident: str, decision: RoutingDecision, registry: Registry) -> Outcome | None:
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
        decision_id=ident,
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
