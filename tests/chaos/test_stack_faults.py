"""kill -9, SIGSTOP and restarts on real processes with real models: nothing accepted is lost, nothing happens twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from protocol.messages.result import TaskEvent, TaskState, TaskView
from services.ctl.bench.bare_stack import BareStack
from services.scheduler.fact_rows import every_fact
from services.scheduler.facts import AttemptStarted, Fact
from tests.system.conftest import demo_models
from tests.waiting import until

pytestmark = pytest.mark.chaos


@pytest.fixture
def stack(short_folder: Path) -> Iterator[BareStack]:
    built = BareStack(short_folder, models=demo_models())
    table = built.registry / "roles.yaml"
    roles = yaml.safe_load(table.read_text(encoding="utf-8"))
    for role in roles["roles"].values():
        role["early_abort"] = {"enabled": False}  # a small model that repeats itself is no fault of the stack
    table.write_text(yaml.safe_dump(roles, sort_keys=False), encoding="utf-8")
    with built as running:
        yield running


def three_steps(index: int) -> dict[str, Any]:
    """Two workers and a join, short enough for ten of them on two cores."""
    short = {"gates": [], "max_tokens": 24}
    return {
        "idempotency_key": f"chaos-{index}",
        "objective": f"Say something about the number {index}.",
        "plan": {
            "steps": [
                {"id": "S1", "actor": "worker", "action": "Say one word.", "outputs": [{"name": "one"}]} | short,
                {"id": "S2", "actor": "worker", "action": "Say two words.", "outputs": [{"name": "two"}]} | short,
                {
                    "id": "S3",
                    "actor": "writer",
                    "action": "Join both.",
                    "inputs": ["one", "two"],
                    "outputs": [{"name": "three"}],
                }
                | short,
            ]
        },
    }


def facts_of(stack: BareStack, kind: str) -> list[Fact]:
    """Facts of one kind in the journal."""
    with sqlite3.connect(f"file:{stack.home.journal}/journal.sqlite?mode=ro", uri=True) as journal:
        return [fact for fact in every_fact(journal) if type(fact).__name__ == kind]


def assert_applied_once(stack: BareStack, views: list[TaskView]) -> None:
    for view in views:
        done = [fact for fact in facts_of(stack, "StepDone") if fact.task == view.task_id]
        ended = [fact for fact in facts_of(stack, "TaskEnded") if fact.task == view.task_id]
        assert len(done) == len(view.steps)
        assert len(ended) == 1


def long_story(max_tokens: int) -> dict[str, Any]:
    step = {"id": "S1", "actor": "worker", "action": "Write a very long story about the sea, with many chapters."}
    limits = {"max_tokens": max_tokens, "gates": [], "timeout_s": 300}
    return {"objective": "A long story.", "plan": {"steps": [step | {"outputs": [{"name": "story"}]} | limits]}}


def wait_for_tokens(stack: BareStack, task_id: str) -> None:
    """Until the engine decodes for it. Whether tokens are streamed depends on who is first, the watcher or the step."""
    for event in stack.client.watch(task_id, timeout_s=300):
        if isinstance(event, TaskEvent) and event.event in ("step.started", "step.tokens"):
            until(lambda: decodes(stack, "inference-worker"), "the engine decodes")
            return
    raise AssertionError("the step ended before it began")


def decodes(stack: BareStack, service: str) -> bool:
    peer = next(peer for peer in stack.client.status().peers if peer.service == service)
    return bool(peer.metrics["requests_processing"])


def generated_total(stack: BareStack, service: str, *, idle: bool = False) -> int:
    """llama.cpp's own counter of generated tokens, as its service reports it; 0 while it is not `idle` as asked for."""
    peer = next(peer for peer in stack.client.status().peers if peer.service == service)
    return 0 if idle and peer.metrics["requests_processing"] else int(peer.metrics["tokens_predicted_total"])


def test_ten_tasks_finish_though_every_service_is_killed_in_turn(stack: BareStack) -> None:
    accepted = [stack.client.submit(three_steps(index)) for index in range(10)]
    for name in stack.argv:
        time.sleep(1.0)
        stack.restart(name)
    views = [stack.client.result(one.task_id, timeout_s=300) for one in accepted]
    assert [view.state for view in views] == [TaskState.SUCCEEDED] * 10
    assert_applied_once(stack, views)
    stack.wait_ready()
    repeated = [stack.client.submit(three_steps(index)) for index in range(10)]
    assert all(one.duplicate for one in repeated), "a repeated submit is the same task, also after a restart"


def test_a_frozen_inference_service_applies_nothing_twice_when_it_wakes(stack: BareStack) -> None:
    accepted = stack.client.submit(long_story(200))
    wait_for_tokens(stack, accepted.task_id)
    stack.kill("inference-worker", signal.SIGSTOP)
    until(
        lambda: "inference-worker" not in [peer.service for peer in stack.client.status().peers], "it lost its session"
    )
    stack.kill("inference-worker", signal.SIGCONT)
    view = stack.client.result(accepted.task_id, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED
    assert_applied_once(stack, [view])
    stack.wait_ready()


def test_a_restarted_scheduler_reattaches_the_running_answer(stack: BareStack) -> None:
    stack.client.run(long_story(8), timeout_s=300)
    accepted = stack.client.submit(long_story(400))
    wait_for_tokens(stack, accepted.task_id)
    before = generated_total(stack, "inference-worker")
    stack.restart("scheduler")
    view = stack.client.result(accepted.task_id, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED
    assert len(view.steps[0].attempts) == 1
    generated = view.usage.generated_tokens
    least = generated - 50
    until(lambda: generated_total(stack, "inference-worker", idle=True) >= least, "the tokens are counted")
    spent = generated_total(stack, "inference-worker") - before
    assert generated - 50 <= spent + before <= before + generated + 16, "one generation, not two"
    started = [fact for fact in facts_of(stack, "AttemptStarted") if fact.task == accepted.task_id]
    assert any(isinstance(fact, AttemptStarted) and fact.reattached for fact in started)


def test_a_dead_llama_server_is_replaced_and_its_step_runs_again(stack: BareStack) -> None:
    accepted = stack.client.submit(long_story(300))
    wait_for_tokens(stack, accepted.task_id)
    peer = next(peer for peer in stack.client.status().peers if peer.service == "inference-worker")
    os.kill(int(peer.metrics["child_pid"]), signal.SIGKILL)
    view = stack.client.result(accepted.task_id, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED
    assert len(view.steps[0].attempts) == 1, "a lost process is no attempt"
    assert view.steps[0].losses == 1
