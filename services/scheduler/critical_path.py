"""What determined the wall clock of a finished task: the chain of segments without a gap, and every step's slack.

Walks back from the step that ended last: before a step became ready, the dependency that ended last was what it
waited for. Pure functions over a TaskRecord.
"""

from __future__ import annotations

from protocol.messages.result import CriticalPath, Segment
from services.scheduler.tasks import StepRecord, TaskRecord


def critical_path(task: TaskRecord) -> CriticalPath | None:
    """The report of a task that has ended and was planned; None for any other."""
    if task.ended_ms is None or task.planned_ms is None:
        return None
    done = {name: step for name, step in task.steps.items() if step.ready_ms is not None and step.ended_ms is not None}
    path: list[Segment] = []
    step = max(done.values(), key=_ended, default=None)
    end = task.ended_ms
    if step is not None and _ended(step) < end:
        path.append(Segment(what="checks", start_ms=_ended(step), end_ms=end))
    while step is not None:
        path.extend(reversed(_segments(step)))
        start = step.ready_ms or task.planned_ms
        step = max((done[name] for name in step.needs if name in done), key=_ended, default=None)
        before = task.planned_ms if step is None else _ended(step)
        if start > before:
            path.append(Segment(what="waiting", start_ms=before, end_ms=start))
    path.append(Segment(what="planning", start_ms=task.created_ms, end_ms=task.planned_ms))
    path.reverse()
    wall = task.ended_ms - task.created_ms
    work = task.planned_ms - task.created_ms
    work += sum(s.end_ms - s.start_ms for one in done.values() for s in _segments(one) if s.what != "queueing")
    return CriticalPath(
        wall_ms=wall,
        work_ms=work,
        parallelism=round(work / wall, 3) if wall else 1.0,
        path=[segment for segment in path if segment.end_ms > segment.start_ms],
        slack_ms=_slack(done, task),
        overlapping_steps=_overlapping(done),
    )


def _ended(step: StepRecord) -> int:
    return step.ended_ms or 0


def _segments(step: StepRecord) -> list[Segment]:
    """Queueing, inference and gates of a step; what a failed attempt took is `retry`."""
    name = step.spec.id
    parts: list[Segment] = []
    at = step.ready_ms or 0
    end = step.ended_ms or at
    for attempt in step.attempts:
        last = attempt is step.attempts[-1]
        started = min(end, attempt.started_ms if attempt.started_ms is not None else (attempt.ended_ms or end))
        inferred = min(end, attempt.inferred_ms or attempt.ended_ms or end)
        finished = min(end, attempt.ended_ms or end)
        parts.append(Segment(step=name, what="queueing", start_ms=at, end_ms=max(at, started)))
        at = max(at, started)
        if last and attempt.failure is None:
            parts.append(Segment(step=name, what="inference", start_ms=at, end_ms=max(at, inferred)))
            at = max(at, inferred)
            parts.append(Segment(step=name, what="gates", start_ms=at, end_ms=max(at, finished)))
        else:
            parts.append(Segment(step=name, what="retry", start_ms=at, end_ms=max(at, finished)))
        at = max(at, finished)
    return parts


def _slack(done: dict[str, StepRecord], task: TaskRecord) -> dict[str, int]:
    """Backward pass: a step may end when the earliest of its followers, run as late as allowed, had to begin."""
    last_end = max((_ended(step) for step in done.values()), default=0)
    latest: dict[str, int] = {}
    for name in sorted(done, key=lambda one: _ended(done[one]), reverse=True):
        followers = [other for other in task.dependents[name] if other in latest]
        latest[name] = min(
            (latest[other] - (_ended(done[other]) - (done[other].ready_ms or 0)) for other in followers),
            default=last_end,
        )
    return {name: max(0, latest[name] - _ended(step)) for name, step in done.items()}


def _overlapping(done: dict[str, StepRecord]) -> int:
    """Steps whose inference ran at the same time as another's: sweep over the ends of the spans."""
    spans = sorted(
        (attempt.started_ms, attempt.inferred_ms, name)
        for name, step in done.items()
        for attempt in step.attempts
        if attempt.started_ms is not None and attempt.inferred_ms is not None
    )
    together: set[str] = set()
    reach, holder = -1, ""
    for start, end, name in spans:
        if start < reach and name != holder:
            together.update((holder, name))
        if end > reach:
            reach, holder = end, name
    return len(together)
