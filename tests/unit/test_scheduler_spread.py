"""How the steps of a finished task were spread, taken from runs of the real hub in virtual time."""

from __future__ import annotations

from typing import Any

from protocol.messages.memory import Spread
from protocol.messages.result import StepState
from protocol.messages.task import TaskIR
from services.scheduler.durations import TokenSpeed
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
