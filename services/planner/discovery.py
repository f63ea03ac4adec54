"""Parallelism discovery: which steps of a plan really have to wait for each other.

Naming an artefact as input is a dependency; writing `depends_on` is only a wish, and models as well as people wish
for chains. Two steps keep the order that the plan gives them, directly or through others, where
 * data flows from one to the other: then the order is in the inputs already,
 * the later one is marked `ordered` and names the other in its `depends_on`,
 * there is a hazard between them: both write one file, or one writes the file that the other reads. Equal names are
   refused before, but `notes` (kept as notes.md) and `notes.md` are two names for one file, and so are `Notes.md` and
   `notes.md` on some file systems; then the order decides what is found there in the end.
Every other control dependency goes, with a note that says which edge and why. A `parallel_group` is a hint: it adds
weight to the reason, and where its steps have to wait for each other all the same, a note says so. Where an order must
hold and no edge is left that holds it (it went through a step in between, or the plan gave none at all), an edge is
added, with its reason. What is done with the result of the serial order is never changed by that: see the property
tests.

Expects a plan without problems (`protocol.plan_graph.find_problems`). Every edge of the result runs forward in one
topological order of the plan, so that it is acyclic; doing it twice changes nothing. Takes time in proportion to the
edges, and to the square of the steps over the word length where reasons need to know what is upstream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from heapq import heappop, heappush
from operator import or_
from typing import Final

from protocol.messages.artefact import Artefact
from protocol.messages.plan import AddedEdge, RemovedEdge
from protocol.messages.task import Plan, Step
from protocol.plan_graph import needs, producers, reads
from services.planner.naming import output_file

_WRITE_WRITE: Final = "{earlier} and {later} write one file, {file!r}: the order decides what is found there in the end"
_READ_AFTER_WRITE: Final = "{later} reads the file {file!r}, which {earlier} writes"
_WRITE_AFTER_READ: Final = "{later} writes the file {file!r}, which {earlier} reads"


@dataclass(frozen=True, slots=True)
class Discovery:
    """A plan without its needless edges, and with those that were missing."""

    plan: Plan
    removed: tuple[RemovedEdge, ...]
    added: tuple[AddedEdge, ...]
    notes: tuple[str, ...] = ()
    """Parallel groups whose steps have to wait for each other all the same."""


def data_needs(plan: Plan) -> dict[str, frozenset[str]]:
    """Step id -> ids of the steps whose outputs it reads."""
    made = producers(plan)
    return {step.id: frozenset(made[name] for name in reads(step) if name in made) for step in plan.steps}


def discover(plan: Plan, inputs: Iterable[Artefact] = ()) -> Discovery:
    """Drop the control dependencies that neither carry data nor guard anything, add those that hazards ask for.

    `inputs` are those of the task: a step may write the file that one of them is kept in.
    """
    data = data_needs(plan)
    order = _in_order(plan)
    hazards = _hazards(plan, order, inputs)
    removed: list[tuple[str, str]] = []
    added: list[AddedEdge] = []
    kept: dict[str, list[str]] = {}
    for step in plan.steps:
        guarded = hazards.get(step.id, {})
        idle = {
            other: None
            for other in step.depends_on
            if not step.ordered and other not in data[step.id] and other not in guarded
        }
        removed += [(step.id, other) for other in idle]
        kept[step.id] = [other for other in step.depends_on if other not in idle]
    upstream = _upstream({step: data[step].union(kept[step]) for step in order}) if removed or hazards else {}
    bit = {step: 1 << number for number, step in enumerate(order)}
    for step_id in order:
        for other, why in hazards.get(step_id, {}).items():
            if upstream[step_id] & bit[other] or other in kept[step_id]:
                continue
            kept[step_id].append(other)
            added.append(AddedEdge(step=step_id, depends_on=other, reason=why))
    apart = tuple(_kept_apart(plan, data, kept, hazards))
    if not removed and not added:
        return Discovery(plan, (), (), apart)
    steps = [
        step if kept[step.id] == step.depends_on else step.model_copy(update={"depends_on": kept[step.id]})
        for step in plan.steps
    ]
    group = {step.id: step.parallel_group for step in plan.steps}
    reasons = tuple(_with_reasons(removed, upstream, bit, group))
    return Discovery(plan.model_copy(update={"steps": steps}), reasons, tuple(added), apart)


def _in_order(plan: Plan) -> list[str]:
    """Every step after those it waits for; where the plan leaves it open, as in its list."""
    waits = needs(plan)
    place = {step.id: number for number, step in enumerate(plan.steps)}
    missing = {step: len(others) for step, others in waits.items()}
    after: dict[str, list[str]] = {step: [] for step in waits}
    for step, others in waits.items():
        for other in others:
            after[other].append(step)
    ready: list[int] = []
    for step, count in missing.items():
        if count == 0:
            heappush(ready, place[step])
    order: list[str] = []
    while ready:
        step = plan.steps[heappop(ready)].id
        order.append(step)
        for other in after[step]:
            missing[other] -= 1
            if missing[other] == 0:
                heappush(ready, place[other])
    return order


def _hazards(plan: Plan, order: list[str], inputs: Iterable[Artefact]) -> dict[str, dict[str, str]]:
    """Later step -> earlier step -> why their order counts. For each file only neighbours in the order: a chain of
    them orders all the others.
    """
    files: dict[str, str] = {artefact.name: artefact.file_name().casefold() for artefact in inputs}
    owner = {file: name for name, file in files.items()}
    shared: set[str] = set()
    for step in plan.steps:
        for output in step.outputs:
            file = files[output.name] = output_file(output).casefold()
            if owner.setdefault(file, output.name) != output.name:
                shared.add(file)
    if not shared:
        return {}
    by_id: dict[str, Step] = {step.id: step for step in plan.steps}
    data = data_needs(plan)
    writer: dict[str, str] = {}
    readers: dict[str, list[str]] = {}
    found: dict[str, dict[str, str]] = {}

    def guard(later: str, earlier: str, why: str, file: str) -> None:
        if later != earlier and earlier not in data[later]:
            found.setdefault(later, {}).setdefault(earlier, why.format(earlier=earlier, later=later, file=file))

    for step_id in order:
        step = by_id[step_id]
        read = {files[name] for name in reads(step) if name in files} & shared
        written = {files[output.name] for output in step.outputs} & shared
        for file in sorted(read):
            if file in writer:
                guard(step_id, writer[file], _READ_AFTER_WRITE, file)
            readers.setdefault(file, []).append(step_id)
        for file in sorted(written):
            if file in writer:
                guard(step_id, writer[file], _WRITE_WRITE, file)
            for reader in readers.pop(file, ()):
                guard(step_id, reader, _WRITE_AFTER_READ, file)
            writer[file] = step_id
    return found


def _upstream(waits: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """All that a step waits for, as bits by place in the order: plans may have thousands of steps."""
    bit = {step: 1 << number for number, step in enumerate(waits)}
    upstream: dict[str, int] = {}
    for step, others in waits.items():
        upstream[step] = reduce(or_, (bit[other] | upstream[other] for other in others), 0)
    return upstream


def _kept_apart(
    plan: Plan,
    data: Mapping[str, frozenset[str]],
    kept: Mapping[str, list[str]],
    hazards: Mapping[str, Mapping[str, str]],
) -> Iterator[str]:
    """Steps of one parallel group that wait for each other directly, and why: a hint is never an order, nor its end."""
    groups = {step.id: step.parallel_group for step in plan.steps if step.parallel_group is not None}
    for step, group in groups.items():
        for other in sorted({*data[step], *kept[step]}):
            if groups.get(other) != group:
                continue
            why = "reads what it makes" if other in data[step] else hazards.get(step, {}).get(other, "is `ordered`")
            yield f"parallel group {group}: {step} waits for {other} all the same, since it {why}"


def _with_reasons(
    removed: list[tuple[str, str]], upstream: Mapping[str, int], bit: Mapping[str, int], group: Mapping[str, str | None]
) -> Iterator[RemovedEdge]:
    for step, other in removed:
        if group[step] is not None and group[step] == group[other]:
            reason = f"the plan itself has both in parallel group {group[step]}, and no data flows between them"
        elif upstream[step] & bit[other]:
            reason = f"{step} reads nothing of {other} itself; what else it waits for keeps the order already"
        else:
            reason = f"no output of {other} is read by {step}; set `ordered: true` on {step} to keep the order"
        yield RemovedEdge(step=step, depends_on=other, reason=reason)
