"""Warm models with real processes: two of them under a budget that holds one, faults while they load, the commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest

from protocol.messages.result import TaskState, TaskView
from protocol.messages.session import ModelReport, PeerReport, StatusReport
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import DEMO_MODEL
from services.kit.config import CHECKOUT
from services.scheduler.place import MIN_RESIDENCE_MS
from tests.conftest import temporary_home
from tests.waiting import until

NEED = 500_000_000
BUDGET = 800_000_000
WARM = {
    "path": DEMO_MODEL, "slots": 2, "context_tokens": 1024, "threads": 1, "residency": "warm", "memory_bytes": NEED
}  # fmt: skip


@pytest.fixture(scope="module")
def stack() -> Iterator[BareStack]:
    """The hub with a front door that costs nothing, and two warm models of which the budget holds one."""
    models = {
        "front": {"tier": "A", "engine": "noop", "slots": 2, "context_tokens": 3072},
        "specialist": {"tier": "B", "engine": "embedded", **WARM},
        "worker": {"tier": "C", "engine": "llama-server", **WARM},
    }
    with temporary_home() as path:
        made = BareStack(path, models=models)
        (made.registry / "hardware.yaml").write_text(f"hardware:\n  memory_bytes: {BUDGET}\n")
        roles = (made.registry / "roles.yaml").read_text()
        (made.registry / "roles.yaml").write_text(roles.replace("max_tokens: 768", "max_tokens: 512"))
        with made as running:
            yield running


@pytest.fixture(autouse=True)
def parked(stack: BareStack) -> None:
    """Every test begins with both models out of memory."""
    for model in ("specialist", "worker"):
        run(stack, "models", "unload", model)
    once(stack, lambda report: report.memory is not None and report.memory.held_bytes == 0, "all memory is free")


def run(stack: BareStack, *argv: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "services.ctl", *argv, "--json"],
        cwd=CHECKOUT, env=stack.environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def once(stack: BareStack, holds: Callable[[StatusReport], bool], what: str) -> StatusReport:
    """The first status of which this holds."""
    seen: list[StatusReport] = []

    def reached() -> bool:
        seen.append(stack.client.status())
        return holds(seen[-1])

    until(reached, what, look_every_s=0.02)
    return seen[-1]


def place(report: StatusReport, model: str) -> ModelReport:
    return next(one for one in report.models if one.model == model)


def peer(report: StatusReport, model: str) -> PeerReport:
    return next(one for one in report.peers if one.service == f"inference-{model}")


def children_of(report: StatusReport, model: str) -> list[psutil.Process]:
    """Engines that run for a model; not the short-lived helpers that look at binary and file before."""
    found = []
    for child in psutil.Process(peer(report, model).pid).children():
        with suppress(psutil.Error):
            if "--port" in child.cmdline():
                found.append(child)
    return found


def holds_memory(process: psutil.Process) -> bool:
    """False once it has ended, be it reaped or not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def chain(*actors: str, **fields: object) -> dict[str, object]:
    steps: list[dict[str, object]] = []
    for number, actor in enumerate(actors):
        inputs = [f"O{number - 1}"] if number else []
        output = {"name": f"O{number}", "kind": "text"}
        steps.append({"id": f"S{number}", "actor": actor, "action": "Say one word.", "max_tokens": 8, "gates": []})
        steps[-1] |= {"inputs": inputs, "outputs": [output]} | fields
    return {"objective": "test", "plan": {"steps": steps}}


def seconds_of(view: TaskView, step: int, what: str) -> float:
    found = view.steps[step].attempts[-1].segments
    return sum(one.end_ms - one.start_ms for one in found if one.what == what) / 1000


def seconds_in_memory_before(view: TaskView, step: int) -> float:
    """From the end of the loading for the step before until the loading for this one begins."""
    (came, went) = (
        next(one for one in view.steps[number].attempts[-1].segments if one.what == "loading")
        for number in (step - 1, step)
    )
    return (went.start_ms - came.end_ms) / 1000


def test_two_models_take_turns_in_a_budget_for_one_and_all_memory_comes_back(stack: BareStack) -> None:
    before = stack.client.status()
    assert [children_of(before, model) for model in ("specialist", "worker")] == [[], []], "parked costs no process"
    assert peer(before, "specialist").state == "parked"
    task = stack.client.submit(chain("coder", "worker", "coder")).task_id
    most_held = most_children = 0
    reasons: set[str] = set()
    while not (view := stack.client.show(task)).state.final:
        report = stack.client.status()
        assert report.memory is not None
        most_held = max(most_held, report.memory.held_bytes)
        most_children = max(most_children, sum(len(children_of(report, one)) for one in ("specialist", "worker")))
        reasons.update(view.waiting)
        time.sleep(0.05)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert most_children == 1, "never both at once"
    assert NEED <= most_held <= BUDGET
    assert any("waits for memory: worker needs" in one for one in reasons), reasons
    assert any("waits for specialist: it loads since" in one for one in reasons), reasons
    after = stack.client.status()
    assert {name: after.counters[name] - before.counters[name] for name in ("loads", "unloads")} == {
        "loads": 3, "unloads": 2
    }  # fmt: skip
    assert all(seconds_of(view, step, "loading") > 0.1 for step in range(3))
    assert seconds_in_memory_before(view, 1) > 0.9 * MIN_RESIDENCE_MS / 1000, "the specialist has its time in memory"
    assert view.critical_path is not None
    assert [one.what for one in view.critical_path.path].count("loading") == 3
    measured = once(stack, lambda report: place(report, "specialist").measured_bytes > 0, "it is measured")
    assert place(measured, "specialist").held_bytes == max(NEED, place(measured, "specialist").measured_bytes)
    assert place(measured, "worker").held_bytes == 0


