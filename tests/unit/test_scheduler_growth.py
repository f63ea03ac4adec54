"""Graphs that grow while they run: mapped steps with an exactly-once join, added steps, cancelled branches."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferRequest
from protocol.messages.reply import ErrorReply
from protocol.messages.result import CancelQuery, StepState, TaskQuery, TaskState, TaskView
from protocol.messages.task import Extend, Submit
from services.scheduler import facts as f
from services.scheduler import snapshot
from services.scheduler.audit import audit_task, problems_of
from services.scheduler.effects import Record
from services.scheduler.fact_rows import advance
from services.scheduler.journal import Journal
from services.scheduler.tasks import TaskRecord
from tests.unit.simulation import Answer, World, final_of, stack, task_of


def mapped(count: int, **changes: object) -> list[dict[str, object]]:
    """A step that makes a list, a step mapped over it, a step that reads what came of it."""
    return [
        {"id": "L", "action": f"list {count}", "outputs": [{"name": "items", "kind": "json"}]},
        {"id": "M", "map_over": "items", "outputs": [{"name": "parts", "kind": "json"}]} | changes,
        {"id": "J", "inputs": ["parts"], "action": "join"},
    ]


def listing(header: Header, body: bytes) -> Answer:
    prompt = unpack_body(InferRequest, body).messages[-1].content
    if header.step == "L":
        count = int(prompt.split("list ")[1].split("\n")[0])
        return 10, final_of(json.dumps([f"item {n}" for n in range(count)]))
    if (header.step or "").startswith("M."):
        return 50, final_of(json.dumps({"of": header.step}))
    return 10, final_of(prompt[-60:])


def refused(world: World, kind: str, body: Submit | Extend) -> str:
    header, answer = world.client(kind, body)
    assert header.kind == "error"
    assert isinstance(answer, ErrorReply)
    return answer.failure.message


@pytest.mark.parametrize("count", [0, 1, 7, 1_000])
def test_a_mapped_step_runs_once_per_item_and_joins_once_in_order(count: int) -> None:
    world = stack(listing, slots=32)
    task = world.submit(task_of(mapped(count), budget={"max_steps": 2_000}))
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert len(result.steps) == 3 + count
    record = world.recorded_tasks()[task]
    assert record.artefacts["parts"].value == [{"of": f"M.{n}"} for n in range(1, count + 1)]
    assert sum(1 for fact in world.facts(task) if type(fact).__name__ == "StepJoined") == 1
    assert result.critical_path is not None
    path = result.critical_path.path
    assert sum(segment.end_ms - segment.start_ms for segment in path) == result.critical_path.wall_ms


def test_the_item_reaches_its_sub_step_and_no_other() -> None:
    prompts: dict[str, str] = {}

    def answer(header: Header, body: bytes) -> Answer:
        prompts[header.step or ""] = unpack_body(InferRequest, body).messages[-1].content
        return listing(header, body)

    world = stack(answer)
    world.finish(world.submit(task_of(mapped(3))))
    assert "item 1" in prompts["M.2"]
    assert "item 0" not in prompts["M.2"]
    assert "item 2" not in prompts["M.2"]


def test_a_mapped_step_survives_restarts_of_the_hub_without_doing_anything_twice() -> None:
    world = stack(listing, slots=4)
    task = world.submit(task_of(mapped(20)))
    for _ in range(4):
        world.run_for(120)
        world.kill_hub()
        world.run_for(400)
        world.boot_hub()
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED
    started = [key for peer in world.peers.values() if peer.service == "inference-worker" for key in peer.started]
    assert len(started) == len(set(started)) == 22
    done = [fact.step for fact in world.facts(task) if type(fact).__name__ == "StepDone"]
    assert len(done) == len(set(done)) == 23


def test_what_is_no_list_or_too_long_a_one_fails_the_step_with_the_reason() -> None:
    world = stack(lambda header, body: (10, final_of('{"not": "a list"}')))
    result = world.finish(world.submit(task_of(mapped(3))))
    assert result.failure is not None
    assert result.failure.code == "map.not_a_list"
    world = stack(listing)
    result = world.finish(world.submit(task_of(mapped(30), budget={"max_steps": 10})))
    assert result.failure is not None
    assert result.failure.code == "budget.steps"
    assert "30 items" in result.failure.message


def test_a_sub_step_that_fails_for_good_fails_the_task_with_its_name() -> None:
    def answer(header: Header, body: bytes) -> Answer:
        if header.step == "M.2":
            return 10, Failure(code="x", category=Category.POLICY, origin="test", message="no")
        return listing(header, body)

    world = stack(answer)
    result = world.finish(world.submit(task_of(mapped(3))))
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert "M.2" in result.failure.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"map_over": "nowhere"}, ["plan.steps[M].map_over", "nowhere"]),
        ({"outputs": [{"name": "c", "kind": "code"}]}, ["plan.steps[M].outputs"]),
        ({"id": "M" * 60}, ["48 letters"]),
    ],
)
def test_a_mapped_step_that_cannot_work_is_refused(changes: dict[str, object], words: list[str]) -> None:
    steps = mapped(3, **changes)[:2]
    message = refused(stack(), "task.submit", Submit(task=task_of(steps).model_dump(mode="json", exclude_none=True)))
    assert all(word in message for word in words), message


def extra(name: str, **changes: object) -> dict[str, object]:
    step = {"id": name, "actor": "worker", "action": "more", "outputs": [{"name": f"{name}.out"}], "gates": []}
    return step | changes


def test_steps_can_be_added_to_a_running_task() -> None:
    world = stack(lambda header, body: (1_000, final_of(f"made by {header.step}")))
    task = world.submit(task_of([{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]))
    world.run_for(1_300)
    steps = [extra("A", inputs=["S1.out"]), extra("B", inputs=["A.out", "S2.out"])]
    header, _ = world.client("task.extend", Extend(task_id=task, steps=steps))
    assert header.kind == "task.extended"
    world.kill_hub()
    world.run_for(200)
    world.boot_hub()
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED
    assert [artefact.name for artefact in result.artefacts] == ["B.out"]
    assert {step.id: step.needs for step in result.steps}["B"] == ["A", "S2"]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([extra("S1")], ["S1", "already"]),
        ([extra("A", inputs=["nothing"])], ["plan.steps[A].inputs"]),
        ([extra("A", actor="nobody")], ["plan.steps[A].actor"]),
        ([extra(f"A{n}") for n in range(5)], ["budget.max_steps leaves room for 3"]),
        ([{"id": "A"}], ["actor"]),
    ],
)
def test_steps_that_do_not_fit_are_refused_and_the_task_goes_on(
    steps: list[dict[str, object]], words: list[str]
) -> None:
    world = stack(lambda header, body: (1_000, final_of("fine")))
    task = world.submit(task_of([{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}], budget={"max_steps": 5}))
    world.run_for(300)
    message = refused(world, "task.extend", Extend(task_id=task, steps=steps))
    assert all(word in message for word in words), message
    assert world.finish(task).state is TaskState.SUCCEEDED


def test_an_ended_task_takes_no_steps() -> None:
    world = stack()
    task = world.submit(task_of([{"id": "S1"}]))
    world.finish(task)
    assert "succeeded" in refused(world, "task.extend", Extend(task_id=task, steps=[extra("A")]))


def test_a_cancelled_step_takes_what_needs_it_along_and_the_rest_goes_on() -> None:
    world = stack(lambda header, body: (1_000, final_of("fine")))
    steps: list[dict[str, object]] = [
        {"id": "A"},
        {"id": "B", "inputs": ["A.out"]},
        {"id": "C", "inputs": ["B.out"]},
        {"id": "D", "inputs": ["A.out"]},
    ]
    task = world.submit(task_of(steps))
    world.run_for(1_500)
    world.client("task.cancel", CancelQuery(task_id=task, step="B"))
    world.client("task.cancel", CancelQuery(task_id=task, step="B"))
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED
    assert {step.id: step.state for step in result.steps} == {
        "A": StepState.DONE,
        "B": StepState.CANCELLED,
        "C": StepState.CANCELLED,
        "D": StepState.DONE,
    }
    header, _ = world.client("task.cancel", CancelQuery(task_id=task, step="Z"))
    assert header.kind == "error"


def test_cancelling_a_mapped_step_cancels_its_sub_steps() -> None:
    world = stack(listing, slots=2)
    task = world.submit(task_of([*mapped(10), {"id": "X"}]))
    world.run_for(150)
    world.client("task.cancel", CancelQuery(task_id=task, step="M"))
    result = world.finish(task)
    states = {step.id: step.state for step in result.steps}
    assert states["J"] is StepState.CANCELLED
    assert states["M"] is StepState.CANCELLED
    assert states["M.10"] is StepState.CANCELLED
    assert states["X"] is StepState.DONE
    assert result.state is TaskState.SUCCEEDED


def test_a_task_that_cannot_go_on_says_why() -> None:
    world = stack(lambda header, body: (5_000, final_of("fine")), slots=1)
    world.peers["inference-specialist"].kill()
    world.run_for(1_500)
    task = world.submit(task_of([{"id": "A", "actor": "coder"}, {"id": "B"}, {"id": "C"}]))
    world.run_for(1_000)
    _, body = world.client("task.show", TaskQuery(task_id=task))
    assert isinstance(body, TaskView)
    first, second = sorted(body.waiting)
    assert first.startswith("step A (role coder) waits for infer.specialist: 0 workers alive since 1970-01-01T")
    assert second == "step C (role worker) waits for a slot of infer.worker: all are busy, 1 call waits"


def test_a_grown_task_is_the_same_from_its_snapshot_and_stands_the_audit(tmp_path: Path) -> None:
    world = stack(listing, slots=4)
    task = world.submit(task_of(mapped(5)))
    world.run(lambda: any(kind == "StepExpanded" for _, _, kind, _ in world.journal))
    world.client("task.extend", Extend(task_id=task, steps=[extra("A", inputs=["items"])]))
    world.finish(task)
    world.run_for(1_000)
    journal = Journal(tmp_path / "j.sqlite")
    record: TaskRecord | None = None
    for name, seq, kind, data in world.journal:
        fact = f.unpack_fact(kind, data)
        journal.append([Record(fact, seq)])
        record = advance(record, seq, fact)
        copy = snapshot.unpack(snapshot.pack(record))
        assert name == task
        assert copy is not None
        assert snapshot.plain(copy) == snapshot.plain(record)
        assert list(problems_of(record)) == []
    journal.close()
    with sqlite3.connect(tmp_path / "j.sqlite") as database:
        assert audit_task(database, task) == []
