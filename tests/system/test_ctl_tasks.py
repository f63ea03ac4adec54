"""The task commands against the real hub and planner, as real processes; models, gates and memory are scripted.

The scripted service speaks the real protocol through the real kit, so everything from the command line to the hub and
back is what users run. What models answer is not the point here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.client import Client
from protocol.errors import CallError
from services.kit.config import CHECKOUT, load_home
from tests.waiting import until

WORKERS = """
import asyncio, sys
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.failure import Category
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.memory import Explained, MemoryFinal, MemoryRequest, Value
from services.kit.config import load_home
from services.kit.service import Service

async def infer(call):
    request = call.read(InferRequest)
    await asyncio.sleep(float(sys.argv[1]))
    text = '{"cheapest": "The Old Mill", "largest": "Tower Rooms", "by_the_water": "Harbour House"}'
    if request.json_schema is None:
        text = "An answer with an escape \\x1b[31msequence\\x1b[0m from a hostile model."
    model = call.header.dst.removeprefix("infer.")
    return InferFinal(text=text, finish_reason="stop", model=model, engine="scripted", prompt_tokens=9,
                      generated_tokens=7)

async def gate(call):
    names = call.read(GateRequest).gates
    return GateFinal(results=[GateResult(gate=name, verdict=Verdict.PASS, category=Category.SCHEMA, started_ms=1,
                                         ended_ms=2) for name in names])

async def memory(call):
    ask = call.read(MemoryRequest).ask
    if ask.op == "outcome":
        decisions.update({item.decision_id: item for item in ask.decisions})
        return MemoryFinal(stored=len(ask.outcomes))
    if ask.op == "explain":
        value = Value(subject="role", task_type="doc", choice="worker", q=0.75, count=3, mean_seconds=1.5)
        known = [Explained(decision=decisions[ident], values=[value]) for ident in ask.decision_ids]
        return MemoryFinal(explained=known)
    return MemoryFinal()

