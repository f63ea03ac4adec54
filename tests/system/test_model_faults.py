"""A model that cannot be served, as an operator sees it: a real supervisord, `tierline status` and supervisorctl.

The service of the model stays up and says why it does not serve; the rest of the stack goes on; what is repaired comes
back without anybody's help. What each fault does to calls and slots is tested in `test_inference_fake.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import CallFailed, DeadlineExceeded
from protocol.messages.infer import ChatMessage, InferRequest
from protocol.messages.result import TaskState
from services.kit.config import CHECKOUT
from tests.system.inference_stack import FAKE_BINARY
from tests.system.test_registry_reload import Stack, reloadable_stack
from tests.waiting import until


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    yield from reloadable_stack()


def supervisorctl(stack: Stack, *words: str) -> str:
    config = str(CHECKOUT / "deploy" / "supervisord.conf")
    command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", config, *words]
    done = subprocess.run(command, env=stack.environment, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def reason_in_status(stack: Stack) -> str:
    services = json.loads(stack.tierline("status", "--json").stdout)["services"]
    (worker,) = [one for one in services if one["name"] == "inference-worker"]
    return str(worker["reason"]) if worker["state"] == "degraded" else ""


def await_reason(stack: Stack, words: str) -> None:
    """Until the hub knows it, who is asked at no cost; then the command has to say it too."""

    def known() -> bool:
        peers = stack.client.status().peers
        return any(words in (one.reason or "") for one in peers if one.service == "inference-worker")

    until(known, f"the worker's reason is {words!r}")
    assert words in reason_in_status(stack)


def kill_engine(stack: Stack, number: signal.Signals = signal.SIGKILL) -> None:
    figures = next(peer.metrics for peer in stack.client.status().peers if peer.service == "inference-worker")
    os.kill(figures["child_pid"], number)


def assert_degraded(stack: Stack, words: str, pid: int) -> None:
    """The same words in both places, the same process of the service, and a call that waits no longer than it may."""
    await_reason(stack, words)
    assert "RUNNING" in supervisorctl(stack, "status", "inference-worker")
    assert words in supervisorctl(stack, "tail", "-20000", "inference-worker")
    assert stack.pids()["inference-worker"] == pid
    request = InferRequest(role="test", messages=[ChatMessage(role="user", content="Hi")], max_tokens=4)
    with pytest.raises((DeadlineExceeded, CallFailed)):  # the hub keeps it waiting for the model, the client does not
        stack.client.infer("worker", request, timeout_s=1.5)


def assert_well(stack: Stack, slots: int = 2) -> None:
    """Ready without a restart by hand, every slot is to be had, and a task runs."""
    until(lambda: stack.state("inference-worker") == "ready", "the worker is well")
    assert stack.client.result(stack.submit("Say it.", "worker"), timeout_s=100).state is TaskState.SUCCEEDED

    def all_free() -> bool:
        peer = next(one for one in stack.client.status().peers if one.service == "inference-worker")
        return peer.granted - peer.used == slots and not peer.in_flight

    until(all_free, "every slot is free")
    assert reason_in_status(stack) == ""


def test_a_damaged_model_file_is_a_reason_in_status_and_supervisorctl_until_it_is_repaired(stack: Stack) -> None:
    pid = stack.pids()["inference-worker"]
    model = stack.root / "worker.gguf"
    whole = model.read_bytes()
    model.write_bytes(whole[:300])
    kill_engine(stack)
    assert_degraded(stack, str(model), pid)
    model.write_bytes(whole)
    assert_well(stack)


def test_a_task_whose_model_stays_damaged_says_so_while_it_waits_and_fails_with_the_reason(stack: Stack) -> None:
    failures, model = stack.root / "registry" / "failures.yaml", stack.root / "worker.gguf"
    shipped, whole = failures.read_text(), model.read_bytes()
    short = shipped.replace("degraded_wait_ms: 180000", "degraded_wait_ms: 3000")
    failures.write_text(short.replace("resource_backoff_ms: 1000", "resource_backoff_ms: 50"))
    stack.reload()
    model.write_bytes(whole[:300])
    kill_engine(stack)
    await_reason(stack, str(model))
    task = stack.submit("Say it.", "worker")
    until(lambda: str(model) in stack.tierline("show", task).stdout, "tierline show says why it waits")
    assert stack.client.show(task).state not in (TaskState.FAILED, TaskState.SUCCEEDED)
    ended = stack.client.result(task, timeout_s=100)
    assert ended.state is TaskState.FAILED
    assert ended.failure is not None
    assert ended.failure.code == "model.degraded"
    assert str(model) in ended.failure.message
    assert ended.failure.message.split("(")[0] in stack.tierline("show", task).stdout
    model.write_bytes(whole)
    failures.write_text(shipped)
    stack.reload("--no-wait")
    assert_well(stack)


def test_a_killed_engine_is_replaced_and_its_end_is_told(stack: Stack) -> None:
    pid = stack.pids()["inference-worker"]
    kill_engine(stack)
    until(lambda: "SIGKILL" in supervisorctl(stack, "tail", "-20000", "inference-worker"), "supervisorctl says so")
    assert_well(stack)
    assert stack.pids()["inference-worker"] == pid


@pytest.mark.parametrize("fault", ["500", "garbage"])
def test_an_engine_that_answers_nonsense_call_after_call_is_degraded_until_it_is_well(stack: Stack, fault: str) -> None:
    pid = stack.pids()["inference-worker"]
    script = Path(f"{stack.root / 'worker.gguf'}.script.json")
    good = script.read_text()
    script.write_text(json.dumps({"default": {"text": "a b c", "fault": fault, "message": "no tensor"}}))
    for number in range(3):
        assert stack.client.result(stack.submit(f"Say {number}.", "worker"), timeout_s=100).state is TaskState.FAILED
    words = "no tensor" if fault == "500" else "where JSON belongs"
    until(lambda: words in reason_in_status(stack), "the status of the service says what its engine says")
    assert "engine.faulty" in reason_in_status(stack)
    assert words in supervisorctl(stack, "tail", "-20000", "inference-worker")
    script.write_text(good)
    assert_well(stack)
    assert stack.pids()["inference-worker"] == pid


def test_an_engine_without_enough_memory_is_degraded_with_the_reason_until_it_has_it(stack: Stack) -> None:
    limit = stack.root / "limit"
    limit.write_text("ulimit -v 9000\n")
    poor = stack.root / "llama-server"
    poor.write_text(f'#!/bin/sh\n[ "$1" = --help ] || [ "$1" = --version ] || . {limit}\nexec {FAKE_BINARY} "$@"\n')
    poor.chmod(0o755)
    stack.models["worker"]["binary"] = str(poor)
    stack.write()
    stack.reload("--no-wait")
    await_reason(stack, "died while loading")
    assert_degraded(stack, "died while loading", stack.pids()["inference-worker"])
    limit.write_text("")
    assert_well(stack)


def test_a_client_that_is_gone_leaves_every_slot_free_and_the_service_as_it_was(stack: Stack) -> None:
    pid, hold = stack.pids()["inference-worker"], stack.root / "go on"
    hold.unlink(missing_ok=True)
    script = (
        "import sys; from protocol.client import Client; from protocol.messages.infer import *\n"
        "Client(sys.argv[1]).infer('worker', InferRequest(role='t', messages=[ChatMessage(role='user', "
        "content='SLOW')], max_tokens=40), timeout_s=300)"
    )
    client = subprocess.Popen([sys.executable, "-c", script, stack.home.hub_address], cwd=CHECKOUT)

    def calls() -> int:
        return sum(len(one.in_flight) for one in stack.client.status().peers if one.service == "inference-worker")

    until(lambda: calls() == 1, "its call runs")
    client.kill()
    client.wait()
    until(lambda: calls() == 0, "its call has ended")
    hold.touch()
    assert_well(stack)
    assert stack.pids()["inference-worker"] == pid


def test_an_engine_that_hangs_is_replaced_and_status_says_so_meanwhile(stack: Stack) -> None:
    pid = stack.pids()["inference-worker"]
    kill_engine(stack, signal.SIGSTOP)
    until(lambda: "no answer and no token" in reason_in_status(stack), "status says that it hangs")
    assert "no answer and no token" in supervisorctl(stack, "tail", "-20000", "inference-worker")
    assert_well(stack)
    assert stack.pids()["inference-worker"] == pid


def test_a_taken_port_is_a_reason_in_status_and_supervisorctl_until_it_is_free(stack: Stack) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        stack.models["worker"]["port"] = port
        stack.write()
        stack.reload("--no-wait")
        await_reason(stack, f"port {port}")
        assert_degraded(stack, f"port {port} of model worker is taken", stack.pids()["inference-worker"])
    assert_well(stack)


def test_a_model_that_is_too_large_for_the_budget_is_refused_and_the_old_one_serves_on(stack: Stack) -> None:
    digest = stack.digests()["scheduler"]
    stack.models["worker"]["memory_bytes"] = 2**50
    stack.write()
    refused = stack.tierline("registry", "reload")
    assert refused.returncode == 2
    assert "models.yaml:" in refused.stderr
    assert f"{2**50:,}" in refused.stderr
    assert "hardware.yaml" in refused.stderr
    assert stack.digests()["scheduler"] == digest
    del stack.models["worker"]["memory_bytes"]
    stack.write()
    assert_well(stack)
