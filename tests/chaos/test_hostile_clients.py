"""Clients that flood, or never read: refused and bounded, while everybody else is served. Real processes."""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.async_client import AsyncClient
from protocol.client import Client
from protocol.codec import pack_body
from protocol.errors import CallRefused
from protocol.header import Header, pack_header
from protocol.messages.infer import ChatMessage, InferRequest
from protocol.messages.result import ArtefactQuery, TaskQuery, TaskState, Watch
from protocol.messages.session import Hello
from services.ctl.bench.bare_stack import BareStack
from services.scheduler.admission import MAX_CALLS_PER_PEER
from services.scheduler.occupancy import MAX_ACTIVE_BYTES, MAX_ACTIVE_TASKS
from services.scheduler.unread import MAX_UNREAD_PER_PEER
from tests.waiting import until

pytestmark = pytest.mark.chaos

FLOOD = MAX_ACTIVE_TASKS // 2 + 200
MODELS = {
    "front": {"tier": "A", "engine": "noop", "slots": 4, "context_tokens": 4096},
    "specialist": {"tier": "B", "engine": "noop", "slots": 4, "context_tokens": 4096},
    "worker": {"tier": "C", "engine": "noop", "slots": 4, "context_tokens": 4096},
}


@pytest.fixture
def stack(short_folder: Path) -> Iterator[BareStack]:
    with BareStack(short_folder, models=MODELS, core=("scheduler", "planner", "memory")) as running:
        yield running
        running.kill("inference-worker", signal.SIGCONT)


def task(actor: str, steps: int = 1) -> dict[str, Any]:
    plan = [
        {"id": f"S{i}", "actor": actor, "action": "answer", "gates": [], "outputs": [{"name": f"o{i}"}]}
        for i in range(steps)
    ]
    return {"objective": "An order.", "plan": {"steps": plan}}


def resident_mb(stack: BareStack) -> float:
    return psutil.Process(stack.processes["scheduler"].pid).memory_info().rss / 2**20


