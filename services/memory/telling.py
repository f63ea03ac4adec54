"""How parts of the memory that own no log file write to the one of the service."""

from __future__ import annotations

from typing import Protocol

from services.kit.logs import LogEvent


class Tell(Protocol):
    """Writes a line to the service's log; may be called from any thread."""

    def __call__(self, event: LogEvent, **fields: object) -> None:
        """Write one line."""
        ...


def tell_nobody(event: LogEvent, **fields: object) -> None:
    """For those who have no log file: programs that use the memory's parts by themselves."""
