"""`tierline bench barrier`: whether a step waits for anything but its own inputs.

A chain of four steps of 0.1 s stands beside one step of 0.4 s. A scheduler that works in waves holds the chain's second
step until the long one has ended and needs 0.7 s; without waves the ideal is 0.4 s. Real processes; only the worker is
one of exactly known speed (`timed_worker`), so that what is above the ideal is ours.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

from protocol.messages.result import TaskEvent, TaskState
from services.ctl.bench.bare_stack import BareStack, bound
from services.ctl.bench.overhead import BenchmarkFailedError
from services.ctl.bench.timed_worker import TOKENS_PER_S
from services.ctl.commands import Commands, Context, count
from services.ctl.outcomes import ExitCode
from services.scheduler.facts import TaskEnded, TaskPlanned

CHAIN_STEPS: Final = 4
CHAIN_STEP_S: Final = 0.1
_MODELS: Final = {
    "front": {"tier": "A", "engine": "noop", "context_tokens": 4096},
    "specialist": {"tier": "B", "engine": "noop", "context_tokens": 4096},
    "worker": {"tier": "C", "engine": "noop", "slots": 4, "context_tokens": 4096},
}


def add(commands: Commands) -> None:
    """Add `bench barrier`."""
    parser = commands.add("barrier", _run, "run a chain beside a long step: no step may wait for a stranger")
    parser.add_argument("--runs", type=count, default=5, help="runs; every figure is the median (default 5)")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    figures = measure(arguments.runs)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "median"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.OK


def measure(runs: int, step_s: float = CHAIN_STEP_S) -> dict[str, Any]:
    """Medians over `runs`, in seconds, of a chain of steps of `step_s` beside one that takes as long as all of them.

    `wall_s` is the hub's own account, from the adoption of the plan to the end of the task; `client_wall_s` what the
    client waited, with submission, planning and the journal's syncs.
    """
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        stack = BareStack(Path(folder), models=_MODELS, core=("scheduler", "planner", "memory"))
        stack.argv["inference-worker"] = bound("services.ctl.bench.timed_worker", "worker")
        with stack:
            _one(stack, -1, step_s)  # first use of everything
            rows.extend(_one(stack, number, step_s) for number in range(runs))
    return {
        "wall_s": round(statistics.median(row["wall_s"] for row in rows), 4),
        "ideal_s": CHAIN_STEPS * step_s,
        "client_wall_s": round(statistics.median(row["client_wall_s"] for row in rows), 4),
        "worst_wall_s": round(max(row["wall_s"] for row in rows), 4),
        "runs": runs,
    }


def _one(stack: BareStack, number: int, step_s: float) -> dict[str, float]:
    began = time.perf_counter()
    view = stack.client.run(_task(number, step_s), timeout_s=60)
    waited = time.perf_counter() - began
    if view.state is not TaskState.SUCCEEDED:
        raise BenchmarkFailedError(f"a benchmark task {view.state.value}: {view.failure}")
    journal = stack.client.watch(view.task_id, timeout_s=10)
    told = {one.event: one.at_ms for one in journal if isinstance(one, TaskEvent)}
    return {"wall_s": (told[TaskEnded.EVENT] - told[TaskPlanned.EVENT]) / 1000, "client_wall_s": waited}


def _task(number: int, step_s: float) -> dict[str, Any]:
    chain: list[dict[str, Any]] = [
        {"id": f"S{i}", "outputs": [{"name": f"o{i}"}], "inputs": [f"o{i - 1}"] if i else []}
        | {"max_tokens": round(step_s * TOKENS_PER_S)}
        for i in range(CHAIN_STEPS)
    ]
    whole = round(CHAIN_STEPS * step_s * TOKENS_PER_S)
    long: dict[str, Any] = {"id": "L", "outputs": [{"name": "long"}], "max_tokens": whole}
    steps = [{"actor": "worker", "action": "take your time", "gates": []} | step for step in [*chain, long]]
    return {"objective": f"measure barriers, run {number}", "plan": {"steps": steps}}
