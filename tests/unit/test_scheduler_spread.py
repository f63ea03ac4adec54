"""How the steps of a finished task were spread, taken from runs of the real hub in virtual time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol.messages.memory import Outcome, RecordOutcomes, Spread
from protocol.messages.plan import PlanVersion, RoutingDecision
from protocol.messages.result import StepState
from protocol.messages.task import TaskIR
from services.scheduler.durations import TokenSpeed
from services.scheduler.outcomes import outcomes_of
from services.scheduler.simulation.run import run_tasks, tiers_of
from services.scheduler.spread import spread_of
from services.scheduler.tasks import TaskRecord
from tests.unit.planner_tasks import SHIPPED


def ran(*steps: dict[str, Any], **fields: Any) -> TaskRecord:
    filled = [{"actor": "worker", "action": "work", "gates": []} | step for step in steps]
    task = TaskIR.model_validate({"objective": "spread", "plan": {"steps": filled}} | fields)
    (record,) = run_tasks([task], SHIPPED, tiers_of(SHIPPED), TokenSpeed(100), TokenSpeed(100)).tasks
    return record


def made(name: str, *inputs: str) -> dict[str, Any]:
    return {"id": f"S{name}", "inputs": list(inputs), "outputs": [{"name": name}]}


def test_a_chain_is_not_spread() -> None:
    assert spread_of(ran(made("a"), made("b", "a"), made("c", "b"))) == Spread(
        width=1, assigned=0, finished=0, useful=0
    )


def test_steps_beside_others_are_counted_and_equal_results_once() -> None:
    record = ran(made("a"), made("b"), made("c"), made("d", "a", "b", "c"))
    assert spread_of(record) == Spread(width=3, assigned=3, finished=3, useful=1), "the simulation writes one word"
    record.artefacts["a"] = record.artefacts["a"].model_copy(update={"value": "something else"})
    record.artefacts["b"] = record.artefacts["b"].model_copy(update={"value": "  "})
    assert spread_of(record) == Spread(width=3, assigned=3, finished=3, useful=2)


def test_what_never_ran_is_assigned_and_not_finished() -> None:
    record = ran(made("a"), made("b"), made("c", "a", "b"))
    record.steps["Sb"].state = StepState.SKIPPED
    assert spread_of(record) == Spread(width=2, assigned=2, finished=1, useful=1)


def test_the_sub_steps_of_a_map_count_and_their_join_does_not() -> None:
    record = ran(
        made("out") | {"map_over": "things"},
        made("end", "out"),
        inputs=[{"name": "things", "kind": "json", "value": [1, 2, 3]}],
    )
    assert spread_of(record) == Spread(width=3, assigned=3, finished=3, useful=1)


def of_decomposition(record: TaskRecord, *alternatives: str) -> Outcome:
    """What memory is told about a decision for this task's plan, taken from these alternatives."""
    decision = RoutingDecision(
        ids={"": "D-1"},
        subject="decomposition",
        choice="doc.map-join/2",
        alternatives=list(alternatives),
        propensity=0.5,
        rule="two inputs",
        task_type="doc",
    )
    assert record.plan is not None
    record.plan = replace(record.plan, decisions=[decision.model_dump(mode="json")])
    request = outcomes_of(record, SHIPPED)
    assert request is not None
    assert isinstance(request.ask, RecordOutcomes)
    (outcome,) = request.ask.outcomes
    return outcome


def test_a_decomposition_is_told_its_spread_where_there_was_a_choice() -> None:
    record = ran(made("a"), made("b"), made("c", "a", "b"))
    chosen, given = of_decomposition(record, "doc.single/1"), of_decomposition(record)
    assert (chosen.reward, chosen.spread) == (1.0, spread_of(record))
    assert (given.reward, given.spread) == (1.0, None)
    assert chosen.staged is None, "crediting is memory's business"


def test_a_plan_that_was_given_up_has_no_success_though_its_task_has() -> None:
    record = ran(made("a"), made("b"), made("c", "a", "b"))
    made_anew = PlanVersion(version=2, at_ms=1, trigger="failed", reason="a review says no", adopted_ms=2)
    for version, reward in ((made_anew.model_copy(update={"adopted_ms": None}), 1.0), (made_anew, 0.0)):
        record.versions = [version]
        assert of_decomposition(record, "doc.single/1").reward == reward
