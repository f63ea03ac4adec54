"""One model and its place in memory: what it takes, how long it stays, what is wanted of it now.

Figures only: which places are filled and which make way is `residency`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from services.kit.registry.launch import Launch
from services.kit.registry.memory import expected_load_s, file_bytes

RESIDENCE_LOADS: Final = 2
"""A model that is loaded stays for at least so many times as long as loading it took, within the next two bounds."""
MIN_RESIDENCE_MS: Final = 2_000
MAX_RESIDENCE_MS: Final = 60_000
TURN_LOADS: Final = 6
"""A busy model makes way after so many times as long as loading took, and MIN_TURN_MS at least."""
MIN_TURN_MS: Final = 10_000
IDLE_UNLOAD_S: Final = 300.0


class State(StrEnum):
    """Where a model is, in the hub's eyes."""

    ABSENT = "absent"
    PARKED = "parked"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    DEGRADED = "degraded"


@dataclass(frozen=True, slots=True)
class Demand:
    """What is wanted of one model now."""

    running: bool = False
    waiting: bool = False
    soon_ms: int | None = None
    """In how many ms the inputs of a step that needs it are expected; None = no such step is in sight."""


NONE: Final = Demand()


@dataclass(slots=True)
class Place:
    """One model and its place in memory."""

    model: str
    residency: Literal["hot", "warm", "cold"] = "hot"
    pinned: bool = False
    idle_ms: int = 0
    launch: Launch | None = None
    """What its process is started from, as it was declared last."""
    outdated: bool = False
    """Its process was started from an earlier entry: what that one holds is booked and says nothing of this one."""
    estimate_bytes: int = 0
    told_bytes: int = 0
    """What its service says it will take, which knows its files; 0 = it has not said."""
    floor_bytes: int = 0
    """Least that is booked while it is loaded: what is declared, else its file, which is mapped and not all in yet."""
    load_ms: int = 0
    """How long loading takes: an estimate until it was seen."""
    state: State = State.ABSENT
    since_ms: int = 0
    """When the state began."""
    resident: bool = False
    """It has been in memory since `loaded_ms`. A service that changes the mode of its engine, or holds calls back for
    that, says that it is loading: nobody ordered it, and it ends no residence."""
    loaded_ms: int = 0
    measured_bytes: int = 0
    """Highest measurement of this residence, or of the last one."""
    fresh: bool = False
    """Nothing was measured in this residence yet."""
    used_ms: int | None = None
    wait_ms: int | None = None
    """Since when it is waited for without being loaded."""
    asked_ms: int | None = None
    """Since when somebody asks for it by name."""
    asked_away: bool = False
    """Somebody wants it out of memory, at the next decision."""
    closing: bool = False
    """It gets no new work: another model waits for its room, or there is not room enough for all that are loaded."""
    wish: bool | None = None
    """What its service was told last; None = nothing yet, its own word counts."""
    order: int = 0
    """Number of that word."""
    loads: int = 0
    pause_ms: int = 0
    """No order before this time."""
    alone_pause_ms: int = 0
    """Nobody makes way for it before this time, if it is too large."""
    kept_until_ms: int | None = None
    """Its process is gone; until then its memory stays booked."""

    def declare(self, launch: Launch, need_bytes: int) -> None:
        """Take over its entry as it is now; what was learned of the one that it had is forgotten if they differ."""
        entry = launch.entry
        if self.launch is None or not self.launch.same_as(launch):
            self.outdated = self.launch is not None and self.state not in (State.ABSENT, State.PARKED)
            self.measured_bytes, self.told_bytes, self.fresh = 0, 0, False
            self.load_ms = int(1000 * expected_load_s(entry))
        self.launch = launch
        self.residency, self.pinned = entry.residency, entry.pinned
        self.idle_ms = int((entry.idle_unload_s or IDLE_UNLOAD_S) * 1000)
        self.estimate_bytes = need_bytes
        self.floor_bytes = entry.memory_bytes or file_bytes(entry) or 0

    @property
    def residence_ms(self) -> int:
        """How long it stays at least."""
        return min(MAX_RESIDENCE_MS, max(MIN_RESIDENCE_MS, RESIDENCE_LOADS * self.load_ms))

    @property
    def turn_ms(self) -> int:
        """How long it may work while another one waits."""
        return max(MIN_TURN_MS, TURN_LOADS * self.load_ms)

    @property
    def need_bytes(self) -> int:
        """Memory it takes, as far as is known."""
        if self.measured_bytes:
            return max(self.measured_bytes, self.floor_bytes)
        return self.told_bytes or self.estimate_bytes

    @property
    def closed(self) -> bool:
        """True if it must not be given work whatever its service says of itself."""
        return self.closing or self.state is State.UNLOADING


def waiting_longest(place: Place) -> tuple[int, str]:
    """Order in which those that are waited for load."""
    return place.wait_ms or 0, place.model


def worth(place: Place, demand: Mapping[str, Demand]) -> tuple[bool, bool, float, int, str]:
    """Order among models that could go, least valuable first: not working, not waited for, needed late or never, used
    long ago."""
    wanted = demand.get(place.model, NONE)
    soon_ms = float("inf") if wanted.soon_ms is None else wanted.soon_ms
    return place.state is State.LOADED, wanted.waiting, -soon_ms, place.used_ms or 0, place.model
