"""Serial collapse and spurious parallelism as numbers: each is driven to where it must be, and to nothing."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.memory import Spread
from services.memory.width_report import LAST, Decided, report

SERIAL = Decided(
    task_type="doc",
    cluster="map-join/8/1024",
    reward=1.0,
    shaped=1.1,
    seconds=8.0,
    spread=Spread(width=1, assigned=0, finished=0, useful=0),
    rules_width=8.0,
    widest=8.0,
)
SPLIT = replace(SERIAL, seconds=2.0, spread=Spread(width=8, assigned=8, finished=8, useful=8))


def test_always_serial_although_the_rules_would_split_is_a_collapse() -> None:
    told = report([SERIAL] * 40, 40, 0.09)
    assert (told.width_pays, told.serial_though_width_pays, told.serial_collapse) == (40, 40, 1.0)
    assert (told.serial, told.split, told.stage, told.weight) == (40, 0, 40, 0.09)


def test_serial_is_no_collapse_where_the_rules_would_not_split_or_nothing_can_be_split() -> None:
    assert report([replace(SERIAL, rules_width=1.0)] * 40, 0, 0).serial_collapse == 0
    assert report([replace(SERIAL, widest=1.0)] * 40, 0, 0).serial_collapse == 0


def test_outcomes_outweigh_the_rules() -> None:
    failed = [replace(SPLIT, reward=0.0)] * 20
    told = report([*failed, *[SERIAL] * 60], 0, 0)
    assert told.serial_collapse == 0, "splitting fails here, so serial is right"
    assert (told.split_in_vain, told.spurious_parallelism) == (20, 1.0)
    told = report([*[SPLIT] * 20, *[replace(SERIAL, reward=0.0, rules_width=1.0)] * 60], 0, 0)
    assert (told.serial_collapse, told.spurious_parallelism) == (60 / 80, 0.0)


def test_of_equally_good_ones_the_faster_side_pays() -> None:
    assert report([*[SPLIT] * 10, *[SERIAL] * 30], 0, 0).serial_collapse == 0.75
    slow = replace(SPLIT, seconds=8.0)
    told = report([*[slow] * 10, *[SERIAL] * 30], 0, 0)
    assert (told.serial_collapse, told.spurious_parallelism) == (0.0, 1.0)


def test_splits_with_fewer_than_two_results_of_their_own_are_spurious() -> None:
    idle = replace(SPLIT, spread=Spread(width=8, assigned=8, finished=8, useful=1))
    told = report([idle] * 3 + [SPLIT] * 7, 0, 0)
    assert (told.split_in_vain, told.spurious_parallelism) == (3, 0.3)


def test_kinds_are_judged_apart() -> None:
    other = "research-write/2/0"
    here = [*[SPLIT] * 10, *[SERIAL] * 10]
    there = [replace(one, cluster=other, reward=float(not one.split)) for one in here]
    told = report([*here, *there], 0, 0)
    assert (told.width_pays, told.serial_though_width_pays, told.split_in_vain) == (20, 10, 10)


def test_an_empty_memory_reports_nothing() -> None:
    told = report([], 0, 0.1)
    assert (told.tasks, told.serial_collapse, told.spurious_parallelism, told.quality) == (0, 0, 0, 0)


@given(
    st.lists(st.sampled_from([SERIAL, SPLIT, replace(SERIAL, reward=0.0), replace(SPLIT, reward=0.0)]), max_size=300)
)
def test_the_numbers_fit_each_other(decided: list[Decided]) -> None:
    told = report(decided, 0, 0)
    assert told.tasks == min(len(decided), LAST) == told.split + told.serial
    assert told.serial_though_width_pays <= min(told.serial, told.width_pays)
    assert told.split_in_vain <= told.split
