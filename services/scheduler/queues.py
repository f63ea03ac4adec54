"""Which waiting call goes next: class, client, rank, deadline, arrival, in this order of precedence.

Interactive work overtakes batch work, but every `BATCH_EVERY`-th call is a batch one where any waits, so batch always
makes progress. Between the clients of a class the one that was served least goes first. Within a client's calls
the one with the longest expected path behind it does (upward rank), then the earliest deadline, then the first
that came: ties are never broken by chance.

Served is what a client got divided by its weight, counted in calls: start-time fair queueing (Goyal, Vin, Cheng,
SIGCOMM 1996). Time is the count at which the newest call went out; who comes back goes on from its own count or from
there, whichever is later. So nobody is owed anything for a time in which it asked for nothing, and asking for one call
at a time does not wipe out what one has had.

Pure bookkeeping over keys; which call may run at all, and where, is the broker's business.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

BATCH_EVERY: Final = 5
"""At least one of so many calls is a batch call while any waits."""
_NEVER: Final = 2**62
_STALE_SLACK: Final = 64
_ABSENT_SLACK: Final = 64
"""Clients without a call here that are remembered at least; of more, only those that are ahead of the others."""

Entry = tuple[float, int, int, str]
"""Negative rank, deadline, arrival, key: the smallest goes first."""


class Place(msgspec.Struct, frozen=True):
    """What decides the place of a call in the queue."""

    client: str
    interactive: bool
    rank_s: float
    """Upward rank in seconds: the longest expected path from the start of this call to the end of its task."""
    deadline_ms: int | None
    weight: float = 1.0
    """Of the client: how many calls it gets for each one of a client of weight 1."""


@dataclass(slots=True)
class _Class:
    """Calls of one priority, by client."""

    waiting: dict[str, list[Entry]] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    """Client -> where its next call starts: calls it got over its weight. Clients that wait, and those that are ahead
    of `now`, so that they do not come back as newcomers."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of the clients that wait."""
    now: float = 0.0
    """Where the newest call that went out started."""

    def push(self, client: str, entry: Entry, weight: float) -> None:
        heap = self.waiting.get(client)
        if heap is None:
            heap = self.waiting[client] = []
            self.served[client] = max(self.served.get(client, 0.0), self.now)
        self.weights[client] = weight
        heapq.heappush(heap, entry)

    def retain(self, keep: Callable[[str], bool]) -> None:
        """Drop the entries whose key `keep` does not want, the first ones being asked about first."""
        for client, heap in list(self.waiting.items()):
            heap[:] = [entry for entry in sorted(heap) if keep(entry[3])]  # sorted, hence still a heap
            if not heap:
                self._leave(client)

    def first_client(self) -> str | None:
        if len(self.waiting) < 2:
            return next(iter(self.waiting), None)
        return min(self.waiting, key=lambda client: (self.served[client], self.waiting[client][0]), default=None)

    def pop(self, client: str) -> None:
        heap = self.waiting[client]
        heapq.heappop(heap)
        if not heap:
            self._leave(client)

    def serve(self, client: str) -> None:
        """Count the first call of this client as handed out."""
        self.now = self.served[client]
        self.served[client] += 1 / self.weights[client]

    def _leave(self, client: str) -> None:
        del self.waiting[client], self.weights[client]
        if len(self.served) > 2 * len(self.waiting) + _ABSENT_SLACK:
            self.served = {name: at for name, at in self.served.items() if name in self.waiting or at > self.now}


