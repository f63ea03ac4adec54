"""The header: everything the hub needs to route a message without reading its body.

A frozen msgspec struct instead of a pydantic model, because hub and services make and read several for every message
they move: writing and reading one costs a quarter of what a dataclass with checks of our own did. What a field may
hold is its type. Bodies are checked by `protocol.codec`, where they are used.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from protocol.errors import BadFrame
from protocol.limits import MAX_HEADER_BYTES, PROTOCOL_VERSION

Token = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:\-]{1,128}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Trace = Annotated[str, Meta(pattern=r"\A00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}\Z")]


class Header(msgspec.Struct, frozen=True, gc=False):
    """Routing fields of one message; a field that is absent is not on the wire."""

    kind: Token
    """What the message is, for example `infer.request`."""
    id: Token
    """Identifier of this message, unique per sender epoch."""
    v: Count = PROTOCOL_VERSION
    """Protocol version this message is written in."""
    corr: Token | None = None
    """`id` of the request that this message answers or continues."""
    src: Token | None = None
    """Name of the sending service or client, for logs; the hub trusts the socket identity instead."""
    dst: Token | None = None
    """Capability asked for, such as `infer.worker` or `memory`."""
    epoch: Token | None = None
    """One session of one process: a restarted or fenced peer has a new one."""
    seq: Count | None = None
    """Counter of the sender within its epoch, rising; the hub drops repeats."""
    key: Token | None = None
    """Idempotency key: the first terminal result for a key wins."""
    attempt: Count | None = None
    """Which try of a step this is, from 1."""
    deadline: Count | None = None
    """Unix time in milliseconds after which the work is dropped at dequeue on both sides."""
    task: Token | None = None
    """Task for which this is done, for logs and figures."""
    step: Token | None = None
    """Step of that task."""
    parent: Token | None = None
    """Key of the call during which this call was made: it is cancelled with its parent."""
    credit: Count | None = None
    """Slots granted by the sender since its epoch began: a running total, so repeats do no harm."""
    cores: Count | None = None
    """On a request that the hub hands out: cores it has reserved for it. From an asker: how many could be used."""
    prio: Literal["interactive", "batch"] | None = None
    """`interactive` or `batch`."""
    trace: Trace | None = None
    """W3C traceparent, handed on unchanged and written into the logs."""


_FIELDS: Final = msgspec.structs.fields(Header)
_NAMES: Final = tuple(field.name for field in _FIELDS)
_Read: Final = msgspec.defstruct(
    "_Read", [(one.name, one.type) if one.required else (one.name, one.type | None, None) for one in _FIELDS]
)
"""A header as it is read: the same fields, but a version that the sender has not named is not ours by default."""
_read: Final = msgspec.msgpack.Decoder(_Read).decode
_write: Final = msgspec.msgpack.Encoder().encode


def pack_header(header: Header) -> bytes:
    """Encode a header; absent fields are left out."""
    values = zip(_NAMES, msgspec.structs.astuple(header), strict=True)
    return _write({name: value for name, value in values if value is not None})


def unpack_header(data: bytes) -> Header:
    """Decode and check a header. Unknown fields are ignored; raises BadFrame for everything else that is off."""
    if len(data) > MAX_HEADER_BYTES:
        raise BadFrame("header.too_large", f"header of {len(data)} bytes, at most {MAX_HEADER_BYTES} are read")
    try:
        read: Any = _read(data)
    except msgspec.ValidationError as err:
        if not _is_map(data):
            raise BadFrame("header.not_a_map", f"the header is not a map: {err}") from err
        raise BadFrame("header.field", f"a header field is missing or has a value that is not allowed: {err}") from err
    except (msgspec.DecodeError, RecursionError) as err:
        raise BadFrame("header.not_msgpack", f"the header is not msgpack: {err}") from err
    if read.v != PROTOCOL_VERSION:
        raise BadFrame("header.version", f"protocol version {read.v}, this hub speaks {PROTOCOL_VERSION}")
    return Header(*msgspec.structs.astuple(read))


def _is_map(data: bytes) -> bool:
    """Whether msgpack bytes begin as a map does: fixmap, map 16, map 32."""
    return data[0] & 0xF0 == 0x80 or data[0] in (0xDE, 0xDF)
