"""Writes down what was chosen for the steps of a plan, as decisions that are scored later.

The same choice out of the same options, with the same in view, is one decision for all its steps: a plan of a thousand
like steps would else be mostly the same words a thousand times, in the planner's answer, in the journal and in the
result. What is chosen is `choose`'s business.

Ids are derived from task, step, subject and choice. Same choice, same id: a plan that is made again after a crash
records nothing twice. Another choice (the model answers differently the second time), another id: the outcome of the
plan that ran is never booked on a choice that did not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from protocol.messages.memory import Advised
from protocol.messages.plan import RoutingDecision
from services.kit.identity import work_key

MAX_DECISIONS: Final = 2_000
"""Of a larger plan the first ones are recorded, counted by step: what they teach repeats itself, and messages stay
bounded."""
_MAX_RULE_CHARS: Final = 1_000


@dataclass(slots=True)
class Ledger:
    """The choices about one plan, in the order of its steps; `task_id` and `task_type` are its task's."""

    task_id: str
    task_type: str
    _taken: dict[tuple[object, ...], RoutingDecision] = field(default_factory=dict)
    _count: int = 0
    _told: dict[str, str] = field(default_factory=dict)
    """Question that memory was asked -> the step beside which its advice is written down."""

    @property
    def full(self) -> bool:
        """Whether the two choices about another step are no longer written down."""
        return self._count + 2 > MAX_DECISIONS

    def take(
        self,
        subject: Literal["role", "persona", "decomposition"],
        choice: str,
        step: str | None,
        *,
        rule: str,
        cluster: str,
        features: Mapping[str, float],
        advice: Advised | None,
        options: Callable[[], Sequence[str]],
    ) -> None:
        """A choice about this step, or about the whole task where there is none.

        `rule` is the reason where memory did not advise; `options` gives what there was, the choice among them.
        """
        self._count += 1
        asked = None if advice is None else advice.key
        key = (subject, choice, cluster, asked, rule if advice is None else "", *features.values())
        about, ident = step or "", work_key("decision", self.task_id, step, subject, choice)
        decision = self._taken.get(key)
        if decision is None:
            decision = self._taken[key] = RoutingDecision(
                ids={about: ident},
                subject=subject,
                choice=choice,
                alternatives=[one for one in options() if one != choice],
                propensity=1.0 if advice is None else advice.propensity,
                rule=(rule if advice is None else self._why(advice))[:_MAX_RULE_CHARS],
                task_type=self.task_type,
                features=dict(features),
                cluster=cluster,
                advice=None if asked in self._told else advice,
            )
            if asked is not None:
                self._told.setdefault(asked, step or "the task")
        decision.ids[about] = ident

    @property
    def decisions(self) -> tuple[RoutingDecision, ...]:
        """All that was taken."""
        return tuple(self._taken.values())

    def _why(self, advice: Advised) -> str:
        """Why, in words; that the reason is another step's where that has given it already."""
        return f"as {self._told[advice.key]}" if advice.key in self._told else advice.why
