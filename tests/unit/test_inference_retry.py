from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.retry import FIRST_PAUSE_S, RetryPolicy, pause_s, retry_after_s

POLICY = RetryPolicy(attempts=4, pause_max_s=8)
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def test_pauses_double_and_end_with_the_last_attempt() -> None:
    assert [pause_s(POLICY, tried, None, 0.0) for tried in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert pause_s(POLICY, 4, None, 0.0) is None


def test_what_the_server_asks_for_is_waited_for_within_the_bound() -> None:
    assert pause_s(POLICY, 1, 5.0, 0.0) == 5.0
    assert pause_s(POLICY, 1, 8.0, 0.99) == 8.0
    assert pause_s(POLICY, 1, 8.1, 0.0) is None, "it would be asked before it is ready"
    assert pause_s(POLICY, 1, 0.0, 0.0) == FIRST_PAUSE_S / 2, "0 is no licence to hammer"


@given(st.integers(1, 3), st.none() | st.floats(0, 8), st.floats(0, 0.999))
def test_a_pause_is_never_shorter_than_asked_nor_longer_than_the_bound(
    tried: int, asked_s: float | None, dice: float
) -> None:
    pause = pause_s(POLICY, tried, asked_s, dice)
    assert pause is not None
    assert (asked_s or 0) <= pause <= POLICY.pause_max_s
    assert pause > 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        (" 0 ", 0.0),
        ("Sun, 01 Mar 2026 12:01:30 GMT", 90.0),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0.0),
        ("-3", None),
        ("soon", None),
        ("1000000000", 1e9),
        ("9" * 400, None),
        ("Sun, 01 Mar 99999999999999999999 12:00:00 GMT", None),
        ("Sun, 01 Mar 2026 12:00:00 +99999999999999999999", None),
    ],
)
def test_retry_after_comes_as_a_number_or_as_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, NOW) == seconds


@given(st.text(max_size=40) | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,3} Mar [0-9]{1,9} [0-9:]{0,9} [+-][0-9]{0,12}"))
def test_whatever_stands_there_is_a_time_to_wait_or_nothing(value: str) -> None:
    seconds = retry_after_s(value, NOW)
    assert seconds is None or 0 <= seconds < 1e12
