"""Which settings to measure next, and which are the best: pure; outcomes with their time in, points out.

Coordinate descent: one axis (threads, then slots, …) at a time, the best option of each is kept, and the axes are gone
through again for as long as a pass has changed something. Within an axis successive halving: every option is measured
once, the better half again, until one challenger is left. The incumbent is measured in every one of these rungs, and
scores are compared within an axis only, so a machine that gets slower meanwhile favours nobody. At the end the winner
and the settings at the start are measured in turn; what is not better by `MARGIN` there is not worth a change.

The budget bounds everything: a measurement that would probably end later is not begun, and time for the final
comparison is kept back. Where time is up within an axis, what leads there is compared all the same. What is measured,
and how, is `measure`'s business.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

Value: TypeAlias = str | int | float

MARGIN: Final = 1.03
"""Faster by less than this is noise."""
CONFIRMING_PAIRS: Final = 3
"""Measurements of winner and start in turn at the end."""
_HOPELESS: Final = 0.9
"""An option slower than this share of the incumbent is not measured a second time."""


@dataclass(frozen=True, slots=True)
class Point:
    """Settings of a model entry by field, `speculation.type`; a field that is not in it stays as the entry has it."""

    settings: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Value]) -> Point:
        """The same settings are the same point, in whatever order."""
        return cls(tuple(sorted(settings.items())))

    def with_option(self, option: Mapping[str, Value]) -> Point:
        """The point with these fields set."""
        return Point.of({**dict(self.settings), **option})


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that can be set in several ways; an option names all fields of the axis that it differs in."""

    name: str
    options: tuple[Mapping[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of measuring one point."""

    score: float | None
    """The more the better; None = the point cannot be used, and is not asked for again."""
    at_s: float
    """Seconds since the search began, when it ended."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the search has found."""

    best: Point
    """The start where nothing is better."""
    best_score: float | None
    start_score: float | None
    """Both as measured in turn at the end, or before that where the time was up; None = not measured."""
    complete: bool
    """Whether a pass has found nothing better any more; False = the time was up first."""

    @property
    def gain(self) -> float:
        """Score of the best over that of the start."""
        return self.best_score / self.start_score if self.best_score and self.start_score else 1.0


class _TimeUp(Exception):
    """No time for another measurement; within an axis it brings what leads there."""

    def __init__(self, leader: Point | None = None) -> None:
        super().__init__()
        self.leader = leader


@dataclass(slots=True)
class _Progress:
    budget_s: float
    now_s: float = 0.0
    longest_s: float = 0.0
    unusable: set[Point] = field(default_factory=set)

    def usable(self, points: Iterable[Point]) -> list[Point]:
        """Those that were not refused so far."""
        return [point for point in points if point not in self.unusable]


def search(start: Point, axes: Sequence[Axis], budget_s: float) -> Generator[Point, Outcome, Result]:
    """Yield the points to measure and take their outcomes; returns the result. Ends by itself.

    The start is measured first, whatever the budget is; where it cannot be used, the search is over.
    """
    progress = _Progress(budget_s)
    began = yield from _measured(progress, start, [])
    if began is None:
        return Result(start, None, None, complete=False)
    best, complete = start, False
    try:
        while not complete:
            before = best
            for axis in axes:
                best = yield from _better_of(progress, best, axis)
            complete = best == before
    except _TimeUp as up:
        best = up.leader or best
    if best == start:
        return Result(start, began, began, complete=complete)
    return (yield from _confirmed(progress, start, best, complete))


def _better_of(progress: _Progress, incumbent: Point, axis: Axis) -> Generator[Point, Outcome, Point]:
    """The incumbent, or the option of the axis that beats it."""
    challengers = progress.usable(_options(incumbent, axis))
    reserve = 2 * (CONFIRMING_PAIRS - 1)
    own: list[float] = []
    scores: dict[Point, list[float]] = {point: [] for point in challengers}
    while challengers:
        try:
            yield from _measured(progress, incumbent, own, reserve)
            for point in challengers:
                yield from _measured(progress, point, scores[point], reserve)
        except _TimeUp:
            raise _TimeUp(_leader(incumbent, own, scores, progress.usable(challengers))) from None
        bar = statistics.median(own)
        hopeful = [
            point for point in progress.usable(challengers) if statistics.median(scores[point]) > bar * _HOPELESS
        ]
        hopeful.sort(key=lambda point: -statistics.median(scores[point]))
        if len(own) > 1 and len(hopeful) <= 1:
            return _leader(incumbent, own, scores, hopeful)
        challengers = hopeful[: max(1, (len(hopeful) + 1) // 2)]
    return incumbent


def _leader(
    incumbent: Point, own: Sequence[float], scores: Mapping[Point, Sequence[float]], among: Iterable[Point]
) -> Point:
    """The best of these by what was measured so far, where it is ahead by `MARGIN`; else the incumbent."""
    medians = {point: statistics.median(scores[point]) for point in among if scores[point]}
    if not own or not medians:
        return incumbent
    first = max(medians, key=lambda point: medians[point])
    return first if medians[first] > statistics.median(own) * MARGIN else incumbent


def _confirmed(progress: _Progress, start: Point, best: Point, complete: bool) -> Generator[Point, Outcome, Result]:
    ours: list[float] = []
    theirs: list[float] = []
    try:
        for turn in range(CONFIRMING_PAIRS):
            order = ((start, theirs), (best, ours)) if turn % 2 else ((best, ours), (start, theirs))
            for point, scores in order:
                yield from _measured(progress, point, scores)
    except _TimeUp:
        complete = False
    pairs = min(len(ours), len(theirs))
    if not pairs:
        return Result(start, None, None, complete=False)  # never compared with what is there: no reason to change it
    won, had = statistics.median(ours[:pairs]), statistics.median(theirs[:pairs])
    if won < had * MARGIN:
        return Result(start, had, had, complete=complete)
    return Result(best, won, had, complete=complete)


def _measured(
    progress: _Progress, point: Point, scores: list[float], reserve: int = 0
) -> Generator[Point, Outcome, float | None]:
    """Measure once and add the score. Raises _TimeUp where it, and `reserve` more like it, would end too late."""
    if progress.now_s + (1 + reserve) * progress.longest_s > progress.budget_s and progress.longest_s:
        raise _TimeUp
    outcome = yield point
    progress.longest_s = max(progress.longest_s, outcome.at_s - progress.now_s)
    progress.now_s = outcome.at_s
    if outcome.score is None:
        progress.unusable.add(point)
    else:
        scores.append(outcome.score)
    return outcome.score


def _options(incumbent: Point, axis: Axis) -> Iterable[Point]:
    """The other points of the axis, each once."""
    points = dict.fromkeys(incumbent.with_option(option) for option in axis.options)
    return [point for point in points if point != incumbent]
