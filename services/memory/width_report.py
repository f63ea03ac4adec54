"""Too few splits, or too many? Numbers over the last decisions about decomposition (pure).

*Serial collapse*: tasks ran one step after the other although, for tasks of their kind, splitting pays. *Spurious
parallelism*: tasks were split although nothing came of it, since fewer than two of the steps beside each other made
something of their own, or since splitting does not pay for tasks of their kind.

Whether it pays is judged per kind (type of task and cluster) by all outcomes at hand: by raw reward where the
difference is larger than chance and 0.05, else by seconds. A kind that ran too seldom on one side is judged by what the
rules would have done, so that a policy that never splits is not its own witness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from protocol.messages.memory import Spread, WidthReport

LAST: Final = 100
"""Decisions that are reported about."""
HISTORY: Final = 1_000
"""Decisions by which it is judged what pays."""
_LEAST: Final = 5
"""Outcomes on each side that it takes to judge by them."""
_MARGIN: Final = 0.05
_FASTER: Final = 0.9


@dataclass(frozen=True, slots=True)
class Decided:
    """One decomposition with what came of it."""

    task_type: str
    cluster: str
    reward: float
    """Raw."""
    shaped: float
    seconds: float
    spread: Spread
    rules_width: float
    """Width of the rules' plan."""
    widest: float
    """Of the plans that there were to choose from."""

    @property
    def split(self) -> bool:
        """Whether steps ran beside each other."""
        return self.spread.width > 1


def report(decided: Sequence[Decided], stage: int, weight: float) -> WidthReport:
    """About the last ones of `decided`, which is in the order of the outcomes; `stage` and `weight` as they are now."""
    kinds: dict[tuple[str, str], list[Decided]] = {}
    for one in decided[-HISTORY:]:
        kinds.setdefault((one.task_type, one.cluster), []).append(one)
    verdicts = {kind: _pays(own) for kind, own in kinds.items()}
    last = decided[-LAST:]
    pays = serial_though = split = in_vain = 0
    for one in last:
        verdict = verdicts[one.task_type, one.cluster]
        wanted = one.widest > 1 and (one.rules_width > 1 if verdict is None else verdict)
        pays += wanted
        serial_though += wanted and not one.split
        split += one.split
        in_vain += one.split and (one.spread.useful < 2 or verdict is False)
    return WidthReport(
        tasks=len(last),
        quality=_mean([one.reward for one in last]),
        shaped=_mean([one.shaped for one in last]),
        stage=stage,
        weight=weight,
        split=split,
        serial=len(last) - split,
        width_pays=pays,
        serial_though_width_pays=serial_though,
        split_in_vain=in_vain,
        serial_collapse=serial_though / pays if pays else 0.0,
        spurious_parallelism=in_vain / split if split else 0.0,
    )


def _pays(own: Sequence[Decided]) -> bool | None:
    """Whether splitting pays for tasks of one kind; None where the outcomes do not say."""
    split = [one for one in own if one.split]
    serial = [one for one in own if not one.split]
    if min(len(split), len(serial)) < _LEAST:
        return None
    gain = _mean([one.reward for one in split]) - _mean([one.reward for one in serial])
    mean = _mean([one.reward for one in own])
    chance = math.sqrt(mean * (1 - mean) * (1 / len(split) + 1 / len(serial)))
    if abs(gain) > max(_MARGIN, chance):
        return gain > 0
    return _mean([one.seconds for one in split]) < _FASTER * _mean([one.seconds for one in serial])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
