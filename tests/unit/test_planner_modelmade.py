"""What a model says becomes a plan only if every word of it makes sense for this task and this registry."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.infer import InferRequest
from protocol.messages.memory import Episode
from protocol.messages.task import TaskIR
from protocol.plan_graph import final_artefacts
from services.kit.plan_check import plan_problems
from services.planner.modelmade import ModelPlanRefused, planning_request, read_plan, worth_asking
from tests.unit.planner_tasks import SHIPPED, task

DOC = task("Compare the two reports", "doc", "a.md", "b.md")
GOOD: list[dict[str, Any]] = [
    {"role": "worker", "action": "List the claims of the first", "reads": ["a.md"]},
    {"role": "worker", "action": "List the claims of the second", "reads": ["b.md"]},
    {"role": "writer", "action": "Compare both lists", "reads": ["step1", "step2"]},
]


def answer(*steps: dict[str, Any]) -> str:
    return json.dumps({"steps": list(steps)})


def refusal(text: str, task_: TaskIR = DOC, finish: str = "stop") -> str:
    with pytest.raises(ModelPlanRefused) as refused:
        read_plan(text, finish, task_, SHIPPED.roles)
    assert len(str(refused.value)) < 1_200
    return str(refused.value)


def test_a_good_answer_becomes_a_plan_with_the_result_named_as_the_rules_name_it() -> None:
    made = read_plan(answer(*GOOD), "stop", DOC, SHIPPED.roles)
    plan = made.plan
    assert made.repairs == ()
    assert plan_problems(DOC.model_copy(update={"plan": plan}), SHIPPED) == []
    assert [step.inputs for step in plan.steps] == [["a.md"], ["b.md"], ["step1", "step2"]]
    assert [step.outputs[0].name for step in plan.steps] == ["step1", "step2", "document"]
    assert "Compare the two reports" in plan.steps[0].action


def test_an_input_called_like_a_label_is_not_mistaken_for_a_result() -> None:
    odd = task("Compare the two reports", "doc", "step1", "b.md")
    steps = [{**GOOD[0], "reads": ["step1"]}, GOOD[1], {**GOOD[2], "reads": ["step_1", "step_2"]}]
    plan = read_plan(answer(*steps), "stop", odd, SHIPPED.roles).plan
    assert [step.inputs for step in plan.steps] == [["step1"], ["b.md"], ["step_1", "step_2"]]


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([GOOD[0], GOOD[0]], "a single step"),
        ([{**GOOD[2], "reads": ["a.md", "b.md"]}], "a single step"),
        ([], "at least 1"),
        ([GOOD[0]] * 9, "at most 8"),
        ([{**GOOD[0], "action": "x" * 601}, *GOOD[1:]], "at most 600"),
        ([{**GOOD[0], "reads": 3}, *GOOD[1:]], "list"),
        ([{**GOOD[0], "depends_on": ["S2"]}, *GOOD[1:]], "depends_on"),
        ([{**GOOD[0], "action": "\ud800 is half a character"}, *GOOD[1:]], "unicode"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_problem_named(steps: list[dict[str, Any]], says: str) -> None:
    assert says in refusal(answer(*steps))


@pytest.mark.parametrize(
    ("steps", "reads", "note"),
    [
        ([{**GOOD[0], "role": "wizard"}, *GOOD[1:]], [["a.md"], ["b.md"], ["step1", "step2"]], "role 'wizard'"),
        (
            [{**GOOD[0], "reads": ["a.md", "../etc/passwd"]}, *GOOD[1:]],
            [["a.md"], ["b.md"], ["step1", "step2"]],
            "cannot read '../etc/passwd'",
        ),
        (
            [{**GOOD[0], "reads": ["a.md", "step2"]}, {**GOOD[1], "reads": ["b.md", "step1"]}, GOOD[2]],
            [["a.md"], ["b.md", "step1"], ["step1", "step2"]],
            "closes a circle",
        ),
        (
            [{**GOOD[0], "reads": ["a.md", "step1"]}, *GOOD[1:]],
            [["a.md"], ["b.md"], ["step1", "step2"]],
            "step1 cannot read 'step1'",
        ),
        ([GOOD[0], {**GOOD[2], "reads": ["step1"]}], [["a.md"], ["step1", "b.md"]], "'b.md' too"),
        (
            [*GOOD[:2], {**GOOD[2], "reads": ["step1"]}],
            [["a.md"], ["b.md"], ["step1", "step2"]],
            "step2 too, which nobody read",
        ),
        (GOOD[:2], [["a.md"], ["b.md"], ["step1", "step2"]], "a join of step1, step2 was added"),
        (
            [*GOOD[:2], {**GOOD[2], "reads": []}],
            [["a.md"], ["b.md"], ["step1", "step2"]],
            "step3 reads step1, step2 too",
        ),
        (
            [GOOD[0], GOOD[0], {**GOOD[2], "reads": ["step1", "step2", "b.md"]}],
            [["a.md"], ["step1", "b.md"]],
            "step2 repeats step1",
        ),
    ],
)
def test_a_mistake_with_one_sensible_cure_is_repaired_with_a_note(
    steps: list[dict[str, Any]], reads: list[list[str]], note: str
) -> None:
    made = read_plan(answer(*steps), "stop", DOC, SHIPPED.roles)
    assert [step.inputs for step in made.plan.steps] == reads
    assert any(note in repair for repair in made.repairs), made.repairs
    assert plan_problems(DOC.model_copy(update={"plan": made.plan}), SHIPPED) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! Here is a plan:",
        "[" * 100_000,
        "[" * 10_000,
        "[1]",
        "null",
        '{"steps": 1}',
        "9" * 10_000,
        "{" * 9_000,
        "x" * 10**7,
    ],
)
def test_answers_that_are_no_plan_at_all_are_refused(text: str) -> None:
    assert refusal(text)


def test_the_complete_steps_of_an_answer_that_was_cut_are_used() -> None:
    cut = answer(*GOOD)[:-20]
    made = read_plan(cut, "length", DOC, SHIPPED.roles)
    assert [step.inputs for step in made.plan.steps] == [["a.md"], ["b.md"], ["step1", "step2"]]
    assert "not JSON" in refusal(cut, finish="stop")
    assert "token limit" in refusal(answer(*GOOD)[:30], finish="length")


def test_a_plan_over_the_step_budget_is_refused() -> None:
    small = task("Compare the two reports", "doc", "a.md", "b.md", budget={"max_steps": 2})
    assert "the budget allows 2" in refusal(answer(*GOOD), small)


def test_the_result_of_a_code_task_is_made_by_a_role_that_writes_code() -> None:
    code = task("Write a queue", "code")
    draft = {"role": "coder", "action": "Write the queue", "reads": []}
    made = read_plan(answer(draft, {**GOOD[2], "reads": ["step1"]}), "stop", code, SHIPPED.roles)
    assert [step.actor for step in made.plan.steps] == ["coder", "coder"]
    assert "makes the code" in made.repairs[0]
    assert [step.outputs[0].kind.value for step in made.plan.steps] == ["code", "code"]


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=20), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_value_gets_past_the_checks(value: Any) -> None:
    refusal(json.dumps(value))
    refusal(json.dumps({"steps": value}))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["worker", "writer", "nobody"]),
                "action": st.text(min_size=8, max_size=40),
                "reads": st.lists(st.sampled_from(["a.md", "b.md", "step1", "step2", "step3", "x"]), max_size=4),
            }
        ),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_is_accepted_can_run(steps: list[dict[str, Any]]) -> None:
    try:
        plan = read_plan(json.dumps({"steps": steps}), "stop", DOC, SHIPPED.roles).plan
    except ModelPlanRefused:
        return
    assert plan_problems(DOC.model_copy(update={"plan": plan}), SHIPPED) == []
    assert len(final_artefacts(plan)) == 1
    assert {"a.md", "b.md"} <= {name for step in plan.steps for name in step.inputs}


def test_the_question_is_small_whatever_the_task_and_lists_roles_and_names_only() -> None:
    huge = task("面" * 60_000, "doc", *[f"in{number}.md" for number in range(12)], context="c" * 60_000)
    hints = [Episode(task_id="e", task_type="doc", objective="o" * 9_000, succeeded=True, seconds=1)] * 16
    request = planning_request(huge, SHIPPED.roles, SHIPPED.roles["frontdoor"], hints)
    assert request.early_abort is not None, "a plan that repeats itself is stopped too"
    assert sum(len(message.content.encode()) for message in request.messages) < 6_000
    assert request.max_tokens <= 512
    step = (request.json_schema or {})["properties"]["steps"]["items"]["properties"]
    assert step["role"]["enum"] == list(SHIPPED.roles)
    assert "x = 1" not in request.messages[1].content  # the content of an input


@pytest.mark.parametrize(
    ("task_", "rule_steps", "ask"),
    [
        (task("Say hello"), 1, False),
        (task("Write a stack", "code"), 3, True),
        (task("Dates", "ingest", "a", "b"), 3, False),
        (task("Write a stack", "code", budget={"max_steps": 1}), 1, False),
        (task("Write a stack", "code", budget={"max_tokens": 1_000}), 3, False),
        (task("Summarise", "doc", *[f"n{number}" for number in range(13)]), 15, False),
    ],
)
def test_the_model_is_asked_only_where_it_could_improve_the_plan(task_: TaskIR, rule_steps: int, ask: bool) -> None:
    worth = worth_asking(task_, rule_steps)
    assert worth.ask is ask
    assert worth.because


ASKING = task("Which is taller, the Eiffel Tower, Big Ben or the Burj Khalifa?", "chat")


def parts_request(objective: str, parts: list[str]) -> InferRequest:
    return planning_request(task(objective, "chat"), SHIPPED.roles, SHIPPED.roles["frontdoor"], [], parts)


def parts_schema(request: InferRequest) -> Any:
    assert request.json_schema is not None
    assert set(request.json_schema["properties"]) == {"parts"}
    return request.json_schema["properties"]["parts"]


def test_where_only_the_parts_are_open_a_verdict_on_each_name_is_asked_for() -> None:
    request = parts_request(ASKING.objective, ["the Eiffel Tower", "Big Ben", "the Burj Khalifa"])
    schema = parts_schema(request)
    assert schema["required"] == list(schema["properties"]) == ["Eiffel Tower", "Big Ben", "Burj Khalifa"]
    assert request.max_tokens <= 160
    shown = [json.loads(turn.content)["parts"] for turn in request.messages if turn.role == "assistant"]
    assert {True, False} == {verdict for example in shown for verdict in example.values()}, "both are to be copied"
    verdicts = {"Eiffel Tower": True, "Big Ben": False, "Burj Khalifa": True, "Atlantis": True}
    made = read_plan(json.dumps({"parts": verdicts}), "stop", ASKING, SHIPPED.roles)
    assert [step.inputs for step in made.plan.steps] == [[], [], ["step1", "step2"]]
    assert "Burj Khalifa" in made.plan.steps[1].action
    assert "'Atlantis' was left out" in made.repairs[0]


def test_without_names_or_with_many_a_list_is_asked_for_and_becomes_a_plan() -> None:
    free = parts_request("Which is faster, a hare or a greyhound?", ["a hare", "a greyhound"])
    assert parts_schema(free)["items"]["type"] == "string"
    assert all(
        isinstance(json.loads(turn.content)["parts"], list) for turn in free.messages if turn.role == "assistant"
    )
    names = ["Chile", "Peru", "Cuba", "Iran", "Iraq", "Nepal", "Ghana", "Kenya"]
    many = parts_request(f"What is the total population of {', '.join(names[:-1])} and {names[-1]}?", names)
    assert parts_schema(many)["items"] == {"enum": names}, "bounded in length, which verdicts are not"
    assert parts_schema(many)["maxItems"] == 7
    plan = read_plan(json.dumps({"parts": ["Eiffel Tower", "Big Ben", "big  ben"]}), "stop", ASKING, SHIPPED.roles).plan
    assert [step.inputs for step in plan.steps] == [[], [], ["step1", "step2"]]
    assert "Big Ben" in plan.steps[1].action or "big ben" in plan.steps[1].action
    assert final_artefacts(plan) == ["answer"]


def test_a_list_that_goes_on_after_the_last_thing_is_cut_to_what_the_objective_names() -> None:
    names = ["Eiffel Tower", "big ben", "height of the Burj Khalifa", "Leaning Tower of Pisa", "Eurasia", "pyramids"]
    made = read_plan(json.dumps({"parts": names}), "stop", ASKING, SHIPPED.roles)
    assert [step.inputs for step in made.plan.steps] == [[], [], [], ["step1", "step2", "step3"]]
    assert [note.partition(" was left out")[0] for note in made.repairs] == [
        "'Leaning Tower of Pisa'",
        "'Eurasia'",
        "'pyramids'",
    ]
    assert "Eurasia" in str(refusal(json.dumps({"parts": ["Eurasia", "Atlantis"]}), ASKING))


@pytest.mark.parametrize(
    "text",
    [
        '{"parts": []}',
        '{"parts": [1]}',
        '{"parts": ["a"], "steps": []}',
        '{"parts": 3}',
        '{"parts": {}}',
        '{"parts": {"Big Ben": "true", "Eiffel Tower": 1}}',
    ],
)
def test_a_list_that_is_none_is_refused(text: str) -> None:
    assert refusal(text, ASKING)


def test_a_task_with_inputs_or_another_kind_of_result_is_asked_for_steps() -> None:
    for other in (DOC, task("Write a parser and a printer", "code")):
        request = planning_request(other, SHIPPED.roles, SHIPPED.roles["frontdoor"], [], ["one", "two"])
        assert request.json_schema is not None
        assert "steps" in request.json_schema["properties"]
