"""`tierline bench makespan FILE`: how close the scheduler comes to the shortest schedule that could exist.

Every graph runs through the real hub machine in virtual time, as one task on workers of one tier with one slot each,
and its makespan is compared with max(critical path, work / workers). Only the order is measured: messages take no
virtual time, planner, gates and memory answer at once, and a unit of the file is as many virtual milliseconds as fit
below the longest timeout a step may have, so that rounding to milliseconds is far below what is measured.

Policies: `upward-rank` is the scheduler with estimates of the durations (exact, or wrong by a factor
exp(N(0, sigma))); `fifo` is the same scheduler with an estimator that knows nothing, so that the order of arrival
decides; `waves` is the first with a barrier after each level of the graph, as superstep engines run it.
"""

from __future__ import annotations

import math
import random
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from protocol.messages.task import Output, Plan, Step, TaskIR
from services.ctl.bench.graph_file import TaskGraph, read_graphs
from services.ctl.commands import Commands, Context
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.kit.config import CHECKOUT
from services.kit.registry import Registry, load_registry
from services.scheduler.durations import Durations, Job
from services.scheduler.simulation.calm import CalmWorld
from services.scheduler.simulation.tiers import Tier
from services.scheduler.simulation.world import RefusedError
from services.scheduler.tasks import TaskRecord

Policy = Literal["upward-rank", "fifo", "waves"]
_POLICIES: Final[tuple[Policy, ...]] = ("upward-rank", "fifo", "waves")
_TIMEOUT_S: Final = 86_400.0
"""The longest a step may have."""
_MAX_WORKERS: Final = 1_000
_ROLE: Final = "worker"
_BARRIER: Final = "barrier"


def add(commands: Commands) -> None:
    """Add `bench makespan`."""
    parser = commands.add(
        "makespan", _run, "compare schedules of task graphs with the shortest possible ones, in virtual time"
    )
    parser.add_argument("file", type=Path, help="graphs as JSON lines: name, tasks with id, seconds, depends_on")
    parser.add_argument("--workers", type=int, default=4, metavar="M", help="one-slot workers (default 4)")
    parser.add_argument("--policy", choices=_POLICIES, default="upward-rank", help="default upward-rank")
    parser.add_argument(
        "--sigma", type=float, default=0.0, help="durations are known up to a factor exp(N(0, sigma)) (default 0)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the errors of the estimates (default 1)")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    if not 1 <= arguments.workers <= _MAX_WORKERS:
        raise BadInput(f"--workers {arguments.workers}: expected 1 to {_MAX_WORKERS}")
    if not 0 <= arguments.sigma <= 5:
        raise BadInput(f"--sigma {arguments.sigma:g}: expected 0 to 5")
    if arguments.sigma and arguments.policy == "fifo":
        raise BadInput("--sigma has no effect on fifo, which does not look at durations")
    graphs = read_graphs(arguments.file)
    figures = measure(graphs, arguments.workers, arguments.policy, arguments.sigma, arguments.seed)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "value"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.OK


def measure(
    graphs: Sequence[TaskGraph], workers: int, policy: Policy = "upward-rank", sigma: float = 0.0, seed: int = 1
) -> dict[str, Any]:
    """Mean and maximum over the graphs of makespan / lower bound."""
    registry = load_registry(CHECKOUT / "registry", CHECKOUT, check_files=False)
    errors = random.Random(seed)  # noqa: S311  repeatable noise, not a secret
    ratios = []
    for graph in graphs:
        known: Durations = NothingKnown()
        if policy != "fifo":
            factor = {task: math.exp(errors.gauss(0.0, sigma)) if sigma else 1.0 for task in graph.seconds}
            known = KnownDurations({task: s * factor[task] for task, s in graph.seconds.items()}, sigma)
        ratios.append(makespan_s(graph, registry, workers, known, waves=policy == "waves") / graph.bound_s(workers))
    return {
        "graphs": len(graphs),
        "workers": workers,
        "policy": policy,
        "sigma": sigma,
        "mean_ratio": round(sum(ratios) / len(ratios), 6),
        "max_ratio": round(max(ratios), 6),
    }


class KnownDurations:
    """Estimates that were given for every step, by its id, and the spread of their errors."""

    def __init__(self, seconds: Mapping[str, float], sigma: float) -> None:
        self._seconds = seconds
        self._sigma = sigma

    def expected_s(self, job: Job) -> float:
        """See Durations."""
        return self._seconds[job.step]

    def seen_s(self, job: Job) -> tuple[float, float]:
        """See Durations."""
        return self.expected_s(job), math.inf

    def spread(self) -> float:
        """See Durations."""
        return self._sigma

    def observe(self, job: Job, seconds: float) -> None:
        """Nothing to learn: each step runs once."""


class NothingKnown:
    """Knows nothing, so every step has the same rank and the first that came goes first."""

    def expected_s(self, job: Job) -> float:
        """See Durations."""
        return 0.0

    def seen_s(self, job: Job) -> tuple[float, float]:
        """See Durations."""
        return 0.0, 0.0

    def spread(self) -> float:
        """See Durations."""
        return math.inf

    def observe(self, job: Job, seconds: float) -> None:
        """Learns nothing either."""


