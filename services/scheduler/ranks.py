"""Upward rank: how much is expected to come after a step, in seconds, from what is known of durations. Pure.

Estimates are wrong, and ranks made from wrong estimates prefer the wrong steps. So estimates are drawn towards each
other as far as they are known to err, and the look ahead, which would fit a schedule to the errors, is used only
where they hardly do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Final

from protocol.messages.result import StepState
from protocol.messages.task import Step, TaskIR
from protocol.plan_graph import needs
from services.kit.registry import Registry, RoleEntry
from services.scheduler.durations import Durations, Job
from services.scheduler.lookahead import Remaining, looked_ahead
from services.scheduler.tasks import StepRecord, TaskRecord

_RERANK_STEPS: Final = 32
_RERANK_SHARE: Final = 4
"""Ranks of a task are looked at anew after so many of its steps have ended, or this part of those that were open,
whichever is more: keeps the cost per step flat."""
_RERANK_MS: Final = 100
"""And not before so long after the last time: what is known of durations does not change faster than that."""
_MATERIAL: Final = 0.05
"""An estimate that moved by less than this share is the same."""
TRUSTED_SPREAD: Final = 0.1
"""Largest spread of the estimates with which the look ahead pays: on random graphs of five kinds it shortened schedules
by 10 % of the gap to the bound at 0.05, by 2 % at 0.1, and lengthened them beyond."""
_MOST_OBSERVED: Final = 64
_LEAST_LEFT: Final = 0.05
"""Share of its estimate that a running step is taken to need still, however long it has run."""


def upward_rank(successors: Mapping[str, Iterable[str]], cost_s: Mapping[str, float]) -> dict[str, float]:
    """Longest expected path from the start of each step to the end of the task, its own cost included, in seconds.

    rank(s) = cost_s[s] + max(rank(t) for t in successors[s]): the upward rank of HEFT (Topcuoglu, Hariri, Wu, IEEE
    TPDS 13(3), 2002) without transfer costs, since all tiers share one machine. Every step needs a cost; raises
    graphlib.CycleError if the graph has a circle.
    """
    before: dict[str, list[str]] = {step: [] for step in cost_s}
    open_: dict[str, int] = {}
    for step in cost_s:
        after = list(successors.get(step, ()))
        open_[step] = len(after)
        for other in after:
            before[other].append(step)
    rank: dict[str, float] = {}
    ranked = [step for step, count in open_.items() if not count]
    for step in ranked:  # grows by those whose successors all have their rank
        rank[step] = cost_s[step] + max((rank[other] for other in successors.get(step, ())), default=0.0)
        for other in before[step]:
            open_[other] -= 1
            if not open_[other]:
                ranked.append(other)
    if len(rank) < len(cost_s):
        # It finds the circle and says what is on it.
        TopologicalSorter({step: successors.get(step, ()) for step in cost_s}).prepare()
    return rank


def shrunk(cost_s: Mapping[str, float], spread: float) -> dict[str, float]:
    """Estimates drawn towards their geometric mean as far as their errors explain how much they differ.

    ln c' = m + (ln c - m) * max(0, 1 - spread^2 / v), with m and v the mean and the variance of ln c: the empirical
    Bayes estimate (Efron and Morris, JASA 70, 1975) for errors with standard deviation `spread` of their logarithm.
    Costs of zero, which stand for knowing nothing, stay zero.
    """
    logs = [math.log(cost) for cost in cost_s.values() if cost > 0]
    if spread <= 0 or len(logs) < 2:
        return dict(cost_s)
    mean = sum(logs) / len(logs)
    variance = sum((log - mean) ** 2 for log in logs) / len(logs)
    kept = max(0.0, 1 - spread**2 / variance) if variance > 0 else 0.0
    return {name: math.exp(mean + (math.log(c) - mean) * kept) if c > 0 else 0.0 for name, c in cost_s.items()}


def job_of(ir: TaskIR, step: Step, role: RoleEntry, given_chars: int) -> Job:
    """What estimators are told of a step in a role, whose inputs have so many characters together."""
    chars = given_chars + len(step.action) + len(role.prompt)
    return Job(role.name, ir.task_type.value, chars, step.max_tokens or role.max_tokens, step.id)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The longest chain of a plan as it was expected when the plan was adopted."""

    length_ms: int
    """Inference only: queueing, gates and retries are what the achieved path shows beside it."""
    steps: tuple[str, ...]
    cost_s: Mapping[str, float]
    """Expected seconds of every step."""
    waits_for: Mapping[str, frozenset[str]]
    """Who waits for whom."""


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Ranks of one task, and what they rest on."""

    rank_s: dict[str, float]
    unfinished: int
    cost_s: dict[str, float]
    slots: dict[str, int]
    at_ms: int

    def is_due(self, task: TaskRecord, at_ms: int) -> bool:
        ended = self.unfinished - task.unfinished
        often = max(_RERANK_STEPS, self.unfinished // _RERANK_SHARE)
        return ended >= often and at_ms - self.at_ms >= _RERANK_MS

    def still_holds(self, cost_s: Mapping[str, float], slots: Mapping[str, int]) -> bool:
        """True if nothing they rest on has changed for the steps that are open now."""
        return all(self.slots.get(tier) == count for tier, count in slots.items()) and all(
            name in self.cost_s and abs(cost - self.cost_s[name]) <= _MATERIAL * self.cost_s[name]
            for name, cost in cost_s.items()
        )


@dataclass(slots=True)
class Ranking:
    """Ranks of the steps of all live tasks, and the estimates behind them."""

    registry: Registry
    durations: Durations
    slots: Callable[[str], int]
    """Slots that a model's workers have now, by the name of its entry."""
    _ranks: dict[str, _Ranks] = field(default_factory=dict)
    _predicted: dict[str, tuple[Step, float]] = field(default_factory=dict)
    """Step id -> step and expected seconds, of a plan that was predicted for the ranking that follows."""
    _observed: list[tuple[TaskRecord, StepRecord, str, float]] = field(default_factory=list)
    """Task, step, role and seconds of inferences that the durations have not been told of yet."""

    def rank_s(self, task: TaskRecord, step: StepRecord, at_ms: int) -> float:
        """Rank of a step under what is known now: seconds from its start to the end of its task."""
        known = self._ranks.get(task.id)
        if known is None or step.spec.id not in known.rank_s or known.is_due(task, at_ms):
            known = self._ranks[task.id] = self._rank(task, known, at_ms)
        return known.rank_s.get(step.spec.id, 0.0)

    def job(self, task: TaskRecord, step: StepRecord) -> Job:
        """What estimators are told of a step's newest attempt."""
        return self._job(task, task.ir, step.spec, step.role)

    def predict(self, task: TaskRecord, planned: TaskIR) -> Prediction:
        """The longest chain of the plan that `task` is about to adopt."""
        self.learn()
        plan = planned.plan
        if plan is None:
            raise ValueError(f"task {task.id} has no plan to predict")
        specs = {step.id: step for step in plan.steps}
        followers: dict[str, list[str]] = {name: [] for name in specs}
        waits_for = needs(plan)
        for name, others in waits_for.items():
            for other in others:
                followers[other].append(name)
        cost_s = {
            name: self.durations.expected_s(self._job(task, planned, step, step.actor)) for name, step in specs.items()
        }
        self._predicted = {name: (step, cost_s[name]) for name, step in specs.items()}
        ranks = upward_rank(followers, cost_s)
        chain = [max(ranks, key=lambda name: (ranks[name], name))]
        while followers[chain[-1]]:
            chain.append(max(followers[chain[-1]], key=lambda name: (ranks[name], name)))
        return Prediction(round(1000 * ranks[chain[0]]), tuple(chain), cost_s, waits_for)

    def expected_s(self, task: TaskRecord, step: Step, role: str) -> float:
        """Seconds of inference that a step is expected to take in a role."""
        return self.durations.expected_s(self._job(task, task.ir, step, role))

    def seen_s(self, task: TaskRecord, step: Step, role: str) -> tuple[float, float]:
        """Seconds that such steps were seen to take, and how many of the role were seen."""
        return self.durations.seen_s(self._job(task, task.ir, step, role))

    def slots_of(self, model: str) -> int:
        """Slots of a model: those it has now, or those it will have."""
        return self.slots(model) or self.registry.models[model].slots

    def observe(self, task: TaskRecord, step: StepRecord, seconds: float) -> None:
        """The inference of this step's newest attempt took so long.

        Learned from when an estimate is asked for, at the next tick, or when many wait: the step that follows need not
        wait for it.
        """
        self._observed.append((task, step, step.role, seconds))
        if len(self._observed) >= _MOST_OBSERVED:
            self.learn()

    def learn(self) -> None:
        """Tell the durations what was observed."""
        observed, self._observed = self._observed, []
        if observed:
            self._predicted.clear()
        for task, step, role, seconds in observed:
            self.durations.observe(self._job(task, task.ir, step.spec, role), seconds)

    def take_up(self, registry: Registry) -> None:
        """Work with this registry from now on: roles may have other models and limits."""
        self.registry = registry
        self._ranks.clear()
        self._predicted.clear()

    def forget(self, task_id: str) -> None:
        """The task has ended."""
        self._ranks.pop(task_id, None)

    def _job(self, task: TaskRecord, ir: TaskIR, step: Step, name: str) -> Job:
        given = sum(len(task.artefacts[one].text()) for one in step.inputs if one in task.artefacts)
        return job_of(ir, step, self.registry.roles[name], given)

    def _expected_s(self, task: TaskRecord, step: StepRecord, predicted: Mapping[str, tuple[Step, float]]) -> float:
        """Seconds to expect of a step's newest attempt: what was predicted of this very step, where it was."""
        spec, seconds = predicted.get(step.spec.id, (None, 0.0))
        if spec is step.spec and not step.attempts:
            return seconds
        return self.durations.expected_s(self.job(task, step))

    def _rank(self, task: TaskRecord, known: _Ranks | None, at_ms: int) -> _Ranks:
        self.learn()
        steps = {name: step for name, step in task.steps.items() if not step.state.final}
        spread = self.durations.spread()
        predicted, self._predicted = self._predicted, {}
        cost_s = shrunk({name: self._expected_s(task, step, predicted) for name, step in steps.items()}, spread)
        tier = {name: self.registry.roles[step.role].model for name, step in steps.items()}
        slots = {model: self.slots_of(model) for model in set(tier.values())}
        if known is not None and known.still_holds(cost_s, slots):
            return _Ranks(known.rank_s, task.unfinished, known.cost_s, known.slots, at_ms)
        followers = {name: [other for other in task.dependents[name] if other in steps] for name in steps}
        running = {name: step for name, step in steps.items() if step.state is StepState.INFERRING}
        left_s = cost_s | {name: _left_s(cost_s[name], step, at_ms) for name, step in running.items()}
        rank = upward_rank(followers, left_s)
        if spread <= TRUSTED_SPREAD:
            rank = looked_ahead(Remaining(left_s, followers, tier, slots, frozenset(running)), rank)
        return _Ranks(rank, task.unfinished, cost_s, slots, at_ms)


def _left_s(cost_s: float, step: StepRecord, at_ms: int) -> float:
    started_ms = step.attempt.started_ms
    gone_s = 0.0 if started_ms is None else (at_ms - started_ms) / 1000
    return max(_LEAST_LEFT * cost_s, cost_s - gone_s)
