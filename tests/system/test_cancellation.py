"""Cancellation reaches what really runs, and work that nobody wants any more is not begun. Real processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from protocol.messages.reply import ErrorReply
from protocol.messages.result import StepState, TaskState
from services.ctl.bench.bare_stack import BareStack
from tests.system.inference_stack import InferenceStack, ask_for
from tests.waiting import until

MODELS = {
    "front": {"tier": "A", "engine": "noop", "slots": 4, "context_tokens": 4096},
    "specialist": {"tier": "B", "engine": "noop", "slots": 4, "context_tokens": 4096},
    "worker": {"tier": "C", "engine": "noop", "slots": 4, "context_tokens": 4096},
}
HANG = {
    "description": "Never comes to an end by itself.",
    "kinds": ["text"],
    "category": "CODE",
    "argv": ["{python}", "-c", "import os, time; os.fork(); time.sleep(300)"],
    "timeout_s": 300,
}


@pytest.fixture
def stack(short_folder: Path) -> Iterator[BareStack]:
    made = BareStack(short_folder, models=MODELS)
    gates = made.registry / "gates.yaml"
    declared = yaml.safe_load(gates.read_text())
    declared["gates"]["hang"] = HANG
    gates.write_text(yaml.safe_dump(declared, sort_keys=False))
    with made as running:
        yield running


def hanging_task() -> dict[str, Any]:
    """Two independent halves: S1, whose gate hangs, with S2 behind it; and S3, which is done at once."""
    steps = [
        {"id": "S1", "gates": ["hang"], "outputs": [{"name": "a"}]},
        {"id": "S2", "gates": [], "inputs": ["a"], "outputs": [{"name": "b"}]},
        {"id": "S3", "gates": [], "outputs": [{"name": "c"}]},
    ]
    plan = [{"actor": "worker", "action": "answer"} | step for step in steps]
    return {"objective": "An order.", "plan": {"steps": plan}}


def sandboxed(stack: BareStack) -> list[psutil.Process]:
    """What sleeps inside a sandbox below the gates service."""
    found = []
    for process in psutil.Process(stack.processes["gates"].pid).children(recursive=True):
        try:
            if "time.sleep(300)" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def states(stack: BareStack, task_id: str) -> dict[str, StepState]:
    return {step.id: step.state for step in stack.client.show(task_id).steps}


def gates_are_free(stack: BareStack) -> bool:
    peer = next(peer for peer in stack.client.status().peers if peer.service == "gates")
    return not peer.in_flight


def test_cancelling_a_task_ends_what_runs_in_its_sandbox(stack: BareStack) -> None:
    task_id = stack.client.submit(hanging_task()).task_id
    until(lambda: len(sandboxed(stack)) >= 2, "the gate runs")
    inside = sandboxed(stack)
    until(lambda: states(stack, task_id)["S3"] is StepState.DONE, "S3 is done")
    assert stack.client.cancel(task_id).state is TaskState.CANCELLED
    until(lambda: not sandboxed(stack) and not any(one.is_running() for one in inside), "the sandbox ends")
    until(lambda: gates_are_free(stack), "its slot is free")
    assert stack.client.cancel(task_id).state is TaskState.CANCELLED, "a second time changes nothing"
    assert states(stack, task_id) == {"S1": StepState.CANCELLED, "S2": StepState.CANCELLED, "S3": StepState.DONE}


def test_cancelling_a_step_ends_its_sandbox_and_its_subtree_and_nothing_else(stack: BareStack) -> None:
    task_id = stack.client.submit(hanging_task()).task_id
    until(lambda: len(sandboxed(stack)) >= 2, "the gate runs")
    stack.client.cancel(task_id, step="S1")
    until(lambda: not sandboxed(stack), "the sandbox ends")
    view = stack.client.result(task_id, 100)
    assert view.state is TaskState.SUCCEEDED
    assert [artefact.name for artefact in view.artefacts] == ["c"]
    assert states(stack, task_id) == {"S1": StepState.CANCELLED, "S2": StepState.CANCELLED, "S3": StepState.DONE}
    until(lambda: gates_are_free(stack), "its slot is free")


def test_a_worker_does_not_begin_what_is_past_its_deadline_when_it_gets_to_it() -> None:
    with InferenceStack() as stack:
        stack.entry("m", engine="noop")
        process = stack.start("m")
        stack.hub.await_peer("inference-m")
        process.send_signal(signal.SIGSTOP)
        late = stack.hub.request("inference-m", "infer.request", ask_for("x"), deadline=int((time.time() + 0.3) * 1000))
        wanted = stack.hub.request("inference-m", "infer.request", ask_for("y"))
        time.sleep(0.6)
        process.send_signal(signal.SIGCONT)
        _, refused, _ = stack.hub.collect(late)
        assert isinstance(refused, ErrorReply)
        assert (refused.failure.code, refused.failure.category.value) == ("call.expired", "TIMEOUT")
        header, _, _ = stack.hub.collect(wanted)
        assert header.kind == "infer.final", "the next one is not held up"
