"""One planning call from its events: whoever is silent, a plan comes out, in time and with its reasons."""

import json
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.messages.infer import InferFinal
from protocol.messages.memory import Episode, MemoryFinal, Retrieve
from protocol.messages.plan import PlanFinal
from protocol.messages.task import TaskIR
from protocol.plan_graph import find_problems
from services.kit.registry.versions import versions
from services.planner.machine import (
    CLIENT_MEMORY_S,
    MEMORY_S,
    MODEL_S,
    AskAdvice,
    AskMemory,
    AskModel,
    Command,
    Event,
    Finish,
    MemoryAnswered,
    ModelAnswered,
    ModelOutcome,
    OutOfTurn,
    Planning,
    Refuse,
    Requested,
    Unanswered,
)
from tests.unit.planner_tasks import SHIPPED, advice_for, task, tasks

DOC = task("Compare the two reports", "doc", "a.md", "b.md")
GOOD = json.dumps(
    {
        "steps": [
            {"role": "extractor", "action": "List the claims of the first", "reads": ["a.md"]},
            {"role": "worker", "action": "List the claims of the second", "reads": ["b.md"]},
            {"role": "writer", "action": "Compare both lists", "reads": ["step1", "step2"]},
        ]
    }
)
CHAIN = {
    "steps": [
        {"id": "S1", "actor": "worker", "action": "one", "outputs": [{"name": "a"}]},
        {"id": "S2", "actor": "worker", "action": "two", "outputs": [{"name": "b"}], "depends_on": ["S1"]},
    ]
}


EPISODE = Episode(task_id="e1", task_type="doc", objective="Contrast two memos", succeeded=True, seconds=2)


def says(text: str) -> ModelAnswered:
    final = InferFinal(
        text=text, finish_reason="stop", model="front", engine="noop", prompt_tokens=9, generated_tokens=7
    )
    return ModelAnswered(3, final)


def go(planning: Planning, event: Event) -> Command:
    """Handle an event; a question for advice that follows is answered by a memory that knows nothing."""
    command = planning.handle(event)
    return planning.handle(MemoryAnswered(8, MemoryFinal())) if isinstance(command, AskAdvice) else command


def finish(command: Command) -> PlanFinal:
    assert isinstance(command, Finish)
    return command.final


def asked(task_: TaskIR = DOC, deadline_ms: int | None = None) -> tuple[Planning, Command]:
    planning = Planning(SHIPPED)
    command = planning.handle(Requested(0, task_, deadline_ms))
    assert isinstance(command, AskMemory)
    return planning, go(planning, MemoryAnswered(1, MemoryFinal()))


def test_a_good_plan_of_the_model_is_used() -> None:
    planning, command = asked()
    assert isinstance(command, AskModel)
    assert command.model == SHIPPED.model_of("frontdoor").name
    final = finish(go(planning, says(GOOD)))
    assert (final.source, final.generated_tokens) == ("model", 7)
    assert "valid, acyclic and within budget" in final.reason
    assert final.task.plan is not None
    assert [step.actor for step in final.task.plan.steps] == ["extractor", "worker", "writer"]
    decomposition = final.decisions[0]
    assert (decomposition.choice, decomposition.alternatives) == ("doc.model/3", ["doc.map-join/2"])
    assert planning.model_outcome is ModelOutcome.USED


def test_a_plan_that_is_narrower_than_the_parts_the_objective_names_gives_way_to_the_rules() -> None:
    planning, command = asked(task("Which is taller, the Eiffel Tower, Big Ben or the Burj Khalifa?", "chat"))
    assert isinstance(command, AskModel)
    chain = [{"role": "worker", "action": f"Look up tower {number}", "reads": []} for number in (1, 2, 3)]
    chain[1]["reads"], chain[2]["reads"] = ["step1"], ["step2"]
    final = finish(go(planning, says(json.dumps({"steps": chain}))))
    assert (final.source, planning.model_outcome) == ("rules", ModelOutcome.NARROW)
    assert "1 steps side by side, although the objective names 3 independent parts" in final.reason


@pytest.mark.parametrize("text", ["no JSON", '{"steps": []}', GOOD.replace('"reads"', '"needs"')])
def test_a_bad_plan_of_the_model_is_replaced_by_the_rules_with_the_reason(text: str) -> None:
    planning, _ = asked()
    final = finish(go(planning, says(text)))
    assert (final.source, final.generated_tokens) == ("rules", 7)
    assert "its plan was refused: " in final.reason
    assert "rules: doc.map-join/2, because 2 inputs" in final.reason
    assert planning.model_outcome is ModelOutcome.REFUSED


