"""`tierline bench warm-load`: how long the first token of a model takes that is not in memory when it is asked for.

From the client's request to the first piece of its answer: the hub gives it its memory, its service starts llama.cpp,
the model is read, the prompt is decoded. Beside it stands the same with the model in memory, so that the difference is
what a warm model costs. The file is in the page cache after the first run; from a cold disk its reading comes on top.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from protocol.messages.infer import ChatMessage, InferPartial, InferRequest
from protocol.messages.session import ModelReport
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import DEMO_MODEL
from services.ctl.bench.overhead import BenchmarkFailedError
from services.ctl.commands import Commands, Context, count
from services.ctl.outcomes import ExitCode

ENGINES: Final = ("llama-server", "embedded")
_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.02


def add(commands: Commands) -> None:
    """Add `bench warm-load`."""
    parser = commands.add("warm-load", _run, "time from a request to its first token, for a model that is not loaded")
    parser.add_argument("--runs", type=count, default=5, help="runs; every figure is the median (default 5)")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only this engine; repeatable")
    parser.add_argument("--model", default=DEMO_MODEL, help=f"GGUF file (default {DEMO_MODEL})")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    figures = measure_warm_load(arguments.runs, arguments.engine or ENGINES, arguments.model)
    if context.screen.json:
        context.screen.document(figures)
        return ExitCode.OK
    rows = [(name, str(one["warm_load_s"]), str(one["loaded_s"])) for name, one in figures["engines"].items()]
    context.screen.table(("engine", "first token, parked (s)", "first token, loaded (s)"), rows)
    return ExitCode.OK


def measure_warm_load(runs: int, engines: Sequence[str] = ENGINES, model: str = DEMO_MODEL) -> dict[str, Any]:
    """Medians over `runs`, in seconds: `engines.<name>.warm_load_s` and `.loaded_s`, and the slowest engine's
    `warm_load_s` for all. Raises BenchmarkFailedError where a model was not loaded for every run.
    """
    found = {engine: _engine(engine, runs, model) for engine in engines}
    return {"engines": found, "warm_load_s": max(one["warm_load_s"] for one in found.values()), "runs": runs}


def _engine(engine: str, runs: int, model: str) -> dict[str, float]:
    name = "worker"
    entry = {"tier": "C", "path": model, "engine": engine, "context_tokens": 1024, "residency": "warm"}
    front = {"tier": "A", "engine": "noop", "context_tokens": 4096}
    specialist = {"tier": "B", "engine": "noop", "context_tokens": 4096}
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        models = {"front": front, "specialist": specialist, name: entry}
        with BareStack(Path(folder), models=models, core=("scheduler",)) as stack:
            parked, loaded = [], []
            for number in range(runs + 1):
                parked.append(_first_token_s(stack, name, number))
                loaded.append(_first_token_s(stack, name, number))
                _park(stack, name)
            loads = stack.client.status().counters["loads"]
    if loads != runs + 1:
        raise BenchmarkFailedError(f"{loads} loads in {runs + 1} runs: not every run began with a parked model")
    # The first run reads the file from the disk, perhaps.
    return {
        "warm_load_s": round(statistics.median(parked[1:]), 3),
        "loaded_s": round(statistics.median(loaded[1:]), 3),
    }


def _first_token_s(stack: BareStack, model: str, number: int) -> float:
    came: list[float] = []

    def piece(_partial: InferPartial) -> None:
        came.append(time.perf_counter())

    prompt = [ChatMessage(role="user", content=f"Count to ten, run {number}.")]
    request = InferRequest(role="worker", messages=prompt, max_tokens=16, stream=True)
    began = time.perf_counter()
    final = stack.client.infer(model, request, _TIMEOUT_S, on_partial=piece)
    if not came:
        raise BenchmarkFailedError(f"no piece of an answer came before its end: {final.text[:100]!r}")
    return came[0] - began


def _park(stack: BareStack, model: str) -> None:
    end = time.monotonic() + _TIMEOUT_S
    stack.client.unload_model(model)
    while _report(stack, model).state != "parked":
        if time.monotonic() > end:
            raise BenchmarkFailedError(f"{model} was not unloaded: {_report(stack, model)}")
        time.sleep(_POLL_S)


def _report(stack: BareStack, model: str) -> ModelReport:
    return next(one for one in stack.client.status().models if one.model == model)
