"""The header of a GGUF file: metadata and the table of tensors, read once, front to back, with a bound on everything.

The `gguf` package keeps each of a vocabulary's tokens as arrays of its own, which takes ten seconds for a large one; a
check at every start cannot wait for that. Here the tokens are hashed as they pass and not kept. A file is hostile until
it has been read: counts, lengths and nesting are checked before they are believed, and tensors are never touched.
What the values mean is `gguf_facts`' business. The format: GGUF versions 2 and 3, little endian.
"""

from __future__ import annotations

import errno
import hashlib
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

MAGIC: Final = b"GGUF"

_MAX_HEADER_BYTES: Final = 512 * 1024**2
_MAX_KEYS: Final = 65_536
_MAX_TENSORS: Final = 1_048_576
_MAX_TEXT_BYTES: Final = 16 * 1024**2
"""The longest text in a real file is a chat template of some 100 kB."""
_MAX_ITEMS: Final = 16_777_216
_MAX_KEPT_ITEMS: Final = 4_096
"""Longer lists of numbers, such as the scores of a vocabulary, are passed over."""
_MAX_DIMENSIONS: Final = 4
_TAIL: Final = 128
_FIRST_COMPARED: Final = 5

_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, str]] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_SPLIT_FILE: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

Value: TypeAlias = int | float | bool | str | tuple[int | float | bool, ...]


class BadHeader(Exception):
    """The file is no whole GGUF file; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The list of a vocabulary's tokens."""

    count: int
    digests: tuple[str, ...]
    """sha256, shortened, over the tokens from number 5 on: all of them first, then one less, two less, … 128 less."""


@dataclass(slots=True)
class Header:
    """What a file says about itself."""

    values: dict[str, Value] = field(default_factory=dict)
    """Metadata; lists of texts and long lists of numbers are left out."""
    tokens: Tokens | None = None
    tensors: int = 0
    parameters: int = 0
    """Elements of all tensors of this file."""
    file_bytes: int = 0


def parts_of(path: Path) -> Sequence[Path]:
    """The files of a model: llama.cpp is given the first part of a split one and opens the others itself."""
    match = _SPLIT_FILE.search(path.name)
    if match is None:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    if count == 0:
        return [path]
    return [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def opened(path: Path) -> BinaryIO:
    """Open a model file for reading. Raises OSError, also for what is no regular file: a pipe would never answer."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.open("rb")


def read_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> Header:
    """Read one file. `block_sizes` gives elements and bytes of a block for each type of tensor, by its number.

    Raises BadHeader for a header that is damaged or beyond the bounds, and for tensors that reach past the file's end,
    as far as the size of their type is known; OSError where the file cannot be read.
    """
    with opened(path) as stream:
        return _Reader(stream, path.stat().st_size).read(block_sizes)


class _Reader:
    def __init__(self, stream: BinaryIO, file_bytes: int) -> None:
        self._stream = stream
        self._file_bytes = file_bytes
        self._at = 0
        self._header = Header(file_bytes=file_bytes)

    def read(self, block_sizes: Mapping[int, tuple[int, int]]) -> Header:
        magic = self._take(4)
        if magic != MAGIC:
            raise BadHeader(f"it begins with {magic!r}, not with {MAGIC!r}")
        version = self._number("<I")
        if version not in (2, 3):
            raise BadHeader(f"GGUF version {version} is not known; 2 and 3 are")
        tensors = self._count("tensors", _MAX_TENSORS)
        for _ in range(self._count("keys", _MAX_KEYS)):
            self._read_key()
        self._read_tensors(tensors, block_sizes)
        return self._header

    def _read_key(self) -> None:
        key = self._text("a key", 65_535)
        kind = self._number("<I")
        if kind == _STRING:
            self._keep(key, self._text(key, _MAX_TEXT_BYTES))
        elif kind == _ARRAY:
            self._read_list(key)
        else:
            self._keep(key, self._scalar(key, kind))

    def _keep(self, key: str, value: Value) -> None:
        if key in self._header.values:
            raise BadHeader(f"the key {key} comes twice")
        self._header.values[key] = value

    def _read_list(self, key: str) -> None:
        kind = self._number("<I")
        count = self._count(f"items of {key}", _MAX_ITEMS)
        if kind == _STRING:
            self._read_texts(key, count)
            return
        if kind not in _SCALARS:
            raise BadHeader(f"the list {key} has items of the unknown type {kind}")
        form = _SCALARS[kind]
        data = self._take(count * struct.calcsize(form))
        if count <= _MAX_KEPT_ITEMS:
            self._keep(key, struct.unpack(f"<{count}{form[1]}", data))

    def _read_texts(self, key: str, count: int) -> None:
        """Pass over a list of texts; the tokens of the vocabulary are hashed on the way."""
        if key != "tokenizer.ggml.tokens":
            for _ in range(count):
                self._take(self._length(key, _MAX_TEXT_BYTES))
            return
        digest = hashlib.sha256()
        tail: list[str] = []
        for number in range(count):
            length = self._length(key, _MAX_TEXT_BYTES)
            if number >= _FIRST_COMPARED:
                digest.update(length.to_bytes(8, "little") + self._take(length))
            else:
                self._take(length)
            if number >= count - 1 - _TAIL:
                tail.append(digest.hexdigest()[:16])
        self._header.tokens = Tokens(count, tuple(reversed(tail)))

    def _read_tensors(self, count: int, block_sizes: Mapping[int, tuple[int, int]]) -> None:
        ends: list[tuple[int, str]] = []
        for _ in range(count):
            name = self._text("a tensor's name", 65_535)
            dimensions = self._number("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise BadHeader(f"tensor {name} has {dimensions} dimensions")
            elements = 1
            for _ in range(dimensions):
                elements *= self._number("<Q")
            kind, offset = self._number("<I"), self._number("<Q")
            # A type that is newer than the table has no size here; llama.cpp may know it.
            block_elements, block_bytes = block_sizes.get(kind, (1, 0))
            ends.append((offset + elements // block_elements * block_bytes, name))
            self._header.parameters += elements
        alignment = self._header.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 65_536:
            raise BadHeader(f"general.alignment is {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        end, name = max(ends, default=(0, ""))
        if begin + end > self._file_bytes:
            raise BadHeader(f"tensor {name} reaches byte {begin + end}, the file has {self._file_bytes}")
        self._header.tensors = count

    def _scalar(self, key: str, kind: int) -> int | float | bool:
        if kind not in _SCALARS:
            raise BadHeader(f"the key {key} has the unknown type {kind}")
        form = _SCALARS[kind]
        value: int | float | bool = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _number(self, form: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _count(self, what: str, most: int) -> int:
        count = self._number("<Q")
        if count > most:
            raise BadHeader(f"it claims {count} {what}; at most {most} are believed")
        return count

    def _length(self, what: str, most: int) -> int:
        length = self._number("<Q")
        if length > most:
            raise BadHeader(f"a text of {what} claims {length} bytes; at most {most} are believed")
        return length

    def _text(self, what: str, most: int) -> str:
        return self._take(self._length(what, most)).decode("utf-8", "replace")

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > _MAX_HEADER_BYTES:
            raise BadHeader(f"the header is longer than {_MAX_HEADER_BYTES} bytes")
        if self._at > self._file_bytes:
            raise BadHeader(f"the header ends or breaks off at byte {self._file_bytes}")
        data = self._stream.read(count)
        if len(data) < count:
            raise BadHeader("the header ends or breaks off: the file became shorter while it was read")
        return data
