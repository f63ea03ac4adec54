"""`tierline bench inference`: what the inference services are worth and what they cost, all of it in one run.

For each engine: tokens per second and time to the first token through the bus beside the same server over plain HTTP
(`streams`), the time from a cancel to a free slot, a fan-out that shares its beginning (`prefix`), prompt lookup on a
copy task and on prose (`lookup`), and the first token of a model that has to be loaded (`warm_load`). The figures
without an engine's name are those of the engine that is worst at it.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from services.ctl.bench import lookup, prefix, streams, warm_load
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import IDLE, decoding_threads, demo_entry
from services.ctl.commands import Commands, Context, count
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.screen import Screen

STREAMS: Final = (1, 2, 4, 8)
ENGINES: Final = warm_load.ENGINES
_ANSWER_TOKENS: Final = 64
_CANCELS_PER_RUN: Final = 8
_QUICK_WORDS: Final = 10
"""Of a "long" prompt in the short form, which a busy machine reads before the service takes its engine for stuck."""
_MODEL: Final = "worker"
_WORST: Final = {
    "prefix_speedup": min,
    "lookup_copy_speedup": min,
    "lookup_prose_ratio": min,
    "cancel_ms_p95": max,
    "warm_load_s": max,
}
"""Figures of the whole run, and which engine's counts."""


def add(commands: Commands) -> None:
    """Add `bench inference`."""
    parser = commands.add(
        "inference", _run, "measure what bus and service add to llama.cpp, and what prefixes and lookups are worth"
    )
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"comma-separated (default {','.join(ENGINES)})")
    parser.add_argument("--runs", type=count, default=5, help="rounds of each kind; figures are medians (default 5)")
    parser.add_argument("--threads", type=count, help="cores to decode with (default: 2 where there are two)")
    parser.add_argument(
        "--quick", action="store_true", help="short answers and prompts: shows that all of it works, no real figures"
    )


def _run(arguments: Namespace, context: Context) -> ExitCode:
    engines = [name.strip() for name in arguments.engines.split(",") if name.strip()]
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown or not engines:
        raise BadInput(f"--engines takes a comma-separated list of {', '.join(ENGINES)}, not {arguments.engines!r}")
    figures = measure(engines, arguments.runs, context.screen, arguments.threads, quick=arguments.quick)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", *engines), _rows(figures, engines))
    return ExitCode.OK


def measure(
    engines: Sequence[str], runs: int, screen: Screen, threads: int | None = None, *, quick: bool = False
) -> dict[str, Any]:
    """All figures: `engines.<name>`, and for the whole run those of `_WORST`."""
    cores = threads or (1 if quick else decoding_threads())
    found = {engine: _engine(engine, runs, cores, screen, quick=quick) for engine in engines}
    worst = {name: pick(one[name] for one in found.values()) for name, pick in _WORST.items()}
    return {"engines": found, **worst, "runs": runs, "threads": cores, "quick": quick}


def _engine(engine: str, runs: int, threads: int, screen: Screen, *, quick: bool) -> dict[str, Any]:
    screen.note(f"tierline: {engine}: streams and cancels")
    entry = demo_entry(engine, tier="C", slots=max(STREAMS), context_tokens=1024, threads=threads)
    models = {"front": {"tier": "A", **IDLE}, "specialist": {"tier": "B", **IDLE}, _MODEL: entry}
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        BareStack(Path(folder), models=models, core=("scheduler",)) as stack,
    ):
        tokens = 4 if quick else _ANSWER_TOKENS
        beginnings = 0 if quick else streams.BEGINNINGS_PER_RUN
        seconds = 0 if quick else streams.PAIRS_S
        figures: dict[str, Any] = dict(
            streams.measure_streams(stack, _MODEL, STREAMS, runs, tokens, beginnings=beginnings, pairs_s=seconds)
        )
        turns = streams.measure_turns(stack, _MODEL, runs, words=_QUICK_WORDS if quick else streams.LONG_WORDS)
        cancels = streams.measure_cancel(stack, _MODEL, 2 if quick else _CANCELS_PER_RUN * runs)
    figures |= turns
    figures |= {f"cancel_ms_{name}": value for name, value in cancels.items()}
    screen.note(f"tierline: {engine}: prompts that begin alike")
    if quick:
        shared = prefix.measure(runs, 120, engine, threads=threads)
    else:
        shared = prefix.measure(max(2, runs // 2), engine=engine)
    screen.note(f"tierline: {engine}: lookup on a copy task and on prose")
    guessed = lookup.measure(runs, engine, quick=quick)
    screen.note(f"tierline: {engine}: loading")
    loaded = warm_load.measure_warm_load(runs, [engine])
    return {
        **figures,
        "prefix_speedup": shared["prefix_speedup"],
        "prefix_speedup_over_engine_cache": shared["prefix_speedup_over_engine_cache"],
        "lookup_copy_speedup": guessed["lookup_copy_speedup"],
        "lookup_prose_ratio": guessed["lookup_prose_ratio"],
        "lookup_prose_ratio_se": guessed["lookup_prose_ratio_se"],
        "lookup_prose_mode": guessed["prose_mode"],
        "lookup_copy_acceptance": guessed["copy_acceptance"],
        "warm_load_s": loaded["warm_load_s"],
    }


def _rows(figures: dict[str, Any], engines: Sequence[str]) -> list[tuple[str, ...]]:
    flat = {engine: _flat(figures["engines"][engine]) for engine in engines}
    return [(name, *(str(flat[engine][name]) for engine in engines)) for name in flat[engines[0]]]


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
