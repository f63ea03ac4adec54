"""New versions of a running task's plan: what asks for one, what may go, and whether an answer can be adopted. Pure.

Three things ask: a failure that the table answers with `replan`, a result with which the plan cannot go on, and a
deadline that will be missed by what is known of durations. However often they ask, a task has at most as many new
versions as registry and task allow, and those that came to nothing count. What is finished stays: a version drops
only what is not done, and everything made so far may be read by what it adds.

Carrying it out is `replanning.py`; the fold of the facts, `fold.py`; what the new rest is, the planner's business.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Final

from protocol.codec import pack_body
from protocol.errors import CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.plan import PlanFinal, PlanRequest, ReplanTrigger, Revision, RoutingDecision
from protocol.messages.result import StepState
from protocol.messages.task import Output, Plan, Step
from protocol.plan_graph import needs
from services.kit.plan_check import plan_problems
from services.kit.plan_shape import least_s
from services.kit.registry import Registry, with_own
from services.scheduler import facts as f
from services.scheduler.feedback import points_of
from services.scheduler.growth import NOT_A_LIST, reach_of
from services.scheduler.lateness import Late, rest_least_s, rest_s
from services.scheduler.own_calls import Wanted
from services.scheduler.prompting import CONTRADICTION
from services.scheduler.ranks import Ranking
from services.scheduler.tasks import Revising, StepRecord, TaskRecord

PLANNER: Final = "planner"
_TIMEOUT_MS: Final = 60_000
_LATE_SHARE: Final = 0.25
"""Of the time that is left, at most so much is spent on a plan that is made because of it."""
_MAX_NOTES_CHARS: Final = 6_000
_MAX_FINISHED: Final = 500
_MAX_SAID_CHARS: Final = 2_000
CONTRADICTED: Final = "plan.contradicted"
_CONTRADICTIONS: Final = frozenset({CONTRADICTED, NOT_A_LIST})
"""Codes of failures that say that a result turns the plan over."""


def replans_left(task: TaskRecord, registry: Registry) -> int:
    """New versions that the plan may still have, those in the making and those that were given up counted.

    A plan that is still being written has those that it will have when it is whole.
    """
    if task.plan is None and not task.plan_open:
        return 0
    own = task.ir.escalation.max_replans
    if own is None and task.plan is not None and task.plan.source == "client":
        return 0  # it runs as it was sent, unless it says otherwise
    most = registry.failures.caps.replans_per_task
    return max(0, min(most, most if own is None else own) - max(0, len(task.versions) - 1))


def may_contradict(task: TaskRecord, step: StepRecord, registry: Registry) -> bool:
    """Whether a worker's word that the plan is wrong is listened to: it has seen results, and something can be done."""
    return replans_left(task, registry) > 0 and bool(step.needs) and step.spec.id in _plan_ids(task)


def contradiction(answer: str) -> Failure | None:
    """The failure that an answer stands for which says that the plan is wrong; None for any other."""
    said = answer[:_MAX_SAID_CHARS].lstrip()
    if not said.startswith(CONTRADICTION):
        return None
    why = " ".join(said[len(CONTRADICTION) :].split())[:500] or "no reason given"
    return Failure(code=CONTRADICTED, category=Category.LOGIC, origin="worker", message=why)


def trigger_of(failure: Failure) -> ReplanTrigger:
    """What asks for a new version where this is the end of a step."""
    return "contradicted" if failure.code in _CONTRADICTIONS else "failed"


def failed_in_plan(task: TaskRecord) -> str | None:
    """A step of the plan in force that has failed, or one of whose sub-steps has: what remains to be planned around.

    A sub-agent that failed is none: the step that leads it was told.
    """
    ids = _plan_ids(task)
    for name, step in task.steps.items():
        if step.state is StepState.FAILED and step.agent is None and _planned(ids, name) in ids:
            return name
    return None


