"""How long a call waits for others on an idle engine: as many as came together the last time, and never for long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.company import BURST_S, Company


def burst(company: Company, at_s: float, calls: int, apart_s: float = 0.001) -> list[float]:
    """Calls that come one after the other to an engine that is idle before the first; returns what each should wait."""
    return [company.wait_s(at_s + number * apart_s, idle=number == 0) for number in range(calls)]


def test_the_first_burst_waits_for_nobody() -> None:
    assert burst(Company(), 100.0, 4) == [0.0] * 4


def test_the_next_one_waits_until_as_many_have_come() -> None:
    company = Company()
    burst(company, 100.0, 4)
    *before, last = burst(company, 200.0, 4)
    assert last == 0.0
    assert before == pytest.approx([BURST_S - number * 0.001 for number in range(3)])


def test_nobody_waits_for_more_than_came() -> None:
    company = Company()
    burst(company, 100.0, 2)
    assert burst(company, 200.0, 5)[1:] == [0.0] * 4


def test_whoever_comes_alone_after_a_burst_waits_once() -> None:
    company = Company()
    burst(company, 100.0, 8)
    assert burst(company, 200.0, 1) == pytest.approx([BURST_S])
    assert burst(company, 300.0, 1) == [0.0]


def test_calls_that_come_later_are_no_part_of_the_burst() -> None:
    company = Company()
    burst(company, 100.0, 4, apart_s=2 * BURST_S)
    assert burst(company, 200.0, 1) == [0.0]


@given(st.lists(st.tuples(st.floats(0, 0.02), st.booleans())))
def test_nobody_waits_beyond_the_burst(steps: list[tuple[float, bool]]) -> None:
    company, now_s, began_s = Company(), 0.0, -1.0
    for apart_s, idle in steps:
        now_s += apart_s
        began_s = now_s if idle else began_s
        wait_s = company.wait_s(now_s, idle=idle)
        assert 0.0 <= wait_s <= BURST_S + 1e-9
        assert now_s + wait_s <= max(now_s, began_s + BURST_S) + 1e-9
