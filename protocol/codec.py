"""Bodies to bytes and back: msgpack outside, pydantic inside, bounded in size and depth.

The header has its own module since it is decoded far more often. Nothing here knows sockets.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Final, TypeVar

import msgspec
from pydantic import ValidationError

from protocol.errors import BadFrame
from protocol.limits import MAX_BODY_BYTES, MAX_NESTING
from protocol.messages.base import Message

M = TypeVar("M", bound=Message)
_PLAIN: Final = frozenset({str, int, bool, type(None)})
_JSON: Final = _PLAIN | {float, list, dict}
_STRINGS: Final = frozenset({str})
_is_float: Final = float.__instancecheck__
_is_map: Final = dict.__instancecheck__
_is_list: Final = list.__instancecheck__
"""As functions, so that `filter` looks at each value of each body without a line of Python."""
_LEVELS_ABOVE_A_VALUE: Final = 8
"""Room for what is around the value of an artefact: the views, requests and joins that it will be part of."""
_write: Final = msgspec.msgpack.Encoder().encode
_read: Final = msgspec.msgpack.Decoder().decode


class Unpacked(bytes):
    """A body that stays the object it is, because it never leaves its process, as in virtual time. Empty as bytes."""

    message: Message

    def __new__(cls, message: Message) -> Unpacked:
        """A body that `unpack_body` turns into this very message."""
        body = super().__new__(cls)
        body.message = message
        return body


def pack_body(message: Message) -> bytes:
    """Encode a body; fields that hold their default None are left out."""
    return _write(message.model_dump(mode="json", exclude_none=True))


def pack_map(values: dict[str, Any]) -> bytes:
    """Encode a body that is made of plain values already; it must read as the message of its kind."""
    return _write(values)


def unpack_map(data: bytes) -> dict[str, Any]:
    """Decode msgpack bytes that must be one map within our bounds; raises BadFrame."""
    if len(data) > MAX_BODY_BYTES:
        raise BadFrame("body.too_large", f"body of {len(data)} bytes, at most {MAX_BODY_BYTES} are read")
    try:
        raw = _read(data)
    except (ValueError, RecursionError) as err:  # msgspec's errors are ValueErrors
        raise BadFrame("body.not_msgpack", f"the body is not msgpack: {err}") from err
    if not isinstance(raw, dict):
        raise BadFrame("body.not_a_map", f"the body is a {type(raw).__name__}, expected a map")
    _check_values(raw)
    return raw


def check_value(value: Any) -> None:
    """Raise BadFrame unless every message that carries this value can be written and read."""
    _check_values({"value": value}, MAX_NESTING - _LEVELS_ABOVE_A_VALUE)
    try:
        _write(value)
    except (ValueError, OverflowError) as err:  # half of a surrogate pair, or a number of more than 64 bits
        raise BadFrame("body.not_json", f"the value cannot be written: {err}") from err


def unpack_body(model: type[M], data: bytes) -> M:
    """Decode and validate a body; raises BadFrame naming every field that is wrong."""
    if isinstance(data, Unpacked) and isinstance(data.message, model):
        return data.message
    raw = unpack_map(data)
    try:
        return model.model_validate(raw)
    except ValidationError as err:
        raise BadFrame("body.invalid", describe(err)) from err


def describe(err: ValidationError) -> str:
    """Every problem of a validation error as `field: what is wrong`, at most ten, without echoing large input."""
    parts = []
    for problem in err.errors(include_url=False, include_context=False)[:10]:
        where = ".".join(str(part) for part in problem["loc"]) or "(whole)"
        parts.append(f"{where}: {problem['msg']}")
    more = err.error_count() - len(parts)
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _check_values(raw: dict[Any, Any], levels: int = MAX_NESTING) -> None:
    """Raise BadFrame for what JSON could not hold either, and for hostile nesting.

    msgpack has binary, timestamps and NaN: one of them deep inside a JSON artefact would blow up far from here.
    Breadth-first, so that a hostile body cannot exhaust our own stack.
    """
    level: list[Any] = [raw]
    for _ in range(levels + 1):
        kinds = set(map(type, level))
        if kinds <= _PLAIN:
            return
        if not kinds <= _JSON:
            names = ", ".join(sorted(kind.__name__ for kind in kinds - _JSON))
            raise BadFrame("body.not_json", f"the body holds a {names}; only JSON's types are read")
        if not all(map(isfinite, filter(_is_float, level))):
            raise BadFrame("body.not_json", "the body holds a number that JSON does not have: an infinity or NaN")
        below: list[Any] = []
        for entries in filter(_is_map, level):
            if not _STRINGS.issuperset(map(type, entries)):
                raise BadFrame("body.not_json", "the body has a map key that is not a string")
            below += entries.values()
        for items in filter(_is_list, level):
            below += items
        if not below:
            return
        level = below
    raise BadFrame("body.too_deep", f"the body nests deeper than {levels} levels")
