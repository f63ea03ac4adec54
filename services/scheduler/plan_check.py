"""Problems of a task that only the registry can see: roles, personas and gates that do not exist.

The graph itself is checked by `protocol.plan_graph`; both together are what a submit and a planner's plan must pass.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.messages.task import TaskIR
from protocol.plan_graph import PlanProblem, find_problems
from services.kit.registry import Registry


def find_plan_problems(task: TaskIR, registry: Registry) -> list[PlanProblem]:
    """Every reason why this task could not run here; each names step and field."""
    problems = find_problems(task)
    problems.extend(_unknown(None, "gates", "gate", task.gates, registry.gates))
    for step in task.plan.steps if task.plan else ():
        problems.extend(_unknown(step.id, "actor", "role", [step.actor], registry.roles))
        problems.extend(_unknown(step.id, "gates", "gate", step.gates or [], registry.gates))
        if step.persona is not None:
            problems.extend(_unknown(step.id, "persona", "persona", [step.persona], registry.personas))
    return problems


def _unknown(
    step: str | None, field: str, noun: str, names: Iterable[str], known: Iterable[str]
) -> Iterable[PlanProblem]:
    have = sorted(known)
    for name in names:
        if name not in have:
            yield PlanProblem(step, field, f"there is no {noun} {name!r}; the registry has {', '.join(have)}")
