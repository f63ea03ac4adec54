"""Whether a persona on trial has earned its place: its outcomes against what the registry has for the same work. Pure.

A trial is compared where it was tried: in each kind of work (task type and cluster) the best declared choice, `none`
among them, weighed by the trial's outcomes there. Expected rewards are means of a beta distribution from a uniform
prior, so a choice nobody has tried counts as one that succeeds half of the time.

    mean = (s + 1) / (n + 2)      deviation² = mean (1 - mean) / (n + 3)      s = sum of rewards, n = outcomes

(Gelman et al., Bayesian Data Analysis, 2.4; rewards between 0 and 1 count as partial successes.) The best of several
noisy means is more likely too high than too low, so the comparison errs against the trial.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from protocol.messages.memory import ArmValue
from protocol.messages.persona import Persona
from services.kit.registry import TrialPolicy
from services.kit.registry.versions import prompt_digest


@dataclass(frozen=True, slots=True)
class Standing:
    """How a choice does against the alternative, both as expected rewards in [0, 1]."""

    outcomes: int
    mean: float
    deviation: float
    alternative: float
    """Best declared choice in the same kinds of work."""
    rival: str
    """Which one that is where the trial was tried most; empty where nothing else has an outcome."""

    def bounds(self, deviations: float) -> tuple[float, float]:
        """Lower and upper confidence bound of the mean."""
        return self.mean - deviations * self.deviation, self.mean + deviations * self.deviation


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a trial."""

    kind: Literal["stay", "adopt", "drop"]
    why: str


def standing_of(persona: Persona, arms: Iterable[ArmValue], declared: Collection[str]) -> Standing:
    """What the outcomes say of a persona, those under its present prompt; `declared` names its alternatives."""
    prompt = prompt_digest(persona.prompt)
    places: dict[tuple[str, str], list[ArmValue]] = defaultdict(list)
    for arm in arms:
        places[arm.task_type, arm.cluster].append(arm)
    outcomes, rewards, alternative = 0, 0.0, 0.0
    most, rival = 0, ""
    for place in places.values():
        own = next((arm for arm in place if (arm.choice, arm.prompt) == (persona.name, prompt) and arm.outcomes), None)
        if own is None:
            continue
        others = [(expected(arm.outcomes, arm.mean_reward)[0], arm.choice) for arm in place if arm.choice in declared]
        best, named = max(others, default=(expected(0, 0.0)[0], ""))
        outcomes += own.outcomes
        rewards += own.outcomes * own.mean_reward
        alternative += own.outcomes * best
        if own.outcomes > most:
            most, rival = own.outcomes, named
    mean, deviation = expected(outcomes, rewards / outcomes if outcomes else 0.0)
    return Standing(outcomes, mean, deviation, alternative / outcomes if outcomes else 0.5, rival)


def expected(outcomes: int, mean_reward: float) -> tuple[float, float]:
    """Expected reward and its standard deviation after so many outcomes of this mean."""
    mean = (outcomes * mean_reward + 1) / (outcomes + 2)
    return mean, math.sqrt(mean * (1 - mean) / (outcomes + 3))


def verdict(standing: Standing, policy: TrialPolicy) -> Verdict:
    """Apply the policy."""
    low, high = standing.bounds(policy.deviations)
    than = f"{standing.rival or 'an untried choice'} {standing.alternative:.2f}"
    figures = f"{standing.mean:.2f} after {standing.outcomes}, bounds {low:.2f} to {high:.2f}, against {than}"
    if standing.outcomes < policy.least_outcomes:
        return Verdict("stay", f"{standing.outcomes} of {policy.least_outcomes} outcomes so far")
    if low > standing.alternative:
        return Verdict("adopt", f"better: {figures}")
    if high < standing.alternative:
        return Verdict("drop", f"worse: {figures}")
    if standing.outcomes >= policy.most_outcomes:
        return Verdict("drop", f"no better after all: {figures}")
    return Verdict("stay", f"undecided: {figures}")