def test_a_plan_with_a_mistake_that_has_a_cure_is_used_and_the_reason_says_what_was_done() -> None:
    planning, _ = asked()
    final = finish(go(planning, says(GOOD.replace("worker", "wizard"))))
    assert final.source == "model"
    assert "it was repaired: step2: 'worker' for the role 'wizard'" in final.reason


def test_a_silent_model_is_replaced_by_the_rules() -> None:
    planning, _ = asked()
    final = finish(go(planning, Unanswered(16_000, "deadline")))
    assert final.source == "rules"
    assert "the model gave no answer (deadline)" in final.reason


def test_a_task_of_one_step_costs_no_model_time() -> None:
    planning, command = asked(task("Say hello"))
    final = finish(command)
    assert "the model was not asked: one step does it" in final.reason
    assert planning.model_outcome is ModelOutcome.NOT_ASKED


def test_a_client_plan_that_leaves_nothing_open_still_learns_of_similar_tasks() -> None:
    planning = Planning(SHIPPED)
    plan = {"steps": CHAIN["steps"], "persona": next(iter(SHIPPED.personas))}
    command = planning.handle(Requested(0, task("x", "doc", plan=plan), None))
    assert isinstance(command, AskMemory)
    assert command.timeout_s == CLIENT_MEMORY_S
    assert finish(planning.handle(MemoryAnswered(2, MemoryFinal(episodes=[EPISODE])))).similar == [EPISODE]


def test_earlier_tasks_are_handed_on_and_hinted_to_the_model() -> None:
    planning = Planning(SHIPPED)
    planning.handle(Requested(0, DOC, None))
    command = planning.handle(MemoryAnswered(1, MemoryFinal(episodes=[EPISODE])))
    assert isinstance(command, AskModel)
    assert "Contrast two memos" in command.request.messages[1].content
    final = finish(go(planning, says(GOOD)))
    assert final.similar == [EPISODE]


def test_without_memory_the_rules_choose_and_what_they_chose_is_told_when_it_is_back() -> None:
    planning = Planning(SHIPPED)
    planning.handle(Requested(0, task("Say hello"), None))
    final = finish(planning.handle(Unanswered(1_000, "deadline")))
    assert final.similar == []
    assert {(one.propensity, one.advice) for one in final.decisions} == {(1.0, None)}
    assert "memory did not answer" in final.reason


def test_a_decision_says_what_stood_behind_the_choice_when_it_was_taken() -> None:
    _, command = asked(task("Say hello"))
    for one in finish(command).decisions:
        assert one.registry_digest == SHIPPED.digest
        assert (one.model, one.prompt) == versions(one.subject, one.choice, SHIPPED)
    assert any(one.model and one.prompt for one in finish(command).decisions)


def test_a_client_plan_loses_its_useless_edges_and_only_its_personas_are_asked_about() -> None:
    planning = Planning(SHIPPED)
    command = planning.handle(Requested(0, task("x", "doc", plan=CHAIN), None))
    assert isinstance(command, AskAdvice)
    assert command.timeout_s == CLIENT_MEMORY_S
    assert {question.subject for question in command.request.questions} == {"persona"}
    assert command.request.retrieve == Retrieve(text="x", task_type="doc")
    final = finish(planning.handle(MemoryAnswered(2, MemoryFinal(episodes=[EPISODE]))))
    assert final.similar == [EPISODE]
    assert (final.source, final.reason) == ("client", "the task brought its plan")
    assert [(edge.step, edge.depends_on) for edge in final.removed_edges] == [("S2", "S1")]
    assert final.task.plan is not None
    assert final.task.plan.steps[1].depends_on == []


@pytest.mark.parametrize(
    ("change", "says_"),
    [
        ({"depends_on": ["S2"]}, "plan.steps[S2].depends_on: a step cannot wait for itself"),
        ({"actor": "workr"}, "plan.steps[S2].actor: the registry has no 'workr'; did you mean 'worker'?"),
        ({"gates": ["lintt"]}, "plan.steps[S2].gates: the registry has no 'lintt'; did you mean 'lint'?"),
        ({"persona": "nobody"}, "plan.steps[S2].persona: the registry has no 'nobody'"),
        ({"inputs": ["ghost"]}, "plan.steps[S2].inputs: no step makes 'ghost'"),
        (
            {"outputs": [{"name": "o", "kind": "json"}], "json_schema": {"properties": {"n": {"type": "nothing"}}}},
            "plan.steps[S2].json_schema: not a JSON Schema: $.properties.n.type",
        ),
    ],
)
def test_a_client_plan_that_cannot_run_is_refused_by_step_and_field(change: dict[str, object], says_: str) -> None:
    plan = {"steps": [CHAIN["steps"][0], {**CHAIN["steps"][1], **change}]}
    command = Planning(SHIPPED).handle(Requested(0, task("x", "doc", plan=plan), None))
    assert isinstance(command, Refuse)
    assert says_ in command.failure.message
    assert command.failure.code == "plan.invalid"


