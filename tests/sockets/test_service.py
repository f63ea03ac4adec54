"""A service of the kit as a process of its own on a scripted hub: what becomes of its calls whatever is returned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.codec import unpack_body
from protocol.kinds import Empty
from protocol.messages.infer import ChatMessage, InferFinal, InferRequest
from protocol.messages.reply import ErrorReply
from tests.fakes.hub import ScriptedHub

SERVICE = """
import asyncio, sys
from protocol.messages.infer import InferFinal, InferRequest
from services.kit.config import load_home
from services.kit.service import Call, Service

async def answer(call):
    tokens = int(call.read(InferRequest).messages[0].content)
    return InferFinal(
        text="", finish_reason="stop", model="m", engine="e", prompt_tokens=tokens, generated_tokens=0
    )

service = Service(load_home().make(), "one", ("infer.one",), slots=1)
service.answer("infer.request", answer)

async def serve():
    return await service.run()

sys.exit(asyncio.run(serve()))
"""


@pytest.fixture
def hub(address: str) -> Iterator[ScriptedHub]:
    root = Path(address.removeprefix("ipc://")).parents[1]
    (root / "run").mkdir(mode=0o700)
    scripted = ScriptedHub(address)
    process = subprocess.Popen([sys.executable, "-c", SERVICE], env={**os.environ, "TIERLINE_HOME": str(root)})
    try:
        scripted.await_peer("one")
        yield scripted
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        scripted.close()


def ask_for(tokens: int) -> InferRequest:
    return InferRequest(role="r", messages=[ChatMessage(role="user", content=str(tokens))], max_tokens=1)


def test_an_ending_that_no_message_can_carry_is_an_error_and_gives_its_slot_back(hub: ScriptedHub) -> None:
    body = hub.ask("one", "infer.request", ask_for(10**30))
    assert isinstance(body, ErrorReply), body
    assert body.failure.code == "internal.bug"
    assert isinstance(hub.ask("one", "infer.request", ask_for(3)), InferFinal), "the only slot is free"
    assert hub.newest_pong("one").in_flight == 0


def test_a_call_that_is_cancelled_before_it_was_begun_ends_and_gives_its_slot_back(hub: ScriptedHub) -> None:
    identity, pid = hub.peers["one"], hub.hellos["one"].pid
    os.kill(pid, signal.SIGSTOP)  # both messages are there when it looks again
    hub.send(identity, "infer.request", ask_for(3), key="k1", dst="infer.one")
    hub.send(identity, "infer.cancel", Empty(), key="k1")
    os.kill(pid, signal.SIGCONT)
    hub.until(lambda: hub.seen("error"), "it has ended")
    ((_, body),) = hub.seen("error")
    assert unpack_body(ErrorReply, body).failure.code == "call.cancelled"
    assert isinstance(hub.ask("one", "infer.request", ask_for(3)), InferFinal), "the only slot is free"
    assert hub.newest_pong("one").in_flight == 0
