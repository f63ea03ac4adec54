"""Who waits for a listing or a status report: one is made in each turn of the loop, for all that ask for the same.

Either takes milliseconds and is asked for in a few bytes, so a client could keep the loop busy with nothing else. What
is in them is the journal's and the machine's.
"""

from __future__ import annotations

from typing import Final

from protocol.header import Header
from protocol.messages.result import ListQuery
from services.scheduler.events import ReadListing, ReadStatus

MOST_AWAITED: Final = 64
"""Reports that one client may wait for."""

Asker = tuple[bytes, Header]


class Reports:
    """Requests by what they ask for (None = the status), the longest waiting first."""

    def __init__(self) -> None:
        self._waiting: dict[bytes | None, tuple[ListQuery | None, list[Asker]]] = {}

    def __bool__(self) -> bool:
        """True while anybody waits."""
        return bool(self._waiting)

    def ask(self, asked: ReadListing | ReadStatus) -> str | None:
        """Wait for it; returns why not, if this client waits for enough."""
        own = sum(who == asked.identity for _, askers in self._waiting.values() for who, _ in askers)
        if own >= MOST_AWAITED:
            return f"you wait for {own} listings and reports"
        query = asked.query if isinstance(asked, ReadListing) else None
        name = None if query is None else query.model_dump_json().encode()
        self._waiting.setdefault(name, (query, []))[1].append((asked.identity, asked.header))
        return None

    def next(self) -> tuple[ListQuery | None, list[Asker]]:
        """What is to be made now, and for whom."""
        return self._waiting.pop(next(iter(self._waiting)))
