"""What memory is asked about a plan, and that its answers decide: who works, under which persona, how wide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from protocol.messages.memory import MemoryFinal
from protocol.messages.persona import NO_PERSONA, Persona
from protocol.messages.plan import PlanFinal
from protocol.messages.task import Plan, TaskIR
from protocol.plan_graph import find_problems
from services.kit.registry import TrialPolicy, with_trials
from services.kit.registry.entries import LearningEntry
from services.kit.registry.versions import versions
from services.planner.advice import WIDTH_KEY, request
from services.planner.machine import (
    AskAdvice,
    Command,
    Finish,
    MemoryAnswered,
    Planning,
    Requested,
    Unanswered,
)
from tests.unit.planner_tasks import SHIPPED, advice_for, task

ONE_STEP = {"steps": [{"id": "S1", "actor": "worker", "action": "x", "outputs": [{"name": "a"}]}]}
DOC = task("Compare the two reports", "doc", "a.md", "b.md")
CODE = task("Write a function that parses dates", "code")


def asked_for_advice(ir: TaskIR) -> tuple[Planning, AskAdvice]:
    planning = Planning(SHIPPED)
    planning.handle(Requested(0, ir, None))
    command: Command = planning.handle(MemoryAnswered(1, MemoryFinal()))
    if not isinstance(command, AskAdvice):
        command = planning.handle(Unanswered(2, "deadline"))  # the model
    assert isinstance(command, AskAdvice)
    return planning, command


def finished(command: Command) -> PlanFinal:
    assert isinstance(command, Finish)
    return command.final


def test_one_request_asks_for_width_roles_and_personas_with_the_rules_choice_first() -> None:
    _, command = asked_for_advice(DOC)
    questions = {question.key: question for question in command.request.questions}
    assert [option.choice for option in questions[WIDTH_KEY].options] == ["doc.map-join", "doc.single"]
    reading = questions["role:worker"]
    assert (reading.rules_choice, reading.cluster) == ("worker", "worker")
    assert {"extractor", "writer"} < {option.choice for option in reading.options}
    assert all(option.model and option.prompt for option in reading.options)
    personas = [key for key in questions if key.startswith("persona:")]
    assert len(personas) > 2
    assert questions[personas[0]].options[-1].choice == NO_PERSONA


def test_advice_decides_and_is_recorded_with_its_propensity_and_reason() -> None:
    planning, command = asked_for_advice(DOC)
    advice = advice_for(command.request, last=True)
    final = finished(planning.handle(MemoryAnswered(5, MemoryFinal(advice=advice))))
    assert final.task.plan is not None
    assert len(final.task.plan.steps) == 1, "the narrow plan was advised"
    assert find_problems(final.task) == []
    width, role, persona = final.decisions
    assert (width.choice, width.alternatives, width.propensity) == ("doc.single/1", ["doc.map-join/2"], 0.9)
    assert role.choice == final.task.plan.steps[0].actor
    assert role.choice != "writer"
    assert role.advice is not None
    assert "writer" in role.alternatives
    assert (role.advice.rules_choice, role.rule) == ("writer", f"learned: {role.choice}")
    assert (persona.choice, final.task.plan.steps[0].persona) == (NO_PERSONA, None)
    assert (role.model, role.prompt) == versions("role", role.choice, SHIPPED)
    assert role.cluster == "writer"


def test_steps_of_one_kind_share_one_answer_and_carry_it_once() -> None:
    planning, command = asked_for_advice(DOC)
    advice = [one for one in advice_for(command.request, last=True) if one.key == "role:worker"]
    final = finished(planning.handle(MemoryAnswered(5, MemoryFinal(advice=advice))))
    assert final.task.plan is not None
    (shared,) = (item for item in final.decisions if item.subject == "role" and item.cluster == "worker")
    assert len(shared.ids) == 2, "both have the same in view"
    assert (shared.choice, shared.advice) == (advice[0].choice, advice[0])


def test_a_step_with_something_else_in_view_refers_to_the_advice_of_another() -> None:
    longer = DOC.model_copy(update={"inputs": [DOC.inputs[0], DOC.inputs[1].model_copy(update={"value": "long " * 9})]})
    planning, command = asked_for_advice(longer)
    advice = [one for one in advice_for(command.request, last=True) if one.key == "role:worker"]
    final = finished(planning.handle(MemoryAnswered(5, MemoryFinal(advice=advice))))
    first, second = (item for item in final.decisions if item.subject == "role" and item.cluster == "worker")
    assert first.choice == second.choice == advice[0].choice
    assert first.advice == advice[0]
    assert (second.advice, second.rule) == (None, f"as {next(iter(first.ids))}")


def test_code_is_only_given_to_roles_that_write_code() -> None:
    _, command = asked_for_advice(CODE)
    (writing,) = (question for question in command.request.questions if question.key == "role:coder:code")
    assert {option.choice for option in writing.options} == {"coder", "architect", "worker"}


def test_without_an_answer_the_rules_choose_and_the_reason_says_so() -> None:
    planning, _ = asked_for_advice(DOC)
    final = finished(planning.handle(Unanswered(900, "deadline")))
    assert "memory gave no advice (deadline), so the rules choose" in final.reason
    assert {item.propensity for item in final.decisions} == {1.0}
    assert all(item.advice is None for item in final.decisions)


def test_a_memory_that_did_not_answer_once_is_not_waited_for_again() -> None:
    planning = Planning(SHIPPED)
    planning.handle(Requested(0, task("Say hello"), None))
    assert isinstance(planning.handle(Unanswered(1_000, "deadline")), Finish)


def test_with_learning_off_nobody_is_asked() -> None:
    planning = Planning(replace(SHIPPED, learning=LearningEntry(enabled=False)))
    planning.handle(Requested(0, task("Say hello"), None))
    assert isinstance(planning.handle(MemoryAnswered(1, MemoryFinal())), Finish)


@pytest.mark.parametrize("field", ["prompt", "model"])
def test_a_changed_role_has_other_versions(field: str) -> None:
    roles, models = dict(SHIPPED.roles), dict(SHIPPED.models)
    if field == "prompt":
        roles["coder"] = roles["coder"].model_copy(update={"prompt": "You are a poet."})
    else:
        models["specialist"] = models["specialist"].model_copy(update={"path": Path("/models/other.gguf")})
    other = replace(SHIPPED, roles=MappingProxyType(roles), models=MappingProxyType(models))
    before, after = versions("role", "coder", SHIPPED), versions("role", "coder", other)
    assert [old != new for old, new in zip(before, after, strict=True)] == [field == "model", field == "prompt"]


def test_of_those_on_trial_three_at_a_time_are_offered_by_turns_and_none_that_is_long_or_that_nobody_may_try() -> None:
    made = [Persona(name=f"p{n}", description="d", prompt=f"Be {n}.", roles=["worker"]) for n in range(5)]
    long = Persona(name="long", description="d", prompt="x" * 3_000, roles=["worker"])
    registry = with_trials(SHIPPED, [*made, long])
    offered: set[str] = set()
    for number in range(20):
        asked_for = DOC.model_copy(update={"task_id": f"t-{number}"})
        asked = request(asked_for, {"t": Plan.model_validate(ONE_STEP)}, registry, "x", roles_open=False)
        assert asked is not None
        (question,) = asked.questions
        assert question.rules_choice == question.options[0].choice == "source-keeper"
        assert question.options[-1].choice == NO_PERSONA
        tried = [one.choice for one in question.options if one.choice in registry.on_trial]
        assert len(tried) == 3
        offered |= set(tried)
    assert offered == {one.name for one in made}
    closed = replace(registry, trials=TrialPolicy(offer=False))
    asked = request(DOC, {"t": Plan.model_validate(ONE_STEP)}, closed, "x", roles_open=False)
    assert asked is not None
    assert not offered & {one.choice for one in asked.questions[0].options}
