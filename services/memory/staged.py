"""The staged reward of decompositions: at first splitting and finishing count too, in the end quality alone (pure).

    r = weight · (r_parallel + r_finish) + r_perf        PARL's reward (Kimi K2.5 report, arXiv 2602.02276)

r_perf is the raw reward of the task; r_parallel = 1 - 1/width asks for steps beside each other, so that splitting is
tried before it is mastered; r_finish = finished/assigned takes that back where the split steps come to nothing. A task
without any has nothing unfinished: its r_finish is 1. Against doing all in one step a split of w thus gains
weight · (f - 1/w), which is more than nothing only if more than one of its steps finishes. The weight of both terms is
annealed from 0.1 to 0 over the first `anneal_over` decompositions of a kind, that is a type of task and a cluster.

The log credits it (`log.py`: once per decision, in the transaction that stores the outcome, which also counts the
stage). Choosing (`routing.py`) adds both terms at *today's* weight to the expected raw reward, as an on-policy learner
would see them: what was paid at an earlier stage does not stay in the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.messages.memory import Spread, Staged


@dataclass(frozen=True, slots=True)
class Staging:
    """The schedule. The simulation of learning leaves out one part at a time."""

    parallel: float = 0.1
    """λ1 at the start."""
    finish: float = 0.1
    """λ2 at the start."""
    anneal_over: int | None = 400
    """Decompositions after which both are 0, falling evenly; None = never."""

    def left(self, stage: int) -> float:
        """Share of both weights that is left after so many credited decompositions, from 1 to 0."""
        if self.anneal_over is None:
            return 1.0
        return max(0.0, 1.0 - stage / self.anneal_over)

    def weight(self, stage: int) -> float:
        """What a term counts at this stage: λ, of the heavier term."""
        return self.left(stage) * max(self.parallel, self.finish)

    def incentive(self, stage: int, width: int, finish: float) -> float:
        """What a split of this width is worth beside its quality, if this share of its steps finishes."""
        return self.left(stage) * (self.parallel * parallel_term(width) + self.finish * finish)

    def credit(self, raw: float, spread: Spread, stage: int) -> Staged:
        """The staged reward of a task that has ended; `stage` counts those credited before."""
        finish = finish_term(spread)
        return Staged(
            stage=stage,
            weight=self.weight(stage),
            parallel=parallel_term(spread.width),
            finish=finish,
            shaped=raw + self.incentive(stage, spread.width, finish),
        )


STAGING: Final = Staging()
"""The schedule that is in force."""


def parallel_term(width: int) -> float:
    """r_parallel of so many steps side by side, in [0, 1); 0 for one after the other."""
    return 1.0 - 1.0 / width


def finish_term(spread: Spread) -> float:
    """r_finish, in [0, 1]."""
    return spread.finished / spread.assigned if spread.assigned else 1.0
