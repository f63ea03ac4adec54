"""The hub's slow clock: starts retention as a child process now and then, and says when learned values are kept.

A child and not a thread: it shares neither the interpreter lock with the loop nor its memory, and a fault in it is a
line in the log. It dies with the hub; whatever it was at, its transactions are whole.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.kit.children import die_with_parent
from services.kit.config import CHECKOUT
from services.kit.logs import LogEvent

RETENTION_DONE = LogEvent("journal.retained", "compacted removed forgotten damaged freed_bytes")
RETENTION_FAILED = LogEvent("journal.retention_failed", "status reason", "warning")

_SAID_BYTES: Final = 2_000


@dataclass(frozen=True, slots=True)
class Intervals:
    """Milliseconds between what is done now and then."""

    first_retention: int = 60_000
    """After the start: not while everything else starts too."""
    retention: int = 3_600_000
    durations: int = 5_000
    """Learned durations that a kill -9 may take."""


class Housekeeping:
    """Call `due` every turn; it costs two comparisons where nothing is."""

    def __init__(self, journal: Path, intervals: Intervals, now_ms: int) -> None:
        self._journal = journal
        self._intervals = intervals
        self._retention_at = now_ms + intervals.first_retention
        self._durations_at = now_ms + intervals.durations
        self._child: subprocess.Popen[bytes] | None = None

    def durations_due(self, now_ms: int) -> bool:
        """True once per interval."""
        if now_ms < self._durations_at:
            return False
        self._durations_at = now_ms + self._intervals.durations
        return True

    def retain(self, now_ms: int) -> Iterator[tuple[LogEvent, dict[str, Any]]]:
        """Start retention when it is time to, and tell what the last one did."""
        if self._child is not None and self._child.poll() is not None:
            child, self._child = self._child, None
            said, complaint = child.communicate()
            if child.returncode == 0:
                yield RETENTION_DONE, json.loads(said)
            else:
                reason = complaint[-_SAID_BYTES:].decode("utf-8", "replace")
                yield RETENTION_FAILED, {"status": child.returncode, "reason": reason}
        if self._child is None and now_ms >= self._retention_at:
            self._retention_at = now_ms + self._intervals.retention
            self._child = subprocess.Popen(
                [sys.executable, "-m", "services.scheduler.retention", str(self._journal)],
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=_die_with_hub,
            )

    def close(self) -> None:
        """End a retention that runs."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _die_with_hub() -> None:
    die_with_parent(signal.SIGKILL)
