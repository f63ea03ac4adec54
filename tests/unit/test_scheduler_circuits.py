"""Circuits of capabilities in virtual time: one backend is enough, one bad step is not, and there is a way back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.kit.registry import FailureCaps
from services.scheduler.circuits import PROBE_RUN_MS, SAME_INCIDENT_MS, Circuits, policy_of

T = "infer.worker"


def circuits() -> Circuits:
    return Circuits(policy_of(FailureCaps()))


def opened(at_ms: int = 10_000) -> Circuits:
    """Three incidents with three calls, the last one at this time."""
    state = circuits()
    for number in range(3):
        assert state.admits(T, at_ms)
        state.failed(T, f"c{number}", "engine.died", at_ms - (2 - number) * SAME_INCIDENT_MS)
    return state


def test_three_failures_with_different_calls_open_it_and_say_so() -> None:
    state = opened()
    assert not state.admits(T, 10_000)
    assert state.admits("infer.front", 10_000), "the others are served"
    ((target, reason),) = state.take()
    assert target == T
    assert "3 failures" in (reason or "")
    assert state.reason(T) == reason == state.open()[T]


def test_calls_that_die_together_are_one_failure() -> None:
    state = circuits()
    for number in range(50):
        state.failed(T, f"c{number}", "gone", 10_000 + number)
    assert state.admits(T, 10_100)


def test_a_call_that_kills_every_worker_is_its_own_fault() -> None:
    state = circuits()
    for number in range(10):
        state.failed(T, "the same", "gone", 10_000 + number * 2_000)
    assert state.admits(T, 40_000)


def test_after_the_pause_one_call_is_let_through_and_closes_it() -> None:
    state = opened()
    assert not state.admits(T, 14_999)
    assert state.admits(T, 15_000)
    state.started(T, "probe", 15_000)
    assert not state.admits(T, 15_001), "one at a time"
    state.ended(T, "other", 15_050)
    assert not state.admits(T, 15_060), "late news of another call says nothing"
    state.ended(T, "probe", 15_100)
    assert state.admits(T, 15_100)
    assert state.take()[-1] == (T, None)


def test_a_failed_probe_doubles_the_pause() -> None:
    state = opened()
    assert state.admits(T, 15_000)
    state.started(T, "probe", 15_000)
    state.failed(T, "probe", "engine.died", 15_100)
    assert not state.admits(T, 25_000)
    assert state.admits(T, 25_100)


def test_a_probe_that_is_slow_but_alive_has_gone_well() -> None:
    state = opened()
    assert state.admits(T, 15_000)
    state.started(T, "probe", 15_000)
    state.on_tick(15_000 + PROBE_RUN_MS - 1)
    assert not state.admits(T, 15_000 + PROBE_RUN_MS - 1)
    state.on_tick(15_000 + PROBE_RUN_MS)
    assert state.admits(T, 15_000 + PROBE_RUN_MS)


def test_a_probe_that_was_cancelled_leaves_its_place_to_the_next_call() -> None:
    state = opened()
    assert state.admits(T, 15_000)
    state.started(T, "probe", 15_000)
    state.withdrawn(T, "probe")
    assert state.admits(T, 15_200)


def test_old_failures_are_forgotten() -> None:
    state = circuits()
    state.failed(T, "a", "x", 0)
    state.failed(T, "b", "x", 2_000)
    state.on_tick(70_000)
    state.failed(T, "c", "x", 70_000)
    assert state.admits(T, 70_000)


@given(st.lists(st.tuples(st.sampled_from(["fail", "end", "withdraw", "try"]), st.integers(0, 20_000)), max_size=80))
def test_whatever_happens_a_call_is_admitted_within_the_longest_pause(story: list[tuple[str, int]]) -> None:
    state, now = circuits(), 0
    for number, (what, passed_ms) in enumerate(story):
        now += passed_ms
        state.on_tick(now)
        key = f"c{number}"
        if state.admits(T, now):
            state.started(T, key, now)
            if what == "fail":
                state.failed(T, key, "gone", now)
            elif what == "end":
                state.ended(T, key, now)
            elif what == "withdraw":
                state.withdrawn(T, key)
    end = now + FailureCaps().circuit_pause_max_ms + PROBE_RUN_MS + 30_000
    while now < end:
        now += 100
        state.on_tick(now)
        if state.admits(T, now):
            return
    raise AssertionError("it stayed open for ever")
