"""How many calls come together, in virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.company import Company

WITHIN_S = 0.005


def group(company: Company, at_s: float, calls: int) -> list[bool]:
    """Whether each of so many calls, a tenth of the time apart, is told that more are to come."""
    return [company.is_wanting(at_s + number * WITHIN_S / 10, idle=number == 0) for number in range(calls)]


def test_as_many_are_wanted_as_came_together_the_last_time() -> None:
    company = Company(WITHIN_S)
    assert group(company, 0.0, 3) == [False, False, False], "nothing is known of company"
    assert group(company, 60.0, 3) == [True, True, False]
    assert group(company, 120.0, 4) == [True, True, False, False], "one more waits for nobody"
    assert group(company, 180.0, 2) == [True, True], "two of four stay away"
    assert group(company, 240.0, 1) == [True]
    assert group(company, 300.0, 1) == [False], "one that comes alone again and again never waits"


def test_one_that_comes_to_a_busy_engine_or_too_late_belongs_to_no_group() -> None:
    company = Company(WITHIN_S)
    group(company, 0.0, 2)
    assert not company.is_wanting(1.0, idle=False)
    assert group(company, 60.0, 1) == [True], "two came together, the third by itself"
    assert not company.is_wanting(60.0 + 2 * WITHIN_S, idle=False)
    assert group(company, 120.0, 1) == [False]


@pytest.mark.parametrize("calls", [1, 2, 8])
@given(gaps_s=st.lists(st.floats(1.0, 1e6), min_size=1, max_size=8))
def test_groups_of_one_size_wait_for_their_last_and_for_nobody_else(calls: int, gaps_s: list[float]) -> None:
    company, at_s = Company(WITHIN_S), 0.0
    group(company, at_s, calls)
    for gap_s in gaps_s:
        at_s += gap_s
        assert group(company, at_s, calls) == [True] * (calls - 1) + [False]
