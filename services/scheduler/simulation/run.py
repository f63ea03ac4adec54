"""Runs tasks through a calm world to their ends, and says what came of it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from protocol.messages.task import TaskIR
from services.kit.registry import Registry
from services.kit.registry.memory import expected_load_s
from services.scheduler.durations import Durations
from services.scheduler.simulation.calm import CalmWorld
from services.scheduler.simulation.outcome import Outcome, outcome_of
from services.scheduler.simulation.tiers import Tier
from services.scheduler.simulation.world import RefusedError
from services.scheduler.tasks import StepRecord, TaskRecord


@dataclass(frozen=True, slots=True)
class Run:
    """One simulated run: its tasks in the order of their ends, and the sum of it."""

    tasks: tuple[TaskRecord, ...]
    outcome: Outcome


def tiers_of(
    registry: Registry, workers: dict[str, int] | None = None, slots: dict[str, int] | None = None
) -> list[Tier]:
    """The tiers that the registry describes, one worker each, with other numbers where these are given by model."""
    return [
        Tier(
            name,
            (workers or {}).get(name, 1),
            (slots or {}).get(name, entry.slots),
            None if entry.residency == "hot" else expected_load_s(entry),
        )
        for name, entry in registry.served.items()
        if registry.roles_of(name)
    ]


def run_tasks(
    tasks: Iterable[TaskIR], registry: Registry, tiers: Sequence[Tier], known: Durations, actual: Durations
) -> Run:
    """Submit all tasks at once, as many as the hub admits, the others as earlier ones end; run until all have ended.

    `known` is what the hub estimates with and learns into, `actual` says how long steps really take; they may be equal
    but not the same object if `known` learns. Raises RefusedError for a task the hub will never take, and
    NotReachedError where a task can never end, such as one for a tier without workers.
    """
    with _without_garbage_collection():
        records = _run(tasks, registry, tiers, known, actual)
    return Run(records, outcome_of(records, tiers))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """The records of a run hold no circles and live to its end: looking for garbage takes a tenth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _run(
    tasks: Iterable[TaskIR], registry: Registry, tiers: Sequence[Tier], known: Durations, actual: Durations
) -> tuple[TaskRecord, ...]:
    world = CalmWorld(registry, known)

    def seconds(task: TaskRecord, step: StepRecord) -> float:
        return actual.expected_s(world.ranking.job(task, step))

    world.add_core()
    world.add_tiers(tiers, seconds)
    pending = deque(tasks)
    submitted: list[str] = []
    while pending or len(world.ended) < len(submitted):
        try:
            while pending:
                submitted.append(world.submit(pending[0]))
                pending.popleft()
        except RefusedError as err:
            if err.retry_after_ms is None:
                raise
        world.run(world.ended_beyond(len(world.ended)))
    return tuple(world.ended.values())
