"""`simulate`: what this registry, or one with more workers or slots, would do with some tasks; nothing is executed.

The tasks come from files or are made up. They run through the real hub machine in virtual time, once as the registry
says and once as `--workers` and `--slots` say, and both are put side by side. Gates, planner and memory answer at once.
`--learning` instead lets the policy that decides about splitting learn from made-up tasks, see `learning`.
"""

from __future__ import annotations

import random
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from protocol.messages.task import TaskIR
from services.ctl.commands import Commands, Context
from services.ctl.learned import KnownDurations, add_duration_arguments, known_durations
from services.ctl.learning.ablations import COURSES, LEAST_TASKS, TASKS, print_ablations, run_ablations
from services.ctl.learning.families import SHIPPED, read_families
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.plan import dry_run
from services.ctl.screen import Screen, seconds
from services.ctl.stack_files import checked_registry
from services.ctl.task_file import checked_task, read_task_fields
from services.ctl.trials import with_live_trials
from services.kit.registry import Registry
from services.scheduler.simulation.outcome import Outcome
from services.scheduler.simulation.peers import SimulationError
from services.scheduler.simulation.run import Run, run_tasks, tiers_of
from services.scheduler.simulation.shapes import SHAPES, made_up_task
from services.scheduler.simulation.tiers import Tier
from services.scheduler.simulation.world import RefusedError

_MAX_STEPS: Final = 1_000
_MAX_ALL_STEPS: Final = 200_000
"""Of all tasks together: their histories are kept in memory until the end, a few KiB a step."""
_MAX_NUMBER: Final = 1_000
_MAX_COURSE: Final = 100_000


