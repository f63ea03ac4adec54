"""Kimi's CriticalSteps for a graph that has no barriers, to compare plans with those of swarms that have.

    CriticalSteps = sum over stages t of  S_main(t) + max over i of S_sub,i(t)

(Kimi K2.5 report, arXiv 2602.02276, on parallel agents.) There a main agent takes steps and sends out sub-agents, and
a stage lasts as long as its longest sub-agent. Here, precisely:

* One *step* of the formula is one attempt that a worker began; a run that was lost with its worker is still the same
  attempt. Waiting costs nothing in this measure.
* A *stage* is the set of all steps of equal depth in the graph, where depth is the number of steps on the longest chain
  before it. It is a fiction: our steps start when their own inputs are ready.
* Of a stage of one step all attempts are *main* steps: nothing is beside them. Of a wider stage each step is one
  sub-agent i, S_sub,i is the number of its attempts, and S_main is 0: sending it out costs no model call.
* Planning is a stage of one main step, and so are the final checks if the task has gates and came to them.

Pure functions over plain values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter


def depths(needs: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Steps on the longest chain before each step, producers before their followers in the order of the result.

    Every step that is needed must be a key. Raises graphlib.CycleError if the graph has a circle.
    """
    depth: dict[str, int] = {}
    for step in TopologicalSorter(needs).static_order():
        depth[step] = max((depth[other] + 1 for other in needs[step]), default=0)
    return depth


def critical_steps(depth: Mapping[str, int], attempts: Mapping[str, int], *, checked: bool) -> int:
    """CriticalSteps of a planned task: `attempts` that began per step, `checked` if it came to its final checks."""
    stages: dict[int, list[int]] = {}
    for step, level in depth.items():
        stages.setdefault(level, []).append(attempts[step])
    # Of a stage of one step the attempts are S_main, else the largest is max S_sub,i: the same number either way.
    return 1 + sum(max(stage) for stage in stages.values()) + int(checked)
