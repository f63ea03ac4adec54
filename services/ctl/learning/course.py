"""One course of learning: a family's tasks one after the other, chosen for by the policy that runs in production.

The plans to choose from are the planner's own, and so is the question that memory gets; the answer comes from
`services.memory.routing`, the reward from `services.memory.staged`. How long a plan takes, how wide it ran and how many
steps were handed out comes from the hub's machine, which runs each plan once in virtual time. What the world answers,
how good a result is and which steps find something to do, is the family's. The same seed gives the same course.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.memory import Question, Spread
from protocol.messages.task import Plan, TaskIR, TaskType
from services.ctl.learning.families import Family
from services.ctl.outcomes import BadInput
from services.kit.registry import Registry
from services.memory.routing import Bandit, Observation
from services.memory.staged import STAGING, Staging, finish_term
from services.planner.advice import WIDTH_KEY, request, shape_of
from services.planner.rules import plans_by_rules
from services.planner.width import width_of
from services.scheduler.durations import Job
from services.scheduler.simulation.run import run_tasks, tiers_of
from services.scheduler.spread import spread_of

VARIANTS: Final[Mapping[str, Staging]] = {
    "no_parallel_term": Staging(parallel=0.0, finish=STAGING.finish, anneal_over=STAGING.anneal_over),
    "no_finish_term": Staging(parallel=STAGING.parallel, finish=0.0, anneal_over=STAGING.anneal_over),
    "no_annealing": Staging(parallel=STAGING.parallel, finish=STAGING.finish, anneal_over=None),
    "full": STAGING,
}
"""The schedule that is in force, and the three that lack one part of it."""

LAST_SHARE: Final = 0.2
"""Part of a course, at its end, whose quality counts."""


@dataclass(frozen=True, slots=True)
class Way:
    """One plan to choose: what it is called, and how it ran in virtual time."""

    choice: str
    width: int
    spread: Spread
    seconds: float


@dataclass(frozen=True, slots=True)
class Ground:
    """A family with the plans that there are for its tasks; the same for every course."""

    family: Family
    question: Question
    ways: Mapping[str, Way]


@dataclass(frozen=True, slots=True)
class Course:
    """What came of one."""

    widths: np.ndarray[tuple[int], np.dtype[np.int64]]
    """Of each task."""
    quality: np.ndarray[tuple[int], np.dtype[np.float64]]
    """Expected raw reward of each task at the width that was chosen, before its noise."""
    share_of_best: float
    """Mean of `quality` over the last fifth, per what the best width reaches."""
    split_share: float
    """Part of the last fifth that was split."""


def ground_of(family: Family, registry: Registry) -> Ground:
    """Plan a task of the family and run each plan once. Raises BadInput where a width has no quality."""
    given = [Artefact(name=f"note_{n}", kind=ArtefactKind.TEXT, value="simulated") for n in range(family.inputs)]
    task = TaskIR(task_type=TaskType.DOC, objective=f"Put these {family.name} together", inputs=given)
    plans = {one.template: one.plan for one in plans_by_rules(task, registry.roles)}
    widths = {template: width_of(plan) for template, plan in plans.items()}
    if set(widths.values()) != set(family.quality):
        offered = ", ".join(map(str, sorted(set(widths.values()))))
        raise BadInput(f"family {family.name}: quality: {family.inputs} inputs need a value for each of {offered}")
    ruled = {template: plans[template] for template in sorted(plans, key=lambda name: widths[name] != family.rules)}
    asked = request(task, ruled, registry, task.objective)
    if asked is None:
        raise BadInput(f"family {family.name}: inputs: there is nothing to choose")
    question = next(one for one in asked.questions if one.key == WIDTH_KEY)
    return Ground(
        family, question, {shape_of(name): _ran(task, name, plan, family, registry) for name, plan in plans.items()}
    )


def run_course(ground: Ground, staging: Staging, tasks: int, seed: int) -> Course:
    """Let a fresh policy choose for so many tasks, one after the other."""
    family = ground.family
    random = np.random.default_rng(seed)
    bandit = Bandit(staging)
    practised = dict.fromkeys(family.quality, 0)
    widths, quality = np.zeros(tasks, dtype=np.int64), np.zeros(tasks)
    for number in range(tasks):
        advised = bandit.advise(ground.question, None, int(random.integers(2**62)))
        way = ground.ways[advised.choice]
        expected = family.expected(way.width, practised)
        practised[way.width] += 1
        raw = float(np.clip(random.normal(expected, family.noise), 0.0, 1.0))
        spread = _finished(way.spread, family, random)
        credited = staging.credit(raw, spread, bandit.stage)
        bandit.learn(
            Observation(
                seq=2 * number + 2,
                decision_seq=2 * number + 1,
                subject=ground.question.subject,
                task_type=TaskType.DOC.value,
                choice=way.choice,
                cluster=ground.question.cluster,
                vector=None,
                reward=raw,
                seconds=way.seconds,
                model="",
                prompt="",
                finish=finish_term(spread),
                stage=credited.stage,
            )
        )
        widths[number], quality[number] = way.width, expected
    count = max(1, int(tasks * LAST_SHARE))
    return Course(widths, quality, float(quality[-count:].mean()) / family.best, float((widths[-count:] > 1).mean()))


class _StepSeconds:
    """Durations of the steps of one plan; known exactly, so there is nothing to learn."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = seconds

    def expected_s(self, job: Job) -> float:
        """See Durations."""
        return self._seconds[job.step]

    def spread(self) -> float:
        """See Durations."""
        return 0.0

    def seen_s(self, job: Job) -> tuple[float, float]:
        """See Durations."""
        return self._seconds[job.step], math.inf

    def observe(self, job: Job, seconds: float) -> None:
        """See Durations."""


def _ran(task: TaskIR, template: str, plan: Plan, family: Family, registry: Registry) -> Way:
    given = {artefact.name for artefact in task.inputs}
    bare = Plan(steps=[step.model_copy(update={"gates": []}) for step in plan.steps])
    known = _StepSeconds(
        {step.id: family.step_s + family.input_s * len(given.intersection(step.inputs)) for step in bare.steps}
    )
    ran = run_tasks([task.model_copy(update={"plan": bare})], registry, tiers_of(registry), known, known)
    spread = spread_of(ran.tasks[0])
    if spread is None:
        raise ValueError(f"{template} ran without a step")
    return Way(shape_of(template), width_of(plan), spread, ran.outcome.makespan_s)


def _finished(spread: Spread, family: Family, random: np.random.Generator) -> Spread:
    """As it ran, but only the steps that find something to do come to an end; each with the same chance."""
    if not spread.assigned:
        return spread
    finished = int(random.binomial(spread.assigned, min(1.0, family.parts / spread.assigned)))
    return spread.model_copy(update={"finished": finished, "useful": finished})
