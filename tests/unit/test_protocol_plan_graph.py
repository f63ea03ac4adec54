"""Every plan that cannot run is refused with the step and the field; every plan that can is not."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.limits import MAX_STEPS
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.task import Budget, Output, Plan, Step, TaskIR
from protocol.plan_graph import final_artefacts, find_cycle, find_problems, needs, producers


def step(ident: str, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Step:
    made = [Output(name=name) for name in outputs or (f"out-{ident}",)]
    return Step(id=ident, actor="worker", action="do", inputs=[*inputs], outputs=made, depends_on=[*after])


def task(*steps: Step, given: tuple[str, ...] = (), max_steps: int = 1_000) -> TaskIR:
    inputs = [Artefact(name=name, value="x") for name in given]
    return TaskIR(objective="x", inputs=inputs, plan=Plan(steps=[*steps]), budget=Budget(max_steps=max_steps))


def problems(*steps: Step, given: tuple[str, ...] = ()) -> list[str]:
    return [str(problem) for problem in find_problems(task(*steps, given=given))]


def test_a_task_without_a_plan_has_no_problems() -> None:
    assert find_problems(TaskIR(objective="x")) == []


def test_a_cycle_through_data_is_named_in_waiting_order() -> None:
    found = problems(step("S1", ("c",), ("a",)), step("S2", ("a",), ("b",)), step("S3", ("b",), ("c",)))
    assert len(found) == 1
    assert found[0].startswith("plan.steps[S1].depends_on: the steps wait for each other: S1 -> S3 -> S2 -> S1")


def test_a_cycle_through_control_and_data_is_found() -> None:
    assert "wait for each other" in problems(step("S1", after=("S2",)), step("S2", ("out-S1",)))[0]


@pytest.mark.parametrize(
    ("steps", "where", "what"),
    [
        ((step("S1"), step("S1", outputs=("b",))), "plan.steps[S1].id", "used by two steps"),
        ((step("S1", ("nothing",)),), "plan.steps[S1].inputs", "no step makes 'nothing'"),
        ((step("S1", after=("S9",)),), "plan.steps[S1].depends_on", "there is no step 'S9'"),
        ((step("S1", after=("S1",)),), "plan.steps[S1].depends_on", "cannot wait for itself"),
        ((step("S1", ("a",), ("a",)),), "plan.steps[S1].inputs", "output of this very step"),
        ((step("S1", (), ("a",)), step("S2", (), ("a",))), "plan.steps[S2].outputs", "already made by step S1"),
        ((step("S1", (), ("spec",)),), "plan.steps[S1].outputs", "already an input of the task"),
        (
            (step("S1").model_copy(update={"json_schema": {"type": "object"}}),),
            "plan.steps[S1].json_schema",
            "exactly one output, of kind json",
        ),
    ],
)
def test_each_problem_names_step_and_field(steps: tuple[Step, ...], where: str, what: str) -> None:
    found = problems(*steps, given=("spec",))
    assert any(line.startswith(where) and what in line for line in found), found


def test_schema_and_grammar_exclude_each_other() -> None:
    made = [Output(name="a", kind=ArtefactKind.JSON)]
    both = step("S1").model_copy(update={"outputs": made, "json_schema": {}, "grammar": "root ::= [a-z]"})
    assert "exclude each other" in problems(both)[0]


def test_an_input_named_twice_is_a_problem() -> None:
    assert "named twice: spec" in problems(step("S1"), given=("spec", "spec"))[0]


def test_all_problems_are_listed_at_once() -> None:
    assert len(problems(step("S1", ("x",), after=("S9",)), step("S1", outputs=("b",)))) == 3


def test_ten_thousand_steps_are_refused_by_the_model_and_more_than_the_budget_by_the_graph() -> None:
    steps = [step(f"S{number}") for number in range(10_000)]
    with pytest.raises(ValidationError, match=str(MAX_STEPS)):
        Plan(steps=steps)
    found = find_problems(task(*steps[:11], max_steps=10))
    assert str(found[0]) == "plan.steps: 11 steps, but budget.max_steps is 10 (first step over it: S10)"


def test_the_longest_plan_allowed_is_checked_quickly_as_chain_and_as_cycle() -> None:
    chain = [step("S0", ("spec",))] + [step(f"S{n}", (f"out-S{n - 1}",)) for n in range(1, MAX_STEPS)]
    began = time.process_time()
    assert find_problems(task(*chain, given=("spec",), max_steps=MAX_STEPS)) == []
    chain[0] = step("S0", (f"out-S{MAX_STEPS - 1}",))
    assert len(find_problems(task(*chain, max_steps=MAX_STEPS))) == 1
    assert time.process_time() - began < 30


@st.composite
def dags(draw: st.DrawFn) -> list[Step]:
    """Steps whose edges only point back, in any order of the list."""
    size = draw(st.integers(1, 12))
    steps = []
    for number in range(size):
        earlier = st.sets(st.integers(0, number - 1)) if number else st.just(set())
        inputs = tuple(f"out-S{place}" for place in sorted(draw(earlier)))
        after = tuple(f"S{place}" for place in sorted(draw(earlier)))
        steps.append(step(f"S{number}", inputs, after=after))
    return draw(st.permutations(steps))


@given(dags())
def test_a_graph_without_cycles_has_no_problems_and_can_be_worked_off(steps: list[Step]) -> None:
    assert problems(*steps) == []
    plan = Plan(steps=steps)
    waiting = dict(needs(plan))
    while waiting:
        ready = {ident for ident, wanted in waiting.items() if not wanted & waiting.keys()}
        assert ready, "steps are left that nobody can start"
        for ident in ready:
            del waiting[ident]


@given(dags())
def test_final_artefacts_are_what_nobody_consumes(steps: list[Step]) -> None:
    plan = Plan(steps=steps)
    consumed = {name for one in steps for name in one.inputs}
    assert set(final_artefacts(plan)) == producers(plan).keys() - consumed
    assert final_artefacts(plan)


@given(st.dictionaries(st.sampled_from("abcdef"), st.frozensets(st.sampled_from("abcdefx"), max_size=3)))
def test_what_is_called_a_cycle_is_one_and_none_is_missed(graph: dict[str, frozenset[str]]) -> None:
    cycle = find_cycle(graph)
    for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True):
        assert there in graph[here]
    remaining = dict(graph)
    while free := [node for node, wanted in remaining.items() if not wanted & remaining.keys()]:
        for node in free:
            del remaining[node]
    assert bool(cycle) == bool(remaining)


def test_the_graph_of_a_plan_is_found_once_and_is_never_that_of_another() -> None:
    one, other = Plan(steps=[step("S1"), step("S2", ("out-S1",))]), Plan(steps=[step("S1"), step("S2")])
    assert needs(one) is needs(one)
    assert (needs(one)["S2"], needs(other)["S2"], needs(one)["S2"]) == ({"S1"}, frozenset(), {"S1"})
