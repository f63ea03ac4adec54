"""A task's timetable as SVG: a row per step, stretches coloured by kind, the critical path, slack and dependencies.

Pure. Positions along time are percentages, so the chart fills whatever width it is given without scaling its text. All
text of a task goes through `safe`: models wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final

from protocol.messages.result import Segment, StepState, StepView, TaskView
from services.ctl.screen import one_line, printable, seconds
from services.ctl.timetable import WORK, Row, path_steps, timetable

#: Kind of stretch -> what it is called in the legend and on hover.
NAMES: Final = {
    "planning": "planning",
    "queueing": "waiting for a slot",
    "loading": "no worker ready",
    "backoff": "pause before a retry",
    "waiting": "waiting",
    "inference": "inference",
    "gates": "gates",
    "retry": "failed or lost run",
    "checks": "final checks",
}
_AXIS_PX: Final = 28
_EDGES_SHOWN: Final = 120
"""Dependencies beyond which only those of the critical path and of the row under the pointer are drawn."""
_LEAST_PERCENT: Final = 0.15
"""A stretch that took any time can be seen."""


def safe(text: str, limit: int = 300) -> str:
    """Text of a model, a task or a log as HTML: on one line, cut, without control characters, escaped."""
    return escape(one_line(text, limit))


def safe_block(text: str, limit: int) -> str:
    """The same with its line breaks; says how much was cut off."""
    rest = len(text) - limit
    return escape(printable(text[:limit])) + (f"\n… {rest:,} more characters" if rest > 0 else "")


@dataclass(frozen=True, slots=True)
class _Bar:
    """One row of the chart."""

    step: StepView
    rows: tuple[Row, ...]
    begin_ms: int
    end_ms: int
    critical: bool


def chart(view: TaskView, now_ms: int) -> str:
    """Legend and chart, a running task until `now_ms`; steps stand in the order in which they began."""
    table = timetable(view, now_ms)
    bars = _bars(table.rows, table.end_ms)
    path = view.critical_path.path if view.critical_path is not None else list(table.frame)
    place = _Place(table.start_ms, max(1, table.end_ms - table.start_ms), _row_px(len(bars)))
    edges = _edges(bars)
    drawn = {one.what for bar in bars for row in bar.rows for one in row.segments} | {one.what for one in path}
    density = {24: "", 18: " dense", 12: " packed"}[place.row_px]
    labels = "".join(_label(number, bar) for number, bar in enumerate(bars))
    order = {bar.step.id: number for number, bar in enumerate(bars)}
    on_path = set(pairwise(path_steps(view.critical_path)))
    lines = [
        _edge(order[a.step.id], order[b.step.id], a, b, (a.step.id, b.step.id) in on_path, place) for a, b in edges
    ]
    slack = view.critical_path.slack_ms if view.critical_path is not None else {}
    rows = "".join(_row(number, bar, slack.get(bar.step.id, 0), place) for number, bar in enumerate(bars))
    height = _AXIS_PX + (len(bars) + 1) * place.row_px
    return (
        f'{_legend(drawn, critical=any(bar.critical for bar in bars), slack=any(slack.values()))}<div class="frame">'
        f'<div class="chart{density}{" many" if len(edges) > _EDGES_SHOWN else ""}"><ul class="labels">'
        f'<li class="critical"><b>{"critical path" if view.critical_path is not None else "task"}</b></li>{labels}</ul>'
        f'<svg height="{height}" role="img" aria-label="timetable of the steps">{_ticks(place, height)}'
        f"{_path_row(path, place)}{rows}{''.join(lines)}</svg></div></div>"
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where things stand: percent across, pixels down."""

    start_ms: int
    span_ms: int
    row_px: int

    def across(self, at_ms: int) -> float:
        """Percent of the width."""
        return round(min(100.0, max(0.0, 100 * (at_ms - self.start_ms) / self.span_ms)), 3)

    def top(self, row: int) -> int:
        """Upper border of a row; -1 is the row of the critical path."""
        return _AXIS_PX + (row + 1) * self.row_px

    def middle(self, row: int) -> float:
        """Middle of a row."""
        return self.top(row) + self.row_px / 2


def _row_px(bars: int) -> int:
    return 24 if bars <= 30 else 18 if bars <= 150 else 12


def _bars(rows: tuple[Row, ...], end_ms: int) -> list[_Bar]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.step.id, []).append(row)
    bars = []
    for tries in found.values():
        parts = [one for row in tries for one in row.segments]
        begin = parts[0].start_ms if parts else end_ms
        bars.append(_Bar(tries[0].step, tuple(tries), begin, parts[-1].end_ms if parts else begin, tries[0].critical))
    return sorted(bars, key=lambda bar: bar.begin_ms)


def _edges(bars: list[_Bar]) -> list[tuple[_Bar, _Bar]]:
    by_id = {bar.step.id: bar for bar in bars}
    return [
        (by_id[name], bar)
        for bar in bars
        if any(row.segments for row in bar.rows)
        for name in bar.step.needs
        if name in by_id
    ]


