"""Plans whose true order is known, made serial at random, and what the discovery of parallelism makes of them.

A plan is given its needs first: data from step to step, files that two steps share under two names, steps that are
`ordered` on purpose. Then a chain of `depends_on` is laid through all of it in some order that is possible, as models
write when they chain everything. Of the pairs of steps that the needs leave free, the share that is free again after
the discovery is `recovered`; every pair that the needs order and that is free afterwards is `unsafe`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from protocol.messages.task import Output, Plan, Step
from protocol.plan_graph import needs
from services.ctl.bench.graph_file import TaskGraph
from services.planner.discovery import discover

_SIZES: Final = (4, 40)
_SHARES_FILE: Final = 0.15
_ORDERED: Final = 0.05


@dataclass(frozen=True, slots=True)
class Known:
    """A serial plan, and which steps really have to wait for which."""

    plan: Plan
    needs: Mapping[str, frozenset[str]]


def random_plans(count: int, seed: int) -> list[Known]:
    """So many plans of 4 to 40 steps, from sparse to dense; the same for the same seed."""
    chance = random.Random(seed)  # noqa: S311  repeatable graphs, not a secret
    return [_random_plan(chance) for _ in range(count)]


def from_graph(graph: TaskGraph, seed: int) -> Known:
    """A graph of a file, its edges as data flow."""
    chance = random.Random(f"{seed} {graph.name}")  # noqa: S311  repeatable order, not a secret
    ids = {task: f"S{number}" for number, task in enumerate(graph.needs, 1)}
    waits = {ids[task]: frozenset(ids[other] for other in others) for task, others in graph.needs.items()}
    steps = {step: _step(step, f"a_{step}", [f"a_{other}" for other in sorted(waits[step])]) for step in waits}
    return _chained(steps, waits, chance)


def measure_discovery(known: Sequence[Known]) -> dict[str, Any]:
    """Shares and counts over all pairs of steps of all plans."""
    free = recovered = unsafe = removed = added = 0
    for one in known:
        found = discover(one.plan)
        removed, added = removed + len(found.removed), added + len(found.added)
        wanted, left = _upstream(one.needs), _upstream(needs(found.plan))
        for step in wanted:
            unsafe += (wanted[step] & ~left[step]).bit_count()
        pairs = [sum(sets.bit_count() for sets in one_order.values()) for one_order in (wanted, left)]
        total = len(wanted) * (len(wanted) - 1) // 2
        free += total - pairs[0]
        recovered += total - max(pairs)
    return {
        "dags": len(known),
        "recovered": round(recovered / free, 6) if free else 1.0,
        "unsafe": unsafe,
        "free_pairs": free,
        "removed_edges": removed,
        "added_edges": added,
    }


def _random_plan(chance: random.Random) -> Known:
    size = chance.randint(*_SIZES)
    density = chance.uniform(0.0, 4.0) / size
    steps: dict[str, Step] = {}
    waits: dict[str, frozenset[str]] = {}
    sharing: set[str] = set()
    second_of: dict[str, str] = {}
    for number in range(1, size + 1):
        step, earlier = f"S{number}", list(steps)
        parents = {other for other in earlier if chance.random() < density}
        reads = [steps[other].outputs[0].name for other in sorted(parents)]
        name = f"a_{step}"
        # Who reads the first of two that share a file, after the second has written it, waits for the second.
        parents |= {second_of[other] for other in list(parents) if other in second_of}
        alone = [other for other in earlier if other not in sharing]
        if alone and chance.random() < _SHARES_FILE:
            # Kept in the file of an earlier step: after it, and after everybody who has read that file.
            other = chance.choice(alone)
            name = f"a_{other}.md"
            sharing |= {other, step}
            second_of[other] = step
            parents |= {other, *(reader for reader in earlier if f"a_{other}" in steps[reader].inputs)}
        depends = []
        if earlier and chance.random() < _ORDERED:
            depends = [chance.choice(earlier)]
        steps[step] = _step(step, name, reads, depends)
        waits[step] = frozenset(parents | set(depends))
    return _chained(steps, waits, chance)


def _step(ident: str, output: str, reads: Iterable[str], ordered_after: Sequence[str] = ()) -> Step:
    return Step(
        id=ident,
        actor="worker",
        action="work",
        inputs=list(reads),
        outputs=[Output(name=output)],
        depends_on=list(ordered_after),
        ordered=bool(ordered_after),
    )


def _chained(steps: Mapping[str, Step], waits: Mapping[str, frozenset[str]], chance: random.Random) -> Known:
    """One chain through all steps, in an order that is possible; a step that is ordered on purpose keeps its own."""
    done: set[str] = set()
    order: list[str] = []
    while len(order) < len(steps):
        ready = [step for step in steps if step not in done and waits[step] <= done]
        order.append(chance.choice(ready))
        done.add(order[-1])
    chained = []
    for before, ident in zip([None, *order], order, strict=False):
        step = steps[ident]
        if before is not None and not step.ordered:
            step = step.model_copy(update={"depends_on": [before]})
        chained.append(step)
    return Known(Plan(steps=chained), waits)


def _upstream(waits: Mapping[str, frozenset[str]]) -> dict[str, int]:
    """All that each step waits for, as bits by its place in `waits` sorted by id, so that two plans compare."""
    bit = {step: 1 << number for number, step in enumerate(sorted(waits))}
    upstream: dict[str, int] = {}
    todo = list(waits)
    while todo:
        step = todo.pop()
        missing = [other for other in waits[step] if other not in upstream]
        if missing:
            todo += [step, *missing]
            continue
        upstream[step] = 0
        for other in waits[step]:
            upstream[step] |= bit[other] | upstream[other]
    return upstream
