"""`tierline bench lookup`: prompt lookup on a copy task and on prose, beside the same model without it.

Two entries of the demo model in one stack: one guesses ahead under the policy of the inference service, one never does.
Both get the same prompt in turn, so that what else the machine does meets both. The copy task is a rewrite: the
model has given a file and is asked for it again, as a coder is after findings of a gate. Prose is asked for until the
policy has made up its mind; pairs before that are reported by themselves.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

from protocol.messages.infer import ChatMessage, InferFinal, InferRequest, Sampling
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import IDLE, decoding_threads, demo_entry
from services.ctl.bench.streams import standard_error
from services.ctl.commands import Commands, Context, count
from services.ctl.outcomes import CommandError, ExitCode

SPECULATION: Final = {"type": "ngram-map-k", "ngram_n": 8, "ngram_m": 48}
_COPY_TOKENS: Final = 240
_PROSE_TOKENS: Final = 96
_PROSE_PAIRS: Final = 4
"""For each of the copy task: a ratio that should be 1 says nothing before its scatter is small, and prose is short."""
_CALL_S: Final = 300.0
_DECIDED_S: Final = 120.0
"""The policy stays in a mode for ten launches at least, and a launch of the demo model takes about a second."""

CODE: Final = """def normalize(values):
    total = sum(values)
    if total == 0:
        return [0.0 for _ in values]
    return [value / total for value in values]


def moving_average(values, width):
    averages = []
    for start in range(len(values) - width + 1):
        window = values[start:start + width]
        averages.append(sum(window) / width)
    return averages


def histogram(values, buckets):
    low = min(values)
    high = max(values)
    step = (high - low) / buckets or 1
    counts = [0] * buckets
    for value in values:
        index = min(int((value - low) / step), buckets - 1)
        counts[index] += 1
    return counts


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
"""
PROSE: Final = (
    "Tell a story about a lighthouse keeper who finds a letter.",
    "Describe how a river shapes a valley.",
    "Write about the first snow in a small town.",
    "Explain why people like to travel by train.",
    "Describe a market in the morning.",
)


def copy_task(code: str) -> tuple[ChatMessage, ...]:
    """A conversation in which the model has written a module and is asked for it again."""
    return (
        ChatMessage(role="user", content="Write the module."),
        ChatMessage(role="assistant", content=f"```python\n{code}```"),
        ChatMessage(role="user", content="Write the module again, without any change."),
    )


def add(commands: Commands) -> None:
    """Add `bench lookup`."""
    parser = commands.add("lookup", _run, "measure prompt lookup on a copy task and on prose, with its policy on")
    parser.add_argument("--pairs", type=count, default=5, help="pairs of each kind; figures are medians (default 5)")
    parser.add_argument("--engine", choices=("auto", "llama-server", "embedded"), default="auto")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    figures = measure(arguments.pairs, arguments.engine)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "value"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.OK


def measure(pairs: int, engine: str = "auto", *, quick: bool = False) -> dict[str, Any]:
    """Ratios of decoding speeds, guessing entry over plain entry, each the median over its pairs.

    A `quick` run shows that it works: short answers on one core, and nobody waits for the policy before prose is
    measured.
    """
    threads = 1 if quick else decoding_threads()
    copy_tokens, prose_tokens = (80, 16) if quick else (_COPY_TOKENS, _PROSE_TOKENS)
    fields = {"slots": 1, "context_tokens": 2048, "threads": threads, "load_deadline_s": 120}
    models = {
        "front": {"tier": "A", **IDLE},
        "specialist": {"tier": "B", **demo_entry(engine, **fields)},
        "worker": {"tier": "C", **demo_entry(engine, **fields), "speculation": SPECULATION},
    }
    with (
        tempfile.TemporaryDirectory(prefix="tl-") as folder,
        BareStack(Path(folder), models=models, core=("scheduler",)) as stack,
    ):
        for model in ("specialist", "worker"):
            _ask(stack, model, copy_task(CODE), 16)
        copies = [_pair(stack, number, copy_task(CODE), copy_tokens) for number in range(pairs)]
        copy_mode = _figures(stack)["mode"]
        before: list[tuple[InferFinal, InferFinal]] = []
        end = time.monotonic() + (0 if quick else _DECIDED_S)
        while _figures(stack)["mode"] == copy_mode and time.monotonic() < end:
            before.append(_pair(stack, len(before), _prose(len(before)), prose_tokens))
            time.sleep(1.5)  # a change of mode waits for an idle moment, and figures come with the next ping
        _ready(stack)
        wanted = pairs * (1 if quick else _PROSE_PAIRS)
        after = [_pair(stack, number, _prose(number), prose_tokens) for number in range(wanted)]
        last = _figures(stack)
    drafted, accepted = (sum(getattr(one[0], name) for one in copies) for name in ("draft_tokens", "accepted_tokens"))
    return {
        "lookup_copy_speedup": _ratio(copies),
        "lookup_prose_ratio": _ratio(after),
        "lookup_prose_ratio_se": round(standard_error(_ratios(after)), 3),
        "prose_ratio_before_the_policy_decided": _ratio(before) if before else None,
        "prose_answers_before_the_policy_decided": len(before),
        "copy_mode": copy_mode,
        "prose_mode": last["mode"],
        "prose_reason": last["mode_reason"],
        "mode_changes": last["mode_changes"],
        "copy_acceptance": round(accepted / drafted, 3) if drafted else 0.0,
        "copy_plain_tokens_per_s": round(statistics.median(_speed(one[1]) for one in copies), 1),
        "copy_lookup_tokens_per_s": round(statistics.median(_speed(one[0]) for one in copies), 1),
        "engine": last["engine"],
        "threads": threads,
        "pairs": pairs,
    }


def _prose(number: int) -> tuple[ChatMessage, ...]:
    return (ChatMessage(role="user", content=PROSE[number % len(PROSE)]),)


def _pair(
    stack: BareStack, number: int, messages: tuple[ChatMessage, ...], max_tokens: int
) -> tuple[InferFinal, InferFinal]:
    """The same prompt on the guessing entry and on the plain one, which take turns in being the first."""
    order = ("worker", "specialist") if number % 2 else ("specialist", "worker")
    finals = {model: _ask(stack, model, messages, max_tokens) for model in order}
    return finals["worker"], finals["specialist"]


def _ask(stack: BareStack, model: str, messages: tuple[ChatMessage, ...], max_tokens: int) -> InferFinal:
    sampling = Sampling(temperature=0, top_k=1, seed=1)
    request = InferRequest(role="bench", messages=list(messages), max_tokens=max_tokens, sampling=sampling)
    return stack.client.infer(model, request, _CALL_S)


def _figures(stack: BareStack) -> dict[str, Any]:
    return next(peer.metrics for peer in stack.client.status().peers if peer.service == "inference-worker")


def _ready(stack: BareStack) -> None:
    time.sleep(1.5)
    stack.wait_ready(["inference-worker"])


def _speed(final: InferFinal) -> float:
    if not final.generate_ms:
        raise CommandError("an answer of the benchmark has no tokens: its speed would mean nothing")
    return final.generated_tokens * 1000 / final.generate_ms


def _ratio(pairs: list[tuple[InferFinal, InferFinal]]) -> float:
    return round(statistics.median(_ratios(pairs)), 3)


def _ratios(pairs: list[tuple[InferFinal, InferFinal]]) -> list[float]:
    """Made within a pair, which runs at one time: what else the machine does changes from pair to pair."""
    return [_speed(guessing) / _speed(plain) for guessing, plain in pairs]
