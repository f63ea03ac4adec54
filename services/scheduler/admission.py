"""How much may wait at the hub, for whom, and when whoever was refused should come again. Pure bookkeeping.

Calls of other peers are bounded three ways: per capability, per requester (so that one of them cannot fill a queue
alone) and in bytes (a few large bodies weigh as much as many small ones). The hub's own steps are bounded by its tasks.
What is measured is only how fast work leaves; whether a call may run is the broker's business.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

MAX_CALLS_PER_PEER: Final = 1_000
"""Calls of one peer that have not ended."""
MAX_BYTES_PER_PEER: Final = 64 * 1024 * 1024
"""Bodies of one peer's calls that have not ended, together."""
MAX_BYTES: Final = 512 * 1024 * 1024
"""The same of all peers."""
_KEPT_ENDS: Final = 32
_KEPT_TARGETS: Final = 256
_UNMEASURED_MS: Final = 1_000
_SHORTEST_MS: Final = 100
_LONGEST_MS: Final = 30_000


@dataclass(slots=True)
class DrainRate:
    """How fast places become free, from the newest ends."""

    _ends_ms: deque[int] = field(default_factory=lambda: deque(maxlen=_KEPT_ENDS))

    def ended(self, at_ms: int) -> None:
        """A place has become free."""
        self._ends_ms.append(at_ms)

    def retry_after_ms(self, at_ms: int, ahead: int = 1) -> int:
        """When `ahead` places should have become free: their number times the mean time between the newest ends.

        A pause since the last end counts as well, so that a stalled queue is not knocked at for ever faster.
        """
        if len(self._ends_ms) < 2:
            return _UNMEASURED_MS
        mean = (self._ends_ms[-1] - self._ends_ms[0]) / (len(self._ends_ms) - 1)
        pause = max(mean, at_ms - self._ends_ms[-1])
        return int(max(_SHORTEST_MS, min(_LONGEST_MS, pause * ahead)))


_UNMEASURED: Final = DrainRate()


@dataclass(slots=True)
class Admission:
    """What every requester has at the hub."""

    _calls: Counter[bytes] = field(default_factory=Counter)
    _bytes: Counter[bytes] = field(default_factory=Counter)
    _all_bytes: int = 0
    _drains: dict[str, DrainRate] = field(default_factory=dict)
    """Capability -> how fast its calls end, for the newest `_KEPT_TARGETS` of them."""

    def drained(self, target: str, at_ms: int) -> None:
        """A worker has ended a call for this capability."""
        rate = self._drains.pop(target, None) or DrainRate()
        self._drains[target] = rate
        rate.ended(at_ms)
        if len(self._drains) > _KEPT_TARGETS:
            del self._drains[next(iter(self._drains))]

    def retry_after_ms(self, target: str, at_ms: int) -> int:
        """When one more call for this capability should find a place, from what was measured."""
        return self._drains.get(target, _UNMEASURED).retry_after_ms(at_ms)

    def objection(self, requester: bytes, size_bytes: int) -> str | None:
        """Why no further call of this size may be taken from this peer; None if it may."""
        if self._calls[requester] >= MAX_CALLS_PER_PEER:
            return f"{MAX_CALLS_PER_PEER} of your calls have not ended"
        if self._bytes[requester] + size_bytes > MAX_BYTES_PER_PEER:
            return f"your calls that have not ended hold {self._bytes[requester]:,} bytes of {MAX_BYTES_PER_PEER:,}"
        if self._all_bytes + size_bytes > MAX_BYTES:
            return f"the calls of all peers hold {self._all_bytes:,} bytes of {MAX_BYTES:,}"
        return None

    def took(self, requester: bytes, size_bytes: int) -> None:
        """A call of this peer is in."""
        self._calls[requester] += 1
        self._bytes[requester] += size_bytes
        self._all_bytes += size_bytes

    def released(self, requester: bytes, size_bytes: int) -> None:
        """A call of this peer has ended, however. Peers without calls leave no trace."""
        self._all_bytes -= size_bytes
        self._bytes[requester] -= size_bytes
        self._calls[requester] -= 1
        if self._calls[requester] <= 0:
            del self._calls[requester], self._bytes[requester]

    def waits(self, requester: bytes) -> bool:
        """Whether this peer has calls that have not ended."""
        return requester in self._calls

    def held(self) -> tuple[int, int]:
        """Calls and bytes of all peers together."""
        return sum(self._calls.values()), self._all_bytes
