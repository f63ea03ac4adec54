"""Reads the services' log files: the line that explains a failure, the last lines of all, and new ones as they come.

Files may be cut, moved away (`.1`) or hold a half-written last line at any moment; a line that is not JSON is still
shown. Writing them is `services.kit.logs`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_TAIL_BYTES: Final = 256 * 1024
_READ_BYTES: Final = 1024 * 1024
_MAX_LINE_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line as it stands in the file, and its fields; none where it is not a JSON object."""

    service: str
    raw: str
    fields: dict[str, Any]

    @property
    def stamp(self) -> str:
        """Its time as written, for sorting; empty where there is none."""
        return str(self.fields.get("ts", ""))


def telling_line(
    logs: Path, service: str, output: Path | None, *, crashed: bool, since: str
) -> tuple[Path, str] | None:
    """The file and line to look at first when a service does not work; None where nothing was written.

    A crash explains itself on standard error, anything else in the service's own log, where only lines with a `ts`
    from `since` on count: an error of an earlier start explains nothing.
    """
    own = logs / f"{service}.jsonl"
    written = [
        line
        for line in last_lines(own, 200)
        if line.fields.get("level") in ("warning", "error") and line.stamp >= since
    ]
    said = [text for text in _tail(output)[0] if text.strip()] if output is not None else []
    if said and output is not None and (crashed or not written):
        return output, said[-1].strip()
    return (own, written[-1].raw) if written else None


def last_lines(path: Path, count: int) -> list[LogLine]:
    """The last lines of one log; empty where there is no such file."""
    return [_parse(path, text) for text in _tail(path)[0][-count:]] if count else []


class Follower:
    """Follows several logs; each call of `new_lines` returns what was added since the last one."""

    def __init__(self, folder: Path, services: Sequence[str]) -> None:
        self._folder = folder
        self._services = list(services)
        self._at: dict[Path, tuple[int, int]] = {}
        """File -> its inode and how far it was read."""

    def paths(self) -> list[Path]:
        """Logs to follow: the named ones, or all that are there."""
        if self._services:
            return [self._folder / f"{service}.jsonl" for service in self._services]
        return sorted(self._folder.glob("*.jsonl"))

    def begin(self, count: int) -> list[LogLine]:
        """The last `count` lines of each, merged by time; what comes later is new."""
        lines = []
        for path in self.paths():
            if (status := _status(path)) is not None:
                texts, end = _tail(path)
                self._at[path] = (status.st_ino, end)
                lines += [_parse(path, text) for text in texts[-count:] if count]
        return sorted(lines, key=lambda line: line.stamp)

    def new_lines(self) -> list[LogLine]:
        """What was added since, merged by time; a file that was replaced or cut is read from its beginning."""
        lines = [line for path in self.paths() for line in self._new_in(path)]
        return sorted(lines, key=lambda line: line.stamp)

    def _new_in(self, path: Path) -> Iterator[LogLine]:
        status = _status(path)
        if status is None:
            return
        inode, offset = self._at.get(path, (status.st_ino, 0))
        if inode != status.st_ino or status.st_size < offset:
            offset = 0
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(_READ_BYTES)
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) > _MAX_LINE_BYTES:
            whole = len(data)  # no service writes such a line: show it as it is instead of waiting for its end
        self._at[path] = (status.st_ino, offset + whole)
        for text in _lines(data[:whole]):
            yield _parse(path, text)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _tail(path: Path) -> tuple[list[str], int]:
    """The whole lines near the end of a file, and the offset after the last of them."""
    status = _status(path)
    if status is None:
        return [], 0
    begin = max(0, status.st_size - _TAIL_BYTES)
    with path.open("rb") as stream:
        stream.seek(begin)
        data = stream.read(_TAIL_BYTES)
    whole = data.rfind(b"\n") + 1
    lines = _lines(data[:whole])
    return (lines[1:] if begin else lines), begin + whole


def _lines(data: bytes) -> list[str]:
    """Lines that end in a line feed; `splitlines` would also split at characters that JSON leaves as they are."""
    return data.decode("utf-8", "replace").removesuffix("\n").split("\n") if data else []


def _parse(path: Path, text: str) -> LogLine:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = {}
    return LogLine(path.stem, text, fields if isinstance(fields, dict) else {})
