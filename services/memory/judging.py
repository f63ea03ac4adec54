"""Whether a projection that was found on disk is used, and what the service's log file says about that."""

from __future__ import annotations

from typing import Final

from services.kit.logs import LogEvent
from services.memory.log_reader import LogReader
from services.memory.machine import Found, Recovery, recovery
from services.memory.telling import Tell

PROJECTION_OPENED: Final = LogEvent("memory.projection_opened", "projection verdict reason applied_seq log_seq")
PROJECTION_REBUILT: Final = LogEvent("memory.projection_rebuilt", "projection reason applied_seq", "warning")


def judge(projection: str, found: Found | None, why: str | None, reader: LogReader, tell: Tell) -> Recovery:
    """What it needs, which is told; `why` says why it was not `found`. An empty log has nothing to rebuild from."""
    log_seq = reader.seq
    verdict, reason = recovery(found, reader.log_id, log_seq)
    if verdict is Recovery.REBUILD and log_seq > 0:
        tell(PROJECTION_REBUILT, projection=projection, reason=why or reason, applied_seq=0)
    else:
        applied = 0 if found is None else found.applied_seq
        tell(
            PROJECTION_OPENED,
            projection=projection,
            verdict=verdict.value,
            reason=why or reason,
            applied_seq=applied,
            log_seq=log_seq,
        )
    return verdict
