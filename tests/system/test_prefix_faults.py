"""Shared beginnings when something goes wrong with them: every call still ends, and every slot is free afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest

from protocol.kinds import Empty
from protocol.messages.infer import InferFinal
from protocol.messages.reply import ErrorReply
from tests.system.inference_stack import FAKE_BINARY, InferenceStack, ask_for

SHARED = " ".join(f"fact {number}" for number in range(150))


@pytest.fixture
def stack() -> Iterator[InferenceStack]:
    with InferenceStack() as running:
        running.entry("m", binary=str(FAKE_BINARY), engine="llama-server", slots=3, context_tokens=2048)
        running.script("m", {"read_s": 1.5})
        running.start("m")
        running.hub.await_peer("inference-m")
        yield running


def send_three(stack: InferenceStack) -> list[str]:
    asked = [ask_for(f"{SHARED} and now {number}") for number in range(3)]
    return [stack.hub.request("inference-m", "infer.request", body, key=f"k{n}") for n, body in enumerate(asked)]


def assert_all_slots_work(stack: InferenceStack) -> None:
    requests = [stack.hub.request("inference-m", "infer.request", ask_for(f"short {n}")) for n in range(3)]
    for request in requests:
        _, final, _ = stack.hub.collect(request, timeout_s=20)
        assert isinstance(final, InferFinal), final
    metrics = stack.figures("m", fresh_s=2.2)
    assert metrics["requests_processing"] == 0
    assert stack.hub.pongs["inference-m"].in_flight == 0


def test_one_reads_and_the_others_copy(stack: InferenceStack) -> None:
    for request in send_three(stack):
        assert isinstance(stack.hub.collect(request, timeout_s=20)[1], InferFinal)
    metrics = stack.figures("m", fresh_s=1.2)
    assert (metrics["prefixes_read"], metrics["prefixes_copied"]) == (1, 2)
    assert list((stack.root / "run" / "prefixes" / "m").iterdir())
    assert_all_slots_work(stack)


def test_an_engine_that_refuses_copies_is_asked_once_and_answers_all_the_same(stack: InferenceStack) -> None:
    stack.script("m", {"copies": False})
    for _ in range(2):
        for request in send_three(stack):
            assert isinstance(stack.hub.collect(request, timeout_s=20)[1], InferFinal)
    lines = (stack.root / "logs" / "inference-m.jsonl").read_text().splitlines()
    refusals = [json.loads(line) for line in lines if '"prefix.off"' in line]
    assert [line["reason"] for line in refusals] == ["scripted: slots are not copied"]
    assert stack.figures("m", fresh_s=1.2)["prefixes_copied"] == 0
    assert_all_slots_work(stack)


def test_the_others_go_on_when_the_one_who_reads_is_cancelled(stack: InferenceStack) -> None:
    requests = send_three(stack)
    stack.figures("m", fresh_s=0.4)
    for number, request in enumerate(requests[:1]):
        stack.hub.send(stack.hub.peers["inference-m"], "infer.cancel", Empty(), corr=request, key=f"k{number}")
    bodies = [stack.hub.collect(request, timeout_s=20)[1] for request in requests]
    assert isinstance(bodies[0], ErrorReply)
    assert bodies[0].failure.code == "call.cancelled"
    assert all(isinstance(body, InferFinal) for body in bodies[1:]), bodies
    assert_all_slots_work(stack)


def test_a_child_that_dies_while_it_reads_is_replaced(stack: InferenceStack) -> None:
    requests = send_three(stack)
    stack.figures("m", fresh_s=0.4)
    os.kill(stack.figures("m", fresh_s=0.2)["child_pid"], signal.SIGKILL)
    for request in requests:
        _, body, _ = stack.hub.collect(request, timeout_s=20)
        assert isinstance(body, ErrorReply), body
        assert body.failure.code in ("engine.died", "engine.not_ready")
    stack.hub.await_peer("inference-m", "degraded")
    stack.hub.await_peer("inference-m", "ready", timeout_s=20)
    assert_all_slots_work(stack)


def test_files_do_not_outlive_the_service(stack: InferenceStack) -> None:
    for request in send_three(stack):
        stack.hub.collect(request, timeout_s=20)
    folder = stack.root / "run" / "prefixes" / "m"
    assert list(folder.iterdir())
    os.kill(stack.hub.hellos["inference-m"].pid, signal.SIGTERM)
    end = time.monotonic() + 15
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not folder.exists()
