"""The mode of the engine, between the policy of `speculation` and the child of `supervisor`: tells the one what happens
and the other what to ask of its machine. Holds the clock; decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.messages.infer import InferFinal
from services.inference import machine as m
from services.inference.command_line import Mode
from services.inference.speculation import Answered, SpeculationPolicy
from services.kit.clock import Clock


@dataclass(slots=True, eq=False)
class Running:
    """One call while it has a slot."""

    mode: Mode
    alone: bool


class EngineModes:
    """Which mode the next child gets, and when there has to be a next one; `modes` are what the entry allows."""

    def __init__(self, modes: Sequence[Mode], clock: Clock, feed: Callable[[m.Event], None]) -> None:
        self._clock = clock
        self._feed = feed
        self._policy = SpeculationPolicy(modes)
        self._next = self._policy.mode
        self._launch_began_ms: int | None = None
        """None once the child of that launch has served."""
        self._running: set[Running] = set()
        self._totals = Counter({"draft_tokens_total": 0, "accepted_tokens_total": 0, "mode_changes": 0})

    def launching(self) -> Mode:
        """A child is about to be started; returns its mode."""
        self._launch_began_ms = now_ms = self._clock.now_ms()
        self._next = self._policy.choose(now_ms).mode
        return self._next

    def serving(self) -> None:
        """The child is ready: for the first time, or again after calls were held back in vain."""
        if self._launch_began_ms is None:
            return
        now_ms = self._clock.now_ms()
        self._policy.launched(now_ms, self._next, now_ms - self._launch_began_ms)
        self._launch_began_ms = None

    def failed(self, reason: str) -> None:
        """It has died by itself, or was killed for what it did. Not what keeps a child from being started, such as a
        missing file or a taken port: it does so in any mode."""
        self._policy.failed(self._clock.now_ms(), self._next, reason)

    def began(self) -> Running:
        """A call has a slot from now on."""
        call = Running(self._policy.mode, alone=not self._running)
        for other in self._running:
            other.alone = False
        self._running.add(call)
        self._policy.load(self._clock.now_ms(), len(self._running))
        return call

    def ended(self, call: Running, final: InferFinal | None) -> None:
        """It has none any more; `final` is its answer, None where it came to nothing."""
        self._running.remove(call)
        self._policy.load(self._clock.now_ms(), len(self._running))
        if final is None:
            return
        self._totals["draft_tokens_total"] += final.draft_tokens
        self._totals["accepted_tokens_total"] += final.accepted_tokens
        self._policy.answered(
            Answered(
                mode=call.mode,
                alone=call.alone,
                generated_tokens=final.generated_tokens,
                generate_ms=final.generate_ms,
                draft_tokens=final.draft_tokens,
                accepted_tokens=final.accepted_tokens,
            )
        )

    def tick(self, life: m.EngineLife) -> None:
        """Ask the machine for a change, or for holding new calls back, where the policy wants it."""
        if not self._policy.may_change or life.phase is not m.Phase.SERVING:
            return
        now_ms = self._clock.now_ms()
        if (choice := self._policy.change(now_ms)) is not None:
            self._totals["mode_changes"] += 1
            self._feed(m.ChangeAsked(now_ms, life.launch, f"changing to {choice.mode}: {choice.reason}"))
        elif (choice := self._policy.hold(now_ms)) is not None:
            self._feed(m.HoldAsked(now_ms, life.launch, f"about to change to {choice.mode}: {choice.reason}"))
        else:
            self._feed(m.HoldEnded(now_ms, life.launch))

    def figures(self) -> dict[str, Any]:
        """For the pong."""
        return {**self._policy.figures(self._clock.now_ms()), **self._totals}
