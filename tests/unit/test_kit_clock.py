"""Clocks never go back."""

import time

import pytest

from services.kit.clock import SteadyClock, VirtualClock


def test_the_virtual_clock_moves_only_when_told_and_never_back() -> None:
    clock = VirtualClock(1_000)
    assert clock.now_ms() == 1_000
    assert clock.advance_ms(0) == 1_000
    assert clock.advance_ms(250) == clock.now_ms() == 1_250
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance_ms(-1)
    assert clock.now_ms() == 1_250


def test_the_steady_clock_tells_unix_time_and_does_not_follow_a_step_of_the_system_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SteadyClock()
    assert abs(clock.now_ms() - time.time() * 1000) < 1_000
    before = clock.now_ms()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    readings = [clock.now_ms() for _ in range(1_000)]
    assert readings == sorted(readings)
    assert readings[0] >= before
