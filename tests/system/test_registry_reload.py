"""`registry reload` on a whole stack under a real supervisord: add, change, remove, refuse; and kill -9 in between.

The tests share one stack and follow one another, as an operator's changes do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from protocol.client import Client
from protocol.errors import CallFailed
from protocol.messages.memory import DecisionRecord, Import, MemoryRequest, Outcome, Row
from protocol.messages.persona import Persona
from protocol.messages.result import TaskState
from protocol.messages.task import TaskIR
from services.ctl.stack import stray_processes
from services.kit.registry.versions import prompt_digest
from tests.fakes.gguf_files import write_tiny_gguf
from tests.system.inference_stack import FAKE_BINARY
from tests.system.test_ctl_stack import Installation
from tests.waiting import until

CORE = {"gates", "memory", "planner", "scheduler"}


class Stack(Installation):
    """An installation with a scripted engine behind the tiers that take time."""

    def __init__(self, root: Path) -> None:
        self.models: dict[str, dict[str, Any]] = {
            "front": {"tier": "A", "engine": "noop", "context_tokens": 4096, "slots": 4},
            "worker": self.scripted(root, "worker"),
        }
        super().__init__(root)
        self.write()
        self.client = Client(self.home.hub_address, name="test")

    @staticmethod
    def scripted(root: Path, name: str, slots: int = 2) -> dict[str, Any]:
        path = write_tiny_gguf(root / f"{name}.gguf")
        slow = {"match": "SLOW", "answers": [{"text": "tick " * 40, "hold": str(root / "go on")}]}
        as_json = {"match": "AS JSON", "answers": ['{"n": 1}']}
        judged = {"match": "Judge the result", "answers": ['{"1": {"reason": "It ticks.", "met": true}}']}
        script = {"default": f"said by {name}", "rules": [slow, as_json, judged]}
        Path(f"{path}.script.json").write_text(json.dumps(script))
        return {
            "tier": "C", "engine": "llama-server", "binary": str(FAKE_BINARY), "path": str(path), "slots": slots,
            "context_tokens": 2048,
        }  # fmt: skip

    def write_models(self, slots: int) -> None:
        return  # `write` does

    def write(self) -> None:
        (self.root / "registry" / "models.yaml").write_text(yaml.safe_dump({"models": self.models}, sort_keys=False))

    def role(self, name: str, **fields: Any) -> None:
        """Set a role; without fields, remove it."""
        path = self.root / "registry" / "roles.yaml"
        roles = yaml.safe_load(path.read_text())
        if fields:
            roles["roles"][name] = {"description": "test", "prompt": "Do it.", "max_tokens": 64, **fields}
        else:
            del roles["roles"][name]
        path.write_text(yaml.safe_dump(roles, sort_keys=False))

    def gate(self, name: str, **fields: Any) -> None:
        """Set a gate; without fields, remove it."""
        path = self.root / "registry" / "gates.yaml"
        gates = yaml.safe_load(path.read_text())
        if fields:
            gates["gates"][name] = {"description": "As agreed.", **fields}
        else:
            del gates["gates"][name]
        path.write_text(yaml.safe_dump(gates, sort_keys=False))

    def reload(self, *argv: str, status: int = 0) -> dict[str, Any]:
        done = self.tierline("registry", "reload", "--json", *argv)
        assert done.returncode == status, done.stderr + done.stdout
        return json.loads(done.stdout) if done.stdout else {"stderr": done.stderr}

    def submit(self, action: str, role: str, more: list[dict[str, Any]] | None = None) -> str:
        step = {"id": "S1", "actor": role, "action": action, "outputs": [{"name": "one"}], "gates": []}
        task = {"objective": "test", "plan": {"steps": [step, *(more or [])]}}
        return self.client.submit(task).task_id

    def begin_slow(self, role: str, more: list[dict[str, Any]] | None = None) -> str:
        """A task at work whose first step ends when `go_on` is called."""
        (self.root / "go on").unlink(missing_ok=True)
        task_id = self.submit("SLOW please", role, more)
        until(lambda: any(step.state == "inferring" for step in self.client.show(task_id).steps), "it is at work")
        return task_id

    def go_on(self) -> None:
        (self.root / "go on").touch()

    def state(self, service: str) -> str:
        return next((peer.state for peer in self.client.status().peers if peer.service == service), "absent")

    def digests(self) -> dict[str, str | None]:
        report = self.client.status()
        return {peer.service: peer.registry for peer in report.peers} | {"scheduler": report.registry}


def reloadable_stack() -> Iterator[Stack]:
    """Up under supervisord, for a fixture; nothing of it is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp") as folder:
        stack = Stack(Path(folder))
        try:
            done = stack.tierline("up")
            assert done.returncode == 0, done.stderr
            yield stack
        finally:
            stack.client.close()
            stack.tierline("down")
            assert stray_processes(stack.home) == []


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    yield from reloadable_stack()


