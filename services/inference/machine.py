"""The life of the engine child, pure: events with their time in, commands out.

It decides when to launch, when a child counts as loaded, hung or stuck, when to kill it, how long to wait before
the next one, and what the hub is told. It starts nothing, asks nothing and reads no clock: `app` does. Invariants:
at most one child at any time, and every state that is not as it should be comes with a reason for people.

IDLE -> LAUNCHING -> LOADING -> SERVING; a child that has to go is ENDING until its exit is seen, then WAITING for
the next launch, or PARKED where nobody wants the model in memory. When the service stops, `supervisor` ends the child
without asking here. Whether the model is wanted is the hub's decision, which also knows of running work.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.messages.session import PeerState

BACKOFF_MS: Final = (500, 1_000, 2_000, 5_000, 10_000, 30_000)
"""Pause before the next launch, by the number of failed ones in a row."""

STABLE_MS: Final = 60_000
"""A child that served this long has not failed at launch: the pauses begin anew."""

HUNG_MS: Final = 10_000
"""Without an answer to /health and without a token for so long, a loaded child is hung."""

STUCK_MS: Final = 5_000
"""More slots busy than calls of ours are running, for so long: a slot works for nobody."""


class Phase(StrEnum):
    """Where the child is."""

    IDLE = "idle"
    LAUNCHING = "launching"
    LOADING = "loading"
    SERVING = "serving"
    ENDING = "ending"
    WAITING = "waiting"
    PARKED = "parked"


@dataclass(frozen=True, slots=True)
class Started:
    """The service has begun; the engine is launched if the model is wanted."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """The model is wanted in memory from now on."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class ParkAsked:
    """The model is wanted out of memory; no call runs."""

    at_ms: int


@dataclass(frozen=True, slots=True)
class Launched:
    """The child of this launch is running."""

    at_ms: int
    launch: int


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """No child was started: the model file, the binary or the port is not usable. `reason` says what to do."""

    at_ms: int
    launch: int
    reason: str


@dataclass(frozen=True, slots=True)
class HealthOk:
    """The child answered that it is ready."""

    at_ms: int
    launch: int


@dataclass(frozen=True, slots=True)
class HealthFailed:
    """The child did not answer, or answered that it is not ready."""

    at_ms: int
    launch: int
    why: str | None = None
    """What it said instead, for people; None where it is merely not ready yet."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """A call received a piece of its answer: the child works, whatever its health check says."""

    at_ms: int
    launch: int


@dataclass(frozen=True, slots=True)
class SlotsSeen:
    """What /slots says, beside the number of calls of ours that may hold a slot."""

    at_ms: int
    launch: int
    busy: int
    calls: int


@dataclass(frozen=True, slots=True)
class SlotStuck:
    """A cancelled call has left a slot that stays busy."""

    at_ms: int
    launch: int


@dataclass(frozen=True, slots=True)
class HoldAsked:
    """No new calls, please: the child is to be replaced once the running ones are done. `reason` is for people."""

    at_ms: int
    launch: int
    reason: str


@dataclass(frozen=True, slots=True)
class HoldEnded:
    """The child may stay after all."""

    at_ms: int
    launch: int


@dataclass(frozen=True, slots=True)
class ChangeAsked:
    """No call runs, and the next child should run in another mode. `reason` is for people."""

    at_ms: int
    launch: int
    reason: str


@dataclass(frozen=True, slots=True)
class ChildExited:
    """The child of this launch is gone and reaped. `how` says so for people: signal, status, last line."""

    at_ms: int
    launch: int
    how: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""

    at_ms: int


Event = (
    Started
    | LoadAsked
    | ParkAsked
    | Launched
    | LaunchFailed
    | HealthOk
    | HealthFailed
    | Progressed
    | SlotsSeen
    | SlotStuck
    | HoldAsked
    | HoldEnded
    | ChangeAsked
    | ChildExited
    | Ticked
)


@dataclass(frozen=True, slots=True)
class Launch:
    """Check the model file, then start a child; answer with Launched or LaunchFailed of this number."""

    launch: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End the child of this launch with its group; ChildExited is still expected."""

    launch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unload:
    """End the child of this launch in good order: nobody wants the model now. ChildExited is still expected."""

    launch: int


@dataclass(frozen=True, slots=True)
class Report:
    """Tell the hub."""

    state: PeerState
    reason: str | None


