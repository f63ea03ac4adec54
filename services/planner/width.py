"""How wide a plan is, and which of the three answers it gives to the question whether to split at all (pure)."""

from __future__ import annotations

from collections import Counter
from graphlib import TopologicalSorter
from typing import Final

from protocol.messages.task import Plan
from protocol.plan_graph import needs
from services.planner.split import Shape

_LEAST_ITEMS: Final = 2
"""Of a list that only shows at run time, where nothing bounds it."""


def levels_of(plan: Plan) -> dict[str, int]:
    """Steps on the longest chain before each step. The plan has no problems, see `plan_graph`."""
    waits = needs(plan)
    level: dict[str, int] = {}
    for step in TopologicalSorter(waits).static_order():
        level[step] = max((level[other] + 1 for other in waits[step]), default=0)
    return level


def width_of(plan: Plan) -> int:
    """Most steps on one level; a mapped step counts as many as the list may have that it is mapped over."""
    level = levels_of(plan)
    items = {
        output.name: int((step.json_schema or {}).get("maxItems", _LEAST_ITEMS))
        for step in plan.steps
        for output in step.outputs
    }
    wide: Counter[int] = Counter()
    for step in plan.steps:
        wide[level[step.id]] += 1 if step.map_over is None else items.get(step.map_over, _LEAST_ITEMS)
    return max(wide.values())


def answer_of(plan: Plan) -> Shape:
    """Direct: nothing runs beside anything. Independent: parts that wait for nothing, and at most their joins. Else
    staged: what runs side by side builds on something, or several wide levels follow each other.
    """
    if width_of(plan) == 1:
        return Shape.DIRECT if len(plan.steps) == 1 else Shape.STAGED
    level = levels_of(plan)
    sizes = Counter(level.values())
    roots_widest = sizes[0] == max(sizes.values())
    joins_only = all(level[step.id] == 0 or _joins(step.inputs, plan) for step in plan.steps)
    mapped = any(step.map_over is not None for step in plan.steps)
    return Shape.INDEPENDENT if roots_widest and joins_only and not mapped else Shape.STAGED


def told(plan: Plan) -> str:
    """The answer in words."""
    width = width_of(plan)
    match answer_of(plan):
        case Shape.DIRECT:
            return "done directly, in one step"
        case Shape.INDEPENDENT:
            return f"split into {width} independent parts"
        case Shape.STAGED:
            beside = f"up to {width} steps side by side" if width > 1 else "one step after the other"
            return f"done in stages, {beside}"


def _joins(inputs: list[str], plan: Plan) -> bool:
    """Whether a step puts together what several others have made, or all that one of them has."""
    made = {output.name for step in plan.steps for output in step.outputs}
    return len(made.intersection(inputs)) > 1
