"""Shared beginnings when something goes wrong with them: every call still ends, and every slot is free afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.kinds import Empty
from protocol.messages.infer import ChatMessage, InferFinal
from protocol.messages.reply import ErrorReply
from services.inference.llama_http import LlamaServer
from services.inference.slots import SlotDesk
from services.kit.clock import SteadyClock
from services.kit.logs import Log
from tests.fakes.gguf_files import write_tiny_gguf
from tests.system.inference_stack import FAKE_BINARY, InferenceStack, ask_for
from tests.waiting import until

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
        _, final, _ = stack.hub.collect(request)
        assert isinstance(final, InferFinal), final
    stack.hub.pump_for(1.5)  # the service asks its engine once a second
    stack.await_figures("m", requests_processing=0)
    assert stack.hub.pongs["inference-m"].in_flight == 0


def test_one_reads_and_the_others_copy(stack: InferenceStack) -> None:
    pid = stack.hub.hellos["inference-m"].pid
    os.kill(pid, signal.SIGSTOP)  # so that all three are there when it looks, however full the machine is
    requests = send_three(stack)
    stack.hub.pump_for(0.3)
    os.kill(pid, signal.SIGCONT)
    for request in requests:
        assert isinstance(stack.hub.collect(request)[1], InferFinal)
    metrics = stack.figures("m")
    assert (metrics["prefixes_read"], metrics["prefixes_copied"]) == (1, 2)
    assert list((stack.root / "run" / "prefixes" / "m").iterdir())
    assert_all_slots_work(stack)


def test_an_engine_that_refuses_copies_is_asked_once_and_answers_all_the_same(stack: InferenceStack) -> None:
    stack.script("m", {"copies": False})
    for _ in range(2):
        for request in send_three(stack):
            assert isinstance(stack.hub.collect(request)[1], InferFinal)
    lines = (stack.root / "logs" / "inference-m.jsonl").read_text().splitlines()
    refusals = [json.loads(line) for line in lines if '"prefix.off"' in line]
    assert [line["reason"] for line in refusals] == ["scripted: slots are not copied"]
    assert stack.figures("m")["prefixes_copied"] == 0
    assert_all_slots_work(stack)


def test_the_others_go_on_when_the_one_who_reads_is_cancelled(stack: InferenceStack) -> None:
    requests = send_three(stack)
    stack.hub.pump_for(0.4)
    for number, request in enumerate(requests[:1]):
        stack.hub.send(stack.hub.peers["inference-m"], "infer.cancel", Empty(), corr=request, key=f"k{number}")
    bodies = [stack.hub.collect(request)[1] for request in requests]
    assert isinstance(bodies[0], ErrorReply)
    assert bodies[0].failure.code == "call.cancelled"
    assert all(isinstance(body, InferFinal) for body in bodies[1:]), bodies
    assert_all_slots_work(stack)


def test_a_child_that_dies_while_it_reads_is_replaced(stack: InferenceStack) -> None:
    pid = stack.figures("m")["child_pid"]
    stack.script("m", {"read_s": 60})  # a busy machine may take its time to get here
    requests = send_three(stack)
    stack.hub.pump_for(0.4)
    os.kill(pid, signal.SIGKILL)
    stack.script("m", {})
    for request in requests:
        _, body, _ = stack.hub.collect(request)
        assert isinstance(body, ErrorReply), body
        assert body.failure.code in ("engine.died", "engine.not_ready")
    stack.hub.await_peer("inference-m", "degraded")
    stack.hub.await_peer("inference-m", "ready")
    assert_all_slots_work(stack)


def test_beside_a_draft_model_nothing_is_copied() -> None:
    with InferenceStack() as stack:
        fields = {"binary": str(FAKE_BINARY), "engine": "llama-server", "slots": 3, "context_tokens": 2048}
        stack.entry("m", **fields, speculation={"type": "draft", "draft": "d", "policy": "always"})
        stack.entry("d", tier="D")
        stack.start("m")
        stack.hub.await_peer("inference-m")
        for request in send_three(stack):
            assert isinstance(stack.hub.collect(request)[1], InferFinal)
        metrics = stack.figures("m")
        assert metrics["mode"] == "speculating"
        assert (metrics["prefixes_read"], metrics["prefixes_copied"]) == (0, 0)
        assert not list(stack.root.glob("run/prefixes/m/*"))


@pytest.mark.parametrize("disk_bytes", [0, 2**50], ids=["none is wanted", "more than there is"])
def test_an_entry_says_how_much_of_the_disk_its_saved_slots_may_take(disk_bytes: int) -> None:
    with InferenceStack() as stack:
        fields = {"binary": str(FAKE_BINARY), "engine": "llama-server", "slots": 3, "context_tokens": 2048}
        stack.entry("m", **fields, prefix_disk_bytes=disk_bytes)
        stack.start("m")
        stack.hub.await_peer("inference-m")
        for request in send_three(stack):
            assert isinstance(stack.hub.collect(request)[1], InferFinal)
        assert stack.figures("m")["prefixes_read"] == 0
        assert not list(stack.root.glob("run/prefixes/m/*"))


def test_the_disk_keeps_what_was_used_last_within_the_bound(tmp_path: Path) -> None:
    folder = tmp_path / "prefixes"
    desk = SlotDesk(folder, 3, Log(tmp_path, "desk", SteadyClock()), 10)  # the scripted engine writes 6 bytes a slot
    assert desk.engine_started("one model", copies=True, token_bytes=1)
    with scripted_engine(folder) as port:
        asyncio.run(_two_groups(desk, port, folder))


@contextmanager
def scripted_engine(folder: Path) -> Iterator[int]:
    """Its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(FAKE_BINARY),
        "--model",
        "m",
        "--port",
        str(port),
        "--parallel",
        "3",
        "--slot-save-path",
        f"{folder}/",
    ]
    child = subprocess.Popen(command, env={**os.environ, "LLAMA_API_KEY": "key"})
    try:
        yield port
    finally:
        child.kill()
        child.wait()


