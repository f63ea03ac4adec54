"""A task's timetable as text: a bar per attempt, and the path that determined the wall clock.

Pure functions over a TaskView. Only ASCII is drawn, so that a pipe, a log and a terminal show the same picture, and
never more than MAX_ROWS bars: a plan of a thousand steps is summed up per role, with the steps that matter below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocol.messages.result import CriticalPath, Segment, StepState, TaskView
from services.ctl.screen import one_line, seconds
from services.ctl.timetable import Row, Timetable, achieved_ms, most_at_work, notable, path_steps, timetable

MAX_ROWS: Final = 40
_MAX_LABEL: Final = 24
_MARKS: Final = {
    "planning": ("p", "planning"),
    "waiting": ("-", "waiting"),
    "queueing": (".", "waiting for a slot"),
    "loading": ("l", "no worker ready"),
    "backoff": ("b", "pause before a retry"),
    "inference": ("=", "inference"),
    "gates": ("g", "gates"),
    "retry": ("r", "failed or lost run"),
    "checks": ("c", "final checks"),
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the picture."""

    text: str
    critical: bool = False
    """It shows a step on the critical path."""


def gantt(view: TaskView, columns: int, now_ms: int) -> list[Line]:
    """The picture of a task, at most `columns` characters wide, a running one until `now_ms`.

    One line for planning and checks, one per attempt, the axis and a legend; every stretch that took time at all gets
    at least one character. Empty for a task without steps.
    """
    if not view.steps:
        return []
    table = timetable(view, now_ms)
    rows = list(table.rows)
    crowds: dict[str, list[Row]] = {}
    if len(rows) > MAX_ROWS:
        shown = {step.id for step in notable(view, MAX_ROWS // 2)}
        crowds = _by_role(rows)
        rows = [row for row in rows if row.step.id in shown][:MAX_ROWS]
    labels = [*(row.label for row in rows), *crowds, "task"]
    label = min(_MAX_LABEL, columns // 3, max(len(name) for name in labels))
    scale = _Scale(table, max(10, columns - label - len("   || 99 min 59 s")))
    lines = [Line(f"{'task':{label}}   |{_bar(table.frame, scale)}|")]
    for role, members in crowds.items():
        steps = len({row.step.id for row in members})
        lines.append(Line(f"{one_line(role, label):{label}}   |{_crowd(members, scale)}| {steps} steps"))
    for row in rows:
        took = seconds(row.took_ms) if row.segments else row.step.state.value
        mark = "*" if row.critical else " "
        lines.append(
            Line(f"{one_line(row.label, label):{label}} {mark} |{_bar(row.segments, scale)}| {took}", row.critical)
        )
    end = seconds(table.end_ms - table.start_ms)
    lines.append(Line(f"{'':{label}}    0 s{end:>{max(1, scale.width - 3)}}"))
    return [*lines, *_legend(table, rows, crowded=bool(crowds), columns=columns)]


def path_rows(critical: CriticalPath) -> list[tuple[str, ...]]:
    """The segments of the critical path as cells: step, what, duration, share of the wall clock.

    A path of more than MAX_ROWS segments is summed up by what it spent its time on.
    """
    wall = max(1, critical.wall_ms)
    spent = [(one.step or "task", one.what, one.end_ms - one.start_ms) for one in critical.path]
    if len(spent) > MAX_ROWS:
        kinds = list(dict.fromkeys(what for _, what, _ in spent))
        many = {kind: [took for _, what, took in spent if what == kind] for kind in kinds}
        spent = [(f"{len(many[kind])} stretches", kind, sum(many[kind])) for kind in kinds]
    return [(step, what, seconds(took), f"{100 * took / wall:.0f} %") for step, what, took in spent]


def path_summary(critical: CriticalPath) -> list[str]:
    """The figures of the report in a few sentences."""
    figures = (
        f"{seconds(critical.wall_ms)} wall clock for {seconds(critical.work_ms)} of work: parallelism "
        f"{critical.parallelism:.2f}, {critical.overlapping_steps} steps overlapped"
    )
    if critical.bound_by:
        why = "the longest chain" if critical.bound_by == "chain" else f"the slots of model {critical.bound_by}"
        figures += f"; no schedule of these attempts takes less than {seconds(critical.lower_bound_ms)} ({why})"
    lines = [figures, f"achieved:  {_chain(path_steps(critical))}, {seconds(achieved_ms(critical))} of inference"]
    if critical.predicted is not None:
        predicted = critical.predicted
        lines.append(f"predicted: {_chain(predicted.steps)}, {seconds(predicted.length_ms)} of inference")
    lines.append(
        f"CriticalSteps {critical.critical_steps} of {critical.total_steps} steps, planning and checks included"
    )
    return lines


def _chain(steps: Sequence[str]) -> str:
    if len(steps) > 12:
        return f"{' -> '.join(steps[:6])} -> ({len(steps) - 9} more) -> {' -> '.join(steps[-3:])}"
    return " -> ".join(steps) or "no step"


class _Scale:
    """Maps unix milliseconds to columns."""

    def __init__(self, table: Timetable, width: int) -> None:
        self.start_ms = table.start_ms
        self.span_ms = max(1, table.end_ms - table.start_ms)
        self.width = width

    def column(self, at_ms: int) -> int:
        """Column of a moment, within the axis."""
        return min(self.width, max(0, round((at_ms - self.start_ms) * self.width / self.span_ms)))

    def moment(self, column: int) -> int:
        """Moment at which a column begins."""
        return self.start_ms + column * self.span_ms // self.width


def _bar(segments: Sequence[Segment], scale: _Scale) -> str:
    cells = [" "] * scale.width
    for segment in segments:
        if segment.end_ms <= segment.start_ms:
            continue
        first = min(scale.column(segment.start_ms), scale.width - 1)
        for column in range(first, max(first + 1, scale.column(segment.end_ms))):
            cells[column] = _MARKS[segment.what][0]
    return "".join(cells)


def _by_role(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Attempts per role; the roles beyond a third of the lines together, should a plan have so many."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        role = row.attempt.role if row.attempt is not None else row.step.actor
        key = role if role in found or len(found) < MAX_ROWS // 3 else "other roles"
        found.setdefault(key, []).append(row)
    return found


def _crowd(rows: Sequence[Row], scale: _Scale) -> str:
    """How many were at work at once, per column: nothing, 1 to 9, or # for more."""
    counts = most_at_work(rows, [scale.moment(column) for column in range(scale.width + 1)])
    return "".join(" " if count == 0 else str(count) if count < 10 else "#" for count in counts)


def _legend(table: Timetable, rows: Sequence[Row], *, crowded: bool, columns: int) -> list[Line]:
    drawn = {one.what for row in rows for one in row.segments} | {one.what for one in table.frame}
    entries = [f"{mark} {name}" for what, (mark, name) in _MARKS.items() if what in drawn]
    if any(row.critical for row in rows):
        entries.append("* on the critical path")
    if crowded:
        entries.append("1-9 at work at once, # ten or more")
        steps = {row.step.id: row.step.state for row in table.rows}
        entries.append(f"{len(steps) - len({row.step.id for row in rows})} steps have no line of their own")
        entries.append(f"{sum(state is StepState.FAILED for state in steps.values())} of all {len(steps)} failed")
    lines = [""]
    for entry in entries:
        if lines[-1] and len(lines[-1]) + 3 + len(entry) > columns:
            lines.append("")
        lines[-1] += f"{'   ' if lines[-1] else ''}{entry}"
    return [Line(text) for text in lines]