decisions = {}
targets = ("infer.front", "infer.specialist", "infer.worker", "gate", "memory")
service = Service(load_home().make(), "scripted", targets, slots=8)
service.answer("memory.request", memory)
service.answer("infer.request", infer)
service.answer("gate.request", gate)
sys.exit(asyncio.run(service.run()))
"""
EXAMPLE = CHECKOUT / "deploy" / "example.yaml"


class Stack:
    """Hub, planner and scripted service of one home."""

    def __init__(self, root: Path, answer_s: float) -> None:
        self.root = root
        self.environment = {**os.environ, "TIERLINE_HOME": str(root), "PYTHONPATH": str(CHECKOUT)}
        self.environment.pop("SUPERVISOR_ENABLED", None)
        argvs = (["-m", "services.scheduler"], ["-m", "services.planner"], ["-c", WORKERS, str(answer_s)])
        self._output = (root / "services.out").open("wb")
        self.processes = [
            subprocess.Popen([sys.executable, *argv], env=self.environment, stdout=self._output, stderr=self._output)
            for argv in argvs
        ]

    def await_ready(self) -> None:
        with Client(load_home(self.environment).hub_address, name="test") as client:

            def ready() -> bool:
                try:
                    states = {peer.service: peer.state for peer in client.status(timeout_s=2).peers}
                except CallError:
                    return False
                return states.get("planner") == states.get("scripted") == "ready"

            until(ready, "its services are ready; services.out says why not")

    def tierline(self, *argv: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services.ctl", *argv],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def stop(self) -> None:
        hub, planner, scripted = self.processes
        hub.terminate()
        planner.terminate()
        scripted.kill()  # would wait for the answers that it was told to keep back, and nothing of it is under test
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._output.close()


def started(answer_s: float) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp") as folder:
        stack = Stack(Path(folder), answer_s)
        try:
            stack.await_ready()
            yield stack
        finally:
            stack.stop()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    yield from started(0.05)


@pytest.fixture(scope="module")
def slow_stack() -> Iterator[Stack]:
    yield from started(60)


def run_example(stack: Stack, *more: str) -> dict[str, Any]:
    done = stack.tierline("run", "--file", str(EXAMPLE), "--json", *more)
    assert done.returncode == 0, done.stderr + done.stdout
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_run_brings_the_example_to_its_end_and_its_artefacts_into_the_folder(stack: Stack, tmp_path: Path) -> None:
    view = run_example(stack, "--output", str(tmp_path / "out"))
    assert view["state"] == "succeeded"
    assert sorted(Path(name).name for name in view["files"]) == ["comparison.md", "facts.json"]
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert facts["cheapest"] == "The Old Mill"
    assert view["usage"]["generated_tokens"] > 0
    assert view["critical_path"]["overlapping_steps"] >= 2
    assert [edge["step"] for edge in view["plan"]["removed_edges"]] == ["S6"]


def test_run_in_a_pipe_prints_progress_and_result_without_any_escape_code(stack: Stack) -> None:
    done = stack.tierline("run", "--file", str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    for event in ("task.planned", "step.started S2", "step.done S6", "task.ended state=succeeded"):
        assert event in done.stderr, done.stderr
    for section in ("== steps", "== artefact comparison", "== gates", "== routing decisions", "== critical path"):
        assert section in done.stdout, done.stdout
    assert "dropped: S6 does not wait for S5" in done.stdout


def test_run_on_a_terminal_draws_a_table_and_passes_no_escape_of_a_model(stack: Stack) -> None:
    reader, writer = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "run", "--file", str(EXAMPLE)],
        env={**stack.environment, "TERM": "xterm-256color", "COLUMNS": "120"},
        stdout=writer,
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    shown = b""
    while True:
        try:
            data = os.read(reader, 65536)
        except OSError:  # the other end of a terminal is closed
            break
        if not data:
            break
        shown += data
    os.close(reader)
    assert process.wait(120) == 0
    assert b"\x1b[" in shown  # it is a terminal, there is colour
    assert b"[31msequence" in shown
    assert b"\x1b[31msequence" not in shown


def test_submit_watch_show_list_explain_and_artefact_speak_of_the_same_task(stack: Stack) -> None:
    submitted = stack.tierline("submit", "--file", str(EXAMPLE))
    task = submitted.stdout.strip()
    assert submitted.returncode == 0
    watched = stack.tierline("watch", task, "--json")
    assert watched.returncode == 0, watched.stderr
    records = [json.loads(line) for line in watched.stdout.splitlines()]
    assert records[0]["event"] == "task.accepted"
    assert records[-1]["state"] == "succeeded"
    assert json.loads(stack.tierline("show", task, "--json").stdout)["state"] == "succeeded"
    assert "hostile model" in stack.tierline("show", task, "--artefact", "mill-summary").stdout
    listed = json.loads(stack.tierline("list", "--state", "succeeded", "--json").stdout)
    assert task in [item["task_id"] for item in listed["tasks"]]
    explained = stack.tierline("explain", task)
    assert explained.returncode == 0, explained.stderr
    assert "the client's plan names it" in explained.stdout
    assert "worker Q=0.75 n=3" in explained.stdout


def test_an_objective_with_inputs_is_planned_by_the_planner(stack: Stack, tmp_path: Path) -> None:
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text(f"Text of {name}\n")
    given = [word for name in ("a.md", "b.md") for word in ("--input", str(tmp_path / name))]
    done = stack.tierline("run", "summarize both files", "--type", "doc", *given, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    view = json.loads(done.stdout)
    assert view["plan"]["source"] in ("rules", "model")
    assert view["artefacts"]


def test_an_unknown_task_is_bad_input(stack: Stack) -> None:
    done = stack.tierline("show", "t-never")
    assert done.returncode == 2
    assert "t-never" in done.stderr


def test_what_the_hub_refuses_is_bad_input_and_named(stack: Stack) -> None:
    done = stack.tierline("run", "say hello", "--gates", "no-such-gate")
    assert done.returncode != 0
    assert "no-such-gate" in done.stderr + done.stdout


@pytest.mark.parametrize("command", ["run --file", "submit --file", "plan --file", "simulate"])
def test_a_role_that_is_not_there_is_named_with_file_and_line(stack: Stack, tmp_path: Path, command: str) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(EXAMPLE.read_text().replace("actor: worker", "actor: workr", 1))
    line = file.read_text().splitlines().index(next(row for row in file.read_text().splitlines() if "workr" in row))
    done = stack.tierline(*command.split(), str(file))
    assert done.returncode == 2
    step = r"plan\.steps\[S\d\]\.actor: the registry has no 'workr'; did you mean 'worker'\?"
    assert re.search(rf"task\.yaml:{line + 1}: {step}", " ".join(done.stderr.split())), done.stderr


def test_show_writes_the_page_of_a_task(stack: Stack, tmp_path: Path) -> None:
    task = run_example(stack)["task_id"]
    file = tmp_path / "task.html"
    done = stack.tierline("show", task, "--html", str(file))
    assert (done.returncode, done.stdout) == (0, f"written: {file}\n")
    text = file.read_text("utf-8")
    for part in (task, "Compare three offers", "predicted", "achieved", "S6", "schema pass", "an escape"):
        assert part in text
    assert "\x1b" not in text
    told = json.loads(stack.tierline("show", task, "--html", str(file), "--json").stdout)
    assert told == {"html": str(file)}
    assert stack.tierline("show", task, "--html", str(file), "--artefact", "facts").returncode == 2
    refused = stack.tierline("show", task, "--html", str(tmp_path / "no" / "task.html"))
    assert refused.returncode == 2
    assert "name a file in a folder that can be written" in refused.stderr


def test_the_prediction_and_critical_steps_are_in_the_result(stack: Stack) -> None:
    report = run_example(stack)["critical_path"]
    assert report["predicted"]["steps"][-1] in ("S5", "S6")
    assert report["predicted"]["length_ms"] > 0
    # planning, S1 and S5 side by side, S2 to S4 side by side, S6: one attempt each unless one was tried again
    assert 4 <= report["critical_steps"] < report["total_steps"]
    assert 0 < report["lower_bound_ms"] <= report["wall_ms"]


def test_status_shows_the_hub_and_its_services(stack: Stack) -> None:
    done = stack.tierline("status")
    assert done.returncode == 0
    assert "planner" in done.stdout
    assert "scripted" in done.stdout
    assert "== hub" in done.stdout


def test_tail_shows_the_lines_of_a_task_and_only_those(stack: Stack) -> None:
    task = run_example(stack)["task_id"]
    done = stack.tierline("tail", "scheduler", "--of-task", task, "--lines", "1000", "--no-follow", "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    assert {line["task"] for line in lines} == {task}


def test_the_first_ctrl_c_cancels_the_task(slow_stack: Stack) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "run", "--file", str(EXAMPLE), "--json"],
        env=slow_stack.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: "running" in slow_stack.tierline("list").stdout, "the task runs", look_every_s=0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert json.loads(out)["state"] == "cancelled"
    assert "cancelling" in err


def test_ctrl_c_leaves_a_watched_task_running(slow_stack: Stack) -> None:
    task = slow_stack.tierline("submit", "--file", str(EXAMPLE)).stdout.strip()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "watch", task],
        env=slow_stack.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "task.accepted" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "goes on" in err
    view = json.loads(slow_stack.tierline("show", task, "--json").stdout)
    assert view["state"] in ("planning", "running")


def test_run_says_why_nothing_happens_until_something_does(stack: Stack) -> None:
    scripted = stack.processes[2]
    scripted.send_signal(signal.SIGSTOP)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.ctl", "run", "--file", str(EXAMPLE)],
            env=stack.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = next((line for line in process.stderr if line.startswith("waiting: ")), "")
    finally:
        scripted.send_signal(signal.SIGCONT)
        stack.await_ready()
    assert " waits for infer." in said or " waits for memory" in said
    assert "ready (scripted suspect" in said or "0 workers alive since " in said
    process.communicate(timeout=120)
    assert process.returncode == 0