def files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


async def _server(port: int) -> LlamaServer:
    server = LlamaServer(port, "key")
    for _ in range(600):
        if await server.alive():
            break
        await asyncio.sleep(0.1)
    return server


async def _two_groups(desk: SlotDesk, port: int, folder: Path) -> None:
    server = await _server(port)
    kept = []
    for group in "ab":
        messages = [[ChatMessage(role="user", content=group * 2_000 + str(n))] for n in range(3)]
        seats = await asyncio.gather(*(desk.enter(f"{group}{n}", one, server) for n, one in enumerate(messages)))
        assert [seat.restored for seat in seats] == [False, True, True]
        for n, seat in enumerate(seats):
            desk.leave(f"{group}{n}", seat, None, complete=True)
        kept.append(files_in(folder))
    assert [len(names) for names in kept] == [1, 1]
    assert kept[0] != kept[1]
    figures = desk.figures()
    assert (figures["prefixes_read"], figures["prefixes_copied"]) == (2, 4)
    assert figures["prefixes_bytes"] <= 10
    desk.engine_started("another model", copies=True, token_bytes=1)
    assert not files_in(folder)
    await server.close()


@pytest.mark.parametrize(
    ("disk_bytes", "restored", "files"), [(10, [False, False, True], 1), (10**18, [False, False, False], 0)]
)
def test_what_is_to_be_restored_is_not_removed_for_what_is_kept_and_a_full_disk_keeps_nothing(
    tmp_path: Path, disk_bytes: int, restored: list[bool], files: int
) -> None:
    folder = tmp_path / "prefixes"
    desk = SlotDesk(folder, 1, Log(tmp_path, "desk", SteadyClock()), disk_bytes=1024**3)
    assert desk.engine_started("one model", copies=True, token_bytes=1)
    desk._disk_bytes = disk_bytes  # room for one file, or more than there is

    async def scene(port: int) -> None:
        server = await _server(port)
        seats = []
        for turn in range(3):
            messages = [ChatMessage(role="user", content="ab"[turn % 2] * 20_000)]
            seats.append(await desk.enter(f"c{turn}", messages, server))
            desk.leave(f"c{turn}", seats[-1], None, complete=True)
        assert [seat.restored for seat in seats] == restored
        assert len(files_in(folder)) == files
        await server.close()

    with scripted_engine(folder) as port:
        asyncio.run(scene(port))


