"""A weight in the registry changes who is served: real processes, two clients, one slot."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from protocol.client import Client
from protocol.messages.result import TaskState, TaskView
from services.ctl.__main__ import main
from services.ctl.bench.bare_stack import BareStack
from tests.waiting import until

STEPS = 60
MODELS = {
    "front": {"tier": "A", "engine": "noop", "context_tokens": 4096},
    "specialist": {"tier": "B", "engine": "noop", "context_tokens": 4096},
    "worker": {"tier": "C", "engine": "noop", "slots": 1, "context_tokens": 4096},
}


def fanout() -> dict[str, Any]:
    steps = [
        {"id": f"S{i}", "actor": "worker", "action": "answer", "gates": [], "outputs": [{"name": f"o{i}"}]}
        for i in range(STEPS)
    ]
    return {"objective": "An order.", "plan": {"steps": steps}}


def starts_ms(view: TaskView) -> list[int]:
    starts = [attempt.started_ms for step in view.steps for attempt in step.attempts]
    return sorted(start for start in starts if start is not None)


def test_a_weight_in_the_registry_decides_whose_steps_go_first(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = BareStack(
        short_folder, models=MODELS, core=("scheduler", "planner", "memory"), weights={"light": 1, "hea*": 5}
    )
    with stack, Client(stack.home.hub_address, "light") as light, Client(stack.home.hub_address, "heavy") as heavy:
        stack.kill("inference-worker", signal.SIGSTOP)
        try:
            first = light.submit(fanout(), timeout_s=100)
            second = heavy.submit(fanout(), timeout_s=100)
            least = 2 * STEPS - 1
            until(lambda: stack.client.status().queued.get("infer.worker", 0) >= least, "all wait for the one slot")
            monkeypatch.setenv("TIERLINE_HOME", stack.environ["TIERLINE_HOME"])
            monkeypatch.setenv("TIERLINE_REGISTRY", stack.environ["TIERLINE_REGISTRY"])
            assert main(["status", "--json"]) == 0
            rows = json.loads(capsys.readouterr().out)["hub"]["clients"]
            shown = {row["client"].rpartition("-")[0]: (row["weight"], row["waiting"] + row["running"]) for row in rows}
            assert shown["light"] == (1, STEPS)
            assert shown["heavy"] == (5, STEPS)
        finally:
            stack.kill("inference-worker", signal.SIGCONT)
        views = [client.result(one.task_id, 200) for client, one in ((light, first), (heavy, second))]
    assert [view.state for view in views] == [TaskState.SUCCEEDED] * 2
    slow, fast = (starts_ms(view) for view in views)
    before = sum(start < fast[-1] for start in slow)
    assert STEPS // 10 <= before <= STEPS * 3 // 10, f"{before} of {STEPS}: expected a fifth"
