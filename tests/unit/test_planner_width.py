"""How wide plans are, which answer they give, and the narrower ones that are offered beside the rules' plan."""

from __future__ import annotations

import pytest

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.task import Budget, TaskIR, TaskType
from services.kit.plan_check import plan_problems
from services.planner.advice import WIDTH_KEY, request, split_cluster
from services.planner.rules import RulePlan, plans_by_rules
from services.planner.split import Shape
from services.planner.width import answer_of, told, width_of
from tests.unit.planner_tasks import SHIPPED


def task_of(inputs: int, task_type: TaskType = TaskType.DOC, **fields: object) -> TaskIR:
    given = [Artefact(name=f"n{n}", kind=ArtefactKind.TEXT, value=f"note {n} " * 20) for n in range(inputs)]
    return TaskIR.model_validate({"task_type": task_type, "objective": "Summarise these", "inputs": given} | fields)


def offered(task: TaskIR) -> dict[str, RulePlan]:
    return {one.template: one for one in plans_by_rules(task, SHIPPED.roles)}


def test_narrower_maps_are_offered_behind_the_rules_choice_where_there_is_enough_to_share() -> None:
    plans = offered(task_of(8))
    assert list(plans) == ["doc.map-join/8", "doc.single/1", "doc.map-join-by2/4", "doc.map-join-by4/2"]
    assert [width_of(one.plan) for one in plans.values()] == [8, 1, 4, 2]
    assert list(offered(task_of(3))) == ["doc.map-join/3", "doc.single/1"]


def test_a_budget_that_makes_two_of_them_equal_offers_one() -> None:
    plans = offered(task_of(8, budget=Budget(max_steps=3)))
    assert [width_of(one.plan) for one in plans.values()] == [2, 1]


@pytest.mark.parametrize("kind", list(TaskType))
@pytest.mark.parametrize("inputs", [0, 5, 20])
def test_every_offered_plan_can_run(kind: TaskType, inputs: int) -> None:
    objective = "Do this:\n" + "\n".join(f"{n}. part number {n} of the work" for n in range(1, 10))
    task = task_of(inputs, kind, objective=objective)
    for one in plans_by_rules(task, SHIPPED.roles):
        assert not plan_problems(task.model_copy(update={"plan": one.plan}), SHIPPED), one.template


@pytest.mark.parametrize(
    ("task", "shape", "words"),
    [
        (task_of(0, objective="Say hello"), Shape.DIRECT, "done directly, in one step"),
        (task_of(4), Shape.INDEPENDENT, "split into 4 independent parts"),
        (task_of(20), Shape.INDEPENDENT, "split into 20 independent parts"),
        (
            task_of(0, objective="Research solar power and wind power, then write a report about them"),
            Shape.INDEPENDENT,
            "split into 3 independent parts",
        ),
        (
            task_of(0, TaskType.CODE, objective="Write a parser with tests"),
            Shape.STAGED,
            "done in stages, up to 2 steps side by side",
        ),
        (
            task_of(0, TaskType.CODE, objective="Write a parser"),
            Shape.STAGED,
            "done in stages, one step after the other",
        ),
        (task_of(0, TaskType.MANAGE, objective="Move the office"), Shape.STAGED, "done in stages, up to 3"),
    ],
)
def test_the_three_answers(task: TaskIR, shape: Shape, words: str) -> None:
    plan = plans_by_rules(task, SHIPPED.roles)[0].plan
    assert answer_of(plan) is shape
    assert told(plan).startswith(words)


def test_memory_is_asked_with_the_width_of_every_option_and_one_cluster_for_tasks_alike() -> None:
    def asked(inputs: int) -> tuple[str, dict[str, int | None]]:
        task = task_of(inputs)
        plans = {one.template: one.plan for one in plans_by_rules(task, SHIPPED.roles)}
        made = request(task, plans, SHIPPED, task.objective)
        assert made is not None
        (question,) = (one for one in made.questions if one.key == WIDTH_KEY)
        assert question.cluster == split_cluster(task, plans)
        return question.cluster, {option.choice: option.width for option in question.options}

    cluster, widths = asked(8)
    assert widths == {"doc.map-join": 8, "doc.map-join-by2": 4, "doc.map-join-by4": 2, "doc.single": 1}
    assert cluster == asked(9)[0] != asked(4)[0]
