"""A look ahead on a task's remaining graph: ranks that know how many slots there are. Pure and deterministic.

Plain upward rank sees the longest chain behind a step but not that slots are few. Here the remaining steps are list
scheduled on the slots of their tiers with the durations that are expected; the schedule is then justified: scheduled
again from its end, later ends first, which yields for each step the latest start that still keeps that schedule, and
these starts are the next list. Forward-backward improvement, or double justification: Li and Willis, EJOR 56(3), 1992;
Valls, Ballestin and Quintanilla, EJOR 165(2), 2005. It is repeated while it helps, and begun anew from ranks that are
slightly jolted (by a fixed sequence) while effort is left. The list with the shortest schedule wins; it is upward
rank's own unless another is better.

Does not decide what runs: its ranks go where upward ranks go, and a rank stays what it was, seconds from the start of
a step to the end of its task. Gates, other tasks and retries are not in it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

EFFORT: Final = 16_000
"""Steps and edges that all passes of one look ahead may visit together: about 10 ms on a slow core."""
_JOLTS: Final = 4
_JOLT: Final = 0.1
"""Standard deviation of the logarithm of the factor on a rank in a jolted start."""
_GAIN: Final = 1.0 - 1e-9
"""A schedule must be shorter than this share of the best one to count as better: rounding is no gain."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a task. Every step has a cost above or equal zero, a tier, and its followers in `followers`."""

    cost_s: Mapping[str, float]
    """Seconds to expect; of a running step, those that are left."""
    followers: Mapping[str, Sequence[str]]
    tier: Mapping[str, str]
    slots: Mapping[str, int]
    """Slots of each tier, at least 1."""
    running: frozenset[str] = frozenset()
    """Steps that have their slot already."""


def looked_ahead(left: Remaining, rank: Mapping[str, float], effort: int = EFFORT) -> dict[str, float]:
    """Seconds from the start of each step to the end of the task, with the number of slots taken into account.

    `rank` is the upward rank of every step. Equal to it where no better order was found within `effort`, and where
    upward rank is known to be the best there is.
    """
    graph = _Graph.of(left)
    bound_s = max([max(rank.values(), default=0.0), *graph.loads()])
    visits = len(graph.cost) + sum(map(len, graph.after))
    passes = effort // max(1, visits)
    start = [rank[name] for name in graph.names]
    if passes < 4 or not any(graph.after):
        return dict(rank)
    best, best_s = start, graph.forward(start)[1]
    passes -= 1
    if best_s * _GAIN <= bound_s:
        return dict(rank)
    jolts = random.Random(0)  # noqa: S311  a fixed sequence: the same graph always gets the same ranks
    for _ in range(1 + _JOLTS):
        found, found_s, spent = _improved(graph, start, passes)
        passes -= spent
        if found_s < best_s * _GAIN:
            best, best_s = found, found_s
        if best_s * _GAIN <= bound_s or passes < 3:
            break
        start = [rank[name] * jolts.lognormvariate(0.0, _JOLT) for name in graph.names]
    return dict(zip(graph.names, best, strict=True))


def _improved(graph: _Graph, priority: list[float], passes: int) -> tuple[list[float], float, int]:
    """Forward and backward passes while they help: the best list, its makespan, and how many passes it took."""
    ends, best_s = graph.forward(priority)
    best, spent = priority, 1
    while spent + 2 <= passes:
        candidate = graph.backward(ends)
        ends, found_s = graph.forward(candidate)
        spent += 2
        if found_s >= best_s * _GAIN:
            break
        best, best_s = candidate, found_s
    return best, best_s, spent


@dataclass(slots=True)
class _Graph:
    """`Remaining` by numbers instead of names, for speed."""

    names: list[str]
    cost: list[float]
    tier: list[int]
    slots: list[int]
    before: list[list[int]]
    after: list[list[int]]
    running: list[int]

    @classmethod
    def of(cls, left: Remaining) -> _Graph:
        names = list(left.cost_s)
        number = {name: index for index, name in enumerate(names)}
        tiers = {tier: index for index, tier in enumerate(dict.fromkeys(left.tier[name] for name in names))}
        after = [[number[other] for other in left.followers.get(name, ()) if other in number] for name in names]
        before: list[list[int]] = [[] for _ in names]
        for index, others in enumerate(after):
            for other in others:
                before[other].append(index)
        return cls(
            names=names,
            cost=[left.cost_s[name] for name in names],
            tier=[tiers[left.tier[name]] for name in names],
            slots=[max(1, left.slots[tier]) for tier in tiers],
            before=before,
            after=after,
            running=sorted(number[name] for name in left.running if name in number),
        )

    def loads(self) -> list[float]:
        """Work of each tier over its slots, in seconds."""
        work = [0.0] * len(self.slots)
        for cost, tier in zip(self.cost, self.tier, strict=True):
            work[tier] += cost
        return [total / slots for total, slots in zip(work, self.slots, strict=True)]

    def forward(self, priority: Sequence[float]) -> tuple[list[float], float]:
        """When each step ends if the ready one with the highest priority always goes first, and the makespan."""
        return self._scheduled(priority, self.before, self.after, self.running)

    def backward(self, ends: Sequence[float]) -> list[float]:
        """Seconds from the start of each step to the end, in the schedule that is made from the end on."""
        # In reversed time a step "ends" where it starts.
        return self._scheduled(ends, self.after, self.before, ())[0]

    def _scheduled(
        self,
        priority: Sequence[float],
        before: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]],
        first: Sequence[int],
    ) -> tuple[list[float], float]:
        # As the hub does it: after every single end the next step is handed out, even if another ends at the same
        # moment, and among equals the first that became ready goes first. Then a plan with exact durations comes true.
        cost, tier = self.cost, self.tier
        free = list(self.slots)
        missing = [len(others) for others in before]
        ready: list[list[tuple[float, int, int]]] = [[] for _ in free]
        ends = [0.0] * len(cost)
        under_way: list[tuple[float, int, int]] = []
        begun = set(first)
        count = itertools.count()
        for index in first:
            free[tier[index]] -= 1
            ends[index] = cost[index]
            heapq.heappush(under_way, (cost[index], next(count), index))
        for index, needs in enumerate(missing):
            if needs == 0 and index not in begun:
                heapq.heappush(ready[tier[index]], (-priority[index], next(count), index))
        now = 0.0
        while True:
            for kind, waiting in enumerate(ready):
                while waiting and free[kind] > 0:
                    index = heapq.heappop(waiting)[2]
                    free[kind] -= 1
                    ends[index] = now + cost[index]
                    heapq.heappush(under_way, (ends[index], next(count), index))
            if not under_way:
                return ends, now
            now, _, index = heapq.heappop(under_way)
            free[tier[index]] += 1
            for other in after[index]:
                missing[other] -= 1
                if missing[other] == 0:
                    heapq.heappush(ready[tier[other]], (-priority[other], next(count), other))
