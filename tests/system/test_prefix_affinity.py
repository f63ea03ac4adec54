"""A fan-out through the hub on real llama.cpp: what its steps share is read once, and every step says what it saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.kinds import Empty
from protocol.messages.infer import InferFinal
from protocol.messages.reply import ErrorReply
from protocol.messages.result import StepState, TaskState, TaskView
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import DEMO_MODEL
from services.inference.engines import find_native
from services.kit.config import load_home
from tests.system.inference_stack import InferenceStack, ask_for
from tests.waiting import until

SHARED = " ".join(f"Fact {n}: queue {n * 7 % 90} holds {n * 13 % 50} letters." for n in range(24))
NOOP = {"engine": "noop", "slots": 2, "context_tokens": 4096}


@pytest.fixture(scope="module", params=["embedded", "llama-server"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareStack]:
    model = load_home().models / DEMO_MODEL
    if not model.is_file():
        pytest.skip(f"no demo model at {model}: run deploy/fetch-model, or set TIERLINE_CACHE")
    if request.param == "llama-server" and find_native(load_home()) is None:
        pytest.skip("no llama-server: run deploy/build-native")
    worker = {"tier": "C", "path": str(model), "engine": request.param, "slots": 4, "context_tokens": 2048}
    models = {"front": {"tier": "A", **NOOP}, "specialist": {"tier": "B", **NOOP}, "worker": worker}
    folder = Path(tmp_path_factory.mktemp("affinity"))
    with BareStack(folder, models=models) as running:
        yield running


def fan_out(width: int, shared: str) -> dict[str, Any]:
    steps = [
        {
            "id": f"S{n}",
            "actor": "worker",
            "action": f"Say one word about fact {n}.",
            "outputs": [{"name": f"word{n}"}],
            "inputs": ["facts"],
            "persona": "plain-writer",  # what is learned may change it from task to task, and with it the beginning
            "max_tokens": 6,
            "gates": [],
        }
        for n in range(width)
    ]
    facts = {"name": "facts", "kind": "text", "value": shared}
    return {"objective": "Say something about facts.", "inputs": [facts], "plan": {"steps": steps}}


def figures(stack: BareStack) -> dict[str, Any]:
    peers = stack.client.status().peers
    return next(peer.metrics for peer in peers if peer.service == "inference-worker")


def cached(view: TaskView) -> list[int]:
    assert view.state is TaskState.SUCCEEDED, view.failure
    return sorted(step.attempts[-1].cached_tokens for step in view.steps)


def test_a_fan_out_reads_what_it_shares_once(stack: BareStack) -> None:
    stack.kill("inference-worker", signal.SIGSTOP)  # so that it finds all steps at once, however full the machine is
    try:
        task = stack.client.submit(fan_out(4, SHARED)).task_id
        until(
            lambda: [step.state for step in stack.client.show(task).steps] == [StepState.INFERRING] * 4,
            "all steps are handed out",
        )
    finally:
        stack.kill("inference-worker", signal.SIGCONT)
    view = stack.client.result(task, timeout_s=300)
    tokens = [step.attempts[-1].prompt_tokens for step in view.steps]
    first, *others = cached(view)
    assert min(tokens) > 400
    assert first < 150, "somebody has to read it"
    assert min(others) > 0.75 * min(tokens), "without a copy each slot would have read it for itself"
    assert view.usage.cached_tokens == first + sum(others)
    saved = first + sum(others)
    until(lambda: figures(stack)["cached_tokens_total"] >= saved, "the totals are in the status")
    totals = figures(stack)
    assert totals["prefixes_read"] == 1
    assert totals["prefixes_copied"] == 3
    assert totals["prefixes_bytes"] > 100_000
    shown = subprocess.run(
        [sys.executable, "-m", "services.ctl", "show", view.task_id],
        env=stack.environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    heads = next(line.split() for line in shown.splitlines() if "cached" in line and "tries" in line)
    rows = [line.split() for line in shown.splitlines() if line.split() and line.split()[0] in ("S0", "S1", "S2", "S3")]
    assert sorted(int(row[heads.index("cached")]) for row in rows[:4]) == [first, *others]


def test_a_later_fan_out_finds_it_even_in_a_new_engine(stack: BareStack) -> None:
    os.kill(figures(stack)["child_pid"], signal.SIGKILL)
    until(lambda: figures(stack)["respawns"] > 0, "it has a new engine")
    stack.wait_ready()
    view = stack.client.run(fan_out(4, SHARED), timeout_s=300)
    tokens = [step.attempts[-1].prompt_tokens for step in view.steps]
    assert min(cached(view)) > 0.75 * min(tokens), "the file outlives the child"


def test_long_contexts_that_take_turns_in_one_slot_are_read_once_each() -> None:
    model, native = load_home().models / DEMO_MODEL, find_native(load_home())
    if not model.is_file() or native is None:
        pytest.skip("no demo model, or no llama-server: run deploy/fetch-model, deploy/build-native")
    with InferenceStack() as alone:
        binary = alone.root / "llama-server"
        # Its own cache in memory would hold both contexts of this model, and not one of a large model's.
        binary.write_text(
            f'#!/bin/sh\n[ "$1" = --help ] && exec "{native}" --help\nexec "{native}" "$@" --cache-ram 0\n'
        )
        binary.chmod(0o755)
        fields = {"path": str(model), "engine": "llama-server", "binary": str(binary)}
        alone.entry("m", **fields, slots=1, context_tokens=4096)
        alone.start("m")
        alone.hub.await_peer("inference-m")
        stories = {
            name: " ".join(
                f"Afterwards the experienced {name} carefully considered everything that happened during chapter {n}."
                for n in range(90)
            )
            for name in ("gardener", "fisherman")
        }
        finals = []
        for name, question in [(name, ask) for ask in ("What did", "Where was") for name in stories]:
            body = alone.ask("m", ask_for(f"{stories[name]} {question} the {name} do?", max_tokens=8), timeout_s=300)
            assert isinstance(body, InferFinal), body
            finals.append(body)
        assert min(final.prompt_tokens for final in finals) > 1_000
        assert max(final.cached_tokens for final in finals[:2]) < 100
        for again in finals[2:]:
            assert again.cached_tokens > 0.9 * again.prompt_tokens, (
                "restored as far as the question, which is another one"
            )
            assert again.first_token_ms < finals[0].first_token_ms / 2
        totals = alone.figures("m")
        assert (totals["prefixes_read"], totals["prefixes_copied"]) == (0, 2)


@pytest.mark.parametrize("engine", ["embedded", "llama-server"])
def test_a_cancel_while_the_beginning_is_read_frees_the_slot_without_a_respawn(engine: str) -> None:
    model = load_home().models / DEMO_MODEL
    native = find_native(load_home())
    if not model.is_file() or (engine == "llama-server" and native is None):
        pytest.skip("no demo model, or no llama-server: run deploy/fetch-model, deploy/build-native")
    fields = {"binary": str(native)} if engine == "llama-server" else {}
    with InferenceStack() as alone:
        alone.entry("m", path=str(model), engine=engine, slots=3, context_tokens=2048, **fields)
        alone.start("m")
        alone.hub.await_peer("inference-m")
        asked = [ask_for(f"{SHARED} And now {number}.", max_tokens=4) for number in range(3)]
        requests = [alone.hub.request("inference-m", "infer.request", one, key=f"k{n}") for n, one in enumerate(asked)]
        alone.hub.pump_for(0.5)
        alone.hub.send(alone.hub.peers["inference-m"], "infer.cancel", Empty(), corr=requests[0], key="k0")
        bodies = [alone.hub.collect(request, timeout_s=300)[1] for request in requests]
        assert isinstance(bodies[0], ErrorReply)
        assert bodies[0].failure.code == "call.cancelled"
        assert all(isinstance(body, InferFinal) for body in bodies[1:]), bodies
        alone.hub.pump_for(1.5)  # the service asks its engine once a second
        assert alone.await_figures("m", requests_processing=0)["respawns"] == 0
