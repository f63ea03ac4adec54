"""Which calls are past their deadline, in the order of those. Pure; what is done about them is the broker's."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.calls import Call

_SLACK: Final = 1_024
_GRACE_MS: Final = 1_000
"""A worker enforces deadlines itself; the hub steps in when it has not."""


@dataclass(slots=True)
class Deadlines:
    """Deadlines of the calls in `calls`, by key, and for a while of some that have ended."""

    calls: Mapping[str, Call]
    _heap: list[tuple[int, str]] = field(default_factory=list)
    """Unix ms and key."""

    def watch(self, call: Call) -> None:
        """The deadline of this call is a new one."""
        if call.deadline_ms is None:
            return
        heapq.heappush(self._heap, (call.deadline_ms, call.key))
        if len(self._heap) > 2 * len(self.calls) + _SLACK:
            # Most calls end long before their deadline: without this the heap would hold all calls of ten minutes.
            self._heap = [(one.deadline_ms, key) for key, one in self.calls.items() if one.deadline_ms is not None]
            heapq.heapify(self._heap)

    def passed(self, at_ms: int) -> Iterator[Call]:
        """Calls whose deadline, and where they run also the grace of their worker, is over. Each has to be ended."""
        while self._heap and self._heap[0][0] <= at_ms:
            due, key = heapq.heappop(self._heap)
            call = self.calls.get(key)
            if call is None or call.deadline_ms is None:
                continue
            limit = call.deadline_ms + (_GRACE_MS if call.worker else 0)
            if limit > max(at_ms, due):
                heapq.heappush(self._heap, (limit, key))
                continue
            yield call

    def next_ms(self) -> int | None:
        """The first one of a call that has not ended."""
        while self._heap and self._heap[0][1] not in self.calls:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def __len__(self) -> int:
        return len(self._heap)
