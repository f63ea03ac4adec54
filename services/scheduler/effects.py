"""What the engine wants done: facts written, calls queued, calls dropped. Carried out by the hub, in order."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler import facts as f
from services.scheduler.broker import Call


@dataclass(frozen=True, slots=True)
class Record:
    """Write this fact to the journal and tell the task's watchers."""

    fact: f.Fact
    seq: int


@dataclass(frozen=True, slots=True)
class Ask:
    """Queue this call at the broker."""

    call: Call


@dataclass(frozen=True, slots=True)
class Drop:
    """Cancel the call with this key, if it is still there."""

    key: str


Effect = Record | Ask | Drop
