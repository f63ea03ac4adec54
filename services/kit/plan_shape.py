"""How parallel a plan is: width, levels, longest chain, and how long it must take at least. Pure.

For people and for decisions before anything runs; what a schedule really looks like is the scheduler's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from graphlib import TopologicalSorter

from protocol.messages.plan import AddedEdge, PlanShape, RemovedEdge
from protocol.messages.task import Plan
from protocol.plan_graph import needs


def levels_of(waits_for: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Step -> steps on the longest chain before it. Raises graphlib.CycleError if the graph has a circle."""
    level: dict[str, int] = {}
    for step in _in_order(waits_for):
        level[step] = max((level[other] + 1 for other in waits_for[step]), default=0)
    return level


def _in_order(waits_for: Mapping[str, Iterable[str]]) -> Iterable[str]:
    """The steps, none before what it waits for: as they are written, which is nearly always such an order."""
    seen: set[str] = set()
    for step, others in waits_for.items():
        if not seen.issuperset(others):
            return TopologicalSorter(waits_for).static_order()
        seen.add(step)
    return waits_for


def width_of(plan: Plan) -> int:
    """Most steps on one level of a plan without problems: as many could run side by side."""
    return max(Counter(levels_of(needs(plan)).values()).values())


def longest_chain(waits_for: Mapping[str, Iterable[str]], cost_s: Mapping[str, float]) -> tuple[list[str], float]:
    """The chain that ends last, first step first, and its seconds; among equals the smaller id."""
    return _chain(waits_for, _ends_s(waits_for, cost_s, _in_order(waits_for)))


def least_s(
    waits_for: Mapping[str, Iterable[str]],
    cost_s: Mapping[str, float],
    model_of: Mapping[str, str],
    slots: Callable[[str], int],
) -> float:
    """Seconds that no schedule of these steps undercuts: the longest chain, or a model's work over its slots."""
    return max(longest_chain(waits_for, cost_s)[1], _busiest_s(cost_s, model_of, slots))


def shape_of_plan(
    waits_for: Mapping[str, frozenset[str]],
    cost_s: Mapping[str, float],
    model_of: Mapping[str, str],
    slots: Callable[[str], int],
) -> PlanShape:
    """The shape of a plan without problems; costs are expected seconds per step."""
    level = levels_of(waits_for)
    chain, seconds = _chain(waits_for, _ends_s(waits_for, cost_s, level))  # the steps of `level` come in a good order
    return PlanShape(
        width=max(Counter(level.values()).values()),
        levels=max(level.values()) + 1,
        critical=chain,
        critical_ms=round(1000 * seconds),
        predicted_ms=round(1000 * max(seconds, _busiest_s(cost_s, model_of, slots))),
    )


def _ends_s(
    waits_for: Mapping[str, Iterable[str]], cost_s: Mapping[str, float], order: Iterable[str]
) -> dict[str, float]:
    """When each step would end if none ever waited for a slot. `order`: nothing before what it waits for."""
    end_s: dict[str, float] = {}
    for step in order:
        end_s[step] = cost_s[step] + max((end_s[other] for other in waits_for[step]), default=0.0)
    return end_s


def _chain(waits_for: Mapping[str, Iterable[str]], end_s: Mapping[str, float]) -> tuple[list[str], float]:
    at: str | None = min(end_s, key=lambda step: (-end_s[step], step), default=None)
    chain: list[str] = []
    while at is not None:
        chain.append(at)
        at = min(waits_for[at], key=lambda step: (-end_s[step], step), default=None)
    return chain[::-1], max(end_s.values(), default=0.0)


def _busiest_s(cost_s: Mapping[str, float], model_of: Mapping[str, str], slots: Callable[[str], int]) -> float:
    """The work of the model that has most of it for its slots."""
    work_s: dict[str, float] = {}
    for step, seconds in cost_s.items():
        work_s[model_of[step]] = work_s.get(model_of[step], 0.0) + seconds
    return max((work_s[model] / max(1, slots(model)) for model in work_s), default=0.0)


def as_written(plan: Plan, removed: Iterable[RemovedEdge], added: Iterable[AddedEdge]) -> Plan:
    """The plan with the dependencies that were dropped again, and without those that were added: what discovery did."""
    dropped: dict[str, list[str]] = {}
    for edge in removed:
        dropped.setdefault(edge.step, []).append(edge.depends_on)
    new = {(edge.step, edge.depends_on) for edge in added}
    known = {step.id for step in plan.steps}
    steps = [
        step.model_copy(
            update={
                "depends_on": [
                    *(other for other in step.depends_on if (step.id, other) not in new),
                    *(other for other in dropped.get(step.id, ()) if other in known),
                ]
            }
        )
        if step.id in dropped or any(step.id == one for one, _ in new)
        else step
        for step in plan.steps
    ]
    return plan.model_copy(update={"steps": steps})