Command = Launch | Kill | Unload | Report


@dataclass(slots=True)
class EngineLife:
    """State of the one child. `handle` is the only door; events of an older launch change nothing."""

    load_deadline_ms: int
    wanted: bool = True
    """Whether the model shall be in memory."""
    phase: Phase = Phase.IDLE
    launch: int = 0
    """Number of the newest launch, from 1."""
    failures: int = 0
    """Launches in a row that did not lead to a stable child."""
    respawns: int = 0
    """Launches because a child died, was killed or could not be started."""
    loads: int = 0
    """Times the model was loaded, whatever for."""
    load_ms: int = 0
    """From the newest child's start to its first good answer."""
    _since_ms: int = 0
    """When the present phase began."""
    _alive_ms: int = 0
    """Last sign of life of a serving child."""
    _stuck_since_ms: int | None = None
    _unwell: str | None = None
    """What the newest failed check of its health said, if anything."""
    _retry_ms: int = 0
    _why: str = ""
    changing: bool = False
    """The child is being replaced by one in another mode: nothing is wrong, calls may wait for it."""
    held: bool = False
    """New calls are held back for such a change."""

    @property
    def killed_for(self) -> str:
        """What the ending child did wrong; empty where nobody wants it any more, or another mode follows."""
        return self._why if self.phase is Phase.ENDING and not self.changing else ""

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what to do, in order."""
        match event:
            case Started(at_ms):
                return self._on_started(at_ms)
            case LoadAsked(at_ms):
                return self._on_load_asked(at_ms)
            case ParkAsked(at_ms):
                return self._on_park_asked(at_ms)
            case Ticked(at_ms):
                return self._on_ticked(at_ms)
        if event.launch != self.launch:
            return []
        match event:
            case Launched():
                return self._on_launched(event)
            case LaunchFailed(at_ms, _, reason):
                return self._gone(at_ms, reason) if self.phase is Phase.LAUNCHING else []
            case HealthOk():
                return self._on_health_ok(event)
            case HealthFailed():
                return self._on_health_failed(event)
            case Progressed(at_ms):
                self._alive_ms = max(self._alive_ms, at_ms)
                return []
            case SlotsSeen():
                return self._on_slots_seen(event)
            case SlotStuck(at_ms):
                return self._kill(at_ms, "a cancelled call left its slot busy") if self.phase is Phase.SERVING else []
            case HoldAsked(_, _, reason):
                return self._hold(reason) if self.phase is Phase.SERVING and not self.held else []
            case HoldEnded():
                return self._release() if self.phase is Phase.SERVING and self.held else []
            case ChangeAsked(at_ms, _, reason):
                return self._change(at_ms, reason) if self.phase is Phase.SERVING else []
            case ChildExited():
                return self._on_exited(event)

    def _on_started(self, at_ms: int) -> list[Command]:
        if self.phase is not Phase.IDLE:
            return []
        return self._launch(at_ms) if self.wanted else self._park(at_ms)

    def _on_load_asked(self, at_ms: int) -> list[Command]:
        """A child that is on its way out is seen off first; one that failed comes back at its own pace."""
        self.wanted = True
        if self.phase is not Phase.PARKED:
            return []
        return [*self._launch(at_ms), Report(PeerState.LOADING, None)]

    def _on_park_asked(self, at_ms: int) -> list[Command]:
        self.wanted = False
        match self.phase:
            case Phase.WAITING:
                return self._park(at_ms)
            case Phase.LOADING | Phase.SERVING:
                return self._unload(at_ms)
            case Phase.LAUNCHING:
                return [Report(PeerState.UNLOADING, None)]  # there is no child yet that could be ended
            case _:
                return []

    def _launch(self, at_ms: int) -> list[Command]:
        self._enter(Phase.LAUNCHING, at_ms)
        self.launch += 1
        return [Launch(self.launch)]

    def _on_launched(self, event: Launched) -> list[Command]:
        if self.phase is not Phase.LAUNCHING:
            return []
        self._enter(Phase.LOADING, event.at_ms)
        self._unwell = None
        return [Report(PeerState.LOADING, None)] if self.wanted else self._unload(event.at_ms)

    def _on_health_ok(self, event: HealthOk) -> list[Command]:
        if self.phase is Phase.SERVING:
            self._alive_ms = max(self._alive_ms, event.at_ms)
            return []
        if self.phase is not Phase.LOADING:
            return []
        self.loads += 1
        self.load_ms = event.at_ms - self._since_ms
        self._enter(Phase.SERVING, event.at_ms)
        self.changing = False
        self._alive_ms = event.at_ms
        self._stuck_since_ms = None
        return [Report(PeerState.READY, None)]

    def _on_health_failed(self, event: HealthFailed) -> list[Command]:
        at_ms, self._unwell = event.at_ms, event.why
        if self.phase is Phase.SERVING and at_ms - self._alive_ms > HUNG_MS:
            return self._kill(at_ms, f"no answer and no token for {(at_ms - self._alive_ms) / 1000:.0f} s")
        return []

    def _on_slots_seen(self, event: SlotsSeen) -> list[Command]:
        if self.phase is not Phase.SERVING or event.busy <= event.calls:
            self._stuck_since_ms = None
            return []
        if self._stuck_since_ms is None:
            self._stuck_since_ms = event.at_ms
        if event.at_ms - self._stuck_since_ms <= STUCK_MS:
            return []
        return self._kill(event.at_ms, f"{event.busy} slots are busy for {event.calls} calls")

    def _on_exited(self, event: ChildExited) -> list[Command]:
        match self.phase:
            case Phase.ENDING if self.changing and self.wanted:
                return self._launch(event.at_ms)
            case Phase.ENDING:
                return self._gone(event.at_ms, self._why)
            case Phase.SERVING:
                if event.at_ms - self._since_ms >= STABLE_MS:
                    self.failures = 0
                return self._gone(event.at_ms, f"the engine died: {event.how}")
            case Phase.LOADING:
                return self._gone(event.at_ms, f"the engine died while loading: {event.how}")
            case _:
                return []

    def _on_ticked(self, at_ms: int) -> list[Command]:
        if self.phase is Phase.WAITING and at_ms >= self._retry_ms:
            self.respawns += 1
            return self._launch(at_ms)
        if self.phase is Phase.LOADING and at_ms - self._since_ms > self.load_deadline_ms:
            cure = self._unwell or "raise load_deadline_s in models.yaml or take a smaller model"
            return self._kill(at_ms, f"the model was not loaded within {self.load_deadline_ms / 1000:g} s: {cure}")
        return []

    def _hold(self, reason: str) -> list[Command]:
        self.held = True
        return [Report(PeerState.LOADING, reason)]

    def _release(self) -> list[Command]:
        self.held = False
        return [Report(PeerState.READY, None)]

    def _change(self, at_ms: int, reason: str) -> list[Command]:
        self._enter(Phase.ENDING, at_ms)
        self.changing = True
        return [Report(PeerState.LOADING, reason), Kill(self.launch, reason)]

    def _kill(self, at_ms: int, reason: str) -> list[Command]:
        self._why = f"the engine was killed: {reason}"
        self.changing = False
        self._enter(Phase.ENDING, at_ms)
        return [Kill(self.launch, reason), Report(PeerState.DEGRADED, self._why)]

    def _unload(self, at_ms: int) -> list[Command]:
        if self.phase is Phase.SERVING:
            self.failures = 0  # it served until somebody else needed the room
        self._why = ""
        self.changing = False
        self._enter(Phase.ENDING, at_ms)
        return [Unload(self.launch), Report(PeerState.UNLOADING, None)]

    def _gone(self, at_ms: int, reason: str) -> list[Command]:
        """There is no child now. `reason` is empty if it was unloaded in good order."""
        if not self.wanted:
            return self._park(at_ms)
        if not reason:
            return [*self._launch(at_ms), Report(PeerState.LOADING, None)]
        return self._wait(at_ms, reason)

    def _park(self, at_ms: int) -> list[Command]:
        self.changing = False
        self._enter(Phase.PARKED, at_ms)
        return [Report(PeerState.PARKED, None)]

    def _wait(self, at_ms: int, reason: str) -> list[Command]:
        self._enter(Phase.WAITING, at_ms)
        self.changing = False
        pause_ms = BACKOFF_MS[min(self.failures, len(BACKOFF_MS) - 1)]
        self.failures += 1
        self._retry_ms = at_ms + pause_ms
        return [Report(PeerState.DEGRADED, f"{reason}; next try in {pause_ms / 1000:g} s")]

    def _enter(self, phase: Phase, at_ms: int) -> None:
        self.phase = phase
        self.held = False
        self._since_ms = at_ms
