"""A circuit breaker as a pure machine: events with their time in, commands out.

It decides when a backend that keeps failing is left alone, when one probe may ask whether it is back, and what people
are told meanwhile. It needs no second backend: work that is not admitted fails at once and says when the probe comes.
It asks nothing and reads no clock: whoever owns the connection reports what happened and carries out `Probe`.

HALF_OPEN (the first probe, at the start) -> CLOSED -> OPEN -> HALF_OPEN -> CLOSED. Invariants: work is admitted in
CLOSED only, at most one probe is out at a time, and from OPEN a probe follows within `pause_max_ms`. A backend that
answered its probe is on probation: if it then fails real work, the circuit opens at once, for twice as long.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

PROBE_LIMIT_MS: Final = 30_000
"""A probe without an answer for so long has failed, whatever holds it up."""


class BreakerState(StrEnum):
    """Whether work is let through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to open, and how long to stay so."""

    failures: int
    """So many failures within `window_ms` open the circuit."""
    window_ms: int
    pause_ms: int
    """From the opening to the probe; doubles with every opening that follows without a success in between."""
    pause_max_ms: int


@dataclass(frozen=True, slots=True)
class Started:
    """The owner wants to know whether the backend is there."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The backend did what was asked of it, or gave a proper answer to a request that was wrong."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The backend did not answer, or not properly. `at_once`: a further try cannot do better (a refused key)."""

    at_ms: int
    reason: str
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class ProbeEnded:
    """The probe of this number has its answer; `reason` None = the backend is well."""

    at_ms: int
    number: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""

    at_ms: int


Event = Started | Succeeded | Failed | ProbeEnded | Ticked


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the backend whether it is well; answer with ProbeEnded of this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Report:
    """Say so: `reason` is for people, None while work is admitted."""

    state: BreakerState
    reason: str | None


Command = Probe | Report


@dataclass(slots=True)
class Breaker:
    """State of one circuit. `handle` is the only door."""

    policy: BreakerPolicy
    state: BreakerState = BreakerState.HALF_OPEN
    opened: int = 0
    """Openings so far, for figures."""
    probes: int = 0
    """Number of the newest probe, from 1."""
    trips: int = 0
    """Openings in a row without a success of real work in between."""
    probe_at_ms: int = 0
    """When the next probe is due; while one is out, when it was sent."""
    _failures: deque[int] = field(default_factory=deque)
    """Times of failures within the window, oldest first; never more than open the circuit."""

    @property
    def admits(self) -> bool:
        """True if work may be sent."""
        return self.state is BreakerState.CLOSED

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what to do, in order."""
        match event:
            case Started(at_ms):
                return self._probe(at_ms) if self.probes == 0 else []
            case Succeeded():
                self._on_succeeded()
                return []
            case Failed():
                return self._on_failed(event)
            case ProbeEnded():
                return self._on_probe_ended(event)
            case Ticked(at_ms):
                return self._on_ticked(at_ms)

    def _on_succeeded(self) -> None:
        if self.state is BreakerState.CLOSED:  # else late news of a call from before the opening
            self.trips = 0
            self._failures.clear()

    def _on_failed(self, event: Failed) -> list[Command]:
        if self.state is not BreakerState.CLOSED:
            return []
        self._failures.append(event.at_ms)
        while self._failures[0] <= event.at_ms - self.policy.window_ms:
            self._failures.popleft()
        if event.at_once:
            return self._open(event.at_ms, event.reason)
        if self.trips:
            return self._open(event.at_ms, f"it answered the probe and failed again: {event.reason}")
        if len(self._failures) < self.policy.failures:
            return []
        within_s = self.policy.window_ms / 1000
        return self._open(
            event.at_ms, f"{len(self._failures)} failures within {within_s:g} s, the last: {event.reason}"
        )

    def _on_probe_ended(self, event: ProbeEnded) -> list[Command]:
        if self.state is not BreakerState.HALF_OPEN or event.number != self.probes:
            return []
        if event.reason is not None:
            return self._open(event.at_ms, event.reason)
        self.state = BreakerState.CLOSED
        self._failures.clear()
        return [Report(BreakerState.CLOSED, None)]

    def _on_ticked(self, at_ms: int) -> list[Command]:
        if self.state is BreakerState.OPEN and at_ms >= self.probe_at_ms:
            return self._probe(at_ms)
        if self.state is BreakerState.HALF_OPEN and self.probes and at_ms - self.probe_at_ms >= PROBE_LIMIT_MS:
            return self._open(at_ms, f"the probe had no answer within {PROBE_LIMIT_MS / 1000:g} s")
        return []

    def _probe(self, at_ms: int) -> list[Command]:
        self.state = BreakerState.HALF_OPEN
        self.probe_at_ms = at_ms
        self.probes += 1
        return [Probe(self.probes)]

    def _open(self, at_ms: int, why: str) -> list[Command]:
        pause_ms = min(self.policy.pause_max_ms, self.policy.pause_ms * 2 ** min(self.trips, 30))
        self.state = BreakerState.OPEN
        self.opened += 1
        self.trips += 1
        self.probe_at_ms = at_ms + pause_ms
        self._failures.clear()
        return [Report(BreakerState.OPEN, f"circuit open: {why}; next probe in {pause_ms / 1000:g} s")]
