"""The circuit breaker in virtual time: it opens, is quiet, probes once, closes, and always comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.kit.breaker import (
    PROBE_LIMIT_MS,
    Breaker,
    BreakerPolicy,
    BreakerState,
    Failed,
    Probe,
    ProbeEnded,
    Report,
    Started,
    Succeeded,
    Ticked,
)

POLICY = BreakerPolicy(failures=3, window_ms=10_000, pause_ms=2_000, pause_max_ms=9_000)


def closed() -> Breaker:
    breaker = Breaker(POLICY)
    assert breaker.handle(Started(0)) == [Probe(1)]
    assert not breaker.admits, "nothing is sent before the first probe is answered"
    assert breaker.handle(ProbeEnded(10, 1, None)) == [Report(BreakerState.CLOSED, None)]
    return breaker


def opened(at_ms: int = 1_000) -> Breaker:
    breaker = closed()
    for number in range(POLICY.failures):
        breaker.handle(Failed(at_ms + number, "refused"))
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_it_opens_after_so_many_failures_within_the_window_and_says_when_it_will_probe() -> None:
    breaker = closed()
    assert breaker.handle(Failed(1_000, "refused")) == []
    assert breaker.handle(Failed(2_000, "refused")) == []
    (report,) = breaker.handle(Failed(3_000, "HTTP 500"))
    assert isinstance(report, Report)
    assert report.state is BreakerState.OPEN
    assert report.reason == "circuit open: 3 failures within 10 s, the last: HTTP 500; next probe in 2 s"
    assert not breaker.admits
    assert breaker.probe_at_ms == 5_000


def test_failures_that_are_older_than_the_window_or_healed_do_not_count() -> None:
    breaker = closed()
    breaker.handle(Failed(1_000, "x"))
    breaker.handle(Failed(2_000, "x"))
    assert breaker.handle(Failed(12_000, "x")) == []
    breaker.handle(Succeeded(12_100))
    assert breaker.handle(Failed(12_200, "x")) == []
    assert breaker.handle(Failed(12_300, "x")) == []
    assert breaker.admits


def test_what_a_further_try_cannot_cure_opens_it_at_once() -> None:
    (report,) = closed().handle(Failed(1_000, "the key is refused", at_once=True))
    assert isinstance(report, Report)
    assert "the key is refused" in (report.reason or "")


def test_half_open_is_a_single_probe_and_a_good_one_closes() -> None:
    breaker = opened()
    assert breaker.handle(Ticked(3_001)) == []
    assert breaker.handle(Ticked(3_002)) == [Probe(2)]
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.handle(Ticked(3_100)) == [], "one probe at a time"
    assert not breaker.admits
    assert breaker.handle(ProbeEnded(3_200, 1, None)) == [], "an old probe says nothing"
    assert breaker.handle(ProbeEnded(3_300, 2, None)) == [Report(BreakerState.CLOSED, None)]
    assert breaker.admits


def test_probes_in_vain_come_less_often_up_to_the_bound() -> None:
    breaker = opened(1_000)
    pauses = []
    for _ in range(5):
        due = breaker.probe_at_ms
        (probe,) = breaker.handle(Ticked(due))
        assert isinstance(probe, Probe)
        breaker.handle(ProbeEnded(due, probe.number, "still refused"))
        pauses.append(breaker.probe_at_ms - due)
    assert pauses == [4_000, 8_000, 9_000, 9_000, 9_000]


def test_a_backend_that_answers_the_probe_and_fails_the_work_opens_it_with_its_first_failure() -> None:
    breaker = opened(1_000)
    breaker.handle(Ticked(3_002))
    breaker.handle(ProbeEnded(3_100, 2, None))
    (report,) = breaker.handle(Failed(3_200, "HTTP 500"))
    assert isinstance(report, Report)
    assert "answered the probe and failed again" in (report.reason or "")
    assert breaker.probe_at_ms - 3_200 == 4_000
    breaker.handle(Ticked(7_200))
    breaker.handle(ProbeEnded(7_300, 3, None))
    breaker.handle(Succeeded(7_400))
    assert breaker.handle(Failed(7_500, "x")) == [], "real work has succeeded: it is trusted again"


def test_a_probe_that_never_ends_counts_as_failed() -> None:
    breaker = opened(1_000)
    breaker.handle(Ticked(3_002))
    assert breaker.handle(Ticked(3_002 + PROBE_LIMIT_MS - 1)) == []
    (report,) = breaker.handle(Ticked(3_002 + PROBE_LIMIT_MS))
    assert isinstance(report, Report)
    assert report.state is BreakerState.OPEN


def test_late_news_of_calls_from_before_the_opening_changes_nothing() -> None:
    breaker = opened(1_000)
    assert breaker.handle(Succeeded(1_500)) == []
    assert breaker.handle(Failed(1_600, "x")) == []
    assert breaker.state is BreakerState.OPEN
    assert breaker.probe_at_ms == 3_002


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 4_000),
        st.sampled_from(["ok", "bad", "bad", "fatal", "probe ok", "probe bad", "stale probe", "tick", "tick"]),
    ),
    max_size=120,
)


@given(EVENTS)
def test_whatever_happens_one_probe_at_a_time_and_never_longer_apart_than_the_bound(
    story: list[tuple[int, str]],
) -> None:
    breaker = Breaker(POLICY)
    breaker.handle(Started(0))
    now, out = 0, 1
    for pause, what in story:
        now += pause
        before = breaker.state
        event = {
            "ok": Succeeded(now),
            "bad": Failed(now, "x"),
            "fatal": Failed(now, "x", at_once=True),
            "probe ok": ProbeEnded(now, breaker.probes, None),
            "probe bad": ProbeEnded(now, breaker.probes, "x"),
            "stale probe": ProbeEnded(now, breaker.probes - 1, None),
            "tick": Ticked(now),
        }[what]
        commands = breaker.handle(event)
        probes = [command for command in commands if isinstance(command, Probe)]
        assert len(probes) <= 1
        if probes:
            assert before is BreakerState.OPEN
            assert probes[0].number == out + 1
            out += 1
        if breaker.state is not before and not probes:
            assert [type(command) for command in commands] == [Report]
            assert (commands[0].reason is None) == breaker.admits  # type: ignore[union-attr]
        assert breaker.admits == (breaker.state is BreakerState.CLOSED)
        if breaker.state is BreakerState.OPEN:
            assert what != "tick" or now < breaker.probe_at_ms, "a due probe goes out with the next tick"
            assert breaker.probe_at_ms - now <= POLICY.pause_max_ms
        assert len(breaker._failures) < POLICY.failures
    # From anywhere a backend that is well is found again, in bounded time and without any call.
    now = max(now, breaker.probe_at_ms)
    for _ in range(4):
        now += POLICY.pause_max_ms
        for command in breaker.handle(Ticked(now)):
            if isinstance(command, Probe):
                breaker.handle(ProbeEnded(now, command.number, None))
        if breaker.state is BreakerState.HALF_OPEN:
            breaker.handle(ProbeEnded(now, breaker.probes, None))
    assert breaker.admits
