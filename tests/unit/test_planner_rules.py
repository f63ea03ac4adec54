"""The rules' promise: a valid plan for every legal task, wide where the task is."""

import pytest
from hypothesis import HealthCheck, given, settings

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.task import Plan, TaskIR
from protocol.plan_graph import final_artefacts, find_problems, needs
from services.kit.plan_check import plan_problems
from services.planner.cast import ROLES_FOR, Work, alternatives, cast
from services.planner.rules import plan_by_rules, room
from tests.unit.planner_tasks import SHIPPED, task, tasks

TESTS = "from calc import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"


def planned(task: TaskIR) -> Plan:
    made = plan_by_rules(task, SHIPPED.roles)
    problems = plan_problems(task.model_copy(update={"plan": made.plan}), SHIPPED)
    assert problems == []
    return made.plan


def shape(plan: Plan) -> dict[str, set[str]]:
    return {step.id: set(waits) for step, waits in zip(plan.steps, needs(plan).values(), strict=True)}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tasks())
def test_every_task_gets_a_valid_plan_that_uses_every_input_and_ends_in_one_result(task: TaskIR) -> None:
    made = plan_by_rules(task, SHIPPED.roles)
    planned_task = TaskIR.model_validate(task.model_copy(update={"plan": made.plan}).model_dump())
    assert find_problems(planned_task) == []
    assert len(made.plan.steps) <= room(task) <= max(1, task.budget.max_steps)
    assert len(final_artefacts(made.plan)) == 1
    read = {name for step in made.plan.steps for name in step.inputs}
    assert {artefact.name for artefact in task.inputs} <= read
    files = [artefact.file_name().casefold() for artefact in task.inputs]
    outputs = [output for step in made.plan.steps for output in step.outputs]
    made_files = [
        Artefact(name=o.name, kind=o.kind, value="", content_type=o.content_type).file_name().casefold()
        for o in outputs
    ]
    assert len(set(made_files)) == len(made_files)
    assert not set(made_files) & set(files)


def test_simple_tasks_take_one_step() -> None:
    for kind in ("chat", "doc", "ingest"):
        assert len(planned(task("Say hello", kind)).steps) == 1
    assert planned(task("Say hello")).steps[0].actor == "frontdoor"
    assert planned(task("Say hello")).steps[0].action == "Say hello"


def test_doc_reads_each_input_in_a_step_of_its_own_and_joins() -> None:
    plan = planned(task("Summarise", "doc", "a.md", "b.md", "c.md"))
    assert shape(plan) == {"S1": set(), "S2": set(), "S3": set(), "S4": {"S1", "S2", "S3"}}
    assert [step.inputs for step in plan.steps[:3]] == [["a.md"], ["b.md"], ["c.md"]]
    assert [step.outputs[0].name for step in plan.steps] == ["notes_a", "notes_b", "notes_c", "document"]


def test_two_files_to_compare_are_read_side_by_side() -> None:
    plan = planned(task("compare these two files", "chat", "a.md", "b.md"))
    assert shape(plan) == {"S1": set(), "S2": set(), "S3": {"S1", "S2"}}


@pytest.mark.parametrize("objective", ["compare A and B", "a; b", "1. one\n2. two", "What is A? What is B?"])
def test_an_objective_that_lists_things_fans_out_and_joins(objective: str) -> None:
    assert shape(planned(task(objective))) == {"S1": set(), "S2": set(), "S3": {"S1", "S2"}}


def test_a_part_that_names_its_input_reads_only_that_one() -> None:
    plan = planned(task("- what alpha.txt says\n- what beta.txt says", "doc", "alpha.txt", "beta.txt"))
    assert [step.inputs for step in plan.steps[:2]] == [["alpha.txt"], ["beta.txt"]]


def test_inputs_that_no_part_names_are_not_lost() -> None:
    plan = planned(task("- what alpha.txt says\n- what beta.txt says", "doc", "alpha.txt", "beta.txt", "rest.txt"))
    assert "rest.txt" in {name for step in plan.steps for name in step.inputs}


def test_wide_maps_are_joined_in_a_tree_so_that_no_join_reads_more_than_eight() -> None:
    names = [f"n{number}.txt" for number in range(100)]
    plan = planned(task("Summarise", "doc", *names))
    assert max(len(step.inputs) for step in plan.steps) == 8
    assert len(plan.steps) == 100 + 13 + 2 + 1


def test_a_small_budget_takes_several_inputs_a_step() -> None:
    plan = planned(task("Summarise", "doc", "a", "b", "c", "d", "e", budget={"max_steps": 3}))
    assert [step.inputs for step in plan.steps[:2]] == [["a", "b", "c"], ["d", "e"]]
    assert len(planned(task("Summarise", "doc", "a", "b", budget={"max_steps": 2})).steps) == 1


