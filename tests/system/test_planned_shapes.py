"""What the planner plans by rule runs: real processes around model servers that answer what a test says."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from protocol.messages.result import TaskState
from tests.system.scripted_stack import ScriptedStack, scripted_stack


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedStack]:
    with scripted_stack() as running:
        running.switch_learning(on=False)
        yield running


def test_a_text_longer_than_the_context_is_read_in_pieces_and_the_answer_can_cite_them(scripted: ScriptedStack) -> None:
    text = "".join(f"Sentence {number} is about quince number {number}. " for number in range(400))
    scripted.say(
        {"match": "The first quince.", "answers": ["Quinces, see characters 1-9."]},
        {"match": "[report.md, characters 1-", "answers": ["[report.md, characters 1-9] The first quince."]},
        {"match": "in this piece", "answers": ["[report.md, characters 10-20] Another quince."]},
    )
    task = {
        "objective": "Say what the report tells about quinces",
        "task_type": "doc",
        "inputs": [{"name": "report.md", "value": text}],
    }
    view = scripted.stack.client.run(task, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, view.failure
    mapped = [step.id for step in view.steps if step.id.startswith("D1.")]
    assert len(mapped) > 2
    assert view.plan is not None
    assert f"read in {len(mapped)} pieces" in view.plan.reason
    assert [artefact.value for artefact in view.artefacts] == ["Quinces, see characters 1-9."]
    prompts = scripted.prompts_with("in this piece")
    assert len(prompts) == len(mapped)
    for number in (0, 199, 399):
        assert any(f"quince number {number}." in prompt for prompt in prompts), "no part of the text is left out"


def test_an_outline_grows_into_a_step_per_point_and_a_whole(scripted: ScriptedStack) -> None:
    scripted.say(
        {"match": "List the points", "answers": [json.dumps(["sand it", "prime it", "paint it"])]},
        {"match": "only the point", "answers": ["A point about the medlar boat."]},
        {"match": "A point about", "answers": ["The whole guide."]},
    )
    view = scripted.stack.client.run({"objective": "How to paint a medlar boat?", "task_type": "doc"}, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [step.id for step in view.steps] == ["S1", "S2", "S3", "S2.1", "S2.2", "S2.3"]
    assert [artefact.value for artefact in view.artefacts] == ["The whole guide."]


def test_things_are_looked_up_side_by_side_and_the_join_reads_all_of_them(scripted: ScriptedStack) -> None:
    scripted.say(
        {"match": "compute from them, step by step", "answers": ["Loquat Tower."]},
        {"match": "about: Loquat Tower", "answers": ["Loquat Tower: 300 m"]},
        {"match": "about: Persimmon Hall", "answers": ["Persimmon Hall: 96 m"]},
    )
    view = scripted.stack.client.run({"objective": "Which is taller, Loquat Tower or Persimmon Hall?"}, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.artefacts[0].value == "Loquat Tower."
    joins = scripted.prompts_with("compute from them, step by step")
    assert "300 m" in joins[0]
    assert "96 m" in joins[0]
