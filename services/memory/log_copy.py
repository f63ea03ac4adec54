"""A second copy of what the log holds, from which a damaged log is made anew.

`log.copy.jsonl` gets the rows of every commit right after it, before anybody is told. It is not synced row by row: for
what a lost power supply takes from it there is the log, which is; both together fail only when two things go wrong.
Vectors and values are not in it, since they follow from the rest.

The first line names the copy; the log knows the name, and gets another one when rows are forgotten, so that a copy
that still holds them is never taken for the log's. Every line starts with a CRC-32 of the rest in hexadecimal digits.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from services.memory.log_rows import find
from services.memory.manifest import sync_folder

COPY_FILE: Final = "log.copy.jsonl"
_TAIL_BYTES: Final = 1 << 18
_ROWS_AT_ONCE: Final = 2_000
_KINDS: Final = {"decision": "decisions", "outcome": "outcomes", "episode": "episodes"}


@dataclass(slots=True)
class Copied:
    """What a copy holds, as far as it can be read."""

    name: str = ""
    """Empty where the first line is damaged."""
    rows: dict[int, str] = field(default_factory=dict)
    """Row number -> the JSON of `{"seq": …, one of decision, outcome, episode, maybe "text"}`: a tenth of the memory
    that the parsed ones would take."""
    damaged_lines: int = 0

    @property
    def last_seq(self) -> int:
        """The highest row number."""
        return max(self.rows, default=0)


class LogCopy:
    """The copy of one log while it is being written; belongs to the thread of the log's writer."""

    def __init__(self, folder: Path, name: str) -> None:
        """Opens the copy of that name, or begins it; `follow` fills it. A torn last line is cut off."""
        self._path = folder / COPY_FILE
        self.last_seq = 0
        """Row number up to which it holds the log."""
        found = _ends(self._path)
        if found is None or found[0] != name:
            self.begin(name)
            return
        _, self.last_seq, length = found
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(self._file, length)

    def begin(self, name: str) -> None:
        """Replace the file by an empty copy of this name."""
        if hasattr(self, "_file"):
            os.close(self._file)
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(_line(json.dumps({"copy": name})))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        sync_folder(self._path.parent)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self.last_seq = 0

    def add(self, rows: Iterable[str], upto: int) -> None:
        """Add the next rows, as `as_row` makes them. Raises OSError, and holds none of them then."""
        data = b"".join(map(_line, rows))
        length = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(f"{self._path}: only {written} of {len(data)} bytes could be written")
        except OSError:
            os.ftruncate(self._file, length)
            raise
        self.last_seq = upto

    def follow(self, db: sqlite3.Connection, upto: int) -> None:
        """Add the rows of the log up to `upto`. Raises OSError, and holds none of the last ones then."""
        while self.last_seq < upto:
            last = min(upto, self.last_seq + _ROWS_AT_ONCE)
            self.add(_texts(db, self.last_seq, last), last)

    def close(self) -> None:
        """Make it durable and close it."""
        os.fsync(self._file)
        os.close(self._file)


def read_copy(folder: Path) -> Copied:
    """Everything that can be read of a copy; raises FileNotFoundError where there is none."""
    found = Copied()
    with (folder / COPY_FILE).open("rb") as lines:
        for number, line in enumerate(lines):
            row = _parsed(line)
            if row is None:
                found.damaged_lines += 1
            elif number == 0:
                found.name = str(row.get("copy", ""))
            elif isinstance(row.get("seq"), int):
                found.rows[row["seq"]] = line[9:-1].decode()
    return found


def damaged_lines(folder: Path) -> int:
    """How many lines are not what was written; 0 where there is no copy."""
    try:
        with (folder / COPY_FILE).open("rb") as lines:
            return sum(not _sound(line) for line in lines)
    except FileNotFoundError:
        return 0


def _texts(db: sqlite3.Connection, after: int, upto: int) -> Iterator[str]:
    """The rows as JSON, in order. What a task's decisions are about stands with the first of them here."""
    rows: list[tuple[int, str, str, str]] = []
    for kind, table in _KINDS.items():
        for values in find(db, table, "WHERE seq > ? AND seq <= ?", after, upto):
            record = values[3] if table == "episodes" else values[-1]
            rows.append((values[1], kind, record, values[2] if table == "decisions" else ""))
    told: set[str] = set()
    for seq, kind, record, task_id in sorted(rows):
        text = ""
        if kind == "decision" and task_id not in told:
            told.add(task_id)
            context = next(find(db, "contexts", "WHERE task_id = ?", task_id), None)
            text = "" if context is None else context[1]
        yield as_row(seq, kind, record, text)


def as_row(seq: int, kind: str, record: str, text: str = "") -> str:
    """JSON of one row; `text` is what a decision was about."""
    about = f', "text": {json.dumps(text)}' if text else ""
    return f'{{"seq": {seq}, "{kind}": {record}{about}}}'


def _line(text: str) -> bytes:
    data = text.encode()
    return b"%08x %s\n" % (zlib.crc32(data), data)


def _sound(line: bytes) -> bool:
    return line.endswith(b"\n") and line[:9] == b"%08x " % zlib.crc32(line[9:-1])


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not _sound(line):
        return None
    row: dict[str, Any] = json.loads(line[9:-1])
    return row


def _ends(path: Path) -> tuple[str, int, int] | None:
    """Name in the first line, row number of the last whole one, length up to its end; None where it cannot be used."""
    try:
        with path.open("rb") as file:
            head = _parsed(file.readline())
            if head is None:
                return None
            start, size = file.tell(), path.stat().st_size
            tail = _TAIL_BYTES
            while True:
                file.seek(max(start, size - tail))
                data = file.read()
                length = size - len(data) + data.rfind(b"\n") + 1
                lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
                if size - tail <= start or len(lines) > 1:
                    break
                tail *= 4
            if not lines:
                return str(head.get("copy", "")), 0, start
            last = _parsed(lines[-1])
            return None if last is None else (str(head.get("copy", "")), int(last.get("seq", 0)), length)
    except FileNotFoundError:
        return None
