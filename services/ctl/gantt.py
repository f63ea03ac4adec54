"""A task's timetable as text: a bar per step, and the path that determined the wall clock.

Pure functions over a TaskView. Only ASCII is drawn, so that a pipe, a log and a terminal show the same picture.
"""

from __future__ import annotations

from typing import Final

from protocol.messages.result import CriticalPath, Segment, StepView, TaskView
from services.ctl.screen import seconds

LEGEND: Final = "p planning   . waiting for a slot   = inference   g gates   c final checks   * on the critical path"

_MARKS: Final = {
    "planning": "p",
    "waiting": " ",
    "queueing": ".",
    "inference": "=",
    "gates": "g",
    "retry": "r",
    "checks": "c",
}


def gantt(view: TaskView, width: int = 60) -> list[str]:
    """One line per step and one for planning; empty while the task has no critical path.

    `width` is the number of characters of the time axis; every stretch that took time at all gets at least one.
    """
    critical = view.critical_path
    if critical is None or not critical.path:
        return []
    scale = _Scale(view.created_ms, max(1, critical.wall_ms), max(10, width))
    on_path = {segment.step for segment in critical.path if segment.step}
    label = max([len(step.id) for step in view.steps] + [len("task")])
    lines = [f"{'task':{label}}   |{_bar([item for item in critical.path if item.step is None], scale)}|"]
    for step in view.steps:
        segments = _segments(step)
        mark = "*" if step.id in on_path else " "
        took = seconds(segments[-1].end_ms - segments[0].start_ms) if segments else step.state.value
        lines.append(f"{step.id:{label}} {mark} |{_bar(segments, scale)}| {took}")
    lines.append(f"{'':{label}}    {'0 s':<{max(1, scale.width - 9)}}{seconds(critical.wall_ms):>9}")
    return lines


def path_rows(critical: CriticalPath) -> list[tuple[str, ...]]:
    """The segments of the critical path as cells: step, what, duration, share of the wall clock."""
    wall = max(1, critical.wall_ms)
    return [
        (
            segment.step or "task",
            segment.what,
            seconds(segment.end_ms - segment.start_ms),
            f"{100 * (segment.end_ms - segment.start_ms) / wall:.0f} %",
        )
        for segment in critical.path
        if segment.end_ms > segment.start_ms
    ]


def path_summary(critical: CriticalPath) -> str:
    """The figures of the critical path in one sentence."""
    return (
        f"{seconds(critical.wall_ms)} wall clock for {seconds(critical.work_ms)} of work: parallelism "
        f"{critical.parallelism:.2f}, {critical.overlapping_steps} steps overlapped"
    )


class _Scale:
    """Maps unix milliseconds to columns."""

    def __init__(self, start_ms: int, wall_ms: int, width: int) -> None:
        self.start_ms = start_ms
        self.wall_ms = wall_ms
        self.width = width

    def column(self, at_ms: int) -> int:
        """Column of a moment, within the axis."""
        return min(self.width, max(0, round((at_ms - self.start_ms) * self.width / self.wall_ms)))


def _segments(step: StepView) -> list[Segment]:
    """Where a step spent its time, over all attempts."""
    found: list[Segment] = []
    for attempt in step.attempts:
        ends = (attempt.started_ms, attempt.inferred_ms, attempt.ended_ms)
        begin = attempt.queued_ms
        for what, end in zip(("queueing", "inference", "gates"), ends, strict=True):
            if end is None or end < begin:
                continue
            found.append(Segment(step=step.id, what=what, start_ms=begin, end_ms=end))
            begin = end
    return found


def _bar(segments: list[Segment], scale: _Scale) -> str:
    cells = [" "] * scale.width
    for segment in segments:
        if segment.end_ms <= segment.start_ms:
            continue
        first = min(scale.column(segment.start_ms), scale.width - 1)
        for column in range(first, max(first + 1, scale.column(segment.end_ms))):
            cells[column] = _MARKS[segment.what]
    return "".join(cells)
