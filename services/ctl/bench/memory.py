"""`tierline bench memory`: how fast and how exact the memory is at 1,000 to 100,000 episodes, and what it forgets.

`--crashes` measures something else, see `memory_crashes.py`.

The memory's own log, projections and routing on a folder of its own, without a bus; it grows from size to size.
Episodes are synthetic, from a seed: objectives of sixty kinds of work with words that vary, two decisions and outcomes
each, written through the log's group commit. What is timed is what a request costs inside the service:

* `retrieve`: embedding, both phases, the graph. `decide`: what answers `advise` on the bus, for one question about
  seven roles, the text's vector given; `decide_p99_cpu_ms` is processor time, which a busy machine does not stretch.
  `write`: one task's decisions, outcomes and episode, each in a durable transaction of its own.
* `task_cpu_ms`: processor time of all that one task costs while tasks come one after the other: what resembles it,
  advice, its decisions and outcomes, and everything that follows from them.
* `start_clean` and `start_unclean`: a new process opens everything, after a clean stop and after kill -9, until it
  could answer. `recall`: share of the ten nearest by exact search that the index finds.
* `forgetting_rate`: two kinds of tasks take turns over ten epochs, fifty tasks each, the same ones every time, known
  apart by their texts alone; the role is what the routing advises, its trying of others included. The share of
  tasks solved at one time that fail the next time.
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

from protocol.messages.memory import (
    Advise,
    DecisionRecord,
    Episode,
    Option,
    Outcome,
    Question,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
)
from services.ctl.bench import memory_crashes
from services.ctl.bench.memory_process import OpenedMemory
from services.ctl.commands import Commands, Context
from services.ctl.outcomes import ExitCode
from services.memory.embedding import Vector
from services.memory.log import Entry

SIZES: Final = (1_000, 10_000, 100_000)
_SEED: Final = 11
_GROUP: Final = 500
"""Tasks in one commit while the store is filled."""
_ASKED: Final = 300
_DECIDED: Final = 2_000
_WRITTEN: Final = 100
_TOLD: Final = 400
_MOST_KILLS: Final = 10_000
_NEAREST: Final = 10
_ROLES: Final = ("worker", "coder", "architect", "writer", "extractor", "reviewer", "frontdoor")
_SHAPES: Final = ("chat.single", "doc.map-join", "code.parts")
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
_FAMILY: Final = 50
"""Tasks of one kind."""


def add(commands: Commands) -> None:
    """Add `bench memory`."""
    parser = commands.add("memory", _run, "fill the memory with episodes, and measure what it answers and how fast")
    parser.add_argument(
        "--sizes", type=_sizes, default=SIZES, metavar="N,N", help="episodes (default 1000,10000,100000)"
    )
    parser.add_argument("--crashes", type=_crashes, metavar="N", help="instead: kill -9 N times, then every other harm")
    parser.add_argument("--seed", type=int, default=_SEED, help="of the harm (default %(default)s)")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError as err:
        raise ArgumentTypeError(f"{text!r}: expected numbers of episodes, as in 1000,10000") from err
    if not all(100 <= size <= 1_000_000 for size in sizes):
        raise ArgumentTypeError(f"{text!r}: every size must be between 100 and 1000000")
    return sizes


def _crashes(text: str) -> int:
    try:
        count = int(text)
    except ValueError as err:
        raise ArgumentTypeError(f"{text!r} is not a number of kills") from err
    if not 1 <= count <= _MOST_KILLS:
        raise ArgumentTypeError(f"{text}: expected 1 to {_MOST_KILLS}")
    return count


def _run(arguments: Namespace, context: Context) -> ExitCode:
    if arguments.crashes is not None:
        return _run_crashes(arguments, context)
    figures: dict[str, Any] = {"episodes": {}}
    held = 0
    with tempfile.TemporaryDirectory(prefix="tl-memory-") as folder:
        for size in sorted(arguments.sizes):
            context.screen.note(f"{size} episodes …")
            figures["episodes"][str(size)] = measure(Path(folder), held, size)
            held = size + _WRITTEN + _TOLD
    figures["forgetting_rate"] = forgetting_rate()
    if context.screen.json:
        context.screen.document(figures)
        return ExitCode.OK
    names = list(next(iter(figures["episodes"].values())))
    rows = [(name, *(str(row[name]) for row in figures["episodes"].values())) for name in names]
    context.screen.table(("figure", *figures["episodes"]), rows)
    context.screen.line(f"forgetting rate: {figures['forgetting_rate']}")
    return ExitCode.OK


def _run_crashes(arguments: Namespace, context: Context) -> ExitCode:
    figures = memory_crashes.measure(arguments.crashes, arguments.seed)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "value"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.FAILED if figures["lost"] or figures["wrong_answers"] else ExitCode.OK


def measure(folder: Path, held: int, size: int) -> dict[str, float]:
    """All figures of one size; the folder holds the first `held` episodes."""
    chance = random.Random(_SEED + held)  # noqa: S311  a workload, not a secret
    began = time.perf_counter()
    memory = OpenedMemory(folder)
    for start in range(held, size, _GROUP):
        tasks = range(start, min(start + _GROUP, size))
        memory.commit([entry for number in tasks for entry in _task(memory, number, chance)])
    memory.follow()
    fill_s = time.perf_counter() - began
    texts = [_objective(chance) for _ in range(_ASKED)]
    retrieve = _times(lambda text: memory.projector.retrieve(Retrieve(text=text, k=5)), texts)
    vectors = [memory.embedder.embed(text) for text in texts]
    cpu: list[float] = []
    decide = _times(
        lambda number: _decide(memory, texts[number % _ASKED], vectors[number % _ASKED], number), range(_DECIDED), cpu
    )
    recall = _recall(memory, texts)
    write = _times(lambda number: _write(memory, _task(memory, number, chance)), range(size, size + _WRITTEN))
    task_cpu_ms = _cost_of_a_task(memory, range(size + _WRITTEN, size + _WRITTEN + _TOLD), chance)
    memory.close()
    start_clean_s = _start_of_a_process(folder, signal.SIGKILL, write=True)
    start_unclean_s = _start_of_a_process(folder, signal.SIGTERM)
    return {
        "retrieve_p50_ms": retrieve[49],
        "retrieve_p99_ms": retrieve[98],
        "decide_p50_ms": decide[49],
        "decide_p99_ms": decide[98],
        "decide_p99_cpu_ms": round(quantiles(cpu, n=100)[98], 4),
        "write_p50_ms": write[49],
        "task_cpu_ms": task_cpu_ms,
        "start_clean_s": round(start_clean_s, 3),
        "start_unclean_s": round(start_unclean_s, 3),
        "size_mb": round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1),
        "recall": round(recall, 4),
        "fill_s": round(fill_s, 1),
    }


def forgetting_rate() -> float:
    """See the module's docstring. The right role of a kind succeeds, any other one fails."""
    chance = random.Random(_SEED)  # noqa: S311  a workload, not a secret
    families = {
        "coder": [
            f"Write a Python function that {_THINGS[n % 6]}s parse, case {n}, with tests" for n in range(_FAMILY)
        ],
        "extractor": [f"Extract every amount and date from the {_THINGS[n % 6]} of page {n}" for n in range(_FAMILY)],
    }
    solved: dict[str, bool] = {}
    lost = kept = 0
    with tempfile.TemporaryDirectory(prefix="tl-memory-") as folder:
        memory = OpenedMemory(Path(folder))
        for epoch in range(_EPOCHS):
            right = list(families)[epoch % len(families)]
            for number, text in enumerate(families[right]):
                vector = memory.embedder.embed(text)
                role = _decide(memory, text, vector, chance.randrange(2**31), clustered=False)
                if solved.get(text):
                    kept, lost = kept + 1, lost + (role != right)
                solved[text] = role == right
                ident = f"{epoch}-{number}"
                decided = RecordDecisions(decisions=[_decision(ident, 0, _TYPES[0], "role", role)], text=text)
                done = RecordOutcomes(outcomes=[_outcome(ident, 0, float(solved[text]), None)])
                memory.commit([Entry(decided, vector), Entry(done)])
        memory.close()
    return round(lost / kept, 4) if kept else 1.0