def test_what_no_template_can_mend_is_refused_too() -> None:
    twice = task("x", "doc", "a", "a")
    unknown_gate = task("x", "doc", gates=["ghost"])
    for task_, says_ in (
        (twice, "named twice: a"),
        (unknown_gate, "gates: the registry has no 'ghost'"),
    ):
        command = Planning(SHIPPED).handle(Requested(0, task_, None))
        assert isinstance(command, Refuse)
        assert says_ in command.failure.message


def test_a_dry_run_shows_decisions_without_recording_them() -> None:
    _, command = asked(task("Say hello", task_id=None))
    final = finish(command)
    assert final.decisions
    assert "dry run" in final.reason


def test_waits_are_shares_of_the_deadline() -> None:
    planning = Planning(SHIPPED)
    command = planning.handle(Requested(0, DOC, 5_000))
    assert isinstance(command, AskMemory)
    assert command.timeout_s == pytest.approx(0.5)
    command = planning.handle(Unanswered(500, "deadline"))
    assert isinstance(command, AskModel)
    assert command.timeout_s == pytest.approx(1.35)
    generous = Planning(SHIPPED).handle(Requested(0, DOC, None))
    assert isinstance(generous, AskMemory)
    assert generous.timeout_s == MEMORY_S
    _, command = asked(DOC.model_copy(update={"deadline_s": 5.0}))
    assert "0.5 s is all the time" in finish(command).reason
    _, command = asked(DOC, 10**9)
    assert isinstance(command, AskModel)
    assert command.timeout_s == MODEL_S


def test_without_a_front_door_role_another_of_tier_a_plans_and_without_tier_a_nobody() -> None:
    roles = {name: role for name, role in SHIPPED.roles.items() if name != "frontdoor"}
    planning = Planning(replace(SHIPPED, roles=MappingProxyType(roles)))
    planning.handle(Requested(0, DOC, None))
    command = planning.handle(MemoryAnswered(1, MemoryFinal()))
    assert isinstance(command, AskModel)
    assert command.model == "front"
    roles = {name: role for name, role in roles.items() if role.model != "front"}
    planning = Planning(replace(SHIPPED, roles=MappingProxyType(roles)))
    planning.handle(Requested(0, DOC, None))
    command = go(planning, MemoryAnswered(1, MemoryFinal()))
    final = finish(command)
    assert "no model of tier A" in final.reason
    assert "the registry has no role 'writer'" in final.reason


def test_an_event_out_of_turn_is_refused_and_changes_nothing() -> None:
    planning = Planning(SHIPPED)
    planning.handle(Requested(0, task("Say hello"), None))
    phase = planning.phase
    with pytest.raises(OutOfTurn, match="ModelAnswered while remembering"):
        planning.handle(says(GOOD))
    assert planning.phase is phase
    assert finish(go(planning, MemoryAnswered(1, MemoryFinal()))).decisions


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tasks(), st.lists(st.sampled_from(["answer", "silence", "nonsense"]), min_size=5, max_size=5))
def test_every_course_ends_in_a_runnable_plan_and_the_same_events_in_the_same_one(
    task_: TaskIR, course: list[str]
) -> None:
    def run() -> Command:
        planning = Planning(SHIPPED)
        command = planning.handle(Requested(0, task_, 60_000))
        for happens in course:
            match command, happens:
                case ((Finish() | Refuse()), _):
                    break
                case _, "silence":
                    command = planning.handle(Unanswered(10, "deadline"))
                case AskAdvice(request=asked_), "answer":
                    command = planning.handle(MemoryAnswered(10, MemoryFinal(advice=advice_for(asked_, last=True))))
                case AskAdvice(request=asked_), _:
                    liar = [one.model_copy(update={"choice": "wizard"}) for one in advice_for(asked_, last=True)]
                    command = planning.handle(MemoryAnswered(10, MemoryFinal(advice=liar)))
                case AskMemory(), _:
                    command = planning.handle(MemoryAnswered(10, MemoryFinal()))
                case AskModel(), "answer":
                    command = planning.handle(says(GOOD))
                case AskModel(), _:
                    command = planning.handle(says("\ud800" * 9))
        return command

    final = finish(run())
    assert final.task.plan is not None
    assert find_problems(final.task) == []
    assert final.reason
    assert finish(run()) == final
