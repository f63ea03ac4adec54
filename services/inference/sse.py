"""Server-sent events from bytes, as servers really write them; pure.

Takes lines that end in LF, CRLF or CR, in pieces cut anywhere; comments and keep-alives (`: ping`); events of several
data lines; fields that nobody asked for; a byte order mark; a last event without the blank line behind it. Format:
WHATWG HTML, section 9.2 "Server-sent events". What the data means is not looked at here.
"""

from __future__ import annotations

from collections.abc import Iterator


class EventTooLarge(Exception):
    """An event, or one line of it, is larger than the bound: nothing that follows can be trusted."""


class EventStream:
    """Collects one stream. `feed` gives the data of every event that is complete, `end` what is left at the end."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._first = True

    def feed(self, part: bytes) -> Iterator[bytes]:
        """Take the next bytes. Raises EventTooLarge."""
        if self._after_cr and part:
            self._after_cr = False
            part = part.removeprefix(b"\n")  # CRLF that was cut in two
        if part.endswith(b"\r"):
            self._after_cr = True
        lines = part.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for number, piece in enumerate(lines, 1):
            self._line += piece
            self._size += len(piece)
            if self._size > self._max_bytes:
                raise EventTooLarge(f"an event of more than {self._max_bytes} bytes")
            if number < len(lines):
                line, self._line = bytes(self._line), bytearray()
                yield from self._take(line)

    def end(self) -> Iterator[bytes]:
        """The stream is over: what is complete but for its blank line counts."""
        if self._line:
            line, self._line = bytes(self._line), bytearray()
            yield from self._take(line)
        yield from self._take(b"")

    def _take(self, line: bytes) -> Iterator[bytes]:
        if self._first:
            self._first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            else:
                self._size -= len(line)  # comments and other fields are not kept
            return
        data, self._data, self._size = self._data, [], 0
        if data:
            yield b"\n".join(data)
