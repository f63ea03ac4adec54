"""Ranks: upward rank, estimates that err, and the look ahead on few slots."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.lookahead import EFFORT, Remaining, looked_ahead
from services.scheduler.ranks import shrunk, upward_rank


def layered(seed: int, steps: int = 60) -> tuple[dict[str, float], dict[str, list[str]]]:
    draw = random.Random(seed)
    cost = {f"S{index}": float(draw.randint(1, 10)) for index in range(steps)}
    after: dict[str, list[str]] = {name: [] for name in cost}
    for index in range(steps):
        for other in draw.sample(range(max(0, index - 12), index), min(index, draw.randint(0, 3))):
            after[f"S{other}"].append(f"S{index}")
    return cost, after


def makespan(cost: dict[str, float], after: dict[str, list[str]], rank: dict[str, float], slots: int) -> float:
    """List scheduling written down once more, as plainly as possible."""
    missing = {name: sum(name in others for others in after.values()) for name in cost}
    ready = [name for name, count in missing.items() if count == 0]
    running: list[tuple[float, int, str]] = []
    now, number = 0.0, 0
    while ready or running:
        while ready and len(running) < slots:
            name = max(ready, key=lambda one: rank[one])
            ready.remove(name)
            running.append((now + cost[name], number, name))
            number += 1
        now, _, done = min(running)
        running = [one for one in running if one[2] != done]
        for other in after[done]:
            missing[other] -= 1
            if missing[other] == 0:
                ready.append(other)
    return now


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_look_ahead_is_never_worse_than_upward_rank_and_better_on_the_whole(slots: int) -> None:
    plain_s = ahead_s = 0.0
    for seed in range(25):
        cost, after = layered(seed)
        plain = upward_rank(after, cost)
        ahead = looked_ahead(Remaining(cost, after, dict.fromkeys(cost, "w"), {"w": slots}), plain)
        before, found = makespan(cost, after, plain, slots), makespan(cost, after, ahead, slots)
        assert found <= before
        plain_s, ahead_s = plain_s + before, ahead_s + found
    assert ahead_s < plain_s


def test_without_effort_slots_to_spare_or_edges_the_upward_rank_stays() -> None:
    cost, after = layered(1)
    tier = dict.fromkeys(cost, "w")
    plain = upward_rank(after, cost)
    assert looked_ahead(Remaining(cost, after, tier, {"w": 3}), plain, effort=10) == plain
    assert looked_ahead(Remaining(cost, after, tier, {"w": 100}), plain) == plain
    free = {name: [] for name in cost}
    assert looked_ahead(Remaining(cost, free, tier, {"w": 3}), cost) == cost


def test_the_same_graph_always_gets_the_same_ranks() -> None:
    cost, after = layered(3)
    left = Remaining(cost, after, dict.fromkeys(cost, "w"), {"w": 3})
    assert looked_ahead(left, upward_rank(after, cost)) == looked_ahead(left, upward_rank(after, cost), EFFORT)


@given(st.dictionaries(st.text(max_size=3), st.floats(0.001, 1e6), min_size=1), st.floats(0, 5))
def test_shrinking_keeps_the_order_and_never_widens(cost: dict[str, float], spread: float) -> None:
    made = shrunk(cost, spread)
    names = sorted(cost, key=lambda name: cost[name])
    assert all(made[a] <= made[b] * (1 + 1e-9) for a, b in itertools.pairwise(names))
    assert max(made.values()) <= max(cost.values()) * (1 + 1e-9)
    assert min(made.values()) >= min(cost.values()) * (1 - 1e-9)


def test_exact_estimates_stay_and_hopeless_ones_become_equal() -> None:
    cost = {"a": 1.0, "b": 4.0, "c": 16.0}
    assert shrunk(cost, 0.0) == cost
    assert list(shrunk(cost, 10.0).values()) == pytest.approx([4.0, 4.0, 4.0])
