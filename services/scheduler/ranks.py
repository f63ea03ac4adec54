"""Upward rank: how much is expected to come after a step, in seconds, from what is known of durations. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Final

from services.kit.registry import Registry
from services.scheduler.durations import Durations, Job
from services.scheduler.tasks import StepRecord, TaskRecord

_RERANK_STEPS: Final = 32
_RERANK_SHARE: Final = 0.25
"""Ranks of a task are made anew from what was learned when so many of its open steps have ended: a flat cost a step."""


def upward_rank(successors: Mapping[str, Iterable[str]], cost_s: Mapping[str, float]) -> dict[str, float]:
    """Longest expected path from the start of each step to the end of the task, its own cost included, in seconds.

    rank(s) = cost_s[s] + max(rank(t) for t in successors[s]): the upward rank of HEFT (Topcuoglu, Hariri, Wu, IEEE
    TPDS 13(3), 2002) without transfer costs, since all tiers share one machine. Every step needs a cost; raises
    graphlib.CycleError if the graph has a circle.
    """
    rank: dict[str, float] = {}
    # A step depends on its successors here, so that they are ranked before it.
    for step in TopologicalSorter({step: successors.get(step, ()) for step in cost_s}).static_order():
        rank[step] = cost_s[step] + max((rank[other] for other in successors.get(step, ())), default=0.0)
    return rank


@dataclass(slots=True)
class Ranking:
    """Ranks of the steps of all live tasks, and the estimates behind them."""

    registry: Registry
    durations: Durations
    _ranks: dict[str, tuple[int, dict[str, float]]] = field(default_factory=dict)
    """Task -> how many steps were unfinished when its ranks were made, and the ranks."""

    def rank_s(self, task: TaskRecord, step: StepRecord) -> float:
        """Upward rank of a step under what is known now, in seconds."""
        known = self._ranks.get(task.id)
        if known is None or known[0] - task.unfinished >= max(_RERANK_STEPS, _RERANK_SHARE * known[0]):
            open_steps = {name: one for name, one in task.steps.items() if not one.state.final}
            cost_s = {name: self.durations.expected_s(self._job(task, one)) for name, one in open_steps.items()}
            followers = {name: [other for other in task.dependents[name] if other in cost_s] for name in cost_s}
            known = self._ranks[task.id] = (task.unfinished, upward_rank(followers, cost_s))
        return known[1].get(step.spec.id, 0.0)

    def observe(self, task: TaskRecord, step: StepRecord, seconds: float) -> None:
        """The inference of this step's newest attempt took so long."""
        self.durations.observe(self._job(task, step), seconds)

    def forget(self, task_id: str) -> None:
        """The task has ended."""
        self._ranks.pop(task_id, None)

    def _job(self, task: TaskRecord, step: StepRecord) -> Job:
        name = step.attempts[-1].role if step.attempts else step.spec.actor
        role = self.registry.roles[name]
        given = sum(len(task.artefacts[one].text()) for one in step.spec.inputs if one in task.artefacts)
        chars = given + len(step.spec.action) + len(role.prompt)
        return Job(name, task.ir.task_type.value, chars, step.spec.max_tokens or role.max_tokens, step.spec.id)
