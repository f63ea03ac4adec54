"""Plans that begin while the model still writes them: real processes around a front door that takes its time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from protocol.messages.result import StepState, TaskState, TaskView
from tests.system.scripted_stack import ScriptedStack, scripted_stack
from tests.waiting import until

HISTORIAN = {"name": "Tide Historian", "manner": "Attend to the year of every claim."}


def plan_of(word: str, persona: dict[str, str] | None = None) -> str:
    """Two readers side by side, the second with this persona, one that needs both, and the whole."""
    steps: list[dict[str, Any]] = [
        {"role": "worker", "action": f"{word} list the claims of the first", "reads": ["a.md"]},
        {"role": "worker", "action": f"{word} list the claims of the second", "reads": ["b.md"]},
        {"role": "worker", "action": f"{word} find what differs between both", "reads": ["step1", "step2"]},
        {"role": "writer", "action": f"{word} write the comparison", "reads": ["step3"]},
    ]
    if persona is not None:
        steps[1]["persona"] = persona
    return json.dumps({"steps": steps})


def long_plan_of(word: str) -> str:
    """The same with further steps behind, so that the third is over before it is whole."""
    steps = json.loads(plan_of(word))["steps"]
    more = [
        {"role": "worker", "action": f"{word} {part} of what differs, one by one and in all detail", "reads": ["step3"]}
        for part in ("name the causes", "name the effects", "name the costs")
    ]
    steps[3:] = [*more, steps[3] | {"reads": ["step4", "step5", "step6"]}]
    return json.dumps({"steps": steps})


def task_about(word: str) -> dict[str, Any]:
    inputs = [{"name": "a.md", "value": f"{word} alpha"}, {"name": "b.md", "value": f"{word} beta"}]
    return {"task_type": "doc", "objective": f"Compare both {word} reports", "inputs": inputs}


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedStack]:
    with scripted_stack() as running:
        running.switch_learning(on=False)
        yield running


def started_ms(view: TaskView, step: str) -> int:
    attempt = next(one for one in view.steps if one.id == step).attempts[0]
    assert attempt.started_ms is not None
    return attempt.started_ms


def planned_ms(scripted: ScriptedStack, task: str) -> int:
    """When the planning call had ended."""
    lines = scripted.tierline("watch", task, "--json").splitlines()
    return next(event["at_ms"] for event in map(json.loads, lines) if event.get("event") == "task.planned")


def offered_early(scripted: ScriptedStack) -> int:
    figures = next(peer.metrics for peer in scripted.stack.client.status().peers if peer.service == "planner")
    return int(figures.get("steps_offered_early", 0))


def test_the_first_steps_run_before_the_planning_call_has_ended(scripted: ScriptedStack) -> None:
    scripted.say(
        {
            "match": f"Objective: {task_about('kumquat')['objective']}",
            "answers": [{"text": plan_of("kumquat", HISTORIAN), "token_s": 0.06}],
        },
        {"match": "kumquat write the comparison", "answers": ["the kumquat comparison"]},
        {"match": "kumquat", "answers": ["claims"]},
    )
    task = scripted.stack.client.submit(task_about("kumquat")).task_id
    seen: list[TaskView] = []

    def over() -> bool:
        seen.append(scripted.stack.client.show(task))
        return seen[-1].state.final

    until(over, "the task has ended", look_every_s=0.02)
    view = seen[-1]
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [step.id for step in view.steps] == ["S1", "S2", "S3", "S4"]
    whole = planned_ms(scripted, task)
    assert started_ms(view, "S1") < whole
    assert started_ms(view, "S2") < whole
    assert started_ms(view, "S4") >= whole, "the last step may still be changed by the whole plan"
    early = [one for one in seen if one.plan is None and any(s.state is StepState.INFERRING for s in one.steps)]
    done = [one for one in seen if one.plan is None and any(s.state is StepState.DONE for s in one.steps)]
    assert early or done, "somebody who looks sees steps at work while the plan is not whole"
    assert view.plan is not None
    assert view.plan.source == "model"
    assert "of its steps began while it was written" in view.plan.reason
    assert next(step for step in view.steps if step.id == "S2").persona == "tide-historian"
    manners = ["Attend to the year" in one for one in scripted.prompts_with("Your step: kumquat list the claims")]
    assert sorted(manners) == [False, True], "who begins early works in the manner that the model wants of this step"
    assert [artefact.value for artefact in view.artefacts] == ["the kumquat comparison"]
    decided = {step for one in view.plan.decisions if one.subject == "role" for step in one.ids}
    assert decided == {"S1", "S2", "S3", "S4"}, "choices of steps that began early are learned from like others"
    until(lambda: offered_early(scripted) >= 2, "the planner's next pong tells how many steps it offered early")


def test_a_plan_that_breaks_off_leaves_its_steps_and_rules_do_the_rest(scripted: ScriptedStack) -> None:
    half = plan_of("loganberry")
    half = half[: half.index("find what differs") + 40]
    scripted.say(
        {
            "match": f"Objective: {task_about('loganberry')['objective']}",
            "answers": [{"text": half, "token_s": 0.05, "fault": "cut"}],
        },
        {"match": "do what is still missing", "answers": ["the loganberry whole"]},
        {"match": "loganberry", "answers": ["claims"]},
    )
    task = scripted.stack.client.submit(task_about("loganberry")).task_id
    view = scripted.stack.client.result(task, timeout_s=200)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [step.id for step in view.steps] == ["S1", "S2", "S3"]
    assert all(step.state is StepState.DONE for step in view.steps)
    assert started_ms(view, "S1") < planned_ms(scripted, task)
    assert view.steps[-1].needs == ["S1", "S2"]
    assert view.plan is not None
    assert "2 of its steps run already and stay, S3 by rule does the rest" in view.plan.reason
    assert [artefact.value for artefact in view.artefacts] == ["the loganberry whole"]


def test_a_worker_that_turns_the_plan_over_while_it_is_written_has_the_rest_planned_when_it_is_whole(
    scripted: ScriptedStack,
) -> None:
    scripted.say(
        {
            "match": f"Objective: {task_about('cloudberry')['objective']}",
            "answers": [{"text": long_plan_of("cloudberry"), "token_s": 0.08}],
        },
        {"match": "The plan turned out to be wrong", "answers": ["what can be said of cloudberry"]},
        {"match": "cloudberry find what differs", "answers": ["CONTRADICTION: both are the same report"]},
        {"match": "cloudberry", "answers": ["claims"]},
    )
    task = scripted.stack.client.submit(task_about("cloudberry")).task_id
    view = scripted.stack.client.result(task, timeout_s=60)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert [one.trigger for one in view.plan.versions or []] == ["planned", "contradicted"]
    failed = next(one for one in view.steps if one.state is StepState.FAILED)
    assert failed.id == "S3"
    assert failed.ended_ms is not None
    assert failed.ended_ms < planned_ms(scripted, task), "it was wrong while the plan was still written"
    assert [one.value for one in view.artefacts] == ["what can be said of cloudberry"]


def test_kill_9_of_the_planner_in_the_middle_of_a_plan_leaves_its_steps_too(scripted: ScriptedStack) -> None:
    scripted.say(
        {
            "match": f"Objective: {task_about('salmonberry')['objective']}",
            "answers": [{"text": plan_of("salmonberry"), "token_s": 0.1}],
        },
        {"match": "do what is still missing", "answers": ["the salmonberry whole"]},
        {"match": "salmonberry", "answers": ["claims"]},
    )
    task = scripted.stack.client.submit(task_about("salmonberry")).task_id
    until(lambda: len(scripted.stack.client.show(task).steps) >= 2, "two steps begin early", look_every_s=0.02)
    scripted.stack.restart("planner")
    view = scripted.stack.client.result(task, timeout_s=200)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert {"S1", "S2"} < {step.id for step in view.steps}
    assert view.plan is not None
    assert "the planner that began this plan is gone" in view.plan.reason
    assert [artefact.value for artefact in view.artefacts] == ["the salmonberry whole"]
    assert len(scripted.prompts_with("salmonberry list the claims of the first")) == 1
