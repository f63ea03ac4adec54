"""The header: everything the hub needs to route a message without reading its body.

A frozen slotted dataclass instead of a pydantic model, because the hub decodes one for every message it moves;
the checks are the same, written out once in `_CHECKS`. Bodies are checked by `protocol.codec`, where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import msgpack

from protocol.errors import BadFrame
from protocol.limits import MAX_HEADER_BYTES, PROTOCOL_VERSION

_TOKEN: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}\Z")
_TRACE: Final = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")


@dataclass(frozen=True, slots=True)
class Header:
    """Routing fields of one message; a field that is absent is not on the wire."""

    kind: str
    """What the message is, for example `infer.request`."""
    id: str
    """Identifier of this message, unique per sender epoch."""
    v: int = PROTOCOL_VERSION
    """Protocol version this message is written in."""
    corr: str | None = None
    """`id` of the request that this message answers or continues."""
    src: str | None = None
    """Name of the sending service or client, for logs; the hub trusts the socket identity instead."""
    dst: str | None = None
    """Capability asked for, such as `infer.worker` or `memory`."""
    epoch: str | None = None
    """One session of one process: a restarted or fenced peer has a new one."""
    seq: int | None = None
    """Counter of the sender within its epoch, rising; the hub drops repeats."""
    key: str | None = None
    """Idempotency key: the first terminal result for a key wins."""
    attempt: int | None = None
    """Which try of a step this is, from 1."""
    deadline: int | None = None
    """Unix time in milliseconds after which the work is dropped at dequeue on both sides."""
    task: str | None = None
    """Task for which this is done, for logs and figures."""
    step: str | None = None
    """Step of that task."""
    parent: str | None = None
    """Key of the call during which this call was made: it is cancelled with its parent."""
    credit: int | None = None
    """Slots granted by the sender since its epoch began: a running total, so repeats do no harm."""
    cores: int | None = None
    """On a request that the hub hands out: cores it has reserved for it. From an asker: how many could be used."""
    prio: str | None = None
    """`interactive` or `batch`."""
    trace: str | None = None
    """W3C traceparent, handed on unchanged and written into the logs."""


def _token(value: Any) -> bool:
    return isinstance(value, str) and _TOKEN.match(value) is not None


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_CHECKS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "kind": _token,
    "id": _token,
    "v": _count,
    "corr": _token,
    "src": _token,
    "dst": _token,
    "epoch": _token,
    "seq": _count,
    "key": _token,
    "attempt": _count,
    "deadline": _count,
    "task": _token,
    "step": _token,
    "parent": _token,
    "credit": _count,
    "cores": _count,
    "prio": lambda value: value in ("interactive", "batch"),
    "trace": lambda value: isinstance(value, str) and _TRACE.match(value) is not None,
}
_NAMES: Final = tuple(field.name for field in fields(Header))


def pack_header(header: Header, **instead: str | int | None) -> bytes:
    """Encode a header; absent fields are left out. `instead` gives values that take the place of the header's."""
    values: dict[str, Any] = {name: value for name in _NAMES if (value := getattr(header, name)) is not None}
    values.update(instead)
    return bytes(msgpack.packb(values))


def unpack_header(data: bytes) -> Header:
    """Decode and check a header. Unknown fields are ignored; raises BadFrame for everything else that is off."""
    if len(data) > MAX_HEADER_BYTES:
        raise BadFrame("header.too_large", f"header of {len(data)} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        raw = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as err:
        raise BadFrame("header.not_msgpack", f"the header is not msgpack: {err}") from err
    if not isinstance(raw, dict):
        raise BadFrame("header.not_a_map", f"the header is a {type(raw).__name__}, expected a map")
    known: dict[str, Any] = {}
    for name, value in raw.items():
        check = _CHECKS.get(name) if isinstance(name, str) else None
        if check is None:
            continue
        if not check(value):
            raise BadFrame("header.field", f"header field {name!r} has a value that is not allowed: {value!r:.80}")
        known[name] = value
    for name in ("kind", "id"):
        if name not in known:
            raise BadFrame("header.field", f"header field {name!r} is missing")
    version = known.get("v")
    if version != PROTOCOL_VERSION:
        raise BadFrame("header.version", f"protocol version {version}, this hub speaks {PROTOCOL_VERSION}")
    return Header(**known)
