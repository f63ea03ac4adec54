"""Whether a task will miss its deadline, by what was seen of durations; what that asks for is `versions.py`. Pure.

A new plan for lack of time gives up part of the work, so it needs more than an estimate: late is a task whose rest
takes longer than the time that is left even if every step takes as little as it well may. What a step may write says
nothing of that, since most write far less; what counts is what was seen. Two things were: how long steps of its role
took in other tasks, and how long those of this very task take, for which estimates may be wrong by one factor. Each
speaks with its own uncertainty, and both together say more than either, as the posterior mean of two normal estimates
of a logarithm does (weights are inverse variances). Of a role of which nothing was seen a step counts for nothing.

    of other tasks    mean of ln seconds;   variance BETWEEN^2 + WITHIN^2 / n
    of this task      ln expected + mean of ln(actual / expected) over its own k;   variance (WITHIN^2 + sum d^2) / k^2
                      with d the deviations from that mean, so that a few that agree soon say a lot
    at the least      exp(mean - MARGIN * sqrt(variance))

Sums of seconds are larger than these means of logarithms say, which errs on the side of hope.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from protocol.messages.result import StepState, TaskState
from services.kit.plan_shape import least_s
from services.scheduler.growth import reach_of
from services.scheduler.ranks import Ranking
from services.scheduler.tasks import StepRecord, TaskRecord

MIN_LEFT_S: Final = 0.5
"""With less time than this before the deadline no new plan helps."""
_BETWEEN: Final = 0.5
"""Standard deviation of ln seconds between tasks whose steps have the same role."""
_WITHIN: Final = 1.0
"""The same between steps of one task, before any was seen: within a factor of three, two times out of three."""
_MARGIN: Final = 2.0
"""Standard deviations below the estimate that a step takes at the least."""
_MOST_OWN: Final = 32
"""Steps of a role that a task's own speed is taken from: the newest."""
_OPEN: Final = (StepState.WAITING, StepState.READY)


@dataclass(frozen=True, slots=True)
class Late:
    """A deadline that will be missed, by what is known of durations."""

    reason: str
    held: tuple[str, ...]
    """What may be dropped: steps that have not begun, and those that run longer than there is time."""


@dataclass(frozen=True, slots=True)
class Own:
    """How the steps of one role in one task compare with what was expected of them."""

    done: int
    mean: float
    """Of ln(actual / expected)."""
    variance: float
    """Of that mean."""


def lateness(task: TaskRecord, ranking: Ranking, at_ms: int) -> Late | None:
    """Whether the deadline will be missed, and what could be dropped; None while there is hope or nothing to gain."""
    deadline_ms = task.deadline_ms
    if deadline_ms is None or task.state is not TaskState.RUNNING or task.revising is not None or task.plan_open:
        return None
    left_s = (deadline_ms - at_ms) / 1000
    if left_s < MIN_LEFT_S:
        return None
    cost_s = rest_s(task, at_least(task, ranking, at_ms), at_ms)
    surely_s = rest_least_s(task, cost_s, ranking)
    if surely_s <= left_s:
        return None
    held = {name for name in cost_s if task.steps[name].state in _OPEN or cost_s[name] > left_s}
    held |= {name for name in cost_s if task.steps[name].state is StepState.EXPANDED}
    for name in list(held):
        held.update(reach_of(task, name))
    held = {name for name in held if not task.steps[name].state.final}
    if not any(task.steps[name].state in _OPEN for name in held):
        return None
    reason = f"the rest takes {surely_s:.1f} s at the least, and {left_s:.1f} s are left"
    return Late(reason, tuple(sorted(held)))


def at_least(task: TaskRecord, ranking: Ranking, at_ms: int) -> Callable[[StepRecord], float]:
    """Seconds that a step of this task takes at the least, see the module; 0 where nothing is known."""
    own = own_speed(task, ranking, at_ms)

    def seconds(step: StepRecord) -> float:
        expected_s = ranking.expected_s(task, step.spec, step.role)
        seen_s, seen = ranking.seen_s(task, step.spec, step.role)
        here = own.get(step.role)
        if math.isinf(seen):
            return expected_s
        others = seen - (0 if here is None else here.done)
        told: list[tuple[float, float]] = []
        if others >= 1:
            told.append((math.log(seen_s), _BETWEEN**2 + _WITHIN**2 / others))
        if here is not None and expected_s > 0:
            told.append((math.log(expected_s) + here.mean, here.variance))
        if not told:
            return 0.0
        weight = sum(1 / variance for _, variance in told)
        mean = sum(log_s / variance for log_s, variance in told) / weight
        return math.exp(mean - _MARGIN / math.sqrt(weight))

    return seconds


def own_speed(task: TaskRecord, ranking: Ranking, at_ms: int) -> dict[str, Own]:
    """Role -> how its steps in this task compare with what was expected of them.

    A step that runs counts as soon as it has run for longer than those before it did.
    """
    ended: dict[str, list[float]] = {}
    running: dict[str, float] = {}
    for step in task.steps.values():
        for attempt in step.attempts:
            if attempt.started_ms is None:
                continue
            took_s = ((attempt.inferred_ms or at_ms) - attempt.started_ms) / 1000
            expected_s = ranking.expected_s(task, step.spec, attempt.role)
            if took_s <= 0 or expected_s <= 0:
                continue
            factor = math.log(took_s / expected_s)
            if attempt.inferred_ms is not None:
                ended.setdefault(attempt.role, []).append(factor)
            elif step.state is StepState.INFERRING:
                running[attempt.role] = max(factor, running.get(attempt.role, -math.inf))
    found: dict[str, Own] = {}
    for role in ended.keys() | running.keys():
        factors = ended.get(role, [])[-_MOST_OWN:]
        done = len(factors)
        if role in running and (not factors or running[role] > statistics.fmean(factors)):
            factors = [*factors, running[role]]
        mean = statistics.fmean(factors)
        spread = _WITHIN**2 + sum((factor - mean) ** 2 for factor in factors)
        found[role] = Own(done, mean, spread / len(factors) ** 2)
    return found


def rest_s(task: TaskRecord, takes_s: Callable[[StepRecord], float], at_ms: int) -> dict[str, float]:
    """Step -> seconds that it still takes, for those that are not over."""
    rest: dict[str, float] = {}
    for name, step in task.steps.items():
        if step.state.final:
            continue
        if step.state in (StepState.EXPANDED, StepState.CHECKING):
            rest[name] = 0.0
            continue
        seconds = takes_s(step)
        if step.state is StepState.INFERRING and step.attempt.started_ms is not None:
            seconds = max(0.0, seconds - (at_ms - step.attempt.started_ms) / 1000)
        rest[name] = seconds
    return rest


def rest_least_s(task: TaskRecord, cost_s: Mapping[str, float], ranking: Ranking) -> float:
    """Seconds that open steps with these costs need in any schedule: the longest chain, each model's work per slot."""
    waits = {name: [other for other in task.steps[name].needs if other in cost_s] for name in cost_s}
    model_of = {name: ranking.registry.roles[task.steps[name].role].model for name in cost_s}
    return least_s(waits, cost_s, model_of, ranking.slots_of)
