"""`tierline bench prefix`: what it is worth that steps which begin alike share what was read.

The same fan-out in two forms, through the whole bus with the demo model: steps that all read one long input, and steps
that read one of equal length each, so that no cache has anything to give. The forms take turns, and each is new to the
engine every time. The second baseline is llama.cpp's own choice of slots with its prompt cache on, in turn as well:
what one gets by just sending the prompts that share to a fresh engine with the same command line, over HTTP and no bus.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import statistics
import subprocess
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

import httpx

from protocol.messages.result import TaskState, TaskView
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import IDLE, demo_entry
from services.ctl.commands import Commands, Context, count
from services.ctl.outcomes import CommandError, ExitCode
from services.kit.config import CHECKOUT

STEPS: Final = 8
SLOTS: Final = 4
ANSWER_TOKENS: Final = 16
_WORDS: Final = ("queue", "token", "slot", "cache", "model", "worker", "planner", "graph", "memory", "index", "router")
_TASK_S: Final = 600.0


def add(commands: Commands) -> None:
    """Add `bench prefix`."""
    parser = commands.add("prefix", _run, "measure prompts that begin alike, with and without what the cache gives")
    parser.add_argument("--runs", type=count, default=3, help="runs; every figure is the median (default 3)")
    parser.add_argument("--tokens", type=int, default=700, help="length of what is shared (default 700)")
    parser.add_argument("--engine", choices=("auto", "llama-server", "embedded"), default="auto")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    figures = measure(arguments.runs, arguments.tokens, arguments.engine)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "median"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.OK


def measure(runs: int, tokens: int = 700, engine: str = "auto", **fields: Any) -> dict[str, Any]:
    """Medians over `runs`; `prefix_speedup` compares throughputs of the two fan-outs, in prompts per second.

    `fields` are further ones of the model's entry.
    """
    context = max(1_024, tokens * 2 + 512)
    entry = demo_entry(engine, tier="C", slots=SLOTS, context_tokens=context, load_deadline_s=120, **fields)
    models = {"front": {"tier": "A", **IDLE}, "specialist": {"tier": "B", **IDLE}, "worker": entry}
    shared: list[float] = []
    apart: list[float] = []
    alone: list[float] = []
    cached: list[int] = []
    read: list[int] = []
    with tempfile.TemporaryDirectory(prefix="tl-") as folder, BareStack(Path(folder), models=models) as stack:
        _finished(stack, _fan_out([_text(0, 40)] * SLOTS, 4))  # first use of everything
        for run in range(runs):
            view = _finished(stack, _fan_out([_text(2 * run + 1, tokens)] * STEPS, ANSWER_TOKENS))
            shared.append(_took_s(view))
            cached.append(view.usage.cached_tokens)
            read.append(view.usage.prompt_tokens)
            others = [_text(1_000 * (run + 1) + step, tokens) for step in range(STEPS)]
            apart.append(_took_s(_finished(stack, _fan_out(others, ANSWER_TOKENS))))
            alone.append(asyncio.run(_engine_alone(_command(stack), _text(5_000 + run, tokens))))
        metrics = _figures(stack)
    seconds = statistics.median(shared)
    return {
        "prefix_speedup": round(statistics.median(apart) / seconds, 2),
        "prefix_speedup_over_engine_cache": round(statistics.median(alone) / seconds, 2),
        "shared_s": round(seconds, 3),
        "apart_s": round(statistics.median(apart), 3),
        "engine_cache_s": round(statistics.median(alone), 3),
        "cached_share": round(statistics.median(cached) / statistics.median(read), 3),
        "prefixes_read": int(metrics["prefixes_read"]),
        "prefixes_copied": int(metrics["prefixes_copied"]),
        "engine": metrics["engine"],
        "steps": STEPS,
        "slots": SLOTS,
        "prefix_tokens": tokens,
        "answer_tokens": ANSWER_TOKENS,
        "runs": runs,
    }


def _text(seed: int, tokens: int) -> str:
    """Words that no other seed begins with; one of them is about one token of the demo model."""
    draw = random.Random(seed)  # noqa: S311  repeatable text, not a secret
    return " ".join(draw.choice(_WORDS) for _ in range(tokens))


def _fan_out(texts: list[str], max_tokens: int) -> dict[str, Any]:
    names = {text: f"notes{number}" for number, text in enumerate(dict.fromkeys(texts))}
    steps = [
        {
            "id": f"S{number}",
            "actor": "worker",
            "action": f"Say one sentence about point {number}.",
            "inputs": [names[text]],
            "outputs": [{"name": f"said{number}"}],
            "max_tokens": max_tokens,
            "timeout_s": _TASK_S,
            "gates": [],
        }
        for number, text in enumerate(texts)
    ]
    inputs = [{"name": name, "kind": "text", "value": text} for text, name in names.items()]
    return {"objective": "Say something about the notes.", "inputs": inputs, "plan": {"steps": steps}}


def _finished(stack: BareStack, task: dict[str, Any]) -> TaskView:
    view = stack.client.run(task, timeout_s=_TASK_S)
    if view.state is not TaskState.SUCCEEDED:
        raise CommandError(f"a task of the benchmark {view.state.value}: {view.failure}")
    return view


def _took_s(view: TaskView) -> float:
    """From the adoption of the plan to the end."""
    path = view.critical_path.path if view.critical_path else []
    planning_ms = next((part.end_ms - part.start_ms for part in path if part.what == "planning"), 0)
    return ((view.ended_ms or 0) - view.created_ms - planning_ms) / 1000


def _figures(stack: BareStack) -> dict[str, Any]:
    return next(peer.metrics for peer in stack.client.status().peers if peer.service == "inference-worker")


def _command(stack: BareStack) -> list[str]:
    """The command line of the engine in the stack."""
    return Path(f"/proc/{_figures(stack)['child_pid']}/cmdline").read_bytes().decode().split("\0")[:-1]


async def _engine_alone(command: list[str], text: str) -> float:
    """Seconds for the same prompts on the same command line, as many at once as there are slots; on a fresh engine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, key = probe.getsockname()[1], secrets.token_urlsafe(16)
    command = list(command)
    command[command.index("--port") + 1] = str(port)
    child = subprocess.Popen(  # noqa: ASYNC220  nothing else runs in this loop meanwhile
        command,
        cwd=CHECKOUT,
        env={"LLAMA_API_KEY": key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=_TASK_S) as http:
            await _until_healthy(http)
            gate = asyncio.Semaphore(SLOTS)

            async def ask(number: int) -> None:
                prompt = f"Material:\n{text}\n\nYour step: Say one sentence about point {number}."
                turns = [{"role": "user", "content": prompt}]
                async with gate:
                    body = {"messages": turns, "max_tokens": ANSWER_TOKENS, "cache_prompt": True}
                    (await http.post("/v1/chat/completions", json=body)).raise_for_status()

            began = time.perf_counter()
            await asyncio.gather(*(ask(number) for number in range(STEPS)))
            return time.perf_counter() - began
    finally:
        child.kill()
        child.wait()


async def _until_healthy(http: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            if (await http.get("/health")).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass  # not listening yet; the loop has an end
        await asyncio.sleep(0.1)
    raise CommandError("the engine of the benchmark did not come up within a minute")