def test_code_without_tests_is_drafted_reviewed_and_revised() -> None:
    plan = planned(task("Write a stack", "code"))
    assert [step.actor for step in plan.steps] == ["coder", "reviewer", "coder"]
    assert final_artefacts(plan) == ["solution"]
    assert len(planned(task("Write a stack", "code", budget={"max_steps": 2})).steps) == 1


def test_code_with_tests_is_one_step_named_as_the_tests_import_it() -> None:
    given_tests = Artefact(name="test_calc.py", kind=ArtefactKind.CODE, value=TESTS)
    plan = planned(task("Write add", "code").model_copy(update={"inputs": [given_tests]}))
    assert [(step.actor, step.outputs[0].name, step.inputs) for step in plan.steps] == [
        ("coder", "calc", ["test_calc.py"])
    ]


def test_listed_parts_of_code_are_written_side_by_side() -> None:
    plan = planned(task("Write a calculator:\n1. a lexer\n2. a parser\n3. an evaluator", "code"))
    assert shape(plan)["S4"] == {"S1", "S2", "S3"}
    assert {output.kind for step in plan.steps for output in step.outputs} == {ArtefactKind.CODE}


def test_ingest_extracts_json_under_a_schema_from_each_input() -> None:
    plan = planned(task("Names and dates", "ingest", "a.txt", "b.txt"))
    assert [step.actor for step in plan.steps] == ["extractor"] * 3
    assert all(step.json_schema and step.outputs[0].kind is ArtefactKind.JSON for step in plan.steps)


def test_manage_breaks_down_works_in_parallel_and_sums_up() -> None:
    plan = planned(task("Move the office", "manage"))
    assert shape(plan) == {"S1": set(), "S2": {"S1"}, "S3": {"S1"}, "S4": {"S1"}, "S5": {"S2", "S3", "S4"}}
    assert len(planned(task("Move the office", "manage", budget={"max_steps": 3})).steps) == 1


def test_missing_roles_are_replaced_with_the_reason() -> None:
    made = plan_by_rules(task("Write a stack", "code"), {"worker": None, "architect": None})
    assert [step.actor for step in made.plan.steps] == ["architect"] * 3
    assert "no role 'coder'" in made.notes[0]
    foreign = plan_by_rules(task("Say hello"), {"poet": None})
    assert foreign.plan.steps[0].actor == "poet"
    assert "'poet' does the work" in foreign.notes[0]


def test_the_table_of_roles_covers_all_work_and_names_roles_that_ship() -> None:
    assert set(ROLES_FOR) == set(Work)
    assert all(cast(work, SHIPPED.roles).note is None for work in Work)
    assert alternatives("coder", SHIPPED.roles) == ["architect", "worker"]


def test_a_question_that_compares_looks_up_each_thing_and_computes() -> None:
    plan = planned(task("Which is taller, the Eiffel Tower, Big Ben or the CN Tower?"))
    assert shape(plan) == {"S1": set(), "S2": set(), "S3": set(), "S4": {"S1", "S2", "S3"}}
    assert "Big Ben" in plan.steps[1].action
    assert [step.outputs[0].name for step in plan.steps] == [
        "fact_Eiffel_Tower",
        "fact_Big_Ben",
        "fact_CN_Tower",
        "answer",
    ]


def test_research_is_done_side_by_side_before_anything_is_written() -> None:
    plan = planned(task("Research the history of tea and write a report", "doc"))
    assert shape(plan) == {"S1": set(), "S2": set(), "S3": set(), "S4": {"S1", "S2", "S3"}}
    assert plan.steps[-1].actor == "writer"


def test_an_answer_that_divides_is_outlined_then_written_point_by_point() -> None:
    plan = planned(task("How to train a dog?", "doc"))
    outline, points, join = plan.steps
    assert points.map_over == outline.outputs[0].name
    assert join.inputs == [points.outputs[0].name]
    assert outline.json_schema is not None
    assert outline.json_schema["maxItems"] <= 8


def test_tests_that_are_asked_for_are_written_beside_the_code() -> None:
    plan = planned(task("Write a stack with tests", "code"))
    assert shape(plan) == {"S1": set(), "S2": set(), "S3": {"S1", "S2"}, "S4": {"S1", "S2", "S3"}}
    assert [step.actor for step in plan.steps] == ["coder", "coder", "reviewer", "coder"]


def test_facts_that_shall_be_checked_are_checked_against_their_own_input() -> None:
    plan = planned(
        task("Extract names and dates", "ingest", "a.txt", "b.txt", definition_of_done=["every fact is verified"])
    )
    assert shape(plan) == {"S1": set(), "S2": {"S1"}, "S3": set(), "S4": {"S3"}, "S5": {"S2", "S4"}}
    assert plan.steps[1].inputs == ["a.txt", "facts_a"]
    small = planned(task("Extract and check", "ingest", "a.txt", "b.txt", "c.txt", budget={"max_steps": 5}))
    assert len(small.steps) <= 5
