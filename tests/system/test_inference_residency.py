"""One inference service whose model comes and goes on a scripted hub's word; the engine is scripted too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from protocol.messages.infer import InferFinal
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Reside
from tests.system.inference_stack import FAKE_BINARY, InferenceStack, ask_for

SERVICE = "inference-m"


@pytest.fixture
def stack(tmp_path: Path):
    with InferenceStack() as running:
        running.entry("front", engine="noop")
        fields = {"binary": str(FAKE_BINARY), "engine": "llama-server", "slots": 2, "context_tokens": 512}
        running.entry("m", residency="warm", **fields)
        running.script("m", {"default": "hello from the fake"})
        running.start("m")
        running.hub.await_peer(SERVICE, "parked")
        yield running


def tell(stack: InferenceStack, order: int, *, loaded: bool) -> None:
    stack.hub.send(stack.hub.peers[SERVICE], "session.reside", Reside(loaded=loaded, order=order))


def child_of(stack: InferenceStack) -> int | None:
    pid = stack.hub.pongs[SERVICE].metrics["child_pid"]
    assert pid is None or isinstance(pid, int)
    return pid


def test_a_parked_model_has_no_child_until_the_hub_wants_it_and_none_afterwards(stack: InferenceStack) -> None:
    assert stack.hub.hellos[SERVICE].state.value == "parked"
    assert child_of(stack) is None
    assert stack.hub.credit[SERVICE] == 0
    tell(stack, 1, loaded=True)
    stack.hub.await_peer(SERVICE, "loading")
    stack.hub.await_peer(SERVICE, "ready")
    assert stack.hub.pongs[SERVICE].order == 1
    assert stack.hub.credit[SERVICE] == 2
    assert isinstance(stack.ask("m", ask_for("hi there")), InferFinal)
    stack.hub.until(lambda: stack.hub.pongs[SERVICE].model_bytes > 1_000_000, "its memory is measured")
    pid = child_of(stack)
    assert pid is not None
    tell(stack, 2, loaded=False)
    stack.hub.await_peer(SERVICE, "parked")
    assert child_of(stack) is None
    assert stack.hub.pongs[SERVICE].model_bytes == 0
    assert not Path(f"/proc/{pid}").exists()
    tell(stack, 3, loaded=True)
    stack.hub.await_peer(SERVICE, "ready")
    assert isinstance(stack.ask("m", ask_for("hi there")), InferFinal)
    assert stack.figures("m")["loads"] == 2
    assert stack.figures("m")["respawns"] == 0
    assert stack.hub.credit[SERVICE] == 4, "two slots, and one given back for each answer"


def test_a_model_is_never_taken_from_a_running_call(stack: InferenceStack) -> None:
    stack.script("m", {"default": {"text": "word", "hold": str(stack.root / "go on")}})
    tell(stack, 1, loaded=True)
    stack.hub.await_peer(SERVICE, "ready")
    request = stack.hub.request(SERVICE, "infer.request", ask_for("go"))
    stack.hub.pump(200)
    tell(stack, 2, loaded=False)
    stack.hub.until(lambda: stack.hub.pongs[SERVICE].order == 2, "the word is heard")
    assert stack.hub.pongs[SERVICE].state.value == "ready"
    (stack.root / "go on").touch()
    assert isinstance(stack.hub.collect(request)[1], InferFinal)
    tell(stack, 2, loaded=False)  # a repeated word is an old one
    stack.hub.pump_for(0.5)
    assert stack.hub.pongs[SERVICE].state.value == "ready"
    tell(stack, 3, loaded=False)
    stack.hub.await_peer(SERVICE, "parked")


def test_a_call_for_a_parked_model_is_a_typed_failure(stack: InferenceStack) -> None:
    answer = stack.ask("m", ask_for("hi there"))
    assert isinstance(answer, ErrorReply)
    assert (answer.failure.code, answer.failure.category.value) == ("engine.not_ready", "RESOURCE")


def test_a_child_that_dies_while_it_loads_is_started_again_and_can_still_be_given_up(stack: InferenceStack) -> None:
    stack.script("m", {"default": "fine", "load_s": 30})
    tell(stack, 1, loaded=True)
    stack.hub.await_peer(SERVICE, "loading")
    stack.hub.until(lambda: child_of(stack) is not None, "its engine is started")
    os.kill(child_of(stack) or 0, signal.SIGKILL)
    stack.hub.await_peer(SERVICE, "degraded")
    stack.hub.await_peer(SERVICE, "loading")
    tell(stack, 2, loaded=False)
    stack.hub.await_peer(SERVICE, "parked")
    assert child_of(stack) is None
