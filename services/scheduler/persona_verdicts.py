"""Whether a persona on trial has earned its place: its outcomes against what the registry has for the same work. Pure.

A trial is compared where it was tried: in each kind of work (task type and cluster) the best declared choice, `none`
among them, weighed by the trial's outcomes there. Both are expectations from a uniform prior (`kit/expectation.py`).
The best of several noisy means is more likely too high than too low, so the comparison errs against the trial.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from protocol.messages.memory import ArmValue
from protocol.messages.persona import Persona
from services.kit.expectation import Expectation, expected
from services.kit.registry import TrialPolicy
from services.kit.registry.versions import prompt_digest


@dataclass(frozen=True, slots=True)
class Standing:
    """How a persona does against the alternative."""

    own: Expectation
    alternative: float
    """Expected reward of the best declared choice in the same kinds of work."""
    rival: str
    """Which one that is where the trial was tried most; empty where nothing else has an outcome."""


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
        others = [(expected(arm.outcomes, arm.outcomes * arm.mean_reward).mean, arm.choice) for arm in place]
        best, named = max((one for one in others if one[1] in declared), default=(expected(0, 0).mean, ""))
        outcomes += own.outcomes
        rewards += own.outcomes * own.mean_reward
        alternative += own.outcomes * best
        if own.outcomes > most:
            most, rival = own.outcomes, named
    return Standing(expected(outcomes, rewards), alternative / outcomes if outcomes else expected(0, 0).mean, rival)


def verdict(standing: Standing, policy: TrialPolicy) -> Verdict:
    """Apply the policy."""
    own = standing.own
    low, high = own.bounds(policy.deviations)
    than = f"{standing.rival or 'a choice nobody has tried'} {standing.alternative:.2f}"
    figures = f"{own.mean:.2f} after {own.outcomes} outcomes, {low:.2f} to {high:.2f}, against {than}"
    if own.outcomes < policy.least_outcomes:
        return Verdict("stay", f"{own.outcomes} of {policy.least_outcomes} outcomes so far")
    if low > standing.alternative:
        return Verdict("adopt", f"better: {figures}")
    if high < standing.alternative:
        return Verdict("drop", f"worse: {figures}")
    if own.outcomes >= policy.most_outcomes:
        return Verdict("drop", f"no better after all: {figures}")
    return Verdict("stay", f"undecided: {figures}")
