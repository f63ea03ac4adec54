"""Does the answer to a request divide into points that can be written at the same time? A probability, with evidence.

Two judges with one face. `RuleJudge` ships: a handful of weights on named features of `request_features`, set by hand
from what the words mean, so that the planner has an opinion on its first day. No weights that were learned from
anybody's data ship; a judge that learns (`trained`) exists where its user has labelled rows. Pure. What is done with
the opinion is up to `split`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from services.planner.request_features import shape_of

#: Weights of the rules, in log odds.
RULES: Final[Mapping[str, float]] = {
    "how_to": 1.6,
    "several": 1.0,
    "what_are": 0.6,
    "compares": 0.8,
    "why": 0.3,
    "what_do_i": 0.6,
    "under_80_chars": 0.4,
    "lists": 0.3,
    "code": -0.8,
    "formula": -0.6,
    "error": -0.3,
    "writes": -1.0,
    "one_piece": -1.2,
    "one_result": -0.6,
    "one_fact": -0.5,
    "yes_no": -0.5,
    "meaning": -0.6,
    "you_are": -0.7,
    "imperative": -0.5,
    "prompt_mark": -1.5,
    "scripture": -0.6,
}
_BIAS: Final = -0.5
MAX_EVIDENCE: Final = 4
"""Reasons that an opinion gives."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """How likely the answer divides, between 0 and 1, and what speaks for or against it, strongest first."""

    probability: float
    evidence: tuple[str, ...]
    judge: str
    """`rules` or `trained`."""


class Judge(Protocol):
    """Whoever has an opinion."""

    def judge(self, request: str) -> Opinion:
        """The opinion on a request."""
        ...


class RuleJudge:
    """The opinion that ships."""

    def judge(self, request: str) -> Opinion:
        """See Judge."""
        shape = shape_of(request)
        parts = {name: weight * shape[name] for name, weight in RULES.items() if shape[name]}
        strongest = sorted(parts, key=lambda name: -abs(parts[name]))[:MAX_EVIDENCE]
        odds = _BIAS + sum(parts.values())
        return Opinion(
            1 / (1 + math.exp(-odds)), tuple(f"{name} {parts[name]:+.1f}" for name in strongest) or ("none",), "rules"
        )
