"""Learned decomposition on real processes: one family of tasks that must be split, one that must not.

A song about several places is one piece of writing to the rules, but here one step is not up to it and a step for each
place is. A list of things is split by the rules, but here the steps come to nothing and one step does it. Both are
tasks of one type, so that the policy has to tell them apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from protocol.messages.memory import MemoryRequest, Stats
from protocol.messages.plan import RoutingDecision
from protocol.messages.result import TaskState, TaskView
from tests.system.scripted_stack import ScriptedStack, scripted_stack

RULED_TASKS = 12
"""Enough to judge by, see `width_report.py`."""
TASKS = 70
LAST = 20
PLACES = ("Kiel", "Lima", "Oslo", "Rome", "Bonn", "Graz")
RIGHT = {"song": "doc.fan-join", "list": "doc.single"}
RULED = {"song": "doc.single", "list": "doc.fan-join"}


@pytest.fixture(scope="module")
def stack() -> Iterator[ScriptedStack]:
    with scripted_stack(worker_slots=4) as scripted:
        scripted.say(
            {"match": "Do only this part:\n- the ", "answers": [""]},
            {"match": "Do only this part:", "answers": [f"a verse, number {n}" for n in range(1_000)]},
            {"match": "Join the inputs", "answers": ["all of it together"]},
            {"match": "Write a song", "answers": [""]},
            {"match": "Describe the following", "answers": ["all three described"]},
        )
        yield scripted


def run(stack: ScriptedStack, number: int) -> tuple[str, TaskView]:
    """Alternately one of each family."""
    a, b, c = (PLACES[(number + step) % len(PLACES)] for step in (0, 1, 2))
    kind = "song" if number % 2 == 0 else "list"
    objective = f"Write a song about {a}, {b} and {c}"
    if kind == "list":
        objective = f"Describe the following:\n1. the harbour of {a}\n2. the station of {b}\n3. the market of {c}"
    return kind, stack.stack.client.run({"task_type": "doc", "objective": objective}, timeout_s=300)


def decision_of(view: TaskView) -> RoutingDecision | None:
    assert view.plan is not None
    return next((item for item in view.plan.decisions if item.subject == "decomposition"), None)


def shape_of(view: TaskView) -> str:
    """By the steps that ran: where the machine is too busy to record a decision in time, a task goes on without."""
    return "doc.single" if len(view.steps) == 1 else "doc.fan-join"


def recorded(kind: str, views: list[tuple[str, TaskView]]) -> int:
    return sum(own == kind and view.plan is not None and bool(view.plan.decisions) for own, view in views)


def tierline(stack: ScriptedStack, *words: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(stack.tierline(*words, "--json"))
    return document


def test_width_follows_outcomes_and_is_the_rules_without_learning(stack: ScriptedStack) -> None:
    stack.switch_learning(on=False)
    ruled = [run(stack, number) for number in range(RULED_TASKS)]
    assert [shape_of(view) for _, view in ruled] == [RULED[kind] for kind, _ in ruled]
    assert all(view.state is TaskState.FAILED for _, view in ruled)

    stack.switch_learning(on=True)
    seen = [run(stack, number) for number in range(TASKS)]
    right = [shape_of(view) == RIGHT[kind] for kind, view in seen]
    assert sum(right[-LAST:]) / LAST > 0.8, [(kind, shape_of(view)) for kind, view in seen]
    for kind, view in seen:
        assert (view.state is TaskState.SUCCEEDED) == (shape_of(view) == RIGHT[kind])

    # What was decided, what it was decided from, and what was credited
    split = next(
        view
        for kind, view in reversed(seen)
        if kind == "song" and shape_of(view) == "doc.fan-join" and decision_of(view) is not None
    )
    explained = tierline(stack, "explain", split.task_id)
    (decision,) = (item for item in explained["plan"]["decisions"] if item["subject"] == "decomposition")
    assert (decision["choice"], decision["alternatives"]) == ("doc.fan-join/3", ["doc.single/1"])
    assert decision["features"]["width"] == decision["features"]["widest"] == 3
    assert decision["features"]["rules_width"] == 1
    assert 0 < decision["propensity"] <= 1
    advice = decision["advice"]
    assert (advice["rules_choice"], advice["learned_choice"]) == ("doc.single", "doc.fan-join")
    assert {arm["choice"]: arm["width"] for arm in advice["arms"]} == {"doc.single": 1, "doc.fan-join": 3}
    assert all(arm["staged"] > 0 for arm in advice["arms"]), "the terms are annealed over more tasks than these"
    assert "split into 3 independent parts" in explained["plan"]["reason"]
    (credited,) = (item["outcome"] for item in explained["memory"] if item["decision"]["subject"] == "decomposition")
    assert credited["reward"] == 1
    assert credited["spread"] == {"width": 3, "assigned": 3, "finished": 3, "useful": 3}
    staged = credited["staged"]
    assert staged["shaped"] == pytest.approx(1 + staged["weight"] * (staged["parallel"] + staged["finish"]))
    assert 0 < staged["weight"] < 0.1
    shown = stack.tierline("explain", split.task_id)
    assert "shaped" in shown
    assert "3 of 3 finished" in shown.replace("\n", " ")

    # Each task was credited once, also those of before
    stats = tierline(stack, "memory", "stats")
    credited_of = {kind: recorded(kind, [*ruled, *seen]) for kind in RIGHT}
    assert stats["width"]["stage"] == max(credited_of.values()), "each kind has its own"
    assert 0 < stats["width"]["quality"] < 1
    assert stats["width"]["tasks"] == sum(credited_of.values()) > TASKS / 2
    assert stats["width"]["split_in_vain"] > 0, "lists were split, and it came to nothing"
    assert stats["width"]["serial_though_width_pays"] > 0, "songs were written in one step, which fails"
    assert "spurious_parallelism" in stack.tierline("memory", "stats")

    # The stage outlives its process
    stack.stack.kill("memory")
    stack.stack.start("memory")
    stack.stack.wait_ready(["memory"])
    assert tierline(stack, "memory", "stats")["width"] == stats["width"]

    stack.switch_learning(on=False)
    again = [run(stack, number) for number in range(4)]
    assert [shape_of(view) for _, view in again] == [RULED[kind] for kind, _ in again]
    assert stack.stack.client.memory(MemoryRequest(ask=Stats())).width is not None
