"""`tierline bench planning`: how wide plans are, whether requests are split that divide, what discovery recovers.

Four parts, each by itself: `--width FILE` plans every question of a file and compares the width of the plan with the
gold width; `--decompose FILE` judges whether the answer of a request divides, trained on `--train FILE` or, without
one, in five folds of the file itself, beside the rules that ship; the discovery of parallelism gets graphs that were
made serial at random (`planning_graphs` has them); `--learning` is `tierline simulate --learning`; `--swarm` runs
sub-agents (`swarm.py`). Without any option it is discovery and learning, which need neither file nor model.

Both planners are the planner's own machine. `rules` leaves its questions unanswered; for `model` a stack with the demo
model answers the one to the front door, under the grammar, and what is no plan for the question counts as not exact.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from protocol.errors import CallError
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.plan import PlanFinal
from protocol.messages.task import TaskIR
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import IDLE, decoding_threads, demo_entry
from services.ctl.bench.graph_file import read_graphs
from services.ctl.bench.planning_graphs import from_graph, measure_discovery, random_plans
from services.ctl.bench.swarm import measure_swarm
from services.ctl.commands import Commands, Context
from services.ctl.learning.ablations import COURSES, TASKS, print_ablations, run_ablations
from services.ctl.learning.families import SHIPPED
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.screen import Screen
from services.kit.config import CHECKOUT
from services.kit.plan_check import plan_problems
from services.kit.registry import Registry, load_registry
from services.planner.divide import Judge, RuleJudge
from services.planner.labelled import BadRow, Labelled, read_labelled, trained_on
from services.planner.machine import AskModel, Finish, ModelAnswered, ModelOutcome, Planning, Requested, Unanswered
from services.planner.modelmade import ModelPlanRefused, read_plan
from services.planner.width import width_of

_FOLDS: Final = 5
_DAGS: Final = 200
_ANSWER_S: Final = 60.0
_SLOTS: Final = 4
"""Questions at once: prompts share their beginning, and decoding in a batch costs little more than one answer."""
_CONTEXT_TOKENS: Final = 2048
_PROGRESS_S: Final = 5.0
_MAX_ROWS: Final = 100_000

Ask = Callable[[str, InferRequest], InferFinal | None]


def add(commands: Commands) -> None:
    """Add `bench planning`."""
    parser = commands.add(
        "planning", _run, "measure plans: width, whether to split, discovered parallelism, learning to split"
    )
    parser.add_argument("--width", type=Path, metavar="FILE", help="questions as JSON lines: question, branch")
    parser.add_argument("--planner", choices=("rules", "model", "both"), default="rules", help="default rules")
    parser.add_argument("--rows", type=int, metavar="N", help="with --width: only the first N questions")
    parser.add_argument("--engine", choices=("auto", "llama-server", "embedded"), default="auto")
    parser.add_argument("--threads", type=int, help="cores to decode with (default: 2 where there are two)")
    parser.add_argument("--decompose", type=Path, metavar="FILE", help="requests as JSON lines: request, decomposable")
    parser.add_argument("--train", type=Path, metavar="FILE", help="learn from these rows (default: five folds)")
    parser.add_argument("--graphs", type=Path, metavar="FILE", help="also graphs of this file, as for makespan")
    parser.add_argument("--dags", type=int, metavar="N", help=f"random graphs to discover (default {_DAGS})")
    parser.add_argument("--learning", action="store_true", help="the staged reward with each of its parts left out")
    parser.add_argument(
        "--courses", type=int, default=COURSES, metavar="N", help=f"with --learning: of each kind (default {COURSES})"
    )
    parser.add_argument("--seed", type=int, default=1, help="of graphs, folds and courses (default 1)")
    parser.add_argument("--swarm", action="store_true", help="sub-agents on the demo model, killed and resumed")
    parser.add_argument("--agents", type=int, default=100, metavar="N", help="with --swarm: sub-agents (default 100)")
    parser.add_argument(
        "--baseline", type=int, default=24, metavar="N", help="with --swarm: in each run that is compared (default 24)"
    )


def _run(arguments: Namespace, context: Context) -> ExitCode:
    if arguments.train is not None and arguments.decompose is None:
        raise BadInput("--train FILE is for --decompose FILE: give both")
    dags = _DAGS if arguments.dags is None else arguments.dags
    if not 1 <= dags <= 10_000:
        raise BadInput(f"--dags {dags}: expected 1 to 10000")
    if not 1 <= arguments.courses <= 1_000:
        raise BadInput(f"--courses {arguments.courses}: expected 1 to 1000")
    if arguments.seed < 0:
        raise BadInput(f"--seed {arguments.seed}: expected 0 or more")
    threads = decoding_threads() if arguments.threads is None else arguments.threads
    if threads < 1:
        raise BadInput(f"--threads {threads}: expected 1 or more")
    anything = (arguments.width, arguments.decompose, arguments.graphs, arguments.dags)
    everything = not (arguments.learning or arguments.swarm) and all(one is None for one in anything)
    parts: dict[str, dict[str, Any]] = {}
    if arguments.width is not None:
        questions = read_questions(arguments.width)[: arguments.rows]
        parts["width"] = _widths(questions, arguments.planner, arguments.engine, threads, context.screen.note)
    if arguments.decompose is not None:
        try:
            rows = read_labelled(arguments.decompose)
            training = read_labelled(arguments.train) if arguments.train is not None else None
            parts["decompose"] = measure_split(rows, training, arguments.seed)
        except ValueError as err:  # BadRow is one, and so is what a judge says that cannot learn from the rows
            raise BadInput(str(err)) from err
    if arguments.swarm:
        if not 2 <= arguments.baseline <= arguments.agents <= 100:
            raise BadInput("--agents N and --baseline M: expected 2 <= M <= N <= 100")
        parts["swarm"] = measure_swarm(arguments.agents, arguments.baseline, arguments.engine, threads)
    if arguments.graphs is not None or arguments.dags is not None or everything:
        known = random_plans(dags, arguments.seed)
        if arguments.graphs is not None:
            known += [from_graph(graph, arguments.seed) for graph in read_graphs(arguments.graphs)]
        parts["discovery"] = measure_discovery(known)
    if arguments.learning or everything:
        registry = load_registry(CHECKOUT / "registry", CHECKOUT, check_files=False)
        seeds = range(arguments.seed, arguments.seed + arguments.courses)
        parts["learning"] = run_ablations(SHIPPED, registry, TASKS, seeds).document()
    if context.screen.json:
        alone = len(parts) == 1 and "swarm" not in parts
        context.screen.document(next(iter(parts.values())) if alone else parts)
    else:
        for name, figures in parts.items():
            _print(context.screen, name, figures)
    return ExitCode.OK


def read_questions(path: Path) -> list[tuple[str, int]]:
    """Questions with their gold widths. Raises BadInput with file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise BadInput(f"{path}: {err}; give a file of questions, one JSON object a line") from err
    questions = []
    for number, line in enumerate(lines[:_MAX_ROWS], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise BadInput(f"{path}:{number}: not JSON: {err}") from err
        question, branch = (row.get("question"), row.get("branch")) if isinstance(row, dict) else (None, None)
        if not isinstance(question, str) or not question.strip():
            raise BadInput(f"{path}:{number}: question: expected a text")
        if not isinstance(branch, int) or isinstance(branch, bool) or branch < 1:
            raise BadInput(f"{path}:{number}: branch: expected a whole number of at least 1, got {branch!r}")
        questions.append((question, branch))
    if not questions:
        raise BadInput(f"{path}: no question in it")
    return questions


def _widths(
    questions: Sequence[tuple[str, int]], planner: str, engine: str, threads: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if planner in ("rules", "both"):
        registry = load_registry(CHECKOUT / "registry", CHECKOUT, check_files=False)
        figures["rules"] = measure_width(questions, registry, None)
    if planner in ("model", "both"):
        front = demo_entry(engine, slots=_SLOTS, context_tokens=_CONTEXT_TOKENS, threads=threads, load_deadline_s=120)
        models = {"front": {"tier": "A", **front}, "specialist": {"tier": "B", **IDLE}, "worker": {"tier": "C", **IDLE}}
        with (
            tempfile.TemporaryDirectory(prefix="tl-") as folder,
            BareStack(Path(folder), models=models, core=("scheduler",)) as stack,
        ):

            def ask(model: str, request: InferRequest) -> InferFinal | None:
                try:
                    return stack.client.infer(model, request, _ANSWER_S)
                except CallError:
                    return None  # counted: without an answer the machine uses the rules, which is not the model's plan

            registry = load_registry(stack.registry, stack.home.models, check_files=False)
            figures["model"] = measure_width(questions, registry, ask, at_once=_SLOTS, progress=progress)
    return figures


@dataclass(frozen=True, slots=True)
class _Planned:
    """What came of one question."""

    gold: int
    final: PlanFinal
    outcome: ModelOutcome
    width: int
    """Of the plan that would run; 0 = it cannot."""
    own_width: int
    """Of the plan as the model wrote it, before rules replaced it; 0 = it wrote none."""
    took_ms: float
    tokens: int


def measure_width(
    questions: Sequence[tuple[str, int]],
    registry: Registry,
    ask: Ask | None,
    *,
    at_once: int = 1,
    progress: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Plan every question; a plan is valid if it can run, exact if as many steps as the gold width are on one level.

    With `ask`, `width_exact` and the confusion are those of the plans as the model wrote them, whatever the planner
    made of it; what would run, the rules' plans in place of unsound ones included, is told apart.
    """
    began_s = told_s = time.monotonic()
    planned: list[_Planned] = []
    with ThreadPoolExecutor(at_once) as pool:
        for one in pool.map(lambda row: _plan(row[0], row[1], registry, ask), questions):
            planned.append(one)
            if time.monotonic() - told_s > _PROGRESS_S:
                told_s = time.monotonic()
                progress(f"{len(planned)} of {len(questions)} questions planned, {told_s - began_s:.0f} s")
    rows = len(planned)
    widths = Counter((one.gold, one.width if ask is None else one.own_width) for one in planned)
    figures: dict[str, Any] = {
        "rows": rows,
        "valid": round(sum(one.width > 0 for one in planned) / rows, 4),
        "width_exact": round(sum(count for (gold, width), count in widths.items() if gold == width) / rows, 4),
        "confusion": {
            str(gold): {str(width): widths[gold, width] for width in sorted({w for g, w in widths if g == gold})}
            for gold in sorted({gold for gold, _ in widths})
        },
        "ms_p50": round(statistics.median(one.took_ms for one in planned), 2),
    }
    if ask is not None:
        outcomes = Counter(one.outcome for one in planned)
        used = [one for one in planned if one.outcome is ModelOutcome.USED]
        figures |= {
            "plans_of_the_model_used": len(used),
            "of_these_repaired": sum("repaired" in one.final.reason for one in used),
            "replaced_by_rules": {
                outcome.value: outcomes[outcome] for outcome in ModelOutcome if outcome is not ModelOutcome.USED
            },
            "width_exact_of_what_runs": round(sum(one.width == one.gold for one in planned) / rows, 4),
            "tokens_p50": int(statistics.median(one.tokens for one in planned)),
            "total_s": round(time.monotonic() - began_s, 1),
        }
    return figures


def _plan(question: str, gold: int, registry: Registry, ask: Ask | None) -> _Planned:
    started_s = time.perf_counter()
    task = TaskIR(objective=question)
    planning = Planning(registry)
    command = planning.handle(Requested(0, task, None))
    own_width = tokens = 0
    while not isinstance(command, Finish):
        answer = ask(command.model, command.request) if ask is not None and isinstance(command, AskModel) else None
        if answer is not None:
            tokens = answer.generated_tokens
            with suppress(ModelPlanRefused):  # the machine says so in its outcome
                own_width = width_of(read_plan(answer.text, answer.finish_reason, task, registry.roles).plan)
        command = planning.handle(Unanswered(0, "not asked") if answer is None else ModelAnswered(0, answer))
    final = command.final
    runs = final.task.plan is not None and not plan_problems(final.task, registry)
    width = width_of(final.task.plan) if final.task.plan is not None and runs else 0
    took_ms = (time.perf_counter() - started_s) * 1000
    return _Planned(gold, final, planning.model_outcome, width, own_width, took_ms, tokens)


def measure_split(rows: Sequence[Labelled], training: Sequence[Labelled] | None, seed: int) -> dict[str, Any]:
    """Balanced accuracy of the trained judge, with precision, recall and time; and of the rules that ship."""
    chances = np.zeros(len(rows))
    labels = np.array([row.divides for row in rows])
    if not 0 < labels.sum() < len(labels):
        raise BadRow("decomposable: all rows have one label, so there is no accuracy to balance")
    milliseconds: list[float] = []
    if training is not None:
        _judge(trained_on(list(training)), rows, range(len(rows)), chances, milliseconds)
    else:
        fold = _folds(labels, seed)
        for number in range(_FOLDS):
            judge = trained_on([row for row, own in zip(rows, fold, strict=True) if own != number])
            _judge(judge, rows, np.flatnonzero(fold == number).tolist(), chances, milliseconds)
    by_rules = np.zeros(len(rows))
    _judge(RuleJudge(), rows, range(len(rows)), by_rules, [])
    said = chances >= 0.5
    right = int((said & labels).sum())
    return {
        "rows": len(rows),
        "balanced_accuracy": round(_balanced(said, labels), 4),
        "ms_p50": round(statistics.median(milliseconds), 3),
        "ms_max": round(max(milliseconds), 3),
        "precision": round(right / max(1, int(said.sum())), 4),
        "recall": round(right / int(labels.sum()), 4),
        "trained_on": len(training) if training is not None else f"{_FOLDS} folds",
        "rules_balanced_accuracy": round(_balanced(by_rules >= 0.5, labels), 4),
    }


def _judge(
    judge: Judge, rows: Sequence[Labelled], numbers: Sequence[int], chances: np.ndarray[Any, Any], ms: list[float]
) -> None:
    for number in numbers:
        started = time.perf_counter()
        chances[number] = judge.judge(rows[number].request).probability
        ms.append((time.perf_counter() - started) * 1000)


def _folds(labels: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """The fold of every row; each label is spread evenly."""
    random = np.random.default_rng(seed)
    fold = np.zeros(len(labels), dtype=int)
    for label in (False, True):
        own = np.flatnonzero(labels == label)
        random.shuffle(own)
        fold[own] = np.arange(len(own)) % _FOLDS
    return fold


def _balanced(said: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    return float(((said & labels).sum() / labels.sum() + (~said & ~labels).sum() / (~labels).sum()) / 2)


def _print(screen: Screen, name: str, figures: dict[str, Any]) -> None:
    if name == "learning":
        screen.heading(name)
        print_ablations(screen, figures)
        return
    if name != "width":
        screen.heading(name)
        screen.table(("figure", "value"), [(key, str(value)) for key, value in figures.items()])
        return
    for planner, measured in figures.items():
        screen.heading(f"width of plans by the {planner}")
        screen.table(("figure", "value"), [(key, str(value)) for key, value in measured.items() if key != "confusion"])
        confusion = measured["confusion"]
        widths = sorted({int(width) for row in confusion.values() for width in row})
        screen.line("rows: gold width, columns: width of the plan")
        screen.table(
            ("gold", *map(str, widths)),
            [(gold, *(str(row.get(str(width), "")) for width in widths)) for gold, row in confusion.items()],
        )