CONTEXTS = [" ".join(f"{name}-number-{number}-of-the-many" for number in range(500)) for name in ("facts", "notes")]
CACHED = {"prompt_tokens_details": {"cached_tokens": 9}}


@pytest.fixture
def one_slot() -> Iterator[InferenceStack]:
    with InferenceStack() as running:
        running.entry("m", binary=str(FAKE_BINARY), engine="llama-server", slots=1, context_tokens=2048)
        running.start("m")
        running.hub.await_peer("inference-m")
        yield running


def visit(stack: InferenceStack, context: int) -> None:
    final = stack.ask("m", ask_for(CONTEXTS[context]))
    assert isinstance(final, InferFinal), final


def reasons(stack: InferenceStack) -> list[str]:
    lines = (stack.root / "logs" / "inference-m.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines if '"prefix.off"' in line]


def test_contexts_that_take_turns_are_kept_and_restored(one_slot: InferenceStack) -> None:
    one_slot.script("m", {"default": {"text": "ok", "usage": CACHED}})
    for turn in range(6):
        visit(one_slot, turn % 2)
    assert one_slot.figures("m")["prefixes_copied"] == 4
    assert len(files_in(one_slot.root / "run" / "prefixes" / "m")) == 2
    assert not reasons(one_slot)


def test_a_context_that_cannot_be_kept_costs_the_call_after_it_nothing(one_slot: InferenceStack) -> None:
    one_slot.script("m", {"copies": False})
    for turn in range(4):
        visit(one_slot, turn % 2)
    assert reasons(one_slot) == ["scripted: slots are not copied"]
    assert one_slot.figures("m")["prefixes_copied"] == 0


def test_an_engine_that_reads_again_what_was_kept_still_copies_beginnings(stack: InferenceStack) -> None:
    stack.script("m", {"default": {"text": "ok", "usage": {"prompt_tokens_details": {"cached_tokens": 0}}}})
    for number in (0, 1, 2, 3, 0):  # the fourth overwrites the first of three slots
        assert isinstance(stack.ask("m", ask_for(f"{number} {CONTEXTS[0]}")), InferFinal)
    stack.script("m", {"default": {"text": "ok", "usage": CACHED}})
    assert reasons(stack) == ["the engine read again what had been kept; no more is kept"]
    before = stack.figures("m")["prefixes_copied"]
    for request in send_three(stack):
        assert isinstance(stack.hub.collect(request)[1], InferFinal)
    assert stack.figures("m")["prefixes_copied"] > before


def test_a_context_too_large_for_the_disk_is_not_kept() -> None:
    with InferenceStack() as stack:
        wide = {"head_count": 1, "head_count_kv": 1, "key_length": 131_072, "value_length": 131_072}  # 512 KB a token
        extra = {f"attention.{name}": value for name, value in wide.items()}
        path = write_tiny_gguf(stack.model_path("m"), extra=extra)
        stack.entry("m", path=str(path), binary=str(FAKE_BINARY), engine="llama-server", slots=1, context_tokens=1024)
        stack.start("m")
        stack.hub.await_peer("inference-m")
        for turn in range(2):
            visit(stack, turn)
        assert not files_in(stack.root / "run" / "prefixes" / "m"), "64 blocks are a gibibyte, and this is 120 of them"


def test_files_do_not_outlive_the_service(stack: InferenceStack) -> None:
    for request in send_three(stack):
        stack.hub.collect(request)
    folder = stack.root / "run" / "prefixes" / "m"
    assert list(folder.iterdir())
    os.kill(stack.hub.hellos["inference-m"].pid, signal.SIGTERM)
    until(lambda: not folder.exists(), "the files are gone")