def asked(
    task: TaskRecord, trigger: ReplanTrigger, step: str | None, failure: Failure, rule: str, at_ms: int
) -> f.ReplanAsked:
    """The fact by which the rest is planned anew, since a step, or the final checks, came to this end."""
    version = len(task.versions) + 1
    held = [] if step is None else [name for name in reach_of(task, step) if not task.steps[name].state.final]
    where = "the final checks" if step is None else f"step {step}"
    return f.ReplanAsked(
        task=task.id,
        at_ms=at_ms,
        step=None if step is None else _planned(_plan_ids(task), step),
        version=version,
        trigger=trigger,
        reason=f"{where}: {failure.code}: {failure.message}"[:1_000],
        rule=rule,
        held=held,
        notes=_notes(task, step, failure),
        failure=failure.model_dump(mode="json", exclude_none=True),
    )


def asked_since_late(task: TaskRecord, late: Late, registry: Registry, at_ms: int) -> f.ReplanAsked:
    """The fact by which the rest is planned anew, since it would come too late."""
    return f.ReplanAsked(
        task=task.id,
        at_ms=at_ms,
        version=len(task.versions) + 1,
        trigger="late",
        reason=late.reason,
        rule=f"{registry.failures.source('replans_per_task')} caps.replans_per_task",
        held=list(late.held),
        notes=late.reason,
    )


def replan_wanted(task: TaskRecord, retries: int, at_ms: int) -> Wanted:
    """The question for a new version; the same again after a lost planner or a restart of the hub."""
    parts = ("replan", _revising(task).version, retries)
    return Wanted("plan.request", PLANNER, parts, None, timeout_ms=_timeout_ms(task, at_ms))


def replan_body(task: TaskRecord, ranking: Ranking, at_ms: int) -> bytes:
    """What is asked, with what is finished when the planner begins."""
    revising = _revising(task)
    ids = _plan_ids(task)
    inputs = {artefact.name for artefact in task.ir.inputs}
    made = [artefact for name, artefact in task.artefacts.items() if name not in inputs]
    left_s = None if task.deadline_ms is None else max(0.0, (task.deadline_ms - at_ms) / 1000)
    bare = Step(id="S", actor="S", action="", outputs=[Output(name="S")])
    revision = Revision(
        version=revising.version,
        trigger=revising.trigger,
        failed=revising.step,
        failure=revising.failure,
        open=sorted(name for name in revising.held if name in ids and name != revising.step),
        finished=[Output(name=one.name, kind=one.kind, content_type=one.content_type) for one in made[-_MAX_FINISHED:]],
        notes=revising.notes,
        left_s=left_s,
        step_s={role: round(ranking.expected_s(task, bare, role), 3) for role in ranking.registry.roles},
    )
    return pack_body(PlanRequest(task=task.ir, personas=list(task.personas.values()), revision=revision))


def adopted_version(
    task: TaskRecord, final: PlanFinal, registry: Registry, ranking: Ranking, at_ms: int
) -> f.TaskReplanned:
    """The fact by which a task takes up this rest. Raises CallFailed: SCHEMA for one that cannot run, POLICY for one
    that gains nothing.
    """
    revising, plan = _revising(task), task.ir.plan
    told = final.task.plan
    if plan is None or told is None:
        raise _refused("the planner returned no plan")
    ids = {step.id for step in plan.steps}
    wanted = {step.id for step in told.steps}
    dropped = {name for name in revising.held if not _stays(task, name, wanted)}
    if revising.step is not None and task.steps[revising.step].state is not StepState.DONE:
        dropped.add(revising.step)
    dropped |= {name for name, step in task.steps.items() if not step.state.final and _planned(ids, name) in dropped}
    kept = [step for step in plan.steps if step.id not in dropped]
    added = [step for step in told.steps if step.id not in ids]
    taken = [step.id for step in added if step.id in task.steps]
    if taken or not added:
        raise _refused(f"the task has a step {taken[0]} already" if taken else "it adds nothing")
    new = plan.model_copy(update={"steps": [*_without(kept, dropped), *added]})
    made = {output.name for step in new.steps for output in step.outputs}
    given = [artefact for name, artefact in task.artefacts.items() if name not in made]
    ir = task.ir.model_copy(update={"plan": new, "inputs": given})
    if problems := plan_problems(ir, with_own(registry, task.personas.values())):
        raise _refused("; ".join(str(problem) for problem in problems[:5]))
    if revising.trigger == "late":
        _must_be_faster(task, new, added, ranking, at_ms)
    models = {registry.roles[step.actor].model for step in added}
    before = map(RoutingDecision.model_validate, task.plan.decisions) if task.plan is not None else ()
    known = {ident for one in before for ident in one.ids.values()}
    decisions = [rest for one in final.decisions if (rest := _without_known(one, known)) is not None]
    return f.TaskReplanned(
        task=task.id,
        at_ms=at_ms,
        version=revising.version,
        trigger=revising.trigger,
        source=final.source,
        reason=final.reason,
        kept=[step.id for step in kept],
        dropped=sorted(dropped),
        added=[step.model_dump(mode="json", exclude_none=True) for step in added],
        decisions=[one.model_dump(mode="json", exclude_none=True) for one in decisions],
        generated_tokens=final.generated_tokens,
        slots={name: registry.models[name].slots for name in sorted(models)},
    )


