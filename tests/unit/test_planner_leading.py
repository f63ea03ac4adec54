"""The plan of `run --swarm`: how many turns the leading model gets."""

from __future__ import annotations

import pytest

from protocol.messages.artefact import Artefact
from protocol.messages.task import TaskIR
from services.planner.leading import led


@pytest.mark.parametrize(
    ("words", "inputs", "turns"), [(3, 0, 4), (24, 0, 4), (25, 0, 5), (3, 6, 10), (60, 2, 8), (3, 100, 32)]
)
def test_the_leading_model_gets_four_turns_and_more_for_inputs_and_a_long_objective(
    words: int, inputs: int, turns: int
) -> None:
    given = [Artefact(name=f"a{number}.md", value="x") for number in range(inputs)]
    plan = led(TaskIR(objective=" ".join(["word"] * words), inputs=given), ["worker", "architect"]).plan
    assert plan is not None
    assert plan.steps[0].spawns is not None
    assert plan.steps[0].spawns.max_turns == turns