def test_a_child_that_is_killed_while_it_loads_costs_time_and_nothing_else(stack: BareStack) -> None:
    before = stack.client.status()
    task = stack.client.submit(chain("worker")).task_id
    loading = once(stack, lambda report: bool(children_of(report, "worker")), "its engine is started")
    assert place(loading, "worker").state == "loading"
    os.kill(children_of(loading, "worker")[0].pid, signal.SIGKILL)
    view = stack.client.result(task, timeout_s=200)
    assert view.state is TaskState.SUCCEEDED, view.failure
    report = stack.client.status()
    assert place(report, "worker").held_bytes >= NEED
    assert report.counters["loads"] - before.counters["loads"] == 1
    assert peer(report, "worker").metrics["respawns"] >= 1


def test_a_service_that_is_killed_gives_its_memory_back(stack: BareStack) -> None:
    run(stack, "models", "load", "specialist")
    child = children_of(stack.client.status(), "specialist")[0]
    stack.kill("inference-specialist")
    stack.start("inference-specialist")
    report = once(stack, lambda one: place(one, "specialist").state == "parked", "it is parked")
    assert place(report, "specialist").held_bytes == 0
    until(lambda: not holds_memory(child), "its engine is gone")
    assert stack.client.run(chain("coder"), timeout_s=200).state is TaskState.SUCCEEDED


def test_a_new_hub_finds_the_model_loaded_and_gives_its_memory_to_nobody(stack: BareStack) -> None:
    run(stack, "models", "load", "specialist")
    child = children_of(stack.client.status(), "specialist")[0]
    stack.restart("scheduler")
    report = once(stack, lambda one: place(one, "specialist").state == "loaded", "it is loaded")
    assert place(report, "specialist").held_bytes >= NEED
    assert stack.client.run(chain("coder"), timeout_s=200).state is TaskState.SUCCEEDED
    assert holds_memory(child)
    assert stack.client.status().counters["loads"] == 0
    view = stack.client.run(chain("worker"), timeout_s=200)
    assert view.state is TaskState.SUCCEEDED
    until(lambda: not holds_memory(child), "it made way")


def test_the_commands_show_and_move_models(stack: BareStack) -> None:
    loaded = run(stack, "models", "load", "worker")
    assert (loaded["state"], loaded["residency"]) == ("loaded", "warm")
    listed = {one["name"]: one for one in run(stack, "models")["models"]}
    assert listed["worker"]["memory"]["held_bytes"] >= NEED
    assert listed["worker"]["residency"] == "warm"
    status = run(stack, "status")
    assert status["hub"]["memory"]["budget_bytes"] == BUDGET
    assert status["hub"]["memory"]["available_bytes"] > 0
    assert run(stack, "models", "unload", "worker")["state"] == "parked"
    checks = {one["name"]: one for one in run(stack, "doctor")["checks"]}
    assert checks["memory"]["verdict"] in ("ok", "warn")


def test_a_model_that_takes_more_than_the_budget_is_named_by_the_commands_once_it_is_measured() -> None:
    declared = 192_000_000  # what its files say; its process has some more
    models = {
        "front": {"tier": "A", "engine": "noop", "slots": 2, "context_tokens": 3072},
        "specialist": {"tier": "B", "engine": "noop", "slots": 2, "context_tokens": 1024},
        "worker": {"tier": "C", "engine": "llama-server", **WARM, "memory_bytes": declared},
    }
    with temporary_home() as path:
        made = BareStack(path, models=models)
        (made.registry / "hardware.yaml").write_text(f"hardware:\n  memory_bytes: {declared}\n")
        roles = (made.registry / "roles.yaml").read_text()
        (made.registry / "roles.yaml").write_text(roles.replace("max_tokens: 768", "max_tokens: 512"))
        with made as running:
            assert run(running, "registry", "check", "--no-files")["notes"] == []
            run(running, "models", "load", "worker")
            once(running, lambda report: place(report, "worker").measured_bytes > declared, "it is measured")
            (note,) = run(running, "registry", "check", "--no-files")["notes"]
            assert note.startswith("worker was measured to need ")
            for command in (("registry", "check", "--no-files"), ("models",), ("status",)):
                done = subprocess.run(
                    [sys.executable, "-m", "services.ctl", *command],
                    cwd=CHECKOUT, env=running.environ | {"COLUMNS": "1000"}, capture_output=True, text=True,
                    timeout=60, check=True,
                )  # fmt: skip
                assert "it loads only alone" in done.stdout, command
