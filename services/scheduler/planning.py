"""What the planner is asked, and the facts that adopt what it answers, piece by piece or as a whole. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from protocol.codec import pack_body
from protocol.errors import CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.plan import PlanFinal, PlanPartial, PlanRequest
from protocol.messages.task import Plan, Step
from protocol.plan_graph import needs
from services.kit.plan_check import plan_problems
from services.kit.plan_shape import as_written, shape_of_plan
from services.kit.registry import Registry, with_own
from services.scheduler import facts as f
from services.scheduler.own_calls import Wanted
from services.scheduler.ranks import Ranking
from services.scheduler.tasks import TaskRecord

PLANNER: Final = "planner"
_TIMEOUT_MS: Final = 120_000


def plan_wanted(retries: int) -> Wanted:
    """The question for a plan; asked anew after a failed attempt, and the same again after a lost planner. Its body is
    composed when it starts, since steps of the plan may run already.
    """
    return Wanted("plan.request", PLANNER, ("plan", retries), None, timeout_ms=_TIMEOUT_MS)


def plan_body(task: TaskRecord) -> bytes:
    """What is asked: the task as it was sent, and the steps of a plan that somebody began to tell."""
    personas = list(task.personas.values())
    if not task.plan_open or task.ir.plan is None:
        return pack_body(PlanRequest(task=task.ir, personas=personas))
    bare, begun = task.ir.model_copy(update={"plan": None}), list(task.ir.plan.steps)
    return pack_body(PlanRequest(task=bare, personas=personas, begun=begun))


def grown(task: TaskRecord, partial: PlanPartial, registry: Registry, at_ms: int) -> f.PlanGrown | None:
    """The fact by which steps of a plan in the making begin; None if there are no new ones, or they could not run."""
    if task.ir.plan is not None and not task.plan_open:
        return None  # it came with its plan
    begun = task.ir.plan.steps if task.ir.plan is not None else []
    new = [step for step in partial.steps if step.id not in task.steps]
    known = with_own(registry, task.personas.values())
    if not new or plan_problems(task.ir.model_copy(update={"plan": Plan(steps=[*begun, *new])}), known):
        return None
    values = [step.model_dump(mode="json", exclude_none=True) for step in new]
    return f.PlanGrown(task=task.id, at_ms=at_ms, steps=values)


def adopted(task: TaskRecord, final: PlanFinal, registry: Registry, ranking: Ranking, at_ms: int) -> f.TaskPlanned:
    """The fact by which a task takes up this plan. Raises CallFailed with SCHEMA for a plan that cannot run."""
    if final.task.plan is None:
        raise _invalid("the planner returned no plan")
    begun = {step.id: step for step in task.ir.plan.steps} if task.plan_open and task.ir.plan is not None else {}
    told = {step.id: step for step in final.task.plan.steps}
    steps = list((told | begun).values())  # what runs stays as it is, and so does what a client has added meanwhile
    plan = final.task.plan.model_copy(update={"steps": steps})
    known = with_own(registry, task.personas.values())
    planned = final.task.model_copy(
        update={
            "task_id": task.id,
            "created_at": task.ir.created_at,
            "idempotency_key": task.ir.idempotency_key,
            "plan": plan,
        }
    )
    problems = plan_problems(planned, known)
    if len(told) < len(final.task.plan.steps):  # a step twice
        problems = plan_problems(final.task, known)
    if problems:
        raise _invalid("; ".join(str(problem) for problem in problems[:5]))
    predicted = ranking.predict(task, planned)
    model_of = {step.id: registry.roles[step.actor].model for step in steps}
    models = set(model_of.values())

    def slots(model: str) -> int:
        return ranking.slots(model) or registry.models[model].slots

    as_run = shape_of_plan(predicted.waits_for, predicted.cost_s, model_of, slots)
    before = as_run
    if final.removed_edges or final.added_edges:
        written = as_written(plan, final.removed_edges, final.added_edges)
        before = shape_of_plan(needs(written), predicted.cost_s, model_of, slots)
    return f.TaskPlanned(
        task=task.id,
        at_ms=at_ms,
        ir=f.Dumped(planned),
        source=final.source,
        reason=final.reason,
        removed_edges=[edge.model_dump(mode="json") for edge in final.removed_edges],
        decisions=[one.model_dump(mode="json", exclude_none=True) for one in final.decisions],
        similar=[one.model_dump(mode="json", exclude_none=True) for one in final.similar],
        lessons=[one.model_dump(mode="json") for one in final.lessons] or None,
        generated_tokens=final.generated_tokens,
        predicted_ms=predicted.length_ms,
        predicted_steps=list(predicted.steps),
        slots={name: registry.models[name].slots for name in sorted(models)},
        added_edges=[edge.model_dump(mode="json") for edge in final.added_edges] or None,
        as_written=None if before is as_run else before.model_dump(mode="json"),
        as_run=as_run.model_dump(mode="json"),
    )


def _invalid(why: str) -> CallFailed:
    return CallFailed(Failure(code="plan.invalid", category=Category.SCHEMA, origin=PLANNER, message=why[:8_000]))


def with_names(final: PlanFinal, names: Mapping[str, str]) -> PlanFinal:
    """The answer with the personas of its plan under other names: old name -> new name.

    Decisions for one that was renamed are left out: memory has them under the old name, which is another persona's.
    """
    plan = final.task.plan
    if plan is None or all(old == new for old, new in names.items()):
        return final
    steps = steps_with_names(plan.steps, names)
    named = plan.model_copy(update={"steps": steps, "persona": names.get(plan.persona or "", plan.persona)})
    renamed = {old for old, new in names.items() if old != new}
    decisions = [one for one in final.decisions if one.subject != "persona" or one.choice not in renamed]
    task = final.task.model_copy(update={"plan": named})
    return final.model_copy(update={"task": task, "decisions": decisions})


def steps_with_names(steps: Sequence[Step], names: Mapping[str, str]) -> list[Step]:
    """The steps with their personas under other names: old name -> new name."""
    return [
        step.model_copy(update={"persona": names.get(step.persona, step.persona)}) if step.persona else step
        for step in steps
    ]
