"""What may be expected of a choice after so many outcomes, and how far that can be trusted. Pure.

The mean of a beta distribution from a uniform prior, so a choice nobody has tried counts as one that succeeds half of
the time:

    mean = (s + 1) / (n + 2)      deviation² = mean (1 - mean) / (n + 3)      s = sum of rewards, n = outcomes

(Gelman et al., Bayesian Data Analysis, 2.4; rewards between 0 and 1 count as partial successes.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Expectation:
    """Expected reward in [0, 1]."""

    outcomes: int
    mean: float
    deviation: float
    """Standard deviation of the mean."""

    def bounds(self, deviations: float) -> tuple[float, float]:
        """Lower and upper confidence bound, within [0, 1]."""
        return max(0.0, self.mean - deviations * self.deviation), min(1.0, self.mean + deviations * self.deviation)


def expected(outcomes: int, rewards: float) -> Expectation:
    """After so many outcomes with this sum of rewards."""
    mean = (rewards + 1) / (outcomes + 2)
    return Expectation(outcomes, mean, math.sqrt(mean * (1 - mean) / (outcomes + 3)))
