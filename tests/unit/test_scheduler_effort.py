"""Whether a larger budget pays: off without evidence, on where it saves time, and both sides stay known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.kit.identity import work_key
from services.scheduler.effort import EffortRecord

QUIET = next(key for key in (work_key("k", n) for n in range(99)) if int(key[:8], 16) % 16)
"""The key of a step that does not explore."""
KEYS = [work_key("step", number) for number in range(1_600)]


def known(
    *, plain: float, harder: float, harder_s: float = 4.0, above_s: float = 30.0, count: int = 60
) -> EffortRecord:
    """What came of so many attempts of each kind, with these success rates."""
    record = EffortRecord()
    for arm, rate, seconds in (("plain", plain, 2.0), ("harder", harder, harder_s), ("escalated", 0.8, 30.0)):
        for number in range(count):
            record.observe("worker", "code", arm, solved=number < rate * count, seconds=seconds)
    return record


def test_without_evidence_it_is_off() -> None:
    record = EffortRecord()
    assert record.benefit_s("worker", "code") is None
    assert not record.pays("measured", "worker", "code", QUIET)
    assert known(plain=0.1, harder=0.9, count=7).benefit_s("worker", "code") is None, "seven of each are too few"


def test_the_switch_overrules_what_is_known() -> None:
    good, bad = known(plain=0.1, harder=0.9), known(plain=0.9, harder=0.1)
    assert not good.pays("off", "worker", "code", QUIET)
    assert bad.pays("always", "worker", "code", QUIET)


def test_it_pays_where_the_escalations_it_saves_cost_more_than_it_does() -> None:
    assert known(plain=0.2, harder=0.7).pays("measured", "worker", "code", QUIET)
    assert not known(plain=0.2, harder=0.7, harder_s=20.0).pays("measured", "worker", "code", QUIET), "it is too slow"
    assert not known(plain=0.5, harder=0.5).pays("measured", "worker", "code", QUIET), "it changes nothing"
    assert not known(plain=0.5, harder=0.55, count=20).pays("measured", "worker", "code", QUIET), "that may be chance"
    assert not known(plain=0.2, harder=0.7).pays("measured", "worker", "doc", QUIET), "of other work nothing is known"


def test_one_occasion_in_sixteen_is_decided_the_other_way() -> None:
    for record, usual in ((known(plain=0.2, harder=0.7), True), (EffortRecord(), False)):
        other = [key for key in KEYS if record.pays("measured", "worker", "code", key) is not usual]
        assert 60 <= len(other) <= 140
        assert [key for key in KEYS if record.pays("measured", "worker", "code", key) is not usual] == other


def test_a_model_that_has_changed_is_noticed() -> None:
    record = known(plain=0.2, harder=0.7, count=400)
    for _ in range(400):
        record.observe("worker", "code", "harder", solved=False, seconds=4.0)
    assert not record.pays("measured", "worker", "code", QUIET)


def test_attempts_that_cannot_be_compared_are_not_counted() -> None:
    record = EffortRecord()
    record.observe("worker", "code", None, solved=True, seconds=1.0)
    record.observe("worker", "code", "something else", solved=True, seconds=1.0)
    assert record.state() == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["worker", "coder"]),
            st.sampled_from(["plain", "harder", "escalated"]),
            st.booleans(),
            st.floats(0, 1e6),
        ),
        max_size=60,
    )
)
def test_what_is_kept_is_what_was_known(seen: list[tuple[str, str, bool, float]]) -> None:
    record, again = EffortRecord(), EffortRecord()
    for role, arm, solved, seconds in seen:
        record.observe(role, "code", arm, solved=solved, seconds=seconds)
    again.restore(record.state())
    assert again.state() == record.state()
    assert again.benefit_s("worker", "code") == record.benefit_s("worker", "code")
