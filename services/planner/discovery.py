"""Parallelism discovery: which steps of a plan really have to wait for each other.

Naming an artefact as input is a dependency; writing `depends_on` is only a wish, and models as well as people wish
for chains. A control dependency stays where
 * data flows along it (it repeats what the inputs say),
 * the step is marked `ordered`,
 * it guards a hazard: two steps whose outputs would be kept in the same file. Equal names are refused before, but
   `notes` (kept as notes.md) and `notes.md` are two names for one file, and so are `Notes.md` and `notes.md` on some
   file systems; then the order decides what is found there in the end. Artefacts are values and every attempt has a
   workspace of its own, so there is no other hazard in IR v1.
Everything else goes, with a note that says which edge and why. Expects a plan without problems
(`protocol.plan_graph.find_problems`); edges are only ever removed, so an acyclic plan stays acyclic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from graphlib import TopologicalSorter
from operator import or_

from protocol.messages.plan import RemovedEdge
from protocol.messages.task import Plan, Step
from protocol.plan_graph import producers, reads
from services.planner.naming import output_file


@dataclass(frozen=True, slots=True)
class Discovery:
    """A plan without its needless edges."""

    plan: Plan
    removed: tuple[RemovedEdge, ...]


def data_needs(plan: Plan) -> dict[str, frozenset[str]]:
    """Step id -> ids of the steps whose outputs it reads."""
    made = producers(plan)
    return {step.id: frozenset(made[name] for name in reads(step) if name in made) for step in plan.steps}


def discover(plan: Plan) -> Discovery:
    """Drop the control dependencies that neither carry data nor guard anything."""
    needs = data_needs(plan)
    files = {step.id: {output_file(output).casefold() for output in step.outputs} for step in plan.steps}
    removed: list[tuple[str, str]] = []
    steps: list[Step] = []
    for step in plan.steps:
        idle = {
            other: None
            for other in step.depends_on
            if not step.ordered and other not in needs[step.id] and files[step.id].isdisjoint(files[other])
        }
        if idle:
            removed += [(step.id, other) for other in idle]
            step = step.model_copy(update={"depends_on": [other for other in step.depends_on if other not in idle]})
        steps.append(step)
    if not removed:
        return Discovery(plan, ())
    return Discovery(plan.model_copy(update={"steps": steps}), tuple(_with_reasons(removed, needs)))


def _with_reasons(removed: list[tuple[str, str]], needs: Mapping[str, frozenset[str]]) -> Iterator[RemovedEdge]:
    bit = {step: 1 << number for number, step in enumerate(needs)}
    upstream: dict[str, int] = {}  # sets of steps as bits of a number: plans may have thousands of steps
    for step in TopologicalSorter(needs).static_order():
        upstream[step] = reduce(or_, (bit[other] | upstream[other] for other in needs[step]), 0)
    for step, other in removed:
        if upstream[step] & bit[other]:
            reason = f"{step} reads nothing of {other} itself; the data between them keeps the order already"
        else:
            reason = f"no output of {other} is read by {step}; set `ordered: true` on {step} to keep the order"
        yield RemovedEdge(step=step, depends_on=other, reason=reason)
