"""What a planning model may make of a persona: hostile words at worst cost the persona, never the plan."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.persona import NO_PERSONA, Persona
from services.kit.plan_check import plan_problems
from services.kit.registry import with_own
from services.planner.modelmade import ModelPlan, read_plan
from tests.unit.planner_tasks import SHIPPED, task

DOC = task("Compare the two reports", "doc", "a.md", "b.md")
MANNER = "Attend to dates and to who said it."


def planned(*personas: Any) -> ModelPlan:
    steps: list[dict[str, Any]] = [
        {"role": "worker", "action": "List the claims of the first", "reads": ["a.md"]},
        {"role": "worker", "action": "List the claims of the second", "reads": ["b.md"]},
        {"role": "writer", "action": "Compare both lists", "reads": ["step1", "step2"]},
    ]
    for step, persona in zip(steps, personas, strict=False):
        step |= {} if persona is None else {"persona": persona}
    return read_plan(json.dumps({"steps": steps}), "stop", DOC, SHIPPED.roles, SHIPPED.personas)


def test_a_step_gets_the_persona_that_was_made_for_it_and_two_steps_may_share_one() -> None:
    wish = {"name": "The Historian!", "manner": MANNER}
    made = planned(wish, None, wish)
    (persona,) = made.personas
    assert (persona.name, persona.prompt, persona.roles) == ("the-historian", MANNER, ["worker", "writer"])
    assert persona.description == "Made with a plan for work like: Compare the two reports"
    assert [step.persona for step in made.plan.steps] == ["the-historian", None, "the-historian"]
    assert made.repairs == ()
    assert plan_problems(DOC.model_copy(update={"plan": made.plan}), with_own(SHIPPED, made.personas)) == []


def test_a_name_that_is_taken_is_changed_and_a_plan_makes_two_at_most() -> None:
    made = planned(*({"name": name, "manner": f"{MANNER} {name}"} for name in ("skeptic", "one", "two")))
    assert [one.name.partition("-")[0] for one in made.personas] == ["skeptic", "one"]
    assert made.personas[0].name != "skeptic"
    assert made.plan.steps[2].persona is None
    assert made.repairs == ("the persona of S3 was left out: a plan makes at most 2",)


@pytest.mark.parametrize(
    "wish",
    [
        "pirate",
        {"name": "x"},
        {"name": "x", "manner": "be good"},
        {"name": "!!", "manner": MANNER},
        {"name": NO_PERSONA, "manner": MANNER},
        {"name": "x", "manner": f"{MANNER}\u202e"},
        {"name": "x", "manner": f"{MANNER} " * 120},
        [1],
    ],
)
def test_what_is_no_persona_is_left_out_and_the_plan_stays(wish: Any) -> None:
    made = planned(wish)
    assert made.personas == ()
    assert len(made.plan.steps) == 3
    assert made.repairs[0].startswith("the persona of S1 was left out: ")
    assert len(made.repairs[0]) < 300


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.text() | st.integers(),
            lambda inner: st.dictionaries(st.sampled_from(["name", "manner", "x"]), inner | st.just(MANNER)),
            max_leaves=4,
        ),
        max_size=3,
    )
)
def test_whatever_a_model_writes_there_is_a_plan_and_every_persona_is_one(personas: list[Any]) -> None:
    made = planned(*personas)
    assert len(made.personas) <= 2
    assert all(Persona.model_validate(one.model_dump()) == one for one in made.personas)
    named = {step.persona for step in made.plan.steps} - {None}
    assert named == {one.name for one in made.personas}