def add(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add(
        "simulate",
        _simulate,
        "virtual time: how long tasks would take, and with more workers or slots",
        elsewhere=True,
        epilog="example: tierline simulate --tasks 100 --shape diamond --workers worker=5",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="tasks as TaskIR, .yaml or .json")
    parser.add_argument("--tasks", type=int, metavar="N", help="make up so many tasks instead")
    parser.add_argument("--shape", choices=list(SHAPES), default="random", help="of made-up tasks (default random)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="steps of a made-up task (default 10)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of made-up tasks (default 1)")
    for name, what in (("workers", "service processes of a model entry"), ("slots", "slots of each of them")):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="MODEL=N", help=f"what if: {what}, repeatable"
        )
    add_duration_arguments(parser)
    parser.add_argument(
        "--learning",
        action="store_true",
        help="instead: learn whether to split, with each part of the staged reward left out once",
    )
    parser.add_argument(
        "--families", type=Path, metavar="FILE", help="with --learning: families of tasks as JSON lines (default: five)"
    )
    parser.add_argument(
        "--courses", type=int, metavar="N", help=f"with --learning: courses, each with its own seed (default {COURSES})"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --learning: draw the curves")


def _simulate(args: Namespace, context: Context) -> ExitCode:
    if args.learning:
        return _learn(args, context)
    if args.families is not None or args.courses is not None or args.png is not None:
        raise BadInput("--families, --courses and --png belong to --learning")
    durations = known_durations(args, context.home)
    registry = with_live_trials(context.home, checked_registry(context.home, check_files=False))
    workers, slots = _numbers("workers", args.workers, registry), _numbers("slots", args.slots, registry)
    tasks = _tasks(args, registry)
    base, pace = _timed(tasks, registry, tiers_of(registry), durations)
    other: Outcome | None = None
    if workers or slots:
        other = _timed(tasks, registry, tiers_of(registry, workers, slots), durations)[0].outcome
    if context.screen.json:
        context.screen.document(_document(base.outcome, other, durations, pace))
    else:
        _print(context.screen, base.outcome, other, durations, pace)
    failed = [task for task in base.tasks if task.failure is not None]
    for task in failed[:5]:
        message = task.failure.message if task.failure else ""
        context.screen.note(f"a task fails in the simulation: {message}")
    return ExitCode.FAILED if failed else ExitCode.OK


def _learn(args: Namespace, context: Context) -> ExitCode:
    if args.files or args.workers or args.slots:
        raise BadInput("--learning makes up its tasks: give no task files, --workers or --slots")
    tasks = TASKS if args.tasks is None else args.tasks
    courses = COURSES if args.courses is None else args.courses
    if not LEAST_TASKS <= tasks <= _MAX_COURSE:
        raise BadInput(f"--tasks {tasks}: expected {LEAST_TASKS} to {_MAX_COURSE} of each course")
    if not 1 <= courses <= _MAX_NUMBER:
        raise BadInput(f"--courses {courses}: expected 1 to {_MAX_NUMBER}")
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed}: expected 0 or more")
    families = SHIPPED if args.families is None else read_families(args.families)
    registry = checked_registry(context.home, check_files=False)
    ablations = run_ablations(families, registry, tasks, range(args.seed, args.seed + courses))
    if args.png is not None:
        from services.ctl.learning.curves import draw  # matplotlib takes longer to load than most commands to run

        try:
            draw(ablations, args.png)
        except OSError as err:
            raise BadInput(f"--png {args.png} cannot be written: {err}") from err
    figures = ablations.document()
    if context.screen.json:
        context.screen.document(figures)
    else:
        print_ablations(context.screen, figures)
    return ExitCode.OK


def _tasks(args: Namespace, registry: Registry) -> list[TaskIR]:
    if (args.tasks is None) == (not args.files):
        raise BadInput("give either task files or --tasks N, as in: tierline simulate --tasks 100 --shape diamond")
    if args.files:
        return [dry_run(checked_task(read_task_fields(path), registry), registry).task for path in args.files]
    if not 1 <= args.steps <= _MAX_STEPS:
        raise BadInput(f"--steps {args.steps}: expected 1 to {_MAX_STEPS}")
    if not 1 <= args.tasks <= _MAX_ALL_STEPS // args.steps:
        raise BadInput(
            f"--tasks {args.tasks}: expected 1 to {_MAX_ALL_STEPS // args.steps} with {args.steps} steps each"
        )
    draw = random.Random(args.seed)  # noqa: S311  repeatable tasks, not a secret
    return [made_up_task(args.shape, args.steps, registry, draw) for _ in range(args.tasks)]


def _numbers(option: str, given: Sequence[str], registry: Registry) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for text in given:
        model, _, number = text.partition("=")
        if model not in registry.models:
            raise BadInput(f"--{option} {text}: there is no model {model!r}, but {', '.join(registry.models)}")
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= _MAX_NUMBER:
            raise BadInput(f"--{option} {text}: expected MODEL=N with N from 1 to {_MAX_NUMBER}")
        numbers[model] = int(number)
    return numbers


@dataclass(frozen=True, slots=True)
class _Pace:
    """How fast virtual time was: what was simulated in one second of real time."""

    tasks_per_s: float
    steps_per_s: float


def _timed(
    tasks: Sequence[TaskIR], registry: Registry, tiers: Sequence[Tier], durations: KnownDurations
) -> tuple[Run, _Pace]:
    began = time.perf_counter()
    try:
        run = run_tasks(tasks, registry, tiers, durations.fresh(), durations.fresh())
    except RefusedError as err:
        raise BadInput(f"the scheduler would not take a task: {err}") from err
    except SimulationError as err:
        raise CommandError(f"the simulation did not come to its end: {err}") from err
    took_s = time.perf_counter() - began
    return run, _Pace(run.outcome.tasks / took_s, run.outcome.steps / took_s)


def _document(base: Outcome, other: Outcome | None, durations: KnownDurations, pace: _Pace) -> dict[str, Any]:
    return {
        "base": asdict(base),
        "what_if": None if other is None else asdict(other),
        "speedup": None if other is None else round(base.makespan_s / other.makespan_s, 4),
        "durations": durations.document(),
        "simulated_tasks_per_s": round(pace.tasks_per_s, 1),
        "simulated_steps_per_s": round(pace.steps_per_s, 1),
    }


def _print(screen: Screen, base: Outcome, other: Outcome | None, durations: KnownDurations, pace: _Pace) -> None:
    screen.line(
        f"{base.tasks} tasks, {base.steps} steps in virtual time; {pace.tasks_per_s:.0f} simulated tasks, "
        f"{pace.steps_per_s:.0f} simulated steps a second"
    )
    screen.line(durations.words())
    screen.heading("as the registry says" if other is not None else "outcome")
    _print_one(screen, base)
    if other is None:
        return
    screen.heading("what if")
    _print_one(screen, other)
    screen.heading("compared")
    rows = [
        (
            "makespan",
            seconds(base.makespan_s * 1000),
            seconds(other.makespan_s * 1000),
            _factor(base.makespan_s, other.makespan_s),
        ),
        (
            "lower bound",
            seconds(base.bound_s * 1000),
            seconds(other.bound_s * 1000),
            _factor(base.bound_s, other.bound_s),
        ),
        (
            "steps per second",
            f"{base.throughput_per_s:.3f}",
            f"{other.throughput_per_s:.3f}",
            _factor(other.throughput_per_s, base.throughput_per_s),
        ),
        ("bottleneck", base.bottleneck, other.bottleneck, ""),
    ]
    for before, after in zip(base.tiers, other.tiers, strict=True):
        rows.append((f"{before.model} busy", f"{before.utilisation:.0%}", f"{after.utilisation:.0%}", ""))
        waits = seconds(before.wait_mean_s * 1000), seconds(after.wait_mean_s * 1000)
        rows.append((f"{before.model} mean wait", *waits, _factor(before.wait_mean_s, after.wait_mean_s)))
    screen.table(("figure", "base", "what if", "gain"), rows)


def _print_one(screen: Screen, outcome: Outcome) -> None:
    screen.line(
        f"makespan {seconds(outcome.makespan_s * 1000)}; no schedule is faster than {seconds(outcome.bound_s * 1000)} "
        f"({outcome.bottleneck}); {outcome.throughput_per_s:.3f} steps per second; {outcome.failed} tasks fail"
    )
    screen.table(
        ("model", "workers", "slots", "steps", "busy", "mean wait", "longest wait"),
        [
            (
                use.model,
                str(use.workers),
                str(use.slots),
                str(use.steps),
                f"{use.utilisation:.0%}",
                seconds(use.wait_mean_s * 1000),
                seconds(use.wait_max_s * 1000),
            )
            for use in outcome.tiers
        ],
    )


def _factor(before: float, after: float) -> str:
    return f"{before / after:.2f} x" if before > 0 and after > 0 else ""