def _write(memory: OpenedMemory, entries: Iterable[Entry]) -> None:
    for entry in entries:
        memory.commit([entry])


def _decide(memory: OpenedMemory, text: str, vector: Vector | None, seed: int, *, clustered: bool = True) -> str:
    """The role that the routing advises, among all; the rules would take the worker."""
    rules = _ROLES[0]
    question = Question(
        key="role",
        subject="role",
        cluster=rules if clustered else "",
        rules_choice=rules,
        options=[Option(choice=role) for role in _ROLES],
    )
    ask = Advise(
        text=text, task_type=_TYPES[seed % len(_TYPES)] if clustered else _TYPES[0], questions=[question], seed=seed
    )
    (advised,) = memory.advisor.advise(ask, vector)
    return advised.choice


def _cost_of_a_task(memory: OpenedMemory, numbers: range, chance: random.Random) -> float:
    """Processor time per task, in milliseconds."""
    tasks = [(number, list(_task(memory, number, chance))) for number in numbers]
    began = time.process_time()
    for number, (decided, done) in tasks:
        text = _text_of(decided)
        memory.projector.retrieve(Retrieve(text=text, task_type=_TYPES[number % len(_TYPES)], k=5))
        _decide(memory, text, None, number)
        memory.commit([decided])
        memory.commit([done])
    memory.follow()
    return round((time.process_time() - began) * 1000 / len(numbers), 3)


