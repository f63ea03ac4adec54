"""What the engine wants done: facts written, calls queued, calls dropped. Carried out by the hub, in order."""

from __future__ import annotations

import msgspec

from services.scheduler import facts as f
from services.scheduler.calls import Call


class Record(msgspec.Struct, frozen=True):
    """Write this fact to the journal and tell the task's watchers."""

    fact: f.Fact
    seq: int


class Ask(msgspec.Struct, frozen=True):
    """Queue this call at the broker."""

    call: Call


class Drop(msgspec.Struct, frozen=True):
    """Cancel the call with this key, if it is still there."""

    key: str


Effect = Record | Ask | Drop
