"""The lines of calls that wait, one per capability, and in which of them something may have become possible.

A call waits while no worker has it; what a line still holds of others is stale, and bounded by the queue itself. Lines
are looked at when something has happened that concerns them (`touch`), so that handing out a call costs the same
however many capabilities there are. Who may go, and to whom, is the broker's business; the order within a line that of
`queues.py`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.scheduler.calls import Call
from services.scheduler.queues import Place, ReadyQueue

_KEPT_QUEUES: Final = 64
"""So many queues stay when they become empty, since most will soon be needed again."""


@dataclass(slots=True)
class Lines:
    """See the module. `calls` are all there are, by key."""

    calls: Mapping[str, Call]
    queues: dict[str, ReadyQueue] = field(default_factory=dict)
    dirty: dict[str, None] = field(default_factory=dict)
    """Capabilities for which something may have become possible, in the order in which it did."""

    def push(self, call: Call, weight: float) -> None:
        """A call waits, from now on or again; its client has this weight among those in the same line."""
        place = Place(call.client, call.interactive, call.rank_s, call.outer_ms, weight)
        queue = self.queues.get(call.target)
        if queue is None:
            queue = self.queues[call.target] = ReadyQueue()
        queue.push(call.key, place, call.hold_until_ms)
        self.dirty[call.target] = None

    def touch(self, targets: Iterable[str]) -> None:
        """Something may have become possible for these capabilities."""
        for target in targets:
            self.dirty[target] = None

    def discard(self, target: str) -> None:
        """A call for this capability waits no longer: its entry is stale."""
        queue = self.queues.get(target)
        if queue is not None:
            queue.discard(self.holds)
            self.dirty[target] = None  # what is behind a stale entry may go, and an empty queue is removed

    def tidy(self, target: str) -> None:
        """A line is at its end, but for calls that are held back; its name may be anything a client thought of."""
        if len(self.queues) > _KEPT_QUEUES and self.queues[target].is_empty:
            del self.queues[target]

    def holds(self, key: str) -> bool:
        """True if this call waits."""
        call = self.calls.get(key)
        return call is not None and call.worker is None

    def has_ready(self, target: str, at_ms: int) -> bool:
        """True if a call for this capability could go out now, were there a worker."""
        queue = self.queues.get(target)
        if queue is None:
            return False
        queue.release(at_ms)
        while (key := queue.first()) is not None:
            if self.holds(key):
                return True
            queue.drop()
        return False

    def waiting(self, target: str) -> list[Call]:
        """Calls that wait for this capability, those that are held back among them."""
        queue = self.queues.get(target)
        keys = [] if queue is None else sorted(key for key in set(queue.waiting_keys()) if self.holds(key))
        return [self.calls[key] for key in keys]

    def lengths(self) -> dict[str, int]:
        """Waiting calls per capability, those with any."""
        lengths = {target: len(self.waiting(target)) for target in self.queues}
        return {target: count for target, count in lengths.items() if count}

    def is_full(self, target: str, most: int) -> bool:
        """True if so many calls wait for this capability."""
        queue = self.queues.get(target)
        return queue is not None and queue.count(self.holds, most) >= most

    def next_release_ms(self) -> int | None:
        """When the next call that is held back joins its line; None = there is none."""
        releases = (queue.next_release_ms() for queue in self.queues.values())
        return min((at_ms for at_ms in releases if at_ms is not None), default=None)

    def check_invariants(self) -> None:
        """Raise AssertionError if a call waits in no line."""
        queued = {key for queue in self.queues.values() for key in queue.waiting_keys() if self.holds(key)}
        for key, call in self.calls.items():
            if call.worker is None and key not in queued:
                raise AssertionError(f"call {key} waits in no queue")
