"""The one place that chooses what follows a failed attempt: the registry's table, applied to a step's history.

Pure: same table, same history, same action. Lost peers are counted by the step (`losses`) and never make an
attempt; everything else ends one attempt and may begin the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from protocol.messages.failure import Category
from services.kit.registry import Registry

#: Codes of PEER failures in which no worker died: they do not count towards poison.
BLAMELESS: Final = frozenset({"peer.draining", "call.cancelled", "breaker.open", "remote.unreachable"})

Kind = Literal["retry", "escalate", "rerun", "backoff", "fail"]


@dataclass(frozen=True, slots=True)
class Past:
    """One earlier attempt: who tried, and how it failed."""

    role: str
    category: Category


@dataclass(frozen=True, slots=True)
class Action:
    """What to do next, and the rule that says so, for people."""

    kind: Kind
    rule: str
    role: str
    delay_ms: int = 0
    constrained: bool = False


def decide(registry: Registry, past: Sequence[Past], *, losses: int, max_level: int) -> Action:
    """Choose the action after the newest failure.

    `past` holds every failed attempt of the step, oldest first, the newest last; `losses` the workers that died
    with it; `max_level` the task's bound on escalations. Escalation follows `escalates_to` and refuses a role
    that has tried already, so that two roles cannot hand a step back and forth.
    """
    newest = past[-1]
    rule = registry.failures.rules[newest.category]
    caps = registry.failures.caps
    name = newest.category.value
    if rule.action == "rerun":
        if losses >= caps.worker_deaths:
            return Action("fail", f"{name}: {losses} workers died with this step, it counts as poisoned", newest.role)
        delay = min(caps.backoff_max_ms, caps.peer_backoff_ms * 2 ** max(0, losses - 1))
        return Action("rerun", f"{name}: the same attempt on another worker", newest.role, delay_ms=delay)
    if rule.action == "fail":
        return Action("fail", f"{name}: never tried again", newest.role)
    if len(past) > caps.retries_per_step:
        return Action("fail", f"cap: {caps.retries_per_step} further attempts per step are used up", newest.role)
    if rule.action in ("retry", "backoff"):
        same = sum(1 for one in past if one.role == newest.role and one.category is newest.category)
        if same <= rule.same_role:
            text = f"{name}: further attempt {same} of {rule.same_role} in the same role"
            if rule.action == "backoff":
                delay = min(caps.backoff_max_ms, caps.resource_backoff_ms * 2 ** (same - 1))
                return Action("backoff", text, newest.role, delay_ms=delay)
            return Action("retry", text, newest.role, constrained=rule.constrained)
        if rule.then == "fail":
            return Action("fail", f"{name}: {rule.same_role} further attempts are used up", newest.role)
    return _escalate(registry, past, max_level)


def _escalate(registry: Registry, past: Sequence[Past], max_level: int) -> Action:
    newest = past[-1]
    name = newest.category.value
    level = len({one.role for one in past}) - 1
    above = registry.roles[newest.role].escalates_to
    if above is None:
        return Action("fail", f"{name}: no role above {newest.role}", newest.role)
    if level >= max_level:
        return Action("fail", f"{name}: escalation.max_level {max_level} is reached", newest.role)
    if any(one.role == above for one in past):
        return Action("fail", f"{name}: {above} has tried this step already", newest.role)
    return Action("escalate", f"{name}: from {newest.role} to {above}", above)
