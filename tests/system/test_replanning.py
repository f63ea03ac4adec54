"""New versions of a plan on real processes, one test per trigger: what is done stays, and kill -9 changes nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import CallError
from protocol.messages.failure import Category
from protocol.messages.plan import PlanVersion
from protocol.messages.result import StepState, TaskState, TaskView
from tests.system.scripted_stack import ScriptedStack, scripted_stack
from tests.waiting import until

GATES = """
  agreed:
    description: The text says that it is agreed.
    kinds: [text]
    category: LOGIC
    argv: [grep, -q, agreed, "{artefact}"]
    cores: 0
    timeout_s: 10
"""
MAY = {"escalation": {"max_level": 0, "max_replans": 2}}


def prepare(registry: Path) -> None:
    gates = registry / "gates.yaml"
    gates.write_text(gates.read_text("utf-8").replace("gates:\n", f"gates:{GATES}\n", 1), "utf-8")


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedStack]:
    with scripted_stack(prepare=prepare) as running:
        running.switch_learning(on=False)
        yield running


def step(name: str, action: str, *inputs: str, **fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"id": name, "actor": "worker", "action": action, "outputs": [{"name": f"{name}.out"}]}
    return made | {"inputs": list(inputs), "gates": []} | fields


def submit(scripted: ScriptedStack, *steps: dict[str, Any], **fields: Any) -> str:
    task = {"objective": "test the making of new plans", "plan": {"steps": list(steps)}} | MAY | fields
    return scripted.stack.client.submit(task).task_id


def versions(view: TaskView) -> list[PlanVersion]:
    assert view.plan is not None
    return view.plan.versions or []


def done(view: TaskView) -> set[str]:
    return {one.id for one in view.steps if one.state is StepState.DONE}


def three(word: str) -> list[dict[str, Any]]:
    """A step, one that gates find wrong in itself, and one that reads its result."""
    return [
        step("A", f"{word} first"),
        step("B", f"{word} second", "A.out", gates=["agreed"]),
        step("C", f"{word} third", "B.out"),
    ]


def three_answers(word: str) -> list[dict[str, Any]]:
    return [
        {"match": f"Do not do it.\nThe step: {word} second", "answers": ["Say that it is all right."]},
        {"match": f"Follow the approach that is given.\n{word} second", "answers": ["now it is agreed"]},
        {"match": f"Your step: {word} first", "answers": ["begun"]},
        {"match": f"Your step: {word} second", "answers": ["refused"]},
        {"match": f"Your step: {word} third", "answers": ["the end"]},
    ]


def test_a_step_that_is_wrong_in_itself_has_the_rest_planned_anew(scripted: ScriptedStack) -> None:
    scripted.say(*three_answers("damson"))
    task = submit(scripted, *three("damson"))
    view = scripted.stack.client.result(task, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert done(view) == {"A", "C", "V2S1", "V2S2"}
    assert view.artefacts[0].value == "the end"
    first, second = versions(view)
    assert (second.trigger, second.kept, second.dropped, second.added) == (
        "failed",
        ["A", "C"],
        ["B"],
        ["V2S1", "V2S2"],
    )
    assert first.adopted_ms is not None
    assert "replans_per_task" in second.rule or "LOGIC" in second.rule
    failed = next(one for one in view.steps if one.id == "B")
    assert failed.failure is not None
    assert failed.failure.category is Category.LOGIC
    assert len(scripted.prompts_with("Your step: damson first")) == 1, "what is done is not done again"
    assert "gate agreed failed" in scripted.prompts_with("The step: damson second")[0], "who thinks about it sees why"
    for command in ("show", "explain"):
        printed = scripted.tierline(command, task)
        for words in ("version 2, failed, in force", "kept: A, C", "dropped: B", "added: V2S1, V2S2"):
            assert words in printed, f"{command} does not say {words!r}"
    watched = scripted.tierline("watch", task)
    assert "task.replanning" in watched
    assert "task.replanned version=2 trigger=failed" in watched
    events = [line for line in watched.splitlines() if "task.replan" in line]
    assert any("dropped=B" in line for line in events)


def test_a_result_that_is_no_list_is_made_into_one_on_the_way(scripted: ScriptedStack) -> None:
    scripted.say(
        {"match": "Make a JSON list of the parts", "answers": [json.dumps(["red", "green"])]},
        {"match": "Your step: quandong list", "answers": ['{"red": 1}']},
        {"match": "Your step: quandong each", "answers": ["one part"]},
        {"match": "Your step: quandong whole", "answers": ["the whole"]},
    )
    task = submit(
        scripted,
        step("L", "quandong list", outputs=[{"name": "items", "kind": "json"}]),
        step("M", "quandong each", map_over="items", outputs=[{"name": "parts"}]),
        step("J", "quandong whole", "parts"),
    )
    view = scripted.stack.client.result(task, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [one.trigger for one in versions(view)] == ["planned", "contradicted"]
    assert done(view) == {"L", "J", "V2S1", "V2S2", "V2S2.1", "V2S2.2"}


def test_a_workers_word_that_the_plan_is_wrong_turns_the_rest_over(scripted: ScriptedStack) -> None:
    scripted.say(
        {"match": "The plan turned out to be wrong", "answers": ["what can be said"]},
        {"match": "Your step: rambutan first", "answers": ["there is no harbour"]},
        {"match": "Your step: rambutan second", "answers": ["CONTRADICTION: no harbour, so no fee"]},
    )
    task = submit(scripted, *[one | {"gates": []} for one in three("rambutan")])
    view = scripted.stack.client.result(task, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [one.trigger for one in versions(view)] == ["planned", "contradicted"]
    assert "no harbour, so no fee" in versions(view)[1].reason
    assert versions(view)[1].dropped == ["B", "C"]
    assert [one.value for one in view.artefacts] == ["what can be said"]
    assert "answer with CONTRADICTION:" in scripted.prompts_with("Your step: rambutan second")[0]
    assert "answer with CONTRADICTION:" not in scripted.prompts_with("Your step: rambutan first")[0]


def test_a_deadline_that_would_be_missed_has_the_rest_made_shorter(scripted: ScriptedStack) -> None:
    """A minute of work and twenty seconds for it, by a role whose steps have always taken so long."""
    scripted.say(
        {"match": "Time is short.", "answers": ["in time"]},
        {"match": "Your step: persimmon", "answers": [{"text": "slowly", "delay_s": 1.0}]},
    )
    own = {"actor": "writer"}
    chain = [step("S1", "persimmon 1", **own)]
    chain += [step(f"S{number}", f"persimmon {number}", f"S{number - 1}.out", **own) for number in range(2, 61)]
    beside = [step(f"T{number}", f"persimmon {number}", **own) for number in range(12)]
    scripted.stack.client.result(submit(scripted, *beside), timeout_s=300)  # what such a step takes is learned first
    task = submit(scripted, *chain, deadline_s=20)
    view = scripted.stack.client.result(task, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, (view.failure, versions(view))
    second = versions(view)[1]
    assert second.trigger == "late"
    assert "S60" in second.dropped
    assert second.added == ["V2S1"]
    assert [(one.name, one.value) for one in view.artefacts] == [("S60.out", "in time")]


def test_kill_9_of_hub_and_planner_in_the_middle_of_it_converges(scripted: ScriptedStack) -> None:
    stack = scripted.stack
    first, *others = three_answers("salak")
    slow = {"match": "Your step: salak first", "answers": [{"text": "begun", "hold": scripted.held("salak")}]}
    scripted.say(first, slow, *others, persist=True)
    task = submit(scripted, *three("salak"))
    until(lambda: stack.client.show(task).plan is not None, "there is a first plan")
    stack.kill("planner", signal.SIGSTOP)  # it is asked for the new version and never says a word
    scripted.release("salak")
    until(lambda: bool(versions(stack.client.show(task))), "a new version is asked for")
    assert versions(stack.client.show(task))[-1].adopted_ms is None, "it is in the making"
    for _ in range(2):
        stack.restart("scheduler")
        stack.restart("planner")
        time.sleep(0.3)

    def over() -> bool:
        try:
            return stack.client.show(task).state.final
        except CallError:
            return False

    until(over, "the task has ended")
    view = stack.client.show(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert done(view) == {"A", "C", "V2S1", "V2S2"}
    assert [one.trigger for one in versions(view)] == ["planned", "failed"]
    assert len(scripted.prompts_with("Your step: salak first")) == 1
    assert scripted.tierline("replay", "--check"), "exit status 1 would say that the journal contradicts itself"
