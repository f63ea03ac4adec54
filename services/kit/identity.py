"""Identifiers: random ones for messages and epochs, derived ones for work that must happen once."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any, Final

import msgspec

_encode: Final = msgspec.msgpack.Encoder().encode


def boot_id() -> str:
    """Identifier of one life of one process."""
    return secrets.token_hex(6)


def work_key(*parts: Any) -> str:
    """Idempotency key: sha256 over the msgpack encoding of its parts, 32 hex digits of it.

    For a step: task, step, inputs of the attempt, sampling seed. Same parts, same key, on every machine.
    """
    return hashlib.sha256(_encode(parts)).hexdigest()[:32]
