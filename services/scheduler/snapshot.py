"""The state of one long-running task as bytes, so that a restart does not fold its whole history.

A snapshot is a shortcut and never the truth: it counts only for the code that would fold the same state from the
facts, and is ignored after any change of that code. `tierline replay --check` compares it with the fold.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from services.scheduler import facts, fold, swarm_state, tasks, timeline
from services.scheduler.tasks import TaskRecord

_LEAST_FACTS: Final = 4_096
"""Facts after a snapshot that a restart may have to fold: about 0.1 s of work."""
_FACTS_PER_STEP: Final = 4
"""A snapshot costs in proportion to the steps. A step that succeeds at once makes four facts, so that the cost of
snapshots per fact stays the same however large the task is."""

_RECORD: Final = TypeAdapter(TaskRecord)
FOLD: Final = hashlib.sha256(
    b"".join(Path(module.__file__ or "").read_bytes() for module in (facts, fold, tasks, timeline, swarm_state))
).hexdigest()[:16]
"""Names the code that folds: a digest rather than a number that somebody has to remember to raise."""


def is_due(record: TaskRecord, since_seq: int) -> bool:
    """True if a task whose newest snapshot was taken after fact `since_seq` needs another one."""
    return record.seq - since_seq >= max(_LEAST_FACTS, _FACTS_PER_STEP * len(record.steps))


def may_be_due(facts_since: int) -> bool:
    """False while no task, however small, would be due: spares looking at it."""
    return facts_since >= _LEAST_FACTS


def pack(record: TaskRecord) -> bytes:
    """The state as JSON."""
    return _RECORD.dump_json(record, exclude_none=True)


def unpack(data: bytes) -> TaskRecord | None:
    """The state that `pack` was given; None if the bytes are damaged, since the facts still have it all."""
    try:
        return _RECORD.validate_json(data)
    except ValidationError:
        return None


def plain(record: TaskRecord) -> dict[str, Any]:
    """The state as plain values that can be compared."""
    values: dict[str, Any] = _RECORD.dump_python(record)
    return values