@dataclass(slots=True)
class ReadyQueue:
    """Calls that wait for one capability. The entry of a call that has ended meanwhile is stale."""

    _interactive: _Class = field(default_factory=_Class)
    _batch: _Class = field(default_factory=_Class)
    _held: list[tuple[int, int, str, Place]] = field(default_factory=list)
    """Due time, arrival, key: calls that must not go out yet."""
    _since_batch: int = 0
    _arrivals: int = 0
    _stale: int = 0
    """Entries whose call waits no longer, at most."""
    _chosen: tuple[_Class, str] | None = None
    """Whose first call goes next, once asked for; until the line changes."""

    def push(self, key: str, place: Place, hold_until_ms: int = 0) -> None:
        """Add a call; with `hold_until_ms` it joins the line when `release` is called at or after that time."""
        self._arrivals += 1
        if hold_until_ms:
            heapq.heappush(self._held, (hold_until_ms, self._arrivals, key, place))
        else:
            self._enter(key, place, self._arrivals)

    def release(self, at_ms: int) -> None:
        """Let the calls whose time has come join the line."""
        while self._held and self._held[0][0] <= at_ms:
            _, arrival, key, place = heapq.heappop(self._held)
            self._enter(key, place, arrival)

    def next_release_ms(self) -> int | None:
        """When `release` will next let a call join the line."""
        return self._held[0][0] if self._held else None

    def first(self) -> str | None:
        """Key of the call that goes next; None when nothing may go."""
        chosen = self._choose()
        return None if chosen is None else chosen[0].waiting[chosen[1]][0][3]

    def take(self) -> None:
        """Remove the call that `first` names, as handed out: its client has been served."""
        chosen = self._choose()
        if chosen is None:
            raise IndexError("the queue is empty")
        self._chosen = None
        group, client = chosen
        group.serve(client)
        group.pop(client)
        self._since_batch = 0 if group is self._batch else self._since_batch + 1

    def drop(self) -> None:
        """Remove the call that `first` names without serving anybody: it has ended while it waited."""
        chosen = self._choose()
        if chosen is None:
            raise IndexError("the queue is empty")
        self._chosen = None
        chosen[0].pop(chosen[1])
        self._stale = max(0, self._stale - 1)

    def discard(self, waits: Callable[[str], bool]) -> None:
        """One of the calls here waits no longer. Its entry stays until it is first, or too many are like it.

        Without that bound whoever asks and cancels in a circle, for a capability that nobody serves, fills the memory.
        """
        self._stale += 1
        if self._stale > max(_STALE_SLACK, len(self) // 2):
            self._purge(waits)

    def count(self, waits: Callable[[str], bool], limit: int) -> int:
        """How many calls wait; exact from `limit` on, below it stale entries may be among them."""
        if self._stale and len(self) >= limit:
            self._purge(waits)
        return len(self)

    def waiting_keys(self) -> list[str]:
        """All keys, held ones included, in no particular order."""
        lines = [heap for group in (self._interactive, self._batch) for heap in group.waiting.values()]
        return [entry[3] for heap in lines for entry in heap] + [held[2] for held in self._held]

    @property
    def is_empty(self) -> bool:
        """True if nothing is here, neither waiting nor held back nor stale."""
        return not (self._interactive.waiting or self._batch.waiting or self._held)

    def __len__(self) -> int:
        groups = (self._interactive, self._batch)
        return len(self._held) + sum(len(heap) for group in groups for heap in group.waiting.values())

    def _purge(self, waits: Callable[[str], bool]) -> None:
        """Keep one entry of each call that waits."""
        seen: set[str] = set()

        def keep(key: str) -> bool:
            if key in seen or not waits(key):
                return False
            seen.add(key)
            return True

        self._chosen = None
        for group in (self._interactive, self._batch):
            group.retain(keep)
        self._held = [held for held in sorted(self._held, key=lambda held: held[:2]) if keep(held[2])]
        self._stale = 0

    def _enter(self, key: str, place: Place, arrival: int) -> None:
        deadline = _NEVER if place.deadline_ms is None else place.deadline_ms
        group = self._interactive if place.interactive else self._batch
        self._chosen = None
        group.push(place.client, (-place.rank_s, deadline, arrival, key), place.weight)

    def _choose(self) -> tuple[_Class, str] | None:
        if self._chosen is not None:
            return self._chosen
        first, second = self._interactive, self._batch
        if self._since_batch >= BATCH_EVERY - 1:
            first, second = second, first
        for group in (first, second):
            client = group.first_client()
            if client is not None:
                self._chosen = group, client
                break
        return self._chosen
