"""The search for better settings, in virtual time, over machines that are made up."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from services.ctl.tuning.search import Axis, Outcome, Point, Result, search

AXES = (
    Axis("threads", tuple({"threads": count} for count in (1, 2, 4, 8))),
    Axis("slots", tuple({"slots": count} for count in (1, 2, 4))),
    Axis("batch", ({"batch_tokens": 512, "ubatch_tokens": 128}, {"batch_tokens": 2048, "ubatch_tokens": 512})),
)
START = Point.of({"threads": 1, "slots": 1})
MEASURE_S = 5.0


def run(
    score: Callable[[Point, int], float | None], budget_s: float, start: Point = START, took_s: float = MEASURE_S
) -> tuple[Result, list[Point], float]:
    """Drive the search; `score` gets the point and how many measurements there were. Returns also when it ended."""
    steps = search(start, AXES, budget_s)
    asked: list[Point] = []
    now_s = 0.0
    try:
        point = next(steps)
        while True:
            now_s += took_s
            asked.append(point)
            point = steps.send(Outcome(score(point, len(asked)), now_s))
    except StopIteration as end:
        return end.value, asked, now_s


def planted(best: Mapping[str, object]) -> Callable[[Point, int], float]:
    """A machine on which each field that has its best value doubles the speed."""
    return lambda point, _count: (
        10.0 * 2 ** sum(dict(point.settings).get(name) == value for name, value in best.items())
    )


def test_with_time_enough_the_best_point_is_found_and_confirmed_against_the_start() -> None:
    result, asked, _ = run(planted({"threads": 4, "slots": 2, "batch_tokens": 512}), 10_000)
    assert dict(result.best.settings) == {"threads": 4, "slots": 2, "batch_tokens": 512, "ubatch_tokens": 128}
    assert (result.start_score, result.best_score, result.gain) == (10.0, 80.0, 8.0)
    assert result.complete
    assert {asked[-1], asked[-2]} == {START, result.best}, "measured in turn at the end"


def test_where_nothing_is_better_the_start_stays() -> None:
    result, _, _ = run(lambda point, _count: 10.0 if point == START else 10.2, 10_000)
    assert result.best == START, "2 % are noise"
    assert result.gain == 1.0
    assert result.complete


def test_settings_that_cannot_be_used_are_asked_for_once_and_never_chosen() -> None:
    def score(point: Point, _count: int) -> float | None:
        settings = dict(point.settings)
        return None if settings["threads"] == 8 else 10.0 * float(settings["threads"])

    result, asked, _ = run(score, 10_000)
    refused = [point for point in asked if dict(point.settings)["threads"] == 8]
    assert refused
    assert len(refused) == len(set(refused))
    assert dict(result.best.settings)["threads"] == 4


def test_a_start_that_cannot_be_used_ends_the_search() -> None:
    result, asked, _ = run(lambda _point, _count: None, 10_000)
    assert asked == [START]
    assert (result.best, result.best_score, result.complete) == (START, None, False)


def test_a_machine_that_gets_slower_meanwhile_favours_nobody() -> None:
    def score(point: Point, count: int) -> float:
        return 10.0 * 0.97**count * (2 if dict(point.settings).get("slots") == 4 else 1)

    result, _, _ = run(score, 10_000)
    assert result.best == START.with_option({"slots": 4})


def test_a_lucky_measurement_alone_wins_nothing() -> None:
    result, _, _ = run(lambda _point, count: 30.0 if count == 3 else 10.0, 10_000)
    assert result.best == START


def test_what_leads_when_the_time_is_up_within_an_axis_is_compared_all_the_same() -> None:
    faster, budget_s = START.with_option({"threads": 4}), 9 * MEASURE_S
    result, asked, ended_s = run(planted({"threads": 4}), budget_s)
    assert (result.best, result.gain, result.complete) == (faster, 2.0, False)
    assert set(asked[-2:]) == {START, faster}
    assert ended_s <= budget_s
    lucky, _, _ = run(lambda _point, count: 30.0 if count == 4 else 10.0, budget_s)
    assert lucky.best == START, "ahead by one measurement, and not when compared"


def test_a_winner_that_was_not_compared_with_the_start_is_not_taken() -> None:
    """The first measurement is quick, and then the machine gets so slow that there is no time to compare."""
    steps = search(START, AXES, 100)
    next(steps)
    steps.send(Outcome(10.0, 1.0))
    steps.send(Outcome(10.0, 2.0))
    try:
        steps.send(Outcome(50.0, 99.0))
        raise AssertionError("a measurement that would end after the budget was begun")
    except StopIteration as end:
        result = end.value
    assert (result.best, result.complete) == (START, False)


@given(
    seed=st.integers(0, 2**32),
    budget_s=st.floats(1, 2_000),
    took_s=st.floats(0.1, 60),
    best=st.fixed_dictionaries({"threads": st.sampled_from([1, 2, 4, 8]), "slots": st.sampled_from([1, 2, 4])}),
)
def test_it_ends_within_its_budget_and_never_names_what_is_clearly_worse(
    seed: int, budget_s: float, took_s: float, best: dict[str, int]
) -> None:
    draw = random.Random(seed)
    true = planted(best)
    score = lambda point, count: true(point, count) * draw.uniform(0.95, 1.05)  # noqa: E731  a parameter in one line
    result, asked, ended_s = run(score, budget_s, took_s=took_s)
    assert ended_s <= max(budget_s, took_s) + 1e-6
    assert result.best in asked
    assert true(result.best, 0) >= true(START, 0), "factors of two cannot be hidden by noise of 5 %"
    if result.complete:
        assert true(result.best, 0) == 40.0


@given(seed=st.integers(0, 2**32))
def test_the_same_outcomes_lead_to_the_same_points(seed: int) -> None:
    def once() -> list[Point]:
        draw = random.Random(seed)
        return run(lambda _point, _count: draw.uniform(5, 15), 600)[1]

    assert once() == once()
