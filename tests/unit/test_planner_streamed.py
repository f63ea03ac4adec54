"""A plan that begins while it is written: whatever is offered early is part of the whole plan, unchanged."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.infer import InferFinal
from protocol.messages.memory import Advised, MemoryFinal
from protocol.messages.task import Plan, Step, TaskIR
from services.kit.plan_check import plan_problems
from services.kit.registry import with_own
from services.planner.advice import first_by_rule, fitting
from services.planner.machine import (
    AskAdvice,
    AskModel,
    Finish,
    MemoryAnswered,
    ModelAnswered,
    Planning,
    Requested,
    Unanswered,
)
from services.planner.streamed import StepReader, StreamedPlan
from tests.unit.planner_tasks import SHIPPED, task

INPUTS = ["a.md", "b.md"]
DOC = task("Compare the two reports", "doc", *INPUTS).model_copy(update={"task_id": "t1"})
STEPS = [
    {"role": "extractor", "action": "List the claims of the first", "reads": ["a.md"]},
    {"role": "worker", "action": "List the claims of the second", "reads": ["b.md"]},
    {"role": "writer", "action": "Compare both lists", "reads": ["step1", "step2"]},
]
MANNER = "Attend to dates and to who said it."
WHOLE = json.dumps({"steps": STEPS})


def asked(of: TaskIR = DOC) -> Planning:
    planning = Planning(SHIPPED)
    command = planning.handle(Requested(0, of, None))
    command = planning.handle(MemoryAnswered(1, MemoryFinal()))
    assert isinstance(command, AskModel), command
    assert command.request.stream
    return planning


def heard(planning: Planning, text: str, piece: int = 7) -> list[Step]:
    offered: list[Step] = []
    for start in range(0, len(text), piece):
        offered = planning.hear(text[start : start + piece], start) or offered
    return offered


def finished(planning: Planning, event: ModelAnswered | Unanswered) -> Finish:
    command = planning.handle(event)
    while not isinstance(command, Finish):
        command = planning.handle(Unanswered(9, "away"))
    return command


def said(text: str, finish_reason: str = "stop") -> ModelAnswered:
    final = {"text": text, "finish_reason": finish_reason, "model": "front", "engine": "noop"}
    return ModelAnswered(3, InferFinal.model_validate(final | {"prompt_tokens": 9, "generated_tokens": 7}))


@pytest.mark.parametrize("piece", [1, 3, 50, 10_000])
def test_steps_are_cut_out_however_the_text_is_cut_up(piece: int) -> None:
    text = json.dumps({"steps": [{"action": 'a "quoted" } ] {', "reads": [["x"]]}, {"action": "b\\", "reads": []}]})
    reader = StepReader()
    found = [json.loads(one) for at in range(0, len(text), piece) for one in reader.feed(text[at : at + piece])]
    assert found == json.loads(text)["steps"]
    assert reader.begun == 2


def test_a_step_is_offered_when_the_next_one_begins_and_the_last_one_never() -> None:
    planning = asked()
    first_ends = WHOLE.index("}") + 1
    assert heard(planning, WHOLE[:first_ends]) == []
    begun = WHOLE.index("{", first_ends) + 1
    assert [step.id for step in planning.hear(WHOLE[first_ends:begun], first_ends)] == ["S1"]
    assert [step.id for step in planning.hear(WHOLE[begun:], begun)] == ["S1", "S2"]


def test_what_was_offered_is_in_the_plan_as_it_was_offered() -> None:
    planning = asked()
    offered = heard(planning, WHOLE)
    final = finished(planning, said(WHOLE)).final
    assert final.task.plan is not None
    assert final.task.plan.steps[:2] == offered
    assert len(final.task.plan.steps) == 3
    assert final.source == "model"
    assert final.broke_off is None


@pytest.mark.parametrize("ending", ["nothing", "garbage", "another plan"])
def test_a_plan_that_breaks_off_keeps_what_runs_and_gets_a_last_step_by_rule(ending: str) -> None:
    planning = asked()
    offered = heard(planning, WHOLE[: WHOLE.index("Compare")])
    assert [step.id for step in offered] == ["S1", "S2"]
    other = json.dumps({"steps": [STEPS[2] | {"reads": INPUTS}, STEPS[1] | {"reads": ["step1"]}]})
    events = {"nothing": Unanswered(3, "peer.lost"), "garbage": said("{"), "another plan": said(other)}
    final = finished(planning, events[ending]).final
    codes = {"nothing": "peer.lost", "garbage": "plan.refused", "another plan": "plan.changed"}
    assert final.broke_off == codes[ending]
    assert [step.id for step in final.task.plan.steps] == ["S1", "S2", "S3"] if final.task.plan else False
    assert final.task.plan is not None
    assert final.task.plan.steps[:2] == offered
    assert not plan_problems(final.task, SHIPPED)
    assert final.source == "model"


def test_steps_of_a_planner_that_is_gone_stay() -> None:
    begun = heard(asked(), WHOLE)
    planning = Planning(SHIPPED)
    command = planning.handle(Requested(0, DOC, None, None, tuple(begun)))
    while not isinstance(command, Finish):
        command = planning.handle(Unanswered(9, "away"))
    assert command.final.broke_off == "peer.lost"
    assert command.final.task.plan is not None
    assert command.final.task.plan.steps[: len(begun)] == begun
    assert len(command.final.task.plan.steps) == len(begun) + 1


def test_a_step_that_begins_early_has_the_persona_that_the_model_wants_for_it() -> None:
    wish = {"name": "Historian", "manner": MANNER}
    text = json.dumps({"steps": [STEPS[0] | {"persona": wish}, STEPS[1], STEPS[2] | {"persona": wish}]})
    planning = asked()
    offered = heard(planning, text)
    assert [step.persona for step in offered] == ["historian", first_by_rule(fitting("worker", DOC, SHIPPED))]
    assert [(one.name, one.prompt) for one in planning.personas] == [("historian", MANNER)]
    final = finished(planning, said(text)).final
    assert final.task.plan is not None
    assert final.task.plan.steps[:2] == offered
    assert final.task.plan.steps[2].persona == "historian"
    assert [(one.name, one.roles) for one in final.personas] == [("historian", ["extractor", "writer"])]


def test_memory_advises_nobody_who_has_begun() -> None:
    planning = asked()
    offered = heard(planning, WHOLE)
    command = planning.handle(said(WHOLE))
    assert isinstance(command, AskAdvice)
    advice = []
    for question in command.request.questions:
        other = next(one.choice for one in reversed(question.options) if one.choice != question.rules_choice)
        told = {"rules_choice": question.rules_choice, "learned_choice": other, "choice": other, "won": "learned"}
        figures = {"propensity": 0.5, "confidence": 0.9, "evidence": 50, "why": "it was told"}
        advice.append(Advised(key=question.key, subject=question.subject, **told, **figures))
    command = planning.handle(MemoryAnswered(4, MemoryFinal(advice=advice)))
    assert isinstance(command, Finish)
    booked = {(step, one.subject): one.choice for one in command.final.decisions for step in one.ids}
    for step in offered:
        assert booked[step.id, "role"] == step.actor, "what is learned from an outcome is about what ran"
        assert booked.get((step.id, "persona")) == step.persona
    assert booked["S3", "role"] != STEPS[2]["role"], "whoever has not begun is advised"


def test_nothing_is_offered_after_a_gap_nor_for_a_dry_run() -> None:
    planning = asked()
    assert planning.hear(WHOLE[:40], 0) == []
    assert planning.hear(WHOLE[60:], 60) == []
    dry = Planning(SHIPPED)
    dry.handle(Requested(0, DOC.model_copy(update={"task_id": None}), None))
    command = dry.handle(MemoryAnswered(1, MemoryFinal()))
    assert isinstance(command, AskModel)
    assert not command.request.stream
    assert heard(dry, WHOLE) == []


def test_what_needs_something_later_or_cannot_be_read_is_not_offered() -> None:
    forward = json.dumps({"steps": [STEPS[0] | {"reads": ["step3"]}, STEPS[1], STEPS[2] | {"reads": ["step2"]}]})
    assert [step.id for step in heard(asked(), forward)] == ["S2"]
    broken = json.dumps({"steps": [STEPS[0], {"role": "worker"}, STEPS[1], STEPS[2]]})
    assert [step.id for step in heard(asked(), broken)] == ["S1"]


LABELS = [f"step{number}" for number in range(1, 9)]
steps_of_models = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["worker", "writer", "extractor", "nobody"]),
            "action": st.sampled_from(["List the claims", "Compare the lists", "Write the report", "Look it up"]),
            "reads": st.lists(st.sampled_from([*INPUTS, *LABELS, "else"]), max_size=4),
        },
        optional={
            "persona": st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["Historian", "skeptic", "!"]),
                    "manner": st.sampled_from([MANNER, MANNER * 2]),
                }
            )
        },
    ),
    min_size=1,
    max_size=9,
)


@given(steps=steps_of_models, cut=st.floats(0, 1), piece=st.integers(1, 60))
def test_whatever_a_model_writes_the_plan_can_run_and_holds_what_was_offered(
    steps: list[dict[str, object]], cut: float, piece: int
) -> None:
    text = json.dumps({"steps": steps})
    text = text[: max(1, int(len(text) * cut))] if cut < 0.7 else text
    planning = asked()
    offered = heard(planning, text, piece)
    if offered:
        early = DOC.model_copy(update={"plan": Plan(steps=offered)})
        assert not plan_problems(early, with_own(SHIPPED, planning.personas))
    final = finished(planning, said(text, "length" if cut < 0.7 else "stop")).final
    assert final.task.plan is not None
    assert not plan_problems(final.task, with_own(SHIPPED, final.personas))
    told = {step.id: step for step in final.task.plan.steps}
    assert all(told[step.id] == step for step in offered)


def test_the_reader_stops_at_so_many_characters() -> None:
    streamed = StreamedPlan(DOC, SHIPPED.roles)
    assert streamed.feed("x" * 20_000, 0).steps == []
    assert streamed.feed(WHOLE, 20_000).steps == []