async def flood_with_tasks(address: str, count: int) -> tuple[int, list[int]]:
    """How many were accepted, and what the refused ones were told."""
    told: list[int] = []
    accepted = 0
    async with AsyncClient(address, name="flood") as client:
        for _ in range(count // 100):
            results = await asyncio.gather(
                *(client.submit(task("worker"), timeout_s=200) for _ in range(100)), return_exceptions=True
            )
            for result in results:
                if isinstance(result, CallRefused):
                    told.append(result.retry_after_ms)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    accepted += 1
    return accepted, told


def test_a_flood_of_submits_is_refused_while_others_are_served(stack: BareStack) -> None:
    for _ in range(5):
        assert stack.client.run(task("writer"), timeout_s=100).state is TaskState.SUCCEEDED  # a pace to measure
    stack.kill("inference-worker", signal.SIGSTOP)
    accepted, told = asyncio.run(flood_with_tasks(stack.home.hub_address, FLOOD))
    assert accepted == MAX_ACTIVE_TASKS // 2
    assert len(told) == FLOOD - accepted
    assert all(100 <= pause <= 30_000 for pause in told)
    assert stack.client.run(task("writer"), timeout_s=100).state is TaskState.SUCCEEDED, "beside all that waits"
    stack.kill("inference-worker", signal.SIGCONT)

    def tasks() -> dict[str, int]:
        return {state: count for state, count in stack.client.status().tasks.items() if count}

    until(lambda: tasks().get("succeeded", 0) >= accepted + 6, "what was accepted is finished", within_s=300)
    assert tasks() == {"succeeded": accepted + 6}, "and nothing else"


def test_heavy_tasks_are_refused_long_before_their_number_would_be(stack: BareStack) -> None:
    stack.kill("inference-worker", signal.SIGSTOP)
    before_mb = resident_mb(stack)
    heavy = task("worker") | {"inputs": [{"name": f"i{n}", "value": "x" * 1_000_000} for n in range(7)]}
    places = MAX_ACTIVE_BYTES // 2 // (2 * 7_000_000)  # inputs are there twice, and half is for others
    accepted = [stack.client.submit(heavy, timeout_s=100).task_id for _ in range(places)]
    with pytest.raises(CallRefused, match="of the hub's memory"):
        stack.client.submit(heavy, timeout_s=100)
    assert resident_mb(stack) - before_mb < MAX_ACTIVE_BYTES / 2**20
    assert stack.client.run(task("writer"), timeout_s=100).state is TaskState.SUCCEEDED, "a small one has a place"
    for one in accepted:
        stack.client.cancel(one)
    stack.client.cancel(stack.client.submit(heavy, timeout_s=100).task_id)


async def flood_with_calls(address: str, count: int) -> tuple[int, int]:
    """Calls that were answered, and that were refused."""
    request = InferRequest(role="worker", messages=[ChatMessage(role="user", content="x")], max_tokens=1)
    async with AsyncClient(address, name="flood") as client:
        results = await asyncio.gather(
            *(client.infer("worker", request, timeout_s=200) for _ in range(count)), return_exceptions=True
        )
    refused = [result for result in results if isinstance(result, CallRefused)]
    assert all(one.retry_after_ms >= 100 for one in refused)
    answered = [result for result in results if not isinstance(result, BaseException)]
    assert len(refused) + len(answered) == count
    return len(answered), len(refused)


def test_a_flood_of_calls_leaves_room_in_the_queue_for_others(stack: BareStack) -> None:
    stack.kill("inference-worker", signal.SIGSTOP)
    outcome: list[tuple[int, int]] = []
    flood = threading.Thread(
        target=lambda: outcome.append(asyncio.run(flood_with_calls(stack.home.hub_address, MAX_CALLS_PER_PEER + 300)))
    )
    flood.start()
    least = MAX_CALLS_PER_PEER - 4
    until(lambda: stack.client.status().queued.get("infer.worker", 0) >= least, "its calls wait, up to the bound")
    time.sleep(1)  # what is beyond the bound comes too
    assert stack.client.status().queued["infer.worker"] <= MAX_CALLS_PER_PEER
    stack.kill("inference-worker", signal.SIGCONT)
    request = InferRequest(role="worker", messages=[ChatMessage(role="user", content="x")], max_tokens=1)
    assert stack.client.infer("worker", request, timeout_s=100).text == "ok"
    flood.join()
    assert outcome == [(MAX_CALLS_PER_PEER, 300)]


# A peer that speaks ZMTP by hand, so that nothing reads for it in the background


def zmtp_frame(body: bytes, flags: int) -> bytes:
    if len(body) < 256:
        return struct.pack("!BB", flags, len(body)) + body
    return struct.pack("!BQ", flags | 2, len(body)) + body


def zmtp_message(header: Header, body: bytes) -> bytes:
    return zmtp_frame(pack_header(header), 1) + zmtp_frame(body, 0)


def connect_by_hand(address: str) -> socket.socket:
    """A DEALER after the handshake (ZMTP 3.0, NULL), which has said HELLO."""
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(10)
    link.connect(address.removeprefix("ipc://"))
    link.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    greeting = b""
    while len(greeting) < 64:
        greeting += link.recv(64 - len(greeting))
    ready = b"\x05READY\x0bSocket-Type" + struct.pack("!I", 6) + b"DEALER"
    link.sendall(zmtp_frame(ready, 4))
    hello = Hello(service="deaf", protocol_min=1, protocol_max=1, pid=1)
    link.sendall(zmtp_message(Header(kind="session.hello", id="h", epoch="deaf-1"), pack_body(hello)))
    return link


def test_a_watcher_that_never_reads_costs_the_hub_little_and_delays_nobody(stack: BareStack) -> None:
    assert stack.client.run(task("worker", 300), timeout_s=200).state is TaskState.SUCCEEDED
    before_mb = resident_mb(stack)
    link = connect_by_hand(stack.home.hub_address)
    sent = 0
    try:
        for round_number in range(4):
            accepted = stack.client.submit(task("worker", 300))
            for number in range(20):
                sent += 1
                watch = Header(kind="task.watch", id=f"w{round_number}-{number}", epoch="deaf-1", seq=sent)
                link.sendall(zmtp_message(watch, pack_body(Watch(task_id=accepted.task_id))))
            assert stack.client.result(accepted.task_id, 100).state is TaskState.SUCCEEDED
        with Client(stack.home.hub_address, name="other") as other:
            assert other.run(task("writer"), timeout_s=100).state is TaskState.SUCCEEDED
        assert resident_mb(stack) - before_mb < 80
    finally:
        link.close()


def beat(link: socket.socket, stop: threading.Event, lock: threading.Lock) -> None:
    """ZMTP heartbeats, as libzmq sends them, so that the hub's side never finds the connection silent."""
    while not stop.wait(1.0):
        with lock:
            link.sendall(zmtp_frame(b"\x04PING" + struct.pack("!H", 600), 4))


def test_a_peer_that_beats_but_never_reads_large_answers_is_bounded_in_bytes(stack: BareStack) -> None:
    """Eight times the bound in answers, asked for by a peer that goes on living but reads nothing."""
    large = task("worker")
    large["inputs"] = [{"name": f"i{number}", "kind": "text", "value": "x" * 1_000_000} for number in range(3)]
    large["plan"]["steps"][0]["inputs"] = []
    task_id = stack.client.run(large, timeout_s=200).task_id
    before_mb = resident_mb(stack)
    link = connect_by_hand(stack.home.hub_address)
    stop, lock = threading.Event(), threading.Lock()
    heart = threading.Thread(target=beat, args=(link, stop, lock))
    heart.start()
    peak_mb = 0.0
    try:
        for number in range(8 * MAX_UNREAD_PER_PEER // 1_000_000):
            query = ArtefactQuery(task_id=task_id, name="i0")
            kind, body = ("task.artefact", query) if number % 5 else ("task.show", TaskQuery(task_id=task_id))
            header = Header(kind=kind, id=f"a{number}", epoch="deaf-1", seq=number + 1)
            with lock:
                link.sendall(zmtp_message(header, pack_body(body)))
        with Client(stack.home.hub_address, name="other") as other:
            end = time.monotonic() + 14  # longer than the silence after which a heartbeat would end it
            bound_mb = MAX_UNREAD_PER_PEER / 2**20
            while time.monotonic() < end or (peak_mb <= bound_mb * 0.7 and time.monotonic() < end + 60):
                assert other.run(task("writer"), timeout_s=100).state is TaskState.SUCCEEDED
                assert len(other.artefact(task_id, "i0").text()) == 1_000_000, "who reads is not made to wait"
                peak_mb = max(peak_mb, resident_mb(stack) - before_mb)
                time.sleep(0.2)
            for _ in range(100):
                other.artefact(task_id, "i1")  # more than the bound, by a client that reads
        # While a batch is being sent, what goes out exists twice: as our bytes and as libzmq's.
        assert bound_mb * 0.7 < peak_mb < bound_mb * 3, "the bound is reached, and it holds"
    finally:
        stop.set()
        heart.join()
        link.close()
