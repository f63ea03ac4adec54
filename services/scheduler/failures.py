"""The one place that chooses what follows a failure: the registry's table, applied to what was tried before.

Every path asks `decide`: the inference and the gates of a step, the gates of a task, its plan, what memory is told,
the prompts of a batch. They differ in what can be done at all (`SCOPES`), never in what should be. Two kinds of answers
come out: the same work again (`rerun`, `backoff`: nothing was said about the answer, so neither is an attempt), or an
end of the attempt (`retry`, `escalate`, `replan`, `fail`).

Pure: same table, same history, same action. Leaves to others: carrying it out (`engine.py`, `batches.py`), what the
next attempt is told (`feedback.py`), whether a model is served at all (`circuits.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, get_args

import msgspec
from msgspec.structs import replace

from protocol.messages.failure import Category, Failure
from services.kit.registry import FailureRule, Registry
from services.kit.registry.rules import NEVER_QUALITY

#: Codes of failures that say nothing against the worker: they count neither towards poison nor for a circuit. What a
#: server elsewhere does is judged once, by the breaker of its service, which tells 429 (well, and we are too many) from
#: an outage, and says DEGRADED while the server is left alone.
BLAMELESS: Final = frozenset(
    {
        *("peer.draining", "call.cancelled", "model.degraded"),
        *("breaker.open", "remote.unreachable", "remote.no_room", "remote.rejected", "remote.no_key"),
    }
)

Kind = Literal["retry", "escalate", "rerun", "backoff", "replan", "fail"]
Arm = Literal["plain", "harder", "escalated"]
ARMS: Final = frozenset(get_args(Arm))
"""Which of the ways out of a failure an attempt is, where they can be compared: the last attempt in the same role as
usual, the same with a larger budget, or the first one of the role above."""


class Work(StrEnum):
    """What failed."""

    INFERENCE = "inference"
    GATES = "gates"
    CHECKS = "checks"
    """The gates of a task's final artefacts."""
    RESULT = "result"
    """A result with which the plan cannot go on: no list where a step is mapped over one, or a worker's word for it."""
    PLAN = "plan"
    REPLAN = "replan"
    """The planner's work on a new version of the plan."""
    MEMORY = "memory"
    BATCH = "batch"
    """One prompt of a batch."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What can be done about a failure of some work."""

    again: bool
    """A further attempt can be made, which is told what was wrong."""
    climbs: bool
    """A stronger role can take over."""
    patient: bool = False
    """Nobody waits for it: pauses go on until it works."""
    replans: bool = False
    """The rest of the plan can be made anew instead of failing."""


SCOPES: Final[Mapping[Work, Scope]] = {
    Work.INFERENCE: Scope(again=True, climbs=True, replans=True),
    Work.GATES: Scope(again=True, climbs=True, replans=True),
    Work.CHECKS: Scope(again=False, climbs=False, replans=True),  # the steps are done: what they made stays what it is
    Work.RESULT: Scope(again=False, climbs=False, replans=True),  # whoever did it again would find the same
    Work.PLAN: Scope(again=True, climbs=False),
    Work.REPLAN: Scope(again=True, climbs=False),
    Work.MEMORY: Scope(again=False, climbs=False, patient=True),
    Work.BATCH: Scope(again=False, climbs=False),  # a prompt that has failed for good is an answer of its own
}


@dataclass(frozen=True, slots=True)
class Past:
    """One earlier attempt: who tried, and how it failed."""

    role: str
    category: Category


@dataclass(frozen=True, slots=True)
class History:
    """What was before the newest failure."""

    past: Sequence[Past] = ()
    """Failed attempts, oldest first, the newest failure not among them."""
    repeats: int = 0
    """How often this very work of this attempt was run again for this category already."""
    losses: int = 0
    """Workers that have died with it, the newest included."""
    max_level: int = 0
    """The task's bound on escalations."""
    replans_left: int = 0
    """New versions of the plan that the task may still have."""
    harder_pays: bool = False
    """A larger budget is worth trying before the role above, as far as is known."""


class Action(msgspec.Struct, frozen=True):
    """What to do next, and the rule that says so, for people: it begins with file and line."""

    kind: Kind
    rule: str
    role: str
    delay_ms: int = 0
    constrained: bool = False
    arm: Arm | None = None
    blame: bool = False
    """A worker died with the work, or may have."""

    @property
    def repeats(self) -> bool:
        """True if the same work is done again, as part of the same attempt."""
        return self.kind in ("rerun", "backoff")


def is_backends_fault(failure: Failure) -> bool:
    """True for a failure of whoever did the work, of which the work itself knows nothing: a circuit counts it."""
    return failure.category in NEVER_QUALITY and failure.code not in BLAMELESS


