"""`tierline bench overhead`: what bus, journal and scheduling add to a step, beside the bare socket in the same run.

A stack with the noop engine answers at once, so that all the time is ours. The baseline (`raw_zmq`) is messages of the
same kind over ROUTER and DEALER between two processes, with nothing around them. It is taken right before and right
after each task, and a ratio is made in each run before the median is: how fast a machine wakes threads changes from one
second to the next.

The growth is that of a step's cost with what the hub has behind it. Fan-outs on a stack with a long history take turns
with fan-outs on a fresh one, so that a machine that gets slower or faster meanwhile does not look like growth, and each
begins when memory has learned from what was before: otherwise it would share the cores with more or less of that.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

from protocol.messages.memory import MemoryRequest, Stats
from protocol.messages.result import TaskState, TaskView
from services.ctl.bench import raw_zmq
from services.ctl.bench.bare_stack import BareStack
from services.ctl.commands import Commands, Context, count
from services.ctl.outcomes import CommandError, ExitCode
from services.kit.children import resident_bytes

FANOUT_STEPS: Final = 1_000
CHAIN_STEPS: Final = 200
HISTORY_STEPS: Final = 100_000
_COMPARED: Final = 25
"""Fan-outs of each kind behind the growth, where the history has so many; it is the ratio of their medians. So many
steady it against single ones that were slow, not against a machine that is busy for minutes."""
_WINDOW: Final = 64
"""Messages under way at once in the raw fan-out: as many as the noop tier has slots."""
_LEARNED_S: Final = 120.0
"""Longest wait for memory to have learned from everything."""
_SETTLED_S: Final = 0.3
"""Outcomes of a task that has just ended come to memory within this time."""
_DIGITS: Final = {"_commits_per_step": 3, "_ratio": 2}
NOOP_MODELS: Final = {
    "front": {"tier": "A", "engine": "noop", "slots": 2, "context_tokens": 4096},
    "specialist": {"tier": "B", "engine": "noop", "slots": 2, "context_tokens": 4096},
    "worker": {"tier": "C", "engine": "noop", "slots": _WINDOW, "context_tokens": 4096},
}


class BenchmarkFailedError(CommandError):
    """A task of the benchmark did not succeed: its figures would mean nothing."""


def add(commands: Commands) -> None:
    """Add `bench overhead`."""
    parser = commands.add("overhead", _run, "measure what a step costs beyond its inference, with a noop tier")
    parser.add_argument("--runs", type=count, default=5, help="runs; every figure is the median (default 5)")
    parser.add_argument(
        "--history",
        type=count,
        default=HISTORY_STEPS,
        metavar="STEPS",
        help=f"steps behind the hub when growth and memory are measured (default {HISTORY_STEPS})",
    )


def _run(arguments: Namespace, context: Context) -> ExitCode:
    history = max(FANOUT_STEPS, arguments.history)
    context.screen.note(f"tierline: first the overhead, then a history of {history} steps; 100,000 take some minutes")
    figures = measure(arguments.runs) | growth(history)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "median"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.OK


def growth(history: int) -> dict[str, Any]:
    """What a step costs after so many steps over what it costs a fresh hub, and the hub's resident memory then."""
    fanouts = history // FANOUT_STEPS
    compared = min(fanouts, _COMPARED)
    with tempfile.TemporaryDirectory(prefix="tl-") as folder, BareStack(Path(folder), models=NOOP_MODELS) as old:
        for _ in range(fanouts - compared):
            _finished(old, _fanout(FANOUT_STEPS))
        with tempfile.TemporaryDirectory(prefix="tl-") as other, BareStack(Path(other), models=NOOP_MODELS) as fresh:
            _finished(fresh, _fanout(50))
            first: list[float] = []
            last: list[float] = []
            for _ in range(compared):
                for stack, figures in ((old, last), (fresh, first)):
                    _learned(old)
                    _learned(fresh)
                    figures.append(_task(stack, "at", _fanout(FANOUT_STEPS))["at_us_per_step"])
        resident = resident_bytes(old.client.status().hub_pid)
    return {
        "history_growth": round(statistics.median(last) / statistics.median(first), 3),
        "history_first_us_per_step": round(statistics.median(first), 1),
        "history_last_us_per_step": round(statistics.median(last), 1),
        "history_steps": fanouts * FANOUT_STEPS,
        "rss_mb": round(resident / 1024**2, 1),
    }


