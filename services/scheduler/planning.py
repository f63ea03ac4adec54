"""What the planner is asked, and the fact that adopts what it answers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from protocol.codec import pack_body
from protocol.errors import CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.plan import PlanFinal, PlanRequest
from services.kit.plan_check import plan_problems
from services.kit.registry import Registry, with_own
from services.scheduler import facts as f
from services.scheduler.own_calls import Wanted
from services.scheduler.ranks import Ranking
from services.scheduler.tasks import TaskRecord

PLANNER: Final = "planner"
_TIMEOUT_MS: Final = 120_000


def plan_wanted(task: TaskRecord, retries: int) -> Wanted:
    """The question for a plan; asked anew after a failed attempt, and the same again after a lost planner."""
    body = pack_body(PlanRequest(task=task.ir, personas=list(task.personas.values())))
    return Wanted("plan.request", PLANNER, ("plan", retries), body, timeout_ms=_TIMEOUT_MS)


def adopted(task: TaskRecord, final: PlanFinal, registry: Registry, ranking: Ranking, at_ms: int) -> f.TaskPlanned:
    """The fact by which a task takes up this plan. Raises CallFailed with SCHEMA for a plan that cannot run."""
    problems = plan_problems(final.task, with_own(registry, task.personas.values()))
    if final.task.plan is None or problems:
        message = "; ".join(str(problem) for problem in problems[:5]) or "the planner returned no plan"
        raise CallFailed(
            Failure(code="plan.invalid", category=Category.SCHEMA, origin=PLANNER, message=message[:8_000])
        )
    planned = final.task.model_copy(
        update={"task_id": task.id, "created_at": task.ir.created_at, "idempotency_key": task.ir.idempotency_key}
    )
    predicted = ranking.predict(task, planned)
    models = {registry.roles[step.actor].model for step in final.task.plan.steps}
    return f.TaskPlanned(
        task=task.id,
        at_ms=at_ms,
        ir=planned.model_dump(mode="json", exclude_none=True),
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
    )


def with_names(final: PlanFinal, names: Mapping[str, str]) -> PlanFinal:
    """The answer with the personas of its plan under other names: old name -> new name.

    Decisions for one that was renamed are left out: memory has them under the old name, which is another persona's.
    """
    plan = final.task.plan
    if plan is None or all(old == new for old, new in names.items()):
        return final
    steps = [
        step.model_copy(update={"persona": names.get(step.persona, step.persona)}) if step.persona else step
        for step in plan.steps
    ]
    named = plan.model_copy(update={"steps": steps, "persona": names.get(plan.persona or "", plan.persona)})
    renamed = {old for old, new in names.items() if old != new}
    decisions = [one for one in final.decisions if one.subject != "persona" or one.choice not in renamed]
    task = final.task.model_copy(update={"plan": named})
    return final.model_copy(update={"task": task, "decisions": decisions})
