"""When the inputs of steps that need a certain model will be there, by what is known of durations. Pure.

Only as far ahead as it pays to know: chains of a few steps from what runs now. A step that itself waits for room in
memory holds up everything behind it for an unknown time, so nothing behind it counts as needed soon.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Final

from protocol.messages.result import StepState, TaskState
from services.scheduler.ranks import Ranking
from services.scheduler.tasks import StepRecord, TaskRecord

HORIZON_STEPS: Final = 6
"""Steps on the chain from one that runs to the one that needs the model."""
_MAX_STEPS: Final = 20_000
"""Steps looked at in all, so that a hub full of large tasks spends some milliseconds on this and not seconds."""


def needed_soon(
    tasks: Iterable[TaskRecord],
    ranking: Ranking,
    models: Collection[str],
    ready_in_ms: Callable[[str], int | None],
    at_ms: int,
) -> dict[str, int]:
    """For each of `models`, in how many ms the first waiting step for it has its inputs; absent = not in sight.

    `ready_in_ms` says when a model is loaded, None if it is not even on its way.
    """
    soon: dict[str, int] = {}
    left = _MAX_STEPS
    for task in tasks:
        if task.state is not TaskState.RUNNING:
            continue
        left -= len(task.steps)
        if left < 0:
            break
        known: dict[str, int | None] = {}
        for step in task.steps.values():
            if step.state is not StepState.WAITING:
                continue
            model = ranking.registry.roles[step.role].model
            if model not in models:
                continue
            ready_ms = _ready_ms(task, step, ranking, ready_in_ms, known, at_ms, HORIZON_STEPS)
            if ready_ms is not None:
                soon[model] = min(ready_ms, soon.get(model, ready_ms))
    return soon


def _ready_ms(
    task: TaskRecord,
    step: StepRecord,
    ranking: Ranking,
    ready_in_ms: Callable[[str], int | None],
    known: dict[str, int | None],
    at_ms: int,
    depth: int,
) -> int | None:
    """In how many ms all inputs of a waiting step are there."""
    last = 0
    for name in step.waiting_for:
        if name not in known:
            known[name] = _end_ms(task, task.steps[name], ranking, ready_in_ms, known, at_ms, depth - 1)
        end_ms = known[name]
        if end_ms is None:
            return None
        last = max(last, end_ms)
    return last


def _end_ms(
    task: TaskRecord,
    step: StepRecord,
    ranking: Ranking,
    ready_in_ms: Callable[[str], int | None],
    known: dict[str, int | None],
    at_ms: int,
    depth: int,
) -> int | None:
    """In how many ms a step that is not done will be; None = beyond the horizon, or nobody can know."""
    cost_ms = int(1000 * ranking.durations.expected_s(ranking.job(task, step)))
    match step.state:
        case StepState.CHECKING:
            return 0
        case StepState.INFERRING:
            started_ms = step.attempt.started_ms
            return max(0, cost_ms - (at_ms - started_ms)) if started_ms is not None else cost_ms
        case StepState.READY:
            wait_ms = ready_in_ms(ranking.registry.roles[step.role].model)
            return None if wait_ms is None else wait_ms + cost_ms
        case StepState.WAITING if depth > 0:
            ready_ms = _ready_ms(task, step, ranking, ready_in_ms, known, at_ms, depth)
            return None if ready_ms is None else ready_ms + cost_ms
        case _:
            return None
