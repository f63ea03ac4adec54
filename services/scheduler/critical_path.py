"""What determined the wall clock of a finished task: the chain of segments without a gap, and every step's slack.

Walks back from the step that ended last: before a step became ready, the dependency that ended last was what it
waited for. Beside it what was expected (`ranks.py`), what no schedule could beat, and CriticalSteps (`stages.py`).
Pure functions over a TaskRecord; where the time of an attempt went is `timeline.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from protocol.messages.result import CriticalPath, PredictedPath, Segment, StepState
from services.scheduler.parts import Parts, finished
from services.scheduler.stages import critical_steps, depths
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.timeline import Stretch

Run = tuple[str, Stretch]
"""A model, and a stretch during which it was at work for a step."""
_WORK: Final = frozenset({"inference", "gates", "retry"})


def critical_path(task: TaskRecord) -> CriticalPath | None:
    """The report of a task that has ended, however it ended; None for any other."""
    return finished(critical_path_in_parts(task))


def critical_path_in_parts(task: TaskRecord) -> Parts[CriticalPath | None]:
    """The same, with pauses: a thousand steps take a few ms between one and the next, and tens of them in all."""
    if task.ended_ms is None:
        return None
    planned = task.planned_ms is not None
    depth = depths({name: step.needs for name, step in task.steps.items()})
    yield
    begun = {name: step for name, step in task.steps.items() if step.ready_ms is not None and step.ended_ms is not None}
    spent = {name: attempt_stretches(step) for name, step in begun.items()}
    yield
    path = _walk_back(task, begun, spent)
    wall_ms = task.ended_ms - task.created_ms
    frame_ms = sum(one.end_ms - one.start_ms for one in path if one.what in ("planning", "checks"))
    busy_ms = {name: _busy_ms(stretches) for name, stretches in spent.items()}
    work_ms = frame_ms + sum(busy_ms.values())
    attempts = {
        name: sum(attempt.started_ms is not None for attempt in step.attempts) for name, step in task.steps.items()
    }
    checked = bool(task.ir.gates) and (bool(task.gates) or (planned and _steps_over_ms(task) < task.ended_ms))
    yield
    runs = {name: _runs(step) for name, step in task.steps.items()}
    yield
    bound_ms, bound_by = _lower_bound(task, depth, busy_ms, runs)
    yield
    slack_ms = _slack(begun, task.dependents, depth)
    yield
    return CriticalPath(
        wall_ms=wall_ms,
        work_ms=work_ms,
        parallelism=round(work_ms / wall_ms, 3) if wall_ms else 1.0,
        path=path,
        slack_ms=slack_ms,
        overlapping_steps=_overlapping({name: runs[name] for name in begun}),
        predicted=None
        if task.predicted_ms is None
        else PredictedPath(length_ms=task.predicted_ms, steps=task.predicted_steps),
        critical_steps=critical_steps(depth, attempts, checked=checked) if planned else 1,
        total_steps=1 + sum(attempts.values()) + int(checked),
        lower_bound_ms=frame_ms + bound_ms,
        bound_by=bound_by,
    )


def attempt_stretches(step: StepRecord) -> list[Stretch]:
    """The stretches of all attempts of a step, in order; open ones end with the step, if it has ended."""
    return [
        stretch
        for attempt in step.attempts
        for stretch in attempt.timeline.stretches(attempt.ended_ms or step.ended_ms, failed=attempt.failure is not None)
    ]


def _steps_over_ms(task: TaskRecord) -> int:
    """When the last step ended, done or dropped; what comes after are the final checks."""
    return max((_ended(step) for step in task.steps.values()), default=task.planned_ms or task.created_ms)


def _busy_ms(stretches: Iterable[Stretch]) -> int:
    return sum(end - begin for what, begin, end in stretches if what in _WORK)


# The path


class _Backwards:
    """Segments from the end of a task to its begin: what is added next begins where the last one was cut off."""

    def __init__(self, end_ms: int, begin_ms: int) -> None:
        self._at_ms = end_ms
        self._begin_ms = begin_ms
        self._segments: list[Segment] = []

    def add(self, step: str | None, what: str, begin_ms: int, end_ms: int) -> None:
        """Add a stretch; what lies between it and the one that follows becomes a `waiting` segment of the same step."""
        self._cut(step, "waiting", max(begin_ms, end_ms))
        self._cut(step, what, begin_ms)

    def _cut(self, step: str | None, what: str, begin_ms: int) -> None:
        begin_ms = max(begin_ms, self._begin_ms)
        if begin_ms < self._at_ms:
            segment = {"step": step, "what": what, "start_ms": begin_ms, "end_ms": self._at_ms}
            self._segments.append(Segment.model_validate(segment))
            self._at_ms = begin_ms

    def finish(self) -> list[Segment]:
        """The path, first segment first."""
        return self._segments[::-1]


def _walk_back(task: TaskRecord, begun: Mapping[str, StepRecord], spent: Mapping[str, list[Stretch]]) -> list[Segment]:
    end_ms = task.ended_ms or task.created_ms
    back = _Backwards(end_ms, task.created_ms)
    name = min(begun, key=lambda one: _last_first(begun[one]), default=None)
    if task.planned_ms is not None:
        back.add(None, "checks", _steps_over_ms(task), end_ms)
    while name is not None:
        for what, begin_ms, until_ms in reversed(spent[name]):
            back.add(name, what, begin_ms, until_ms)
        needed = [other for other in begun[name].needs if other in begun]
        before = min(needed, key=lambda one: _last_first(begun[one]), default=None)
        earlier_ms = (task.planned_ms or task.created_ms) if before is None else _ended(begun[before])
        back.add(name, "waiting", earlier_ms, earlier_ms)
        name = before
    back.add(None, "planning", task.created_ms, end_ms if task.planned_ms is None else task.planned_ms)
    return back.finish()


def _ended(step: StepRecord) -> int:
    return step.ended_ms or 0


def _last_first(step: StepRecord) -> tuple[int, int, str]:
    """Order in which steps explain an end: the latest, among equals the one that failed, then those that got done."""
    weight = {StepState.FAILED: 0, StepState.DONE: 1}.get(step.state, 2)
    return -_ended(step), weight, step.spec.id


# Beside the path


def _slack(
    begun: Mapping[str, StepRecord], dependents: Mapping[str, list[str]], depth: Mapping[str, int]
) -> dict[str, int]:
    """Backward pass: a step may end when the earliest of its followers, run as late as allowed, had to begin."""
    last_end = max((_ended(step) for step in begun.values()), default=0)
    latest: dict[str, int] = {}
    for name in sorted(begun, key=lambda one: depth[one], reverse=True):
        latest[name] = min(
            (
                latest[other] - (_ended(begun[other]) - (begun[other].ready_ms or 0))
                for other in dependents[name]
                if other in begun
            ),
            default=last_end,
        )
    return {name: max(0, latest[name] - _ended(step)) for name, step in begun.items()}


def _lower_bound(
    task: TaskRecord, depth: Mapping[str, int], busy_ms: Mapping[str, int], runs: Mapping[str, Sequence[Run]]
) -> tuple[int, str]:
    """Milliseconds that the steps need in any schedule of these attempts, and what says so.

    The longest chain by measured durations, or for a model its inference over its slots: as many as the registry said
    when the plan was adopted, or as were seen at work at once, whichever is more. Hence never above the wall clock.
    """
    if not task.steps:
        return 0, ""
    chain: dict[str, int] = {}
    for name in depth:  # producers first
        before = max((chain[other] for other in task.steps[name].needs), default=0)
        chain[name] = before + busy_ms.get(name, 0)
    best = (max(chain.values()), "chain")
    at_work: dict[str, list[Stretch]] = {}
    for of_step in runs.values():
        for model, run in of_step:
            at_work.setdefault(model, []).append(run)
    for model, together in sorted(at_work.items()):
        slots = max(task.slots.get(model, 0), _most_at_once(together), 1)
        best = max(best, (sum(end - begin for _, begin, end in together) // slots, model), key=lambda one: one[0])
    return best


def _most_at_once(runs: list[Stretch]) -> int:
    changes = sorted((at, change) for _, begin, end in runs for at, change in ((begin, 1), (end, -1)))
    most = now = 0
    for _, change in changes:  # at the same moment ends come before begins
        now += change
        most = max(most, now)
    return most


def _runs(step: StepRecord) -> list[Run]:
    """Model and stretch of everything that occupied a slot for this step, whatever became of it."""
    found: list[Run] = []
    for attempt in step.attempts:
        until_ms = attempt.inferred_ms or attempt.ended_ms or step.ended_ms
        stretches = attempt.timeline.stretches(until_ms, failed=False)
        found += [(attempt.model, one) for one in stretches if one[0] in ("inference", "retry")]
    return found


def _overlapping(runs_of: Mapping[str, Sequence[Run]]) -> int:
    """Steps whose inference ran at the same time as another's: sweep over the ends of the runs."""
    runs = sorted((begin, end, name) for name, those in runs_of.items() for _, (_, begin, end) in those)
    together: set[str] = set()
    reach, holder = -1, ""
    for start, end, name in runs:
        if start < reach and name != holder:
            together.update((holder, name))
        if end > reach:
            reach, holder = end, name
    return len(together)
