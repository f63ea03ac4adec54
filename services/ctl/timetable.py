"""A task's time as rows of stretches: what the chart on the terminal and the one on the page both draw.

Pure functions over a TaskView. The hub says where the time of every attempt went; what is added here is the stretch
that a running attempt is in, which only whoever looks at it can end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from protocol.messages.result import AttemptView, CriticalPath, Segment, StepState, StepView, TaskState, TaskView

_DOING: Final = {StepState.READY: "queueing", StepState.INFERRING: "inference", StepState.CHECKING: "gates"}
WORK: Final = frozenset({"planning", "inference", "gates", "retry", "checks"})
"""Kinds of stretches in which something works; in all others somebody waits."""


@dataclass(frozen=True, slots=True)
class Row:
    """One attempt, or a step that never had any."""

    step: StepView
    attempt: AttemptView | None
    segments: tuple[Segment, ...]
    critical: bool
    """Its step is on the critical path."""

    @property
    def label(self) -> str:
        """Id of the step, with the attempt's number where there are several."""
        if self.attempt is None or len(self.step.attempts) == 1:
            return self.step.id
        return f"{self.step.id}#{self.attempt.number}"

    @property
    def took_ms(self) -> int:
        """From being queued to its end, or until now."""
        return self.segments[-1].end_ms - self.segments[0].start_ms if self.segments else 0


@dataclass(frozen=True, slots=True)
class Timetable:
    """A whole task between two moments (unix ms)."""

    start_ms: int
    end_ms: int
    frame: tuple[Segment, ...]
    """Planning and final checks."""
    rows: tuple[Row, ...]


def timetable(view: TaskView, now_ms: int) -> Timetable:
    """All attempts in the order of the plan; of a running task until `now_ms`."""
    end_ms = max(view.created_ms, now_ms if view.ended_ms is None else view.ended_ms)
    on_path = path_steps(view.critical_path)
    rows = [
        Row(step, attempt, _segments(step, attempt, end_ms), step.id in on_path)
        for step in view.steps
        for attempt in (step.attempts or (None,))
    ]
    return Timetable(view.created_ms, end_ms, _frame(view, end_ms), tuple(rows))


def path_steps(critical: CriticalPath | None) -> list[str]:
    """Steps on the achieved path, each once, in order of time."""
    path = critical.path if critical is not None else []
    return list(dict.fromkeys(segment.step for segment in path if segment.step is not None))


def achieved_ms(critical: CriticalPath) -> int:
    """Inference on the achieved path, to be held against what was predicted."""
    return sum(one.end_ms - one.start_ms for one in critical.path if one.what == "inference")


def notable(view: TaskView, limit: int) -> list[StepView]:
    """At most `limit` steps worth a line of their own, in the order of the plan.

    Up to half of them are those on which the critical path spent most, then come those that failed, then those that
    were tried again or lost a worker, then the others of the path; if all fit, all are taken.
    """
    if len(view.steps) <= limit:
        return list(view.steps)
    spent: Counter[str] = Counter()
    for one in view.critical_path.path if view.critical_path is not None else ():
        if one.step is not None:
            spent[one.step] += one.end_ms - one.start_ms
    favoured = {name for name, _ in spent.most_common(limit // 2)}

    def place(step: StepView) -> tuple[bool, bool, bool, int]:
        again = len(step.attempts) > 1 or step.losses > 0
        return step.id not in favoured, step.state is not StepState.FAILED, not again, -spent[step.id]

    chosen = {step.id for step in sorted(view.steps, key=place)[:limit]}
    return [step for step in view.steps if step.id in chosen]


def most_at_work(rows: Sequence[Row], borders: Sequence[int]) -> list[int]:
    """Most attempts at work at once between each border (unix ms, rising) and the next."""
    # At the same moment ends come before begins.
    changes = sorted(
        change
        for row in rows
        for one in row.segments
        if one.what in WORK
        for change in ((one.start_ms, 1), (one.end_ms, -1))
    )
    found, now, at = [], 0, 0
    for begin_ms, end_ms in pairwise(borders):
        while at < len(changes) and changes[at][0] <= begin_ms:
            now += changes[at][1]
            at += 1
        most = now
        while at < len(changes) and changes[at][0] < end_ms:
            now += changes[at][1]
            most = max(most, now)
            at += 1
        found.append(most)
    return found


def _segments(step: StepView, attempt: AttemptView | None, end_ms: int) -> tuple[Segment, ...]:
    if attempt is None:
        return ()
    known = list(attempt.segments)
    doing = _DOING.get(step.state)
    since_ms = known[-1].end_ms if known else attempt.queued_ms
    if doing is not None and attempt.ended_ms is None and attempt is step.attempts[-1] and since_ms < end_ms:
        known.append(Segment.model_validate({"what": doing, "start_ms": since_ms, "end_ms": end_ms}))
    return tuple(known)


def _frame(view: TaskView, end_ms: int) -> tuple[Segment, ...]:
    if view.critical_path is not None:
        return tuple(one for one in view.critical_path.path if one.step is None)
    if view.state is TaskState.PLANNING and end_ms > view.created_ms:
        return (Segment(what="planning", start_ms=view.created_ms, end_ms=end_ms),)
    begun_ms = min((step.ready_ms for step in view.steps if step.ready_ms is not None), default=view.created_ms)
    return (Segment(what="planning", start_ms=view.created_ms, end_ms=begun_ms),) if begun_ms > view.created_ms else ()
