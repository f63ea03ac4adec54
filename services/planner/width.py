"""How wide a plan is, and which of the three answers it gives to the question whether to split at all (pure)."""

from __future__ import annotations

from collections import Counter
from typing import Final

from protocol.messages.task import Plan
from protocol.plan_graph import needs
from services.kit import plan_shape
from services.planner.split import Shape

_LEAST_ITEMS: Final = 2
"""Of a list that only shows at run time, where nothing bounds it."""


def levels_of(plan: Plan) -> dict[str, int]:
    """Steps on the longest chain before each step. The plan has no problems, see `plan_graph`."""
    return plan_shape.levels_of(needs(plan))


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
    """Direct: one step. Independent: most steps wait for nothing, and what they make is joined, each result once.
    Staged: steps build on others, or what runs side by side does.
    """
    if width_of(plan) == 1:
        return Shape.DIRECT if len(plan.steps) == 1 else Shape.STAGED
    sizes = Counter(levels_of(plan).values())
    read = Counter(name for step in plan.steps for name in step.inputs)
    joined_once = all(read[output.name] <= 1 for step in plan.steps for output in step.outputs)
    mapped = any(step.map_over is not None for step in plan.steps)
    independent = sizes[0] == max(sizes.values()) and joined_once and not mapped
    return Shape.INDEPENDENT if independent else Shape.STAGED


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