def test_a_new_model_and_role_serve_without_any_restart(stack: Stack) -> None:
    before = stack.pids()
    stack.models["extra"] = stack.scripted(stack.root, "extra")
    stack.write()
    stack.role("clerk", model="extra")
    assert "not taken up yet: tierline registry reload" in stack.tierline("status").stdout
    told = stack.reload()
    assert set(told["added"]) == {"models.extra", "roles.clerk"}
    assert (told["changed"], told["removed"], told["draining"]) == ([], [], [])
    assert told["started"] == ["inference-extra"]
    assert told["waiting"] == []
    view = stack.client.result(stack.submit("Say it.", "clerk"), timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.artefacts[0].value == "said by extra"
    after = stack.pids()
    assert {name: pid for name, pid in after.items() if name in before} == before
    assert stack.client.plan(TaskIR(objective="Say it.", task_type="chat"), timeout_s=100).task.plan is not None
    assert {digest for service, digest in stack.digests().items() if service != "memory"} == {told["digest"]}
    shown = json.loads(stack.tierline("status", "--json").stdout)
    assert not any(service["registry_lags"] for service in shown["services"])
    assert "not taken up" not in stack.tierline("status").stdout


def test_a_new_gate_and_persona_are_known_to_planner_and_gates_service(stack: Stack) -> None:
    before = stack.pids()
    registry = stack.root / "registry"
    stack.gate("shape", kinds=["json"], category="SCHEMA", builtin="schema")
    personas = yaml.safe_load((registry / "personas.yaml").read_text())
    personas["personas"]["pirate"] = {"description": "At sea.", "prompt": "Speak like a pirate."}
    (registry / "personas.yaml").write_text(yaml.safe_dump(personas, sort_keys=False))
    assert set(stack.reload()["added"]) == {"gates.shape", "personas.pirate"}
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    step = {
        "id": "S1", "actor": "clerk", "action": "AS JSON", "persona": "pirate", "gates": ["shape"],
        "json_schema": schema, "outputs": [{"name": "one", "kind": "json"}],
    }  # fmt: skip
    view = stack.client.run({"objective": "test", "plan": {"steps": [step]}}, timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [(gate.gate, gate.verdict.value) for gate in view.steps[0].attempts[-1].gates] == [("shape", "pass")]
    assert stack.pids() == before


def remembered(choice: str, reward: float, prompt: str = "") -> list[Row]:
    """Thirty outcomes of a persona of the worker, as an export of memory has them."""
    rows: list[Row] = []
    for number in range(30):
        ident = f"{choice}-{number}"
        decision = DecisionRecord(
            decision_id=ident, task_id=ident, subject="persona", choice=choice, propensity=1, task_type="chat",
            cluster="worker", prompt=prompt,
        )  # fmt: skip
        outcome = Outcome(decision_id=ident, reward=reward, seconds=1, attempts=1, at_ms=1)
        rows += [Row(decision=decision), Row(outcome=outcome)]
    return rows


def test_an_adopted_persona_stands_in_the_operators_file_and_nothing_is_restarted(stack: Stack) -> None:
    before = stack.pids()
    stoker = Persona(name="stoker", description="Below deck.", prompt="You keep the fire.", roles=["worker"])
    assert stack.client.make_persona(stoker).state == "trial"
    rows = [*remembered("none", 0.0), *remembered("stoker", 1.0, prompt_digest(stoker.prompt))]
    stack.client.memory(MemoryRequest(ask=Import(rows=rows)))
    step = {"id": "S1", "actor": "worker", "action": "Say it.", "persona": "stoker", "outputs": [{"name": "one"}]}
    view = stack.client.run({"objective": "test", "plan": {"steps": [step | {"gates": []}]}}, timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    until(lambda: _state_of(stack, "stoker") == "adopted", "it has earned its place")
    text = (stack.root / "registry" / "personas.yaml").read_text()
    assert yaml.safe_load(text)["personas"]["stoker"]["prompt"].strip() == stoker.prompt
    until(lambda: len({digest for name, digest in stack.digests().items() if name != "memory"}) == 1, "all follow")
    assert "not taken up" not in stack.tierline("status").stdout
    assert stack.tierline("up").returncode == 0
    assert stack.pids() == before, "`up` finds the registry that the services have"
    assert stack.reload()["unchanged"] > 0


def _state_of(stack: Stack, name: str) -> str:
    return next(one.state for one in stack.client.personas() if one.name == name)


def test_a_changed_model_finishes_its_running_step_and_begins_anew(stack: Stack) -> None:
    before = stack.pids()
    task_id = stack.begin_slow("worker")
    stack.models["worker"]["slots"] = 3
    stack.write()
    told = stack.reload("--no-wait")
    assert told["changed"] == ["models.worker"]
    assert told["draining"] == ["worker"]
    waiting = stack.submit("Say it.", "worker")
    stack.go_on()
    view = stack.client.result(task_id, timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert len(view.steps[0].attempts) == 1, "it was not cut"
    assert str(view.artefacts[0].value).split() == ["tick"] * 40
    assert stack.client.result(waiting, timeout_s=100).state is TaskState.SUCCEEDED, "the new generation serves it"
    assert stack.reload()["waiting"] == []
    after = stack.pids()
    assert {name for name in before if after[name] != before[name]} == {"inference-worker"}
    worker = next(peer for peer in stack.client.status().peers if peer.service == "inference-worker")
    assert worker.granted - worker.used == 3


def test_an_invalid_registry_is_refused_whole_and_the_old_one_serves(stack: Stack) -> None:
    before, digests = stack.pids(), stack.digests()
    stack.models["extra"]["slots"] = 0
    stack.write()
    stack.role("clerk", model="extra", timeout_s=7)
    line = next(
        number
        for number, text in enumerate((stack.root / "registry" / "models.yaml").read_text().splitlines(), 1)
        if "slots: 0" in text
    )
    done = stack.tierline("registry", "reload")
    assert done.returncode == 2
    assert f"models.yaml:{line}: models.extra.slots" in done.stderr
    assert stack.digests() == digests
    assert stack.pids() == before
    assert stack.client.result(stack.submit("Say it.", "clerk"), timeout_s=100).state is TaskState.SUCCEEDED
    # A service that happens to die now comes back with what was taken up, not with what is being edited.
    psutil.Process(before["planner"]).kill()
    until(lambda: stack.pids().get("planner") not in (0, None, before["planner"]), "the planner is back")
    until(lambda: stack.digests().get("planner") == digests["planner"], "with what was taken up")
    stack.models["extra"]["slots"] = 2
    stack.write()
    stack.role("clerk", model="extra")
    assert stack.reload()["changed"] == []


def test_a_model_that_does_not_work_with_it_is_named_with_its_reason_until_it_does(stack: Stack) -> None:
    binary = stack.root / "broken-server"
    binary.write_text("#!/bin/sh\necho no such library\nexit 3\n")
    binary.chmod(0o755)
    stack.models["broken"] = stack.scripted(stack.root, "broken") | {"binary": str(binary)}
    stack.write()
    told = stack.reload(status=1)
    assert told["added"] == ["models.broken"]
    assert told["waiting"] == []
    assert [one["service"] for one in told["degraded"]] == ["inference-broken"]
    assert f"{binary} does not know --model" in told["degraded"][0]["why"]
    done = stack.tierline("registry", "reload")
    assert done.returncode == 1
    assert f"inference-broken: {binary} does not know" in done.stderr
    assert "every service works with it" not in done.stdout
    assert stack.reload("--no-wait")["degraded"] == [], "nobody has looked"
    stack.models["broken"]["binary"] = str(FAKE_BINARY)
    stack.write()
    assert stack.reload()["degraded"] == []


def test_a_model_that_works_at_its_third_try_is_given_the_time_for_it(stack: Stack) -> None:
    binary, tried = stack.root / "late-server", stack.root / "tried"
    often_enough = f"test $(wc -l < {tried}) -gt 2"
    binary.write_text(f'#!/bin/sh\necho once >> {tried}\n{often_enough} && exec {FAKE_BINARY} "$@"\nexit 3\n')
    binary.chmod(0o755)
    stack.models["broken"]["binary"] = str(binary)
    stack.write()
    assert stack.reload()["degraded"] == []
    assert stack.state("inference-broken") == "ready"
    del stack.models["broken"]
    stack.write()
    assert stack.reload()["removed"] == ["models.broken"]


def test_a_removed_model_and_role_stay_for_the_running_task_and_leave_afterwards(stack: Stack) -> None:
    second = {
        "id": "S2", "actor": "clerk", "action": "Say it.", "inputs": ["one"], "outputs": [{"name": "two"}], "gates": [],
    }  # fmt: skip
    task_id = stack.begin_slow("clerk", [second])
    del stack.models["extra"]
    stack.write()
    stack.role("clerk")
    told = stack.reload("--no-wait")
    assert set(told["removed"]) == {"models.extra", "roles.clerk"}
    assert set(told["kept"]) == {"roles.clerk", "models.extra"}
    with pytest.raises(CallFailed, match="clerk"):
        stack.submit("Say it.", "clerk")
    # Even a kill -9 of the process that is to leave does not take the task its model.
    psutil.Process(stack.pids()["inference-extra"]).kill()
    stack.go_on()
    view = stack.client.result(task_id, timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert {attempt.worker for step in view.steps for attempt in step.attempts} == {"inference-extra"}
    assert stack.reload()["waiting"] == []
    assert "inference-extra" not in stack.pids()
    assert not (stack.home.conf_d / "inference-extra.conf").exists()
    assert set(stack.pids()) == {*CORE, "inference-front", "inference-worker"}


def test_a_removed_gate_judges_a_running_step_with_its_role_and_model_even_after_a_restart(stack: Stack) -> None:
    stack.models["extra"] = stack.scripted(stack.root, "extra")
    stack.write()
    stack.role("judge", model="extra")
    stack.gate("judged", kinds=["text"], category="LOGIC", role="judge")
    stack.reload()
    (stack.root / "go on").unlink(missing_ok=True)
    step = {"id": "S1", "actor": "worker", "action": "SLOW please", "outputs": [{"name": "one"}], "gates": ["judged"]}
    task = {"objective": "test", "definition_of_done": ["It ticks."], "plan": {"steps": [step]}}
    task_id = stack.client.submit(task).task_id
    until(lambda: any(step.state == "inferring" for step in stack.client.show(task_id).steps), "it is at work")
    del stack.models["extra"]
    stack.write()
    stack.role("judge")
    stack.gate("judged")
    told = stack.reload("--no-wait")
    assert set(told["kept"]) == {"gates.judged", "roles.judge", "models.extra"}
    until(lambda: stack.digests()["gates"] == told["digest"], "the gates service has followed")
    before = stack.pids()["gates"]
    psutil.Process(before).kill()
    until(lambda: stack.pids().get("gates") not in (0, None, before), "the gates service is back")
    stack.go_on()
    view = stack.client.result(task_id, timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [(gate.gate, gate.verdict.value) for gate in view.steps[0].attempts[-1].gates] == [("judged", "pass")]
    assert stack.reload()["waiting"] == []
    assert "inference-extra" not in stack.pids()


def test_a_removed_model_serves_a_running_batch_to_its_last_prompt(stack: Stack) -> None:
    stack.models["extra"] = stack.scripted(stack.root, "extra")
    stack.write()
    stack.role("clerk", model="extra")
    stack.reload()
    (stack.root / "go on").unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as asking:
        batch = asking.submit(
            stack.client.llm_batch, "clerk", ["SLOW one", "two", "three"], timeout_s=100, concurrency=1
        )
        until(lambda: any(peer.in_flight for peer in stack.client.status().peers), "the first prompt is at work")
        del stack.models["extra"]
        stack.write()
        stack.role("clerk")
        assert stack.reload("--no-wait")["kept"] == ["models.extra"]
        stack.go_on()
        answers = batch.result().answers
    assert [(answer.failure, answer.model) for answer in answers] == [(None, "extra")] * 3
    assert stack.reload()["waiting"] == []
    assert "inference-extra" not in stack.pids()


def test_a_model_that_comes_back_while_its_old_process_still_stands_by_is_served_anew(stack: Stack) -> None:
    stack.models["extra"] = stack.scripted(stack.root, "extra")
    stack.write()
    stack.role("clerk", model="extra")
    stack.reload()
    before = stack.pids()["inference-extra"]
    del stack.models["extra"]
    stack.write()
    stack.role("clerk")
    stack.reload("--no-wait")
    until(lambda: stack.state("inference-extra") == "draining", "the old process is to leave")
    stack.models["extra"] = stack.scripted(stack.root, "extra")
    stack.write()
    stack.role("clerk", model="extra")
    assert stack.reload()["waiting"] == []
    assert stack.client.result(stack.submit("Say it.", "clerk"), timeout_s=100).state is TaskState.SUCCEEDED
    assert stack.pids()["inference-extra"] != before
    del stack.models["extra"]
    stack.write()
    stack.role("clerk")
    assert stack.reload()["waiting"] == []


def test_kill_9_of_the_hub_in_the_middle_of_a_reload_converges_with_the_next(stack: Stack) -> None:
    task_id = stack.begin_slow("worker")
    stack.models["extra"] = stack.scripted(stack.root, "extra", slots=1)
    stack.write()
    stack.role("clerk", model="extra")
    hub = stack.pids()["scheduler"]
    before = stack.home.current_registry.resolve().name
    reloading = subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "registry", "reload"],
        env=stack.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # The link moves just before the hub is told, and stays moved: this cannot be missed.
    until(lambda: stack.home.current_registry.resolve().name != before, "the link has moved", look_every_s=0.005)
    psutil.Process(hub).kill()
    reloading.wait(300)
    stack.go_on()
    stack.client.status(timeout_s=100)  # the next hub is there: a command waits for one no longer than people would
    told = stack.reload()
    assert told["waiting"] == []
    assert {digest for service, digest in stack.digests().items() if service != "memory"} == {told["digest"]}
    view = stack.client.result(task_id, timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert len(view.steps[0].attempts) == 1
    assert stack.client.result(stack.submit("Say it.", "clerk"), timeout_s=100).state is TaskState.SUCCEEDED


def test_kill_9_of_supervisord_in_the_middle_of_a_reload_converges_with_up_and_the_next(stack: Stack) -> None:
    stack.models["late"] = stack.scripted(stack.root, "late", slots=1)
    stack.models["worker"]["slots"] = 3
    stack.write()
    stack.role("late-clerk", model="late")
    task_id = stack.begin_slow("worker")
    supervisord = next(p for p in stray_processes(stack.home) if "supervisor.supervisord" in p.cmdline())
    reloading = subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "registry", "reload"],
        env=stack.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The hub has been told, the file of the new program is there, and supervisord is about to be asked to run it.
    until((stack.home.conf_d / "inference-late.conf").exists, "its file is there", look_every_s=0.002)
    supervisord.kill()
    supervisord.wait(60)
    stack.go_on()
    _, said = reloading.communicate(timeout=300)
    assert reloading.returncode != 0, "nobody was there to start the new program, and that is said"
    assert "supervisord" in said
    done = stack.tierline("up")
    assert done.returncode == 0, done.stderr
    told = stack.reload()
    assert told["waiting"] == []
    assert {digest for service, digest in stack.digests().items() if service != "memory"} == {told["digest"]}
    view = stack.client.result(task_id, timeout_s=100)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert stack.client.result(stack.submit("Say it.", "late-clerk"), timeout_s=100).state is TaskState.SUCCEEDED
    slots = {peer.service: peer.granted - peer.used for peer in stack.client.status().peers}
    assert slots["inference-worker"] == 3, "the changed entry is in force"


def test_kill_9_of_supervisord_after_a_reload_and_up_brings_the_same_registry_back(stack: Stack) -> None:
    stack.role("scribe", model="front")
    digest = stack.reload()["digest"]
    done = stack.tierline("up")
    assert "nothing" in done.stderr, "up has nothing to restart after a reload"
    supervisord = next(p for p in stray_processes(stack.home) if "supervisor.supervisord" in p.cmdline())
    supervisord.kill()
    supervisord.wait(60)
    done = stack.tierline("up")
    assert done.returncode == 0, done.stderr
    until(lambda: {d for name, d in stack.digests().items() if name != "memory"} == {digest}, "all have the same")
    assert stack.client.result(stack.submit("Say it.", "scribe"), timeout_s=100).state is TaskState.SUCCEEDED