def _learned(stack: BareStack) -> None:
    """Wait until the memory of a stack has nothing left to do about tasks that are over."""
    until_s, before = time.monotonic() + _LEARNED_S, -1
    while time.monotonic() < until_s:
        stats = stack.client.memory(MemoryRequest(ask=Stats())).stats or {}
        if stats["log_seq"] == stats["graph_seq"] == stats["vectors_seq"] == before:
            return
        before = stats["log_seq"]
        time.sleep(_SETTLED_S)
    raise BenchmarkFailedError(f"after {_LEARNED_S:g} s memory still learns from what was before")


def measure(runs: int) -> dict[str, Any]:
    """All figures as medians over `runs`; times in microseconds."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="tl-") as folder, BareStack(Path(folder), models=NOOP_MODELS) as stack:
        for task in (_fanout(FANOUT_STEPS), _chain(CHAIN_STEPS)):
            _finished(stack, task)  # first use of everything
        for _ in range(runs):
            fanout = _beside(Path(folder), stack, "fanout", _fanout(FANOUT_STEPS), FANOUT_STEPS, _WINDOW)
            rows.append(fanout | _beside(Path(folder), stack, "chain", _chain(CHAIN_STEPS), CHAIN_STEPS, 1))
    digits = {name: next((places for end, places in _DIGITS.items() if name.endswith(end)), 1) for name in rows[0]}
    return {
        **{name: round(statistics.median(row[name] for row in rows), digits[name]) for name in rows[0]},
        "fanout_steps": FANOUT_STEPS,
        "chain_steps": CHAIN_STEPS,
        "runs": runs,
    }


def _beside(
    folder: Path, stack: BareStack, name: str, task: dict[str, Any], count: int, window: int
) -> dict[str, float]:
    """One task between two rounds of raw messages, and what a step costs in raw round trips of this very moment."""
    _learned(stack)
    before = raw_zmq.measure(folder, count, window)
    figures = _task(stack, name, task)
    raw = statistics.mean((before, raw_zmq.measure(folder, count, window)))
    return {f"raw_zmq_{name}_us": raw} | figures | {f"{name}_ratio": figures[f"{name}_us_per_step"] / raw}


def _task(stack: BareStack, name: str, task: dict[str, Any]) -> dict[str, float]:
    """One task: per step from the adoption of the plan to the end, all that the client waited, and commits."""
    commits = stack.client.status().counters["commits"]
    began = time.perf_counter()
    view = _finished(stack, task)
    waited = time.perf_counter() - began
    commits = stack.client.status().counters["commits"] - commits
    steps = len(view.steps)
    planning = next((s.end_ms - s.start_ms for s in _path(view) if s.what == "planning"), 0)
    running_ms = (view.ended_ms or 0) - view.created_ms - planning
    return {
        f"{name}_us_per_step": running_ms * 1000 / steps,
        f"{name}_client_us_per_step": waited * 1e6 / steps,
        f"{name}_commits_per_step": commits / steps,
    }


def _path(view: TaskView) -> list[Any]:
    return view.critical_path.path if view.critical_path else []


def _finished(stack: BareStack, task: dict[str, Any]) -> TaskView:
    view = stack.client.run(task, timeout_s=300)
    if view.state is not TaskState.SUCCEEDED:
        raise BenchmarkFailedError(f"a benchmark task {view.state.value}: {view.failure}")
    return view


def _fanout(count: int) -> dict[str, Any]:
    return _ir([{"id": f"S{i}", "outputs": [{"name": f"o{i}"}]} for i in range(count)])


def _chain(count: int) -> dict[str, Any]:
    return _ir(
        [{"id": f"S{i}", "outputs": [{"name": f"o{i}"}], "inputs": [f"o{i - 1}"] if i else []} for i in range(count)]
    )


def _ir(steps: list[dict[str, Any]]) -> dict[str, Any]:
    filled = [{"actor": "worker", "action": "answer", "gates": []} | step for step in steps]
    return {"objective": "measure the overhead", "plan": {"steps": filled}}
