"""What durations say at the least, while little is known of a role."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.durations import Job, LearnedDurations

JOB = Job("worker", "doc", 1_000, 4_096)
OTHER = Job("writer", "doc", 1_000, 4_096)


def test_of_a_role_that_nobody_has_seen_nothing_is_sure() -> None:
    known = LearnedDurations()
    known.observe(OTHER, 5.0)
    assert known.expected_s(JOB) > 100, "a step may write so much"
    assert known.surely_s(JOB) == 0


def test_a_step_that_runs_says_something_and_several_say_more() -> None:
    known = LearnedDurations()
    sure = [known.surely_s(JOB, running_s=10.0)]
    for _ in range(3):
        known.observe(JOB, 10.0)
        sure.append(known.surely_s(JOB))
    assert sure[0] == sure[1]
    assert 1 < sure[1] < sure[2] < sure[3] < 10
    assert known.surely_s(JOB, running_s=5.0) == sure[3], "one that has run less than usual says nothing new"
    assert known.surely_s(JOB, running_s=30.0) > sure[3]
    known.observe(JOB, 10.0)
    assert math.isclose(known.surely_s(JOB), 10.0)
    assert known.expected_s(JOB) > 10.0, "the prior still counts in what is expected"


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=3), st.floats(0.01, 1_000), st.floats(0, 1))
def test_few_observations_within_a_factor_of_e_never_promise_more_than_a_step_takes(
    noise: list[float], typical_s: float, running: float
) -> None:
    known = LearnedDurations()
    for one in noise:
        known.observe(JOB, typical_s * math.exp(one))
    running_s = running * typical_s if len(noise) < 3 else 0.0
    assert known.surely_s(JOB, running_s) <= typical_s * 1.000_001