def _label(number: int, bar: _Bar) -> str:
    roles = list(dict.fromkeys(row.attempt.role for row in bar.rows if row.attempt is not None)) or [bar.step.actor]
    mark = ' class="critical"' if bar.critical else ""
    tip = f"{bar.step.id} ({bar.step.state.value}): {bar.step.action}"
    return (
        f'<li{mark} data-row="{number}" title="{safe(tip)}"><b>{safe(bar.step.id, 64)}</b>'
        f"{safe(' → '.join(roles), 100)}</li>"
    )


def _row(number: int, bar: _Bar, slack_ms: int, place: _Place) -> str:
    top, middle = place.top(number), place.middle(number)
    parts = [f'<rect class="back" x="0" y="{top}" width="100%" height="{place.row_px}"/>']
    for row in bar.rows:
        for one in row.segments:
            tip = f"{row.label}: {NAMES[one.what]}, {seconds(one.end_ms - one.start_ms)}"
            parts.append(_rect(one, top, place, tip, inset=3 if place.row_px > 12 else 2))
    if bar.critical:
        x, width = place.across(bar.begin_ms), place.across(bar.end_ms) - place.across(bar.begin_ms)
        under = top + place.row_px - 3
        parts.append(f'<rect class="mark" x="{x}%" y="{under}" width="{width:.3f}%" height="2.5"/>')
    if slack_ms > 0 and bar.step.state is StepState.DONE:
        x1, x2 = place.across(bar.end_ms), place.across(bar.end_ms + slack_ms)
        tip = f"{bar.step.id}: could have ended {seconds(slack_ms)} later"
        parts.append(
            f'<line class="slack" x1="{x1}%" x2="{x2}%" y1="{middle}" y2="{middle}"><title>{safe(tip)}</title></line>'
        )
    aside = "" if bar.critical else " aside"
    return f'<g class="row{aside}" data-row="{number}">{"".join(parts)}</g>'


def _path_row(path: list[Segment], place: _Place) -> str:
    top = place.top(-1)
    parts = []
    for one in path:
        who = one.step or "task"
        share = 100 * (one.end_ms - one.start_ms) / place.span_ms
        tip = f"{who}: {NAMES[one.what]}, {seconds(one.end_ms - one.start_ms)}, {share:.0f} % of the wall clock"
        parts.append(_rect(one, top, place, tip, inset=2))
        if one.step is not None and share > 1.1 * len(one.step) + 1 and place.row_px > 12:
            middle = place.across((one.start_ms + one.end_ms) // 2)
            idle = "" if one.what in WORK else " idle"
            parts.append(
                f'<text class="within{idle}" x="{middle}%" y="{place.middle(-1) + 4}" text-anchor="middle">'
                f"{safe(one.step, 64)}</text>"
            )
    return "".join(parts)


def _rect(one: Segment, top: int, place: _Place, tip: str, inset: int) -> str:
    x = place.across(one.start_ms)
    width = max(_LEAST_PERCENT, place.across(one.end_ms) - x)
    return (
        f'<rect class="{one.what}" x="{x}%" y="{top + inset}" width="{width:.3f}%" height="{place.row_px - 2 * inset}">'
        f"<title>{safe(tip)}</title></rect>"
    )


def _edge(start: int, end: int, one: _Bar, other: _Bar, critical: bool, place: _Place) -> str:
    """Down from the end of a step, then across to the begin of its follower."""
    x1, x2 = place.across(one.end_ms), place.across(other.begin_ms)
    y1, y2 = place.middle(start), place.middle(end)
    return (
        f'<g class="edge{" critical" if critical else ""}" data-from="{start}" data-to="{end}">'
        f'<line x1="{x1}%" x2="{x1}%" y1="{y1}" y2="{y2}"/><line x1="{x1}%" x2="{x2}%" y1="{y2}" y2="{y2}"/>'
        f'<circle cx="{x2}%" cy="{y2}" r="2.5"/></g>'
    )


def _ticks(place: _Place, height: int) -> str:
    """About eight lines at round numbers of seconds."""
    rough = place.span_ms / 8
    power = 10 ** math.floor(math.log10(max(1.0, rough)))
    step_ms = max(1, next(round(power * factor) for factor in (1, 2, 5, 10) if power * factor >= rough))
    parts = []
    for at_ms in range(0, place.span_ms + 1, step_ms):
        x = place.across(place.start_ms + at_ms)
        anchor = "start" if at_ms == 0 else "end" if x > 97 else "middle"
        parts.append(
            f'<line class="tick" x1="{x}%" x2="{x}%" y1="{_AXIS_PX - 6}" y2="{height}"/>'
            f'<text x="{x}%" y="{_AXIS_PX - 12}" text-anchor="{anchor}">{at_ms / 1000:g} s</text>'
        )
    return f'<g class="ticks">{"".join(parts)}</g>'


def _legend(drawn: Set[str], *, critical: bool, slack: bool) -> str:
    entries = [
        f'<span><svg width="14" height="10"><rect class="{what}" width="14" height="10"/></svg>{name}</span>'
        for what, name in NAMES.items()
        if what in drawn
    ]
    if critical:
        entries.append(
            '<span><svg width="14" height="10"><rect class="mark" y="4" width="14" height="3"/></svg>'
            "on the critical path</span>"
        )
    if slack:
        entries.append(
            '<span><svg width="14" height="10"><line class="slack" x2="14" y1="5" y2="5"/></svg>slack</span>'
        )
    return f'<div class="legend">{"".join(entries)}</div>'
