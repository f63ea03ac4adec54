"""`tierline bench memory`: how fast and how exact the memory is at 1,000 to 100,000 episodes, and what it forgets.

The memory's own log, projections and machine on a folder of its own, without a bus. Episodes are synthetic, from a
seed: objectives of sixty kinds of work with words that vary, two decisions and outcomes each, written through the log's
group commit. What is timed is what a request costs inside the service:

* `retrieve`: embedding, both phases, the graph. `decide`: the values of a role's alternatives, looked up and ranked,
  without embedding. `write`: one task's decisions, outcomes and episode, each in a durable transaction of its own.
* `start_clean` and `start_unclean`: a new process opens everything, after a clean stop and after kill -9, until it
  could answer. `recall`: share of the ten nearest by exact search that the index finds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

import numpy as np

from protocol.messages.memory import DecisionRecord, Episode, Outcome, RecordDecisions, RecordOutcomes, Retrieve
from services.ctl.bench.memory_process import OpenedMemory
from services.ctl.commands import Commands, Context
from services.ctl.outcomes import ExitCode
from services.memory.log import Entry

SIZES: Final = (1_000, 10_000, 100_000)
_SEED: Final = 11
_GROUP: Final = 500
"""Tasks in one commit while the store is filled."""
_ASKED: Final = 300
_WRITTEN: Final = 100
_NEAREST: Final = 10
_ROLES: Final = ("worker", "coder", "architect", "writer", "extractor")
_TYPES: Final = ("chat", "doc", "code", "ingest", "manage")
_VERBS: Final = (
    "Compare",
    "Summarise",
    "Write",
    "Translate",
    "Extract",
    "Plan",
    "Review",
    "Implement",
    "Explain",
    "Fix",
)
_THINGS: Final = ("contract", "parser", "invoice", "database schema", "travel itinerary", "lab report")
_DETAILS: Final = (
    "with tests", "for the board", "clause by clause", "in Python", "by Friday", "from last year", "in plain words",
    "with all figures", "for beginners", "as a table", "without jargon", "in three steps",
)  # fmt: skip
_EPOCHS: Final = 10
_TASKS_AN_EPOCH: Final = 50


def add(commands: Commands) -> None:
    """Add `bench memory`."""
    parser = commands.add("memory", _run, "fill the memory with episodes, and measure what it answers and how fast")
    parser.add_argument(
        "--sizes", type=_sizes, default=SIZES, metavar="N,N", help="episodes (default 1000,10000,100000)"
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as err:
        raise ArgumentTypeError(f"{text!r}: expected numbers of episodes, as in 1000,10000") from err
    if not all(100 <= size <= 1_000_000 for size in sizes):
        raise ArgumentTypeError(f"{text!r}: every size must be between 100 and 1000000")
    return sizes


def _run(arguments: Namespace, context: Context) -> ExitCode:
    figures: dict[str, Any] = {"episodes": {}}
    for size in arguments.sizes:
        context.screen.note(f"{size} episodes …")
        with tempfile.TemporaryDirectory(prefix="tl-memory-") as folder:
            figures["episodes"][str(size)] = measure(Path(folder), size)
    figures["forgetting_rate"] = forgetting_rate()
    if context.screen.json:
        context.screen.document(figures)
        return ExitCode.OK
    names = list(next(iter(figures["episodes"].values())))
    rows = [(name, *(str(row[name]) for row in figures["episodes"].values())) for name in names]
    context.screen.table(("figure", *figures["episodes"]), rows)
    context.screen.line(f"forgetting rate: {figures['forgetting_rate']}")
    return ExitCode.OK


def measure(folder: Path, size: int) -> dict[str, float]:
    """All figures of one size."""
    chance = random.Random(_SEED)  # noqa: S311  a workload, not a secret
    began = time.perf_counter()
    memory = OpenedMemory(folder)
    for start in range(0, size, _GROUP):
        tasks = range(start, min(start + _GROUP, size))
        memory.commit([entry for number in tasks for entry in _task(memory, number, chance)])
    memory.projector.advance()
    fill_s = time.perf_counter() - began
    texts = [_objective(chance) for _ in range(_ASKED)]
    retrieve = _times(lambda text: memory.projector.retrieve(Retrieve(text=text, k=5)), texts)
    decide = _times(lambda number: _decide(memory, _TYPES[number % len(_TYPES)]), range(1_000))
    recall = _recall(memory, texts)
    write = _times(lambda number: _write(memory, _task(memory, number, chance)), range(size, size + _WRITTEN))
    memory.close()
    start_clean_s = _start_of_a_process(folder, signal.SIGTERM)
    _start_of_a_process(folder, signal.SIGKILL, write=True)
    start_unclean_s = _start_of_a_process(folder, signal.SIGTERM)
    return {
        "retrieve_p50_ms": retrieve[49],
        "retrieve_p99_ms": retrieve[98],
        "decide_p50_ms": decide[49],
        "decide_p99_ms": decide[98],
        "write_p50_ms": write[49],
        "start_clean_s": round(start_clean_s, 3),
        "start_unclean_s": round(start_unclean_s, 3),
        "size_mb": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1),
        "recall": round(recall, 4),
        "fill_s": round(fill_s, 1),
    }


def forgetting_rate() -> float:
    """Share of tasks solved with the best-valued choice in one epoch that fail with it in the next epoch of that kind.

    Two families with different best roles alternate over ten epochs; in each task the role of highest value is taken,
    a tenth of the time another one; the right role succeeds, a wrong one fails.
    """
    chance = random.Random(_SEED)  # noqa: S311  a workload, not a secret
    best = {"code": "coder", "ingest": "extractor"}
    solved: dict[str, bool] = {}
    lost = kept = 0
    with tempfile.TemporaryDirectory(prefix="tl-memory-") as folder:
        memory = OpenedMemory(Path(folder))
        for epoch in range(_EPOCHS):
            family = ("code", "ingest")[epoch % 2]
            for number in range(_TASKS_AN_EPOCH):
                ident = f"{family}{epoch}-{number}"
                greedy = _decide(memory, family)
                if solved.get(family):
                    kept, lost = kept + 1, lost + (greedy != best[family])
                role = chance.choice(_ROLES) if chance.random() < 0.1 else greedy
                memory.commit([Entry(RecordDecisions(decisions=[_decision(ident, 0, family, role)]))])
                reward = float(role == best[family])
                memory.commit([Entry(RecordOutcomes(outcomes=[_outcome(ident, 0, reward, None)]))])
            solved[family] = _decide(memory, family) == best[family]
        memory.close()
    return round(lost / kept, 4) if kept else 1.0


def _write(memory: OpenedMemory, entries: Iterable[Entry]) -> None:
    for entry in entries:
        memory.commit([entry])


def _decide(memory: OpenedMemory, task_type: str) -> str:
    """The alternative of highest value; one that was never tried stands at the prior."""
    values = [(memory.projector.reader.value("role", task_type, role), role) for role in _ROLES]
    return max(values, key=lambda pair: 0.5 if pair[0] is None else pair[0].q)[1]


def _times(work: Callable[[Any], object], arguments: Any) -> list[float]:
    """The 99 percentiles of how long it takes, in milliseconds."""
    taken = []
    for argument in arguments:
        began = time.perf_counter()
        work(argument)
        taken.append((time.perf_counter() - began) * 1000)
    return [round(value, 4) for value in quantiles(taken, n=100)]


def _recall(memory: OpenedMemory, texts: list[str]) -> float:
    matrix, ids = memory.projector.index.vectors(), memory.projector.index.ids()
    found = total = 0
    for text in texts:
        query = memory.embedder.embed(text)
        similarities = matrix @ query
        worst = float(np.sort(similarities)[-_NEAREST])
        answer = memory.projector.index.nearest(query, _NEAREST)
        # By similarity and not by row: equal objectives tie, and any of them is right.
        found += sum(similarity >= worst - 1e-5 for _, similarity in answer)
        total += min(_NEAREST, len(ids))
    return found / total


def _start_of_a_process(folder: Path, end_with: signal.Signals, *, write: bool = False) -> float:
    """Seconds a new process takes from its start until it could answer; then it is ended as told."""
    argv = [sys.executable, "-m", "services.ctl.bench.memory_process", str(folder), *(["write"] if write else [])]
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as process:
        if process.stdout is None or not process.stdout.readline():
            raise RuntimeError("the memory could not be opened again")
        taken = time.perf_counter() - began
        process.send_signal(end_with)
        process.wait(120)
    return taken


def _task(memory: OpenedMemory, number: int, chance: random.Random) -> Iterator[Entry]:
    kind = _TYPES[number % len(_TYPES)]
    ident, role, succeeded = f"t{number}", chance.choice(_ROLES), chance.random() < 0.8
    code = None if succeeded else chance.choice(("gate.unit", "gate.lint", "gate.schema"))
    yield Entry(RecordDecisions(decisions=[_decision(ident, 0, kind, role), _decision(ident, 1, kind, "worker")]))
    outcomes = [_outcome(ident, 0, float(succeeded), code), _outcome(ident, 1, 1.0, None)]
    text = _objective(chance)
    episode = Episode(
        task_id=ident, task_type=kind, objective=text, steps=2, succeeded=succeeded, seconds=4.0, at_ms=number
    )
    yield Entry(RecordOutcomes(outcomes=outcomes, episode=episode), memory.embedder.embed(text))


def _objective(chance: random.Random) -> str:
    details = " ".join(chance.sample(_DETAILS, 3))
    return f"{chance.choice(_VERBS)} the {chance.choice(_THINGS)} {chance.randrange(10_000)} {details}"


def _decision(task: str, step: int, task_type: str, role: str) -> DecisionRecord:
    return DecisionRecord(
        decision_id=f"{task}-{step}",
        task_id=task,
        step=f"S{step + 1}",
        subject="role",
        choice=role,
        alternatives=[other for other in _ROLES if other != role],
        propensity=0.2,
        task_type=task_type,
    )


def _outcome(task: str, step: int, reward: float, code: str | None) -> Outcome:
    return Outcome(
        decision_id=f"{task}-{step}", reward=reward, seconds=2.0, attempts=1, failure_code=code, at_ms=1 + step
    )
