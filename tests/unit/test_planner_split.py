"""Whether to split at all: what is written out is believed first, an opinion last, and one step is always offered."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from protocol.messages.task import TaskIR
from services.kit.plan_check import plan_problems
from services.planner.divide import Opinion, RuleJudge
from services.planner.labelled import BadRow, judge_of, read_labelled
from services.planner.request_features import shape_of, words_of
from services.planner.rules import plans_by_rules
from services.planner.split import How, Shape, split
from services.planner.trained import TrainedJudge
from tests.unit.planner_tasks import SHIPPED, task, tasks

DIVIDES = [
    f"How to {verb} a {noun}?" for verb in ("clean", "build", "find", "paint") for noun in ("boat", "house", "car")
]
WHOLE = [
    f"Write a {kind} about my {noun}."
    for kind in ("poem", "story", "letter", "song")
    for noun in ("boat", "cat", "car")
]


class Fixed:
    """A judge that always says the same."""

    def __init__(self, probability: float, name: str) -> None:
        self.opinion = Opinion(probability, ("test",), name)

    def judge(self, request: str) -> Opinion:
        return self.opinion


@pytest.mark.parametrize(
    ("objective", "task_type", "shape", "how", "width"),
    [
        ("Say hello", "chat", Shape.DIRECT, How.ONE_STEP, 1),
        ("Which is taller, the Eiffel Tower or Big Ben?", "chat", Shape.INDEPENDENT, How.LOOKUPS, 2),
        ("1. one\n2. two\n3. three", "chat", Shape.INDEPENDENT, How.PARTS, 3),
        ("Compare Python with Rust", "doc", Shape.INDEPENDENT, How.PARTS, 2),
        ("Research the history of tea and write a report", "doc", Shape.STAGED, How.RESEARCH, 1),
        ("Write a poem about love, death and time.", "chat", Shape.DIRECT, How.ONE_STEP, 1),
        ("How to train a dog?", "doc", Shape.STAGED, How.OUTLINE, 1),
        ("How to train a dog?", "chat", Shape.DIRECT, How.ONE_STEP, 1),
    ],
)
def test_the_rules_choose_by_the_strongest_evidence(
    objective: str, task_type: str, shape: Shape, how: How, width: int
) -> None:
    choice = split(task(objective, task_type), 100, RuleJudge()).choice
    assert (choice.shape, choice.how, choice.width) == (shape, how, width)
    assert choice.because


def test_a_trained_opinion_splits_what_nothing_else_splits_and_only_then() -> None:
    sure, unsure = Fixed(0.9, "trained"), Fixed(0.55, "trained")
    assert split(task("Say hello"), 100, sure).choice.how is How.OUTLINE
    assert [option.how for option in split(task("Say hello"), 100, unsure).options] == [How.ONE_STEP, How.OUTLINE]
    assert split(task("1. one\n2. two"), 100, Fixed(0.0, "trained")).choice.how is How.PARTS
    assert split(task("Say hello"), 5, sure).choice.how is How.ONE_STEP, "no room for an outline"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tasks())
def test_every_alternative_can_run_and_one_step_is_among_them(ir: TaskIR) -> None:
    plans = plans_by_rules(ir, SHIPPED.roles, Fixed(0.9, "trained"))
    for made in plans:
        planned = TaskIR.model_validate(ir.model_copy(update={"plan": made.plan}).model_dump())
        assert plan_problems(planned, SHIPPED) == []
    assert len({made.template for made in plans}) == len(plans)
    assert any(len(made.plan.steps) == 1 for made in plans)


def test_a_judge_learns_from_labels_and_says_what_it_saw() -> None:
    judge = TrainedJudge(DIVIDES + WHOLE, [True] * len(DIVIDES) + [False] * len(WHOLE))
    good, bad = judge.judge("How to paint a boat shed?"), judge.judge("Write a poem about my boat shed.")
    assert good.probability > 0.6 > 0.4 > bad.probability
    assert good.judge == "trained"
    assert len(good.evidence) > 2
    turned = TrainedJudge(DIVIDES + WHOLE, [False] * len(DIVIDES) + [True] * len(WHOLE))
    assert turned.judge("How to paint a boat shed?").probability < 0.4


@pytest.mark.parametrize("labels", [[True] * 12, [False] * 12, [True, False]])
def test_a_judge_needs_enough_rows_of_both_labels(labels: list[bool]) -> None:
    with pytest.raises(ValueError, match="both labels"):
        TrainedJudge(DIVIDES[: len(labels)], labels)


@pytest.mark.parametrize("text", ["", " ", "?", "\ud800", "面" * 5_000, "a" * 100_000, "``` $ \n" * 1_000])
def test_any_text_has_features_and_an_opinion(text: str) -> None:
    assert shape_of(text).keys() == shape_of("How?").keys()
    assert len(words_of(text)) < 4_000
    assert 0 < RuleJudge().judge(text).probability < 1


def test_a_file_of_labels_makes_a_trained_judge_and_without_one_the_rules_judge(tmp_path: Path) -> None:
    file = tmp_path / "divides.jsonl"
    assert isinstance(judge_of(file), RuleJudge)
    rows = [{"request": text, "decomposable": 1} for text in DIVIDES]
    rows += [{"request": text, "decomposable": False} for text in WHOLE]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    assert len(read_labelled(file)) == len(rows)
    assert isinstance(judge_of(file), TrainedJudge)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no row"),
        ("{}", "1: request"),
        ('{"request": "a", "decomposable": 1}\n{"request": "a"}', "2: decomposable"),
        ('{"request": "a", "decomposable": 2}', "1: decomposable"),
        ("[", "1: not JSON"),
        ("[]", "1: expected an object"),
        ('{"request": "a", "decomposable": 1}', "at least ten"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_line_and_field(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "divides.jsonl"
    file.write_text(text, "utf-8")
    with pytest.raises(BadRow, match=says):
        judge_of(file)
