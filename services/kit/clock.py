"""Time as an object, so that machines never read one and tests can move it.

Real time is unix milliseconds that never go back: the wall clock read once, then advanced by the monotonic one.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Anything that can tell the time in unix milliseconds."""

    def now_ms(self) -> int:
        """Unix time in milliseconds; never less than the last answer."""
        ...


class SteadyClock:
    """The real one. A step of the system's clock does not disturb timeouts of a running process."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ms(self) -> int:
        """See Clock."""
        return (self._offset_ns + time.monotonic_ns()) // 1_000_000


class VirtualClock:
    """A clock that moves only when told to, for tests and simulation."""

    def __init__(self, start_ms: int = 0) -> None:
        self._now_ms = start_ms

    def now_ms(self) -> int:
        """See Clock."""
        return self._now_ms

    def advance_ms(self, by_ms: int) -> int:
        """Move forward and return the new time; raises ValueError for a step back."""
        if by_ms < 0:
            raise ValueError(f"time does not go back: {by_ms} ms")
        self._now_ms += by_ms
        return self._now_ms