def _text_of(entry: Entry) -> str:
    if not isinstance(entry.request, RecordDecisions):
        raise TypeError("expected decisions")
    return entry.request.text


def _times(work: Callable[[Any], object], arguments: Any, cpu: list[float] | None = None) -> list[float]:
    """The 99 percentiles of how long it takes, in milliseconds; this thread's processor time of each goes to `cpu`."""
    taken = []
    for argument in arguments:
        began, used = time.perf_counter(), time.thread_time()
        work(argument)
        taken.append((time.perf_counter() - began) * 1000)
        if cpu is not None:
            cpu.append((time.thread_time() - used) * 1000)
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
    """Seconds a new process takes from its start until it could answer; then it writes, and is ended, as told."""
    argv = [sys.executable, "-m", "services.ctl.bench.memory_process", str(folder), *(["write"] if write else [])]
    began = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ) as process:
        if process.stdout is None or not process.stdout.readline():
            raise RuntimeError("the memory could not be opened again")
        taken = time.perf_counter() - began
        if write:
            process.stdout.readline()
        process.send_signal(end_with)
        process.wait(120)
    return taken


def _task(memory: OpenedMemory, number: int, chance: random.Random) -> Iterator[Entry]:
    kind = _TYPES[number % len(_TYPES)]
    ident, role, succeeded = f"t{number}", chance.choice(_ROLES), chance.random() < 0.8
    code = None if succeeded else chance.choice(("gate.unit", "gate.lint", "gate.schema"))
    text = _objective(chance)
    vector = memory.embedder.embed(text)
    shape = chance.choice(_SHAPES)
    decisions = [_decision(ident, 0, kind, "role", role, _ROLES[0]), _decision(ident, 1, kind, "decomposition", shape)]
    yield Entry(RecordDecisions(decisions=decisions, text=text), vector)
    outcomes = [_outcome(ident, 0, float(succeeded), code), _outcome(ident, 1, 1.0, None)]
    episode = Episode(
        task_id=ident, task_type=kind, objective=text, steps=2, succeeded=succeeded, seconds=4.0, at_ms=number
    )
    yield Entry(RecordOutcomes(outcomes=outcomes, episode=episode), vector)


def _objective(chance: random.Random) -> str:
    details = " ".join(chance.sample(_DETAILS, 3))
    return f"{chance.choice(_VERBS)} the {chance.choice(_THINGS)} {chance.randrange(10_000)} {details}"


def _decision(task: str, step: int, task_type: str, subject: str, choice: str, cluster: str = "") -> DecisionRecord:
    others = _ROLES if subject == "role" else _SHAPES
    return DecisionRecord(
        decision_id=f"{task}-{step}",
        task_id=task,
        step=f"S{step + 1}",
        subject=subject,
        choice=choice,
        alternatives=[other for other in others if other != choice],
        propensity=0.2,
        task_type=task_type,
        cluster=cluster,
    )


def _outcome(task: str, step: int, reward: float, code: str | None) -> Outcome:
    return Outcome(
        decision_id=f"{task}-{step}", reward=reward, seconds=2.0, attempts=1, failure_code=code, at_ms=1 + step
    )
