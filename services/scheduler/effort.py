"""Whether a larger budget is worth trying before a stronger role: what came of it so far, per role and task type. Pure.

Three ways out of a failure are compared: the last retry in the same role as usual (`plain`), the same with more tokens
and a prompt that asks for thought (`harder`), and the first attempt of the role above (`escalated`). Harder pays where
the escalations it saves cost more time than it takes:

    (p_harder - p_plain - error) * t_escalated > t_harder - t_plain

with success rates p after Laplace (one success and one failure added), the standard error of their difference, and
mean seconds t. Without enough of each it is off. One occasion in `_EXPLORE_ONE_IN` is decided the other way, by the
step's own key and not by chance, so that both sides stay known (a greedy rule would keep what it tried first).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from services.kit.registry import Registry
from services.scheduler.failures import ARMS
from services.scheduler.tasks import StepRecord, TaskRecord

Mode = Literal["off", "measured", "always"]
Effort = list[tuple[list[str], float, float, float]]
"""`[role, task type, arm]`, tried, solved, seconds in all: as the journal keeps it."""

_LEAST: Final = 8.0
"""So many attempts of each kind must be known before the figures count."""
_MEMORY: Final = 200.0
"""Attempts after which older ones fade, so that a new model is noticed."""
_EXPLORE_ONE_IN: Final = 16


@dataclass(slots=True)
class _Record:
    tried: float = 0.0
    solved: float = 0.0
    seconds: float = 0.0

    def add(self, *, solved: bool, seconds: float) -> None:
        if self.tried >= _MEMORY:
            kept = (_MEMORY - 1) / self.tried
            self.tried, self.solved, self.seconds = _MEMORY - 1, self.solved * kept, self.seconds * kept
        self.tried += 1
        self.solved += solved
        self.seconds += seconds

    @property
    def rate(self) -> float:
        return (self.solved + 1) / (self.tried + 2)

    @property
    def variance(self) -> float:
        return self.rate * (1 - self.rate) / (self.tried + 3)

    @property
    def mean_s(self) -> float:
        return self.seconds / self.tried if self.tried else 0.0


@dataclass(slots=True)
class EffortRecord:
    """What came of the three ways; bounded by roles x task types."""

    _records: dict[tuple[str, str, str], _Record] = field(default_factory=dict)

    def observe(self, role: str, task_type: str, arm: str | None, *, solved: bool, seconds: float) -> None:
        """An attempt has ended; `role` is the one that failed before it. Without an arm there is nothing to compare."""
        if arm is not None and arm in ARMS:
            self._records.setdefault((role, task_type, arm), _Record()).add(solved=solved, seconds=seconds)

    def benefit_s(self, role: str, task_type: str) -> float | None:
        """Seconds that one harder attempt saves on average, on the safe side; None while too little is known."""
        plain, harder, above = (self._of(role, task_type, arm) for arm in ("plain", "harder", "escalated"))
        if min(plain.tried, harder.tried, above.tried) < _LEAST:
            return None
        gain = harder.rate - plain.rate - math.sqrt(harder.variance + plain.variance)
        return gain * above.mean_s - (harder.mean_s - plain.mean_s)

    def pays(self, mode: Mode, role: str, task_type: str, key: str) -> bool:
        """The decision for one step; `key` (hexadecimal) says whether it is one that explores."""
        if mode != "measured":
            return mode == "always"
        benefit_s = self.benefit_s(role, task_type)
        known = benefit_s is not None and benefit_s > 0
        return known is not (int(key[:8], 16) % _EXPLORE_ONE_IN == 0)

    def state(self) -> Effort:
        """Everything, as plain values for the journal."""
        return [(list(name), one.tried, one.solved, one.seconds) for name, one in self._records.items()]

    def restore(self, state: Iterable[tuple[list[str], float, float, float]]) -> None:
        """Take up what `state` gave."""
        self._records = {
            (name[0], name[1], name[2]): _Record(tried, solved, seconds) for name, tried, solved, seconds in state
        }

    def _of(self, role: str, task_type: str, arm: str) -> _Record:
        return self._records.get((role, task_type, arm), _Record())


def at_home(step: StepRecord, registry: Registry) -> bool:
    """Whether the newest attempt ran on its role's own model: what another one does says nothing about the role."""
    return step.attempt.model == registry.roles[step.attempt.role].model


def learn_effort(
    record: EffortRecord, task: TaskRecord, step: StepRecord, registry: Registry, at_ms: int, *, solved: bool
) -> None:
    """Take what came of the newest attempt, if it can be compared with another way out of the failure before it."""
    attempt = step.attempt
    if attempt.number > 1 and attempt.started_ms is not None and at_home(step, registry):
        failed = step.attempts[-2].role
        seconds = (at_ms - attempt.started_ms) / 1000
        record.observe(failed, task.ir.task_type.value, attempt.arm, solved=solved, seconds=seconds)
