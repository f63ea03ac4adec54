"""What a simulated run amounts to: makespan, lower bound, use of each tier and queueing. Pure, from task records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.messages.result import TaskState
from services.scheduler.ranks import upward_rank
from services.scheduler.simulation.tiers import Tier
from services.scheduler.tasks import TaskRecord


@dataclass(frozen=True, slots=True)
class TierUse:
    """One model entry over the whole run; times in virtual seconds."""

    model: str
    workers: int
    slots: int
    """Of all workers together."""
    steps: int
    """Attempts that it answered."""
    busy_s: float
    """Sum over the attempts."""
    utilisation: float
    """Share of its slots' time that was spent, 0.0-1.0."""
    wait_mean_s: float
    wait_max_s: float
    """How long attempts waited for a slot."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run; times in virtual seconds."""

    tasks: int
    failed: int
    steps: int
    makespan_s: float
    """From the first submission to the last end."""
    bound_s: float
    """No schedule is faster: the longest critical path, or the work of the busiest tier over its slots."""
    bottleneck: str
    """What that bound comes from: a model entry, or `critical path`."""
    throughput_per_s: float
    """Steps per virtual second."""
    tiers: tuple[TierUse, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """One attempt of a step as it ran, in ms since the first submission."""

    step: str
    model: str
    queued_ms: int
    started_ms: int
    ended_ms: int


def spans_of(task: TaskRecord) -> list[Span]:
    """All attempts of a task that had a worker, in the order of their starts."""
    spans = [
        Span(
            step=name,
            model=attempt.model,
            queued_ms=attempt.queued_ms - task.created_ms,
            started_ms=attempt.started_ms - task.created_ms,
            ended_ms=(attempt.inferred_ms or attempt.ended_ms or attempt.started_ms) - task.created_ms,
        )
        for name, step in task.steps.items()
        for attempt in step.attempts
        if attempt.started_ms is not None
    ]
    return sorted(spans, key=lambda span: (span.started_ms, span.step))


def outcome_of(tasks: Iterable[TaskRecord], tiers: Sequence[Tier]) -> Outcome:
    """Sum up tasks that have ended; `tiers` are the workers they ran on. Raises ValueError without any task."""
    tasks = list(tasks)
    if not tasks:
        raise ValueError("no task has ended")
    spans = [span for task in tasks for span in spans_of(task)]
    makespan_s = (max(task.ended_ms or 0 for task in tasks) - min(task.created_ms for task in tasks)) / 1000
    uses = tuple(_use(tier, [span for span in spans if span.model == tier.model], makespan_s) for tier in tiers)
    path_s = max(_critical_s(task) for task in tasks)
    loads = {use.model: use.busy_s / use.slots for use in uses}
    busiest = max(loads, key=lambda model: loads[model], default="")
    return Outcome(
        tasks=len(tasks),
        failed=sum(task.state is not TaskState.SUCCEEDED for task in tasks),
        steps=sum(len(task.steps) for task in tasks),
        makespan_s=makespan_s,
        bound_s=max(path_s, loads.get(busiest, 0.0)),
        bottleneck=busiest if loads.get(busiest, 0.0) > path_s else "critical path",
        throughput_per_s=len(spans) / makespan_s if makespan_s else 0.0,
        tiers=uses,
    )


def _use(tier: Tier, spans: Sequence[Span], makespan_s: float) -> TierUse:
    slots = tier.workers * tier.slots
    busy_s = sum(span.ended_ms - span.started_ms for span in spans) / 1000
    waits = [(span.started_ms - span.queued_ms) / 1000 for span in spans]
    return TierUse(
        model=tier.model,
        workers=tier.workers,
        slots=slots,
        steps=len(spans),
        busy_s=busy_s,
        utilisation=busy_s / (slots * makespan_s) if makespan_s else 0.0,
        wait_mean_s=sum(waits) / len(waits) if waits else 0.0,
        wait_max_s=max(waits, default=0.0),
    )


def _critical_s(task: TaskRecord) -> float:
    """The longest chain of a task's steps by what their attempts took, in seconds; 0 for a task without a plan."""
    cost_s = dict.fromkeys(task.steps, 0.0)
    for span in spans_of(task):
        cost_s[span.step] += (span.ended_ms - span.started_ms) / 1000
    # From what each step needed: `dependents` names no sub-step of a mapped one, since nothing waited for it then.
    followers: dict[str, list[str]] = {name: [] for name in task.steps}
    for name, step in task.steps.items():
        for other in step.needs:
            followers[other].append(name)
    return max(upward_rank(followers, cost_s).values(), default=0.0)
