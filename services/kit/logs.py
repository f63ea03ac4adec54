"""JSON lines: one object per line, one file per process, events as constants with declared fields.

`tail -F | jq` and lnav read them (deploy/lnav). Prompts, answers and secrets are never logged: events carry ids,
counts and durations. An undeclared field is a programming error and raises, so that logs stay searchable.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from services.kit.clock import Clock

Level = Literal["debug", "info", "warning", "error"]
LEVELS: Final[tuple[Level, ...]] = ("debug", "info", "warning", "error")
_MAX_FIELD_CHARS: Final = 2_000
_MAX_BATCH_LINES: Final = 1_000
_MAX_FILE_BYTES: Final = 64 * 1024 * 1024
_as_json: Final = msgspec.json.Encoder(enc_hook=str).encode


@dataclass(frozen=True, slots=True)
class LogEvent:
    """A kind of line: its stable name, the fields it may carry (space separated), its level."""

    name: str
    fields: str
    level: Level = "info"

    allowed: frozenset[str] = field(init=False, repr=False)
    """The declared fields, one by one."""

    def __post_init__(self) -> None:
        """Take the declaration apart once: every line asks for it."""
        object.__setattr__(self, "allowed", frozenset(self.fields.split()))


class Log:
    """Appends lines to `<folder>/<service>.jsonl`; at 64 MiB the file is moved to `.1` and begun anew.

    Lines below `level` are left out. A `batched` log makes and writes its lines at `flush`, for a loop in which others
    wait for every turn; what was not flushed a kill -9 takes. Not for several threads at once.
    """

    def __init__(
        self, folder: Path, service: str, clock: Clock, *, level: Level = "info", batched: bool = False
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = folder / f"{service}.jsonl"
        self._service = service
        self._clock = clock
        self._left_out = frozenset(LEVELS[: LEVELS.index(level)])
        self._batched = batched
        self._pending: list[tuple[LogEvent, int, dict[str, Any]]] = []
        """Lines to be made: kind, unix ms, fields."""
        self._fd = self._open()

    def keeps(self, event: LogEvent) -> bool:
        """Whether lines of this kind are written at all: spares making their fields."""
        return event.level not in self._left_out

    def write(self, event: LogEvent, **fields: Any) -> None:
        """Write one line. Raises KeyError for a field that the event does not declare; None values are left out."""
        if not fields.keys() <= event.allowed:
            unknown = next(name for name in fields if name not in event.allowed)
            raise KeyError(f"{event.name} does not declare the field {unknown!r}")
        if not self.keeps(event):
            return
        self._pending.append((event, self._clock.now_ms(), fields))
        if not self._batched or len(self._pending) >= _MAX_BATCH_LINES:
            self.flush()

    def flush(self) -> None:
        """Write the lines of a batched log."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        data = b"".join(self._line(*one) for one in pending)
        if os.fstat(self._fd).st_size + len(data) > _MAX_FILE_BYTES:
            self._path.replace(self._path.with_suffix(".jsonl.1"))
            os.close(self._fd)
            self._fd = self._open()
        os.write(self._fd, data)

    def close(self) -> None:
        """Write what is left and close the file."""
        self.flush()
        os.close(self._fd)

    def _line(self, event: LogEvent, at_ms: int, fields: dict[str, Any]) -> bytes:
        line: dict[str, Any] = {
            "ts": _stamp(at_ms),
            "level": event.level,
            "service": self._service,
            "event": event.name,
        }
        for name, value in fields.items():
            if value is not None:
                line[name] = value[:_MAX_FIELD_CHARS] if isinstance(value, str) else value
        return _encoded(line) + b"\n"

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _encoded(line: dict[str, Any]) -> bytes:
    try:
        return _as_json(line)
    except UnicodeEncodeError:  # half of a surrogate pair: a model may write anything
        return json.dumps(line, default=str).encode()


def _stamp(at_ms: int) -> str:
    """ISO 8601 in UTC with milliseconds."""
    return f"{_second(at_ms // 1000)}.{at_ms % 1000:03d}Z"


@lru_cache(maxsize=2)
def _second(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