def teaches(registry: Registry, failure: Failure) -> bool:
    """True if learning counts this failure against whoever and whatever was chosen."""
    return registry.failures.rules[failure.category].quality_signal


def kills(registry: Registry, failure: Failure) -> bool:
    """True if a worker died with the work, or may have: counted towards `caps.worker_deaths`."""
    return registry.failures.rules[failure.category].action == "rerun" and failure.code not in BLAMELESS


def react(registry: Registry, work: Work, failure: Failure, role: str, history: History) -> Action:
    """What follows this failure of `work`, done by `role`: `decide`, and whether a worker is to blame."""
    return replace(decide(registry, work, failure.category, role, history), blame=kills(registry, failure))


def decide(registry: Registry, work: Work, category: Category, role: str, history: History) -> Action:
    """Choose what follows a failure of `work` in this category, done by `role`.

    Where the category allows it, what would be the end of the step is a reason to plan the rest anew, as often as the
    task may. Escalation follows `escalates_to` and refuses a role that has tried already, so that two roles cannot hand
    a step back and forth. Nothing that the table calls `rerun` or `backoff` uses up an attempt.
    """
    action, rule = _decide(registry, work, category, role, history), registry.failures.rules[category]
    if action.kind == "fail" and rule.replan and SCOPES[work].replans and history.replans_left > 0:
        return Action("replan", f"{action.rule}; so the rest is planned anew, {history.replans_left} left", role)
    return action


def _decide(registry: Registry, work: Work, category: Category, role: str, history: History) -> Action:
    table, scope = registry.failures, SCOPES[work]
    rule, caps = table.rules[category], table.caps
    at = f"{table.source(category)} {category.value}"
    match rule.action:
        case "rerun":
            if history.losses >= caps.worker_deaths:
                cap = f"{table.source('worker_deaths')} caps.worker_deaths"
                return Action("fail", f"{cap}: {history.losses} workers died with it, it counts as poisoned", role)
            delay_ms = _pause(caps.peer_backoff_ms, history.repeats, caps.backoff_max_ms)
            return Action("rerun", f"{at}: the same again, on another worker or after a restart", role, delay_ms)
        case "backoff":
            if history.repeats < rule.same_role or scope.patient:
                delay_ms = _pause(caps.resource_backoff_ms, history.repeats, caps.backoff_max_ms)
                often = "until it works" if scope.patient else f"of {rule.same_role}"
                return Action(
                    "backoff", f"{at}: the same again after a pause, {history.repeats + 1} {often}", role, delay_ms
                )
            if rule.then == "fail":
                return Action("fail", f"{at}: {rule.same_role} pauses did not help", role)
        case "fail":
            return Action("fail", f"{at}: never tried again", role)
    if not scope.again:
        return Action("fail", f"{at}: there is no further attempt for {work.value}", role)
    if len(history.past) >= caps.retries_per_step:
        cap = f"{table.source('retries_per_step')} caps.retries_per_step"
        return Action("fail", f"{cap}: {caps.retries_per_step} further attempts are used up", role)
    above = _escalate(registry, scope, at, role, history)
    if rule.action != "retry":
        return above
    same = 1 + sum(1 for one in history.past if one.role == role and one.category is category)
    if same > rule.same_role:
        return above if rule.then == "escalate" else Action("fail", f"{at}: {rule.same_role} retries are used up", role)
    arm = _arm(rule, same, above, history)
    text = f"{at}: retry {same} of {rule.same_role} in the same role" + (", harder" if arm == "harder" else "")
    return Action("retry", text, role, constrained=rule.constrained, arm=arm)


def _arm(rule: FailureRule, same: int, above: Action, history: History) -> Arm | None:
    """Only the last attempt before an escalation can be compared with one: plain, or harder where that pays."""
    if same < rule.same_role or rule.then != "escalate" or above.kind != "escalate":
        return None
    return "harder" if history.harder_pays else "plain"


def _escalate(registry: Registry, scope: Scope, at: str, role: str, history: History) -> Action:
    tried = [one.role for one in history.past] + [role]
    above = registry.roles[role].escalates_to if scope.climbs else None
    if not scope.climbs:
        return Action("fail", f"{at}: nobody stronger can take it over", role)
    if above is None:
        return Action("fail", f"{at}: no role above {role}", role)
    if len(set(tried)) > history.max_level:
        return Action("fail", f"{at}: escalation.max_level {history.max_level} is reached", role)
    if above in tried:
        return Action("fail", f"{at}: {above} has tried this step already", role)
    return Action("escalate", f"{at}: from {role} to {above}", above, arm="escalated")


def _pause(first_ms: int, repeats: int, longest_ms: int) -> int:
    return min(longest_ms, first_ms << min(repeats, 32))
