"""Gates as steps and tasks meet them: real hub, gates and wrappers as processes, around scripted model servers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from protocol.errors import CallFailed
from protocol.messages.failure import Category
from protocol.messages.gate import Verdict
from protocol.messages.result import TaskState
from tests.system.scripted_stack import ScriptedStack, scripted_stack
from tests.waiting import until

NOTES = "# Notes\n\nThe harbour is open.\n"


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedStack]:
    # Each model decodes with all cores of the machine: a judge could not be asked beside a gate that held one.
    with scripted_stack(threads=os.cpu_count() or 1) as running:
        yield running


def step(action: str, *gates: str, **fields: Any) -> dict[str, Any]:
    output = {"name": "notes.md", "kind": "text", "content_type": "text/markdown"}
    return {"id": "S1", "action": action, "outputs": [output], "gates": list(gates)} | fields


def verdict(*met: bool) -> str:
    return json.dumps({str(n): {"reason": f"line {n} says so", "met": one} for n, one in enumerate(met, 1)})


def test_a_judge_says_of_each_criterion_whether_it_is_met_and_why(scripted: ScriptedStack) -> None:
    scripted.say(
        {"match": "Judge the result", "answers": [verdict(True, False), verdict(True, True)]},
        {"match": "quince", "answers": [NOTES, f"{NOTES}\nIt is free.\n"]},
    )
    criteria = ["names the harbour", "says what it costs"]
    # integration needs a core: while the judge is asked, the gate run holds it
    gates = ("integration", "definition_of_done")
    asked = step("quince: write notes", *gates, check_command=["{python}", "-c", "print(1)"])
    view = scripted.run(asked, definition_of_done=criteria)
    assert view.state is TaskState.SUCCEEDED, view.failure
    first, second = view.steps[0].attempts
    assert first.failure is not None
    assert first.failure.category is Category.LOGIC
    assert [finding.rule for finding in first.failure.findings] == ["criterion-2"]
    assert first.gates[1].message == "1. met: line 1 says so\n2. NOT met: line 2 says so"
    assert [gate.verdict for gate in second.gates] == [Verdict.PASS, Verdict.PASS]
    assert second.gates[1].message.startswith("1. met: ")
    (question, *_) = scripted.prompts_with("Judge the result")
    assert "The harbour is open." in question
    assert "says what it costs" in scripted.prompts_with("quince")[-1], "the next attempt sees what was not met"


def test_a_judge_that_answers_nonsense_has_not_judged(scripted: ScriptedStack) -> None:
    scripted.say({"match": "Judge the result", "answers": ["fine!"]}, {"match": "medlar", "answers": [NOTES]})
    final = {"gates": ["definition_of_done"], "definition_of_done": ["is short"]}
    view = scripted.run(step("medlar: write notes"), **final)
    assert view.state is TaskState.FAILED
    assert view.gates[0].verdict is Verdict.ERROR
    assert view.gates[0].message.startswith("judge.")


def test_a_tasks_own_command_judges_its_results(scripted: ScriptedStack) -> None:
    scripted.say({"match": "damson", "answers": ["short\n", "long enough by now\n"]})
    command = ["{python}", "-c", "import sys; sys.exit(len(open('notes.md').read()) < 10)"]
    view = scripted.run(step("damson: write notes", "integration"), check_command=command)
    assert view.state is TaskState.SUCCEEDED, view.failure
    first, second = view.steps[0].attempts
    assert (first.gates[0].verdict, first.gates[0].category) == (Verdict.FAIL, Category.CODE)
    assert second.gates[0].verdict is Verdict.PASS


def test_an_advisory_gate_fails_nothing_and_its_findings_are_kept(scripted: ScriptedStack) -> None:
    scripted.say({"match": "sloe", "answers": ["# A\n### B\n"]})
    view = scripted.run(step("sloe: write notes", "markdown"))
    assert view.state is TaskState.SUCCEEDED
    (result,) = view.steps[0].attempts[0].gates
    assert (result.verdict, result.required) == (Verdict.FAIL, False)
    assert {finding.rule for finding in result.findings} == {"MD001", "MD022"}


def test_a_gate_that_needs_a_command_is_refused_on_submit_without_one(scripted: ScriptedStack) -> None:
    with pytest.raises(CallFailed) as refused:
        scripted.run(step("rowan: write notes", "integration"))
    assert "plan.steps[S1].check_command" in str(refused.value)


def test_the_same_artefact_is_not_checked_twice(scripted: ScriptedStack) -> None:
    scripted.say({"match": "hawthorn", "answers": ["# Thorns\n"]})
    first, second = (scripted.run(step("hawthorn: write notes", "markdown")) for _ in range(2))
    cached = [view.steps[0].attempts[0].gates[0].cached for view in (first, second)]
    assert cached == [False, True]
    until(lambda: hits(scripted) >= 1, "the service tells of it with a pong")


def hits(scripted: ScriptedStack) -> int:
    (gates,) = [peer for peer in scripted.stack.client.status().peers if peer.service == "gates"]
    return int(gates.metrics["cache_hits"])