def _without_known(decision: RoutingDecision, known: Set[str]) -> RoutingDecision | None:
    """What of a decision the plan does not have yet; None if it has all of it."""
    new = {step: ident for step, ident in decision.ids.items() if ident not in known}
    return decision.model_copy(update={"ids": new}) if new else None


def _timeout_ms(task: TaskRecord, at_ms: int) -> int:
    if task.deadline_ms is None:
        return _TIMEOUT_MS
    return max(1_000, min(_TIMEOUT_MS, int((task.deadline_ms - at_ms) * _LATE_SHARE)))


def _stays(task: TaskRecord, name: str, wanted: set[str]) -> bool:
    """Whether a step that may be dropped stays: it is wanted, or has got done meanwhile."""
    return task.steps[name].state is StepState.DONE or name in wanted


def _without(steps: list[Step], dropped: set[str]) -> list[Step]:
    """Steps without waiting for what is dropped."""
    return [
        step.model_copy(update={"depends_on": [other for other in step.depends_on if other not in dropped]})
        for step in steps
    ]


def _must_be_faster(task: TaskRecord, new: Plan, added: list[Step], ranking: Ranking, at_ms: int) -> None:
    left_s = rest_s(task, lambda step: ranking.expected_s(task, step.spec, step.role), at_ms)
    before_s = rest_least_s(task, left_s, ranking)
    waits = needs(new)
    cost_s = {name: seconds for name, seconds in left_s.items() if name in waits}
    cost_s |= {step.id: ranking.expected_s(task, step, step.actor) for step in added}
    roles = {name: task.steps[name].role for name in cost_s if name in task.steps}
    roles |= {step.id: step.actor for step in added}
    model_of = {name: ranking.registry.roles[role].model for name, role in roles.items()}
    open_waits = {name: waits[name] & cost_s.keys() for name in cost_s}
    after_s = least_s(open_waits, cost_s, model_of, ranking.slots_of)
    if after_s >= before_s:
        message = f"the new rest takes {after_s:.1f} s, the old one {before_s:.1f} s"
        raise CallFailed(Failure(code="plan.no_faster", category=Category.POLICY, origin=PLANNER, message=message))


def _notes(task: TaskRecord, step: str | None, failure: Failure) -> str:
    """What happened, as material: the failure, what checks found, and the last answer."""
    lines = [f"{failure.code}: {failure.message}"]
    if step is None:
        lines += [f"- {point.gate}: {point.message}" for point in failure.findings[:20]]
    else:
        record = task.steps[step]
        lines += [f"- {point.gate}: {point.message}" for point in points_of(record.attempts)[:20]]
        answers = [one.text() for attempt in record.attempts[-1:] for one in attempt.artefacts]
        if answers:
            lines += ["The last answer:", *answers]
    return "\n".join(lines)[:_MAX_NOTES_CHARS]


def _revising(task: TaskRecord) -> Revising:
    if task.revising is None:
        raise ValueError(f"no new version of the plan of {task.id} was asked for")
    return task.revising


def _plan_ids(task: TaskRecord) -> set[str]:
    return set() if task.ir.plan is None else {step.id for step in task.ir.plan.steps}


def _planned(ids: set[str], step_id: str) -> str:
    """The step of the plan with these ids that a step belongs to: itself, or the mapped one of a sub-step."""
    while step_id not in ids and "." in step_id:
        step_id = step_id.rpartition(".")[0]
    return step_id


def _refused(why: str) -> CallFailed:
    return CallFailed(Failure(code="plan.invalid", category=Category.SCHEMA, origin=PLANNER, message=why[:8_000]))
