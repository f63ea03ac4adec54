"""What memory is told of a finished task: every decision that has an outcome, as it was when it was taken."""

from dataclasses import replace

from protocol.messages.memory import RecordOutcomes
from protocol.messages.plan import RoutingDecision
from protocol.messages.task import TaskIR
from services.scheduler.durations import TokenSpeed
from services.scheduler.outcomes import outcomes_of
from services.scheduler.simulation.run import run_tasks, tiers_of
from tests.unit.planner_tasks import SHIPPED


def decision(ids: dict[str, str]) -> RoutingDecision:
    return RoutingDecision(
        ids=ids,
        subject="role",
        choice="worker",
        alternatives=["coder"],
        propensity=0.7,
        rule="outcomes agree",
        task_type="chat",
        features={"steps": 2.0},
        cluster="worker",
        registry_digest="an older one",
        model="m1",
        prompt="p1",
    )


def test_the_decisions_go_with_their_outcomes_and_say_what_stood_behind_them_when_they_were_taken() -> None:
    steps = [
        {"id": "S1", "actor": "worker", "action": "work", "gates": [], "outputs": [{"name": "a"}]},
        {"id": "S2", "actor": "worker", "action": "work", "gates": [], "outputs": [{"name": "b"}], "inputs": ["a"]},
    ]
    task = TaskIR.model_validate({"objective": "work", "plan": {"steps": steps}})
    (record,) = run_tasks([task], SHIPPED, tiers_of(SHIPPED), TokenSpeed(100), TokenSpeed(100)).tasks
    assert record.plan is not None
    taken = [decision({"S1": "D-1", "S2": "D-2"}), decision({"": "D-3"})]
    record.plan = replace(record.plan, decisions=[one.model_dump(mode="json") for one in taken])
    request = outcomes_of(record, SHIPPED)
    assert request is not None
    told = request.ask
    assert isinstance(told, RecordOutcomes)
    assert told.text == "work"
    assert [(one.decision_id, one.step) for one in told.decisions] == [("D-1", "S1"), ("D-2", "S2"), ("D-3", None)]
    assert [one.decision_id for one in told.outcomes] == ["D-1", "D-2", "D-3"]
    first = told.decisions[0]
    assert first.task_id == record.id
    for name in RoutingDecision.model_fields.keys() - {"advice", "ids"}:
        assert getattr(first, name) == getattr(taken[0], name)
    earlier = [
        {**one.model_dump(mode="json", exclude={"ids"}), "decision_id": ident, "step": step or None}
        for one in taken
        for step, ident in one.ids.items()
    ]
    record.plan = replace(record.plan, decisions=earlier)
    assert outcomes_of(record, SHIPPED) == request, "as an earlier version's journal has them, one for each step"