def makespan_s(graph: TaskGraph, registry: Registry, workers: int, known: Durations, *, waves: bool = False) -> float:
    """Seconds, in the unit of the graph, from the adoption of the plan to the end of its last step."""
    names = {task: f"S{number}" for number, task in enumerate(graph.seconds)}
    ids = {step: task for task, step in names.items()}
    unit_ms = _unit_ms(max(graph.seconds.values()))
    world = CalmWorld(registry, _Scaled(known, ids, unit_ms))
    world.add_core()
    model = registry.model_of(_ROLE).name
    world.add_tiers(
        [Tier(model, workers, 1)],
        lambda _, step: graph.seconds[ids[step.spec.id]] * unit_ms / 1000 if step.spec.id in ids else 0.0,
    )
    try:
        task_id = world.submit(_task(graph, names, waves=waves))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise BadInput(f"graph {graph.name!r} is more than a plan holds: {field}: {first['msg']}") from err
    except RefusedError as err:
        raise BadInput(f"graph {graph.name!r}: {err}") from err
    world.run(lambda: task_id in world.ended)
    return _took_ms(world.ended[task_id], graph.name) / unit_ms


class _Scaled:
    """Estimates in units of the file, by ids of the file, as the hub asks for them."""

    def __init__(self, known: Durations, ids: Mapping[str, str], unit_ms: float) -> None:
        self._known = known
        self._ids = ids
        self._unit_s = unit_ms / 1000

    def expected_s(self, job: Job) -> float:
        """See Durations; a barrier takes no time."""
        task = self._ids.get(job.step)
        if task is None:
            return 0.0
        return self._unit_s * self._known.expected_s(Job(job.role, job.task_type, 0, 0, task))

    def seen_s(self, job: Job) -> tuple[float, float]:
        """See Durations."""
        return self.expected_s(job), math.inf

    def spread(self) -> float:
        """See Durations."""
        return self._known.spread()

    def observe(self, job: Job, seconds: float) -> None:
        """See Durations."""


def _unit_ms(longest: float) -> float:
    """Virtual milliseconds per unit of the file: a power of ten, the largest with which no step times out."""
    return float(10.0 ** math.floor(math.log10(_TIMEOUT_S * 1000 / longest / 2)))


def _task(graph: TaskGraph, names: Mapping[str, str], *, waves: bool) -> TaskIR:
    needs = {names[task]: [names[other] for other in others] for task, others in graph.needs.items()}
    needs = _with_barriers(needs) if waves else _without_detours(needs)
    steps = [
        Step(
            id=step,
            actor=_ROLE,
            action="run",
            outputs=[Output(name=f"{step}.out")],
            depends_on=others,
            ordered=True,
            gates=[],
            timeout_s=_TIMEOUT_S,
        )
        for step, others in needs.items()
    ]
    return TaskIR.model_validate(
        {"objective": "run a graph of a file", "plan": Plan(steps=steps), "budget": {"max_steps": len(steps)}}
    )


def _without_detours(needs: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The same order said with the fewest words: who waits for b, which waits for a, need not name a.

    Dense random graphs name nearly all their earlier tasks, and a plan takes a limited number of such edges.
    """
    bit = {step: 1 << number for number, step in enumerate(needs)}
    before: dict[str, int] = {}
    least: dict[str, list[str]] = {}
    for step in _in_order(needs):
        implied = 0
        for other in needs[step]:
            implied |= before[other]
        least[step] = [other for other in needs[step] if not implied & bit[other]]
        before[step] = implied | sum(bit[other] for other in least[step])
    return {step: least[step] for step in needs}


def _with_barriers(needs: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The same steps level by level: each level ends in a step without duration that the next one waits for."""
    level: dict[str, int] = {}
    for step in _in_order(needs):
        level[step] = max((level[other] + 1 for other in needs[step]), default=0)
    waves = {step: [f"{_BARRIER}{level[step] - 1}"] if level[step] else [] for step in needs}
    for number in range(max(level.values())):
        waves[f"{_BARRIER}{number}"] = [step for step in needs if level[step] == number]
    return waves


def _in_order(needs: Mapping[str, list[str]]) -> list[str]:
    """Every step after those it needs. The graph has no circle: its reader has looked."""
    missing = {step: len(others) for step, others in needs.items()}
    after: dict[str, list[str]] = {step: [] for step in needs}
    for step, others in needs.items():
        for other in others:
            after[other].append(step)
    order = [step for step, count in missing.items() if count == 0]
    for step in order:  # grows while it is walked
        for other in after[step]:
            missing[other] -= 1
            if missing[other] == 0:
                order.append(other)
    return order


def _took_ms(task: TaskRecord, name: str) -> int:
    if task.failure is not None or task.planned_ms is None or task.ended_ms is None:
        raise CommandError(f"graph {name!r} did not run to its end, its figures would mean nothing: {task.failure}")
    return task.ended_ms - task.planned_ms
