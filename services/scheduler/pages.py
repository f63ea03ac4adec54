"""Whose page of past events is read next: the clients take turns, however many watches one of them has begun.

What is read, and what the watcher is told, is the driver's and the watchers' business.
"""

from __future__ import annotations

from collections.abc import Container

from services.scheduler.events import ReadEvents


class Pages:
    """One page for each watcher that came late; of a client the one that waits longest first."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, dict[str, ReadEvents]] = {}

    def __bool__(self) -> bool:
        """True while anybody waits."""
        return bool(self._waiting)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def ask(self, read: ReadEvents) -> None:
        """Wait for a page; the same watcher again waits for this one instead."""
        self._waiting.setdefault(read.identity, {})[read.header.id] = read

    def next(self) -> ReadEvents:
        """The page whose turn it is; its client goes to the end."""
        identity, reads = next(iter(self._waiting.items()))
        del self._waiting[identity]
        read = reads.pop(next(iter(reads)))
        if reads:
            self._waiting[identity] = reads
        return read

    def retain(self, late: Container[tuple[bytes, str]]) -> None:
        """Forget whoever is none of these any more."""
        kept = [read for reads in self._waiting.values() for read in reads.values()]
        self._waiting.clear()
        for read in kept:
            if (read.identity, read.header.id) in late:
                self.ask(read)
