"""What the planner is asked, and the fact that adopts what it answers. Pure."""

from __future__ import annotations

from typing import Final

from protocol.codec import pack_body
from protocol.errors import CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.plan import PlanFinal, PlanRequest
from services.kit.plan_check import plan_problems
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.own_calls import Wanted
from services.scheduler.ranks import Ranking
from services.scheduler.tasks import TaskRecord

PLANNER: Final = "planner"
_TIMEOUT_MS: Final = 120_000


def plan_wanted(task: TaskRecord, retries: int) -> Wanted:
    """The question for a plan; asked anew after a failed attempt, and the same again after a lost planner."""
    body = pack_body(PlanRequest(task=task.ir))
    return Wanted("plan.request", PLANNER, ("plan", retries), body, timeout_ms=_TIMEOUT_MS)


def adopted(task: TaskRecord, final: PlanFinal, registry: Registry, ranking: Ranking, at_ms: int) -> f.TaskPlanned:
    """The fact by which a task takes up this plan. Raises CallFailed with SCHEMA for a plan that cannot run."""
    problems = plan_problems(final.task, registry)
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
        generated_tokens=final.generated_tokens,
        predicted_ms=predicted.length_ms,
        predicted_steps=list(predicted.steps),
        slots={name: registry.models[name].slots for name in sorted(models)},
    )
