"""The staged reward with each of its parts left out once: the same families and seeds, several courses each."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Final

import numpy as np

from services.ctl.learning.course import LAST_SHARE, VARIANTS, Course, Ground, ground_of, run_course
from services.ctl.learning.families import Family
from services.ctl.screen import Screen
from services.kit.registry import Registry
from services.kit.threads import one_thread_each
from services.memory.staged import STAGING

TASKS: Final = 800
"""Tasks of one course: twice the decompositions over which the terms are annealed."""
LEAST_TASKS: Final = 10
_WORTH_A_POOL: Final = 4_000
"""Tasks in all from which more processes save more time than they take to start."""
COURSES: Final = 5
"""Of each family and variant, with seeds of their own."""


@dataclass(frozen=True, slots=True)
class Ablations:
    """All courses, by variant and family."""

    grounds: tuple[Ground, ...]
    tasks: int
    seeds: tuple[int, ...]
    courses: dict[tuple[str, str], list[Course]]

    def quality(self, variant: str, family: str) -> float:
        """Share of the best width's quality that is reached in the end, mean over the seeds."""
        return statistics.fmean(course.share_of_best for course in self.courses[variant, family])

    def document(self) -> dict[str, Any]:
        """For programs; the figure of a variant is that of the family in which it does worst."""
        names = [ground.family.name for ground in self.grounds]
        by_family = {variant: {name: round(self.quality(variant, name), 4) for name in names} for variant in VARIANTS}
        return {
            **{variant: min(own.values()) for variant, own in by_family.items()},
            "by_family": by_family,
            "worst_seed": {
                variant: {
                    name: round(min(course.share_of_best for course in self.courses[variant, name]), 4)
                    for name in names
                }
                for variant in VARIANTS
            },
            "serial_collapse": {variant: self._worst(variant, split_is_right=True) for variant in VARIANTS},
            "spurious_parallelism": {variant: self._worst(variant, split_is_right=False) for variant in VARIANTS},
            "best_width": {ground.family.name: ground.family.best_width for ground in self.grounds},
            "width_in_the_end": {
                variant: {name: self._usual_width(variant, name) for name in names} for variant in VARIANTS
            },
            "virtual_seconds": {
                ground.family.name: {str(way.width): way.seconds for way in ground.ways.values()}
                for ground in self.grounds
            },
            "tasks": self.tasks,
            "annealed_over": STAGING.anneal_over,
            "seeds": list(self.seeds),
        }

    def _worst(self, variant: str, *, split_is_right: bool) -> float:
        """Share of tasks in the end that run serial though the best width is larger, or are split though it is 1; of
        the family where it is largest, 0 without such a family.
        """
        shares = []
        for ground in self.grounds:
            if (ground.family.best_width > 1) == split_is_right:
                split = statistics.fmean(one.split_share for one in self.courses[variant, ground.family.name])
                shares.append(1 - split if split_is_right else split)
        return round(max(shares, default=0.0), 4)

    def _usual_width(self, variant: str, family: str) -> int:
        last = [course.widths[-max(1, int(self.tasks * LAST_SHARE)) :] for course in self.courses[variant, family]]
        values, counts = np.unique(np.concatenate(last), return_counts=True)
        return int(values[np.argmax(counts)])


def run_ablations(families: Sequence[Family], registry: Registry, tasks: int, seeds: Sequence[int]) -> Ablations:
    """Run every variant on every family with every seed, on all cores. Raises BadInput for a family that cannot be."""
    grounds = tuple(ground_of(family, registry) for family in families)
    wanted = [(variant, ground, seed) for variant in VARIANTS for ground in grounds for seed in seeds]
    ran: Sequence[Course]
    if tasks * len(wanted) < _WORTH_A_POOL:
        ran = [_run(one, tasks) for one in wanted]
    else:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            ran = list(pool.map(_run, wanted, [tasks] * len(wanted)))
    courses: dict[tuple[str, str], list[Course]] = {}
    for (variant, ground, _), course in zip(wanted, ran, strict=True):
        courses.setdefault((variant, ground.family.name), []).append(course)
    return Ablations(grounds, tasks, tuple(seeds), courses)


def _run(wanted: tuple[str, Ground, int], tasks: int) -> Course:
    variant, ground, seed = wanted
    one_thread_each()  # as in the process that chooses: every core has a course of its own
    return run_course(ground, VARIANTS[variant], tasks, seed)


def print_ablations(screen: Screen, figures: dict[str, Any]) -> None:
    """For people."""
    screen.line(
        f"{figures['tasks']} tasks a course, {len(figures['seeds'])} courses each; terms annealed over "
        f"{figures['annealed_over']}; figures are of the last fifth"
    )
    screen.heading("raw quality per that of the best width")
    families = list(figures["best_width"])
    screen.table(
        ("variant", "worst family", *families),
        [
            (name, f"{figures[name]:.3f}", *(f"{own[family]:.3f}" for family in families))
            for name, own in figures["by_family"].items()
        ],
    )
    screen.heading("width that is taken most")
    rows = [("best", *(str(figures["best_width"][family]) for family in families))]
    rows += [(name, *(str(own[family]) for family in families)) for name, own in figures["width_in_the_end"].items()]
    screen.table(("variant", *families), rows)
    screen.heading("share of tasks in the family that is worst off")
    screen.table(
        ("variant", "serial though width pays", "split though it does not"),
        [
            (name, f"{figures['serial_collapse'][name]:.2f}", f"{figures['spurious_parallelism'][name]:.2f}")
            for name in figures["by_family"]
        ],
    )
