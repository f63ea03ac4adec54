"""Where a command writes: tables and colour on a terminal, plain lines in a pipe, JSON on request.

Text from models, tasks and logs goes through `printable` first: an answer with escape sequences must not drive
someone's terminal. In a pipe nothing of rich is used at all, so no environment variable can bring colour back.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final, TextIO

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

#: Word of a state or verdict -> its colour on a terminal.
STYLES: Final[Mapping[str, str]] = {
    "ok": "green",
    "pass": "green",
    "ready": "green",
    "done": "green",
    "succeeded": "green",
    "warn": "yellow",
    "skipped": "yellow",
    "suspect": "yellow",
    "starting": "yellow",
    "loading": "yellow",
    "cancelled": "yellow",
    "retry": "yellow",
    "fail": "red",
    "failed": "red",
    "error": "red",
    "fatal": "red",
    "backoff": "red",
    "stopped": "red",
    "absent": "red",
    "running": "cyan",
    "inferring": "cyan",
    "checking": "cyan",
}

_KEPT: Final = "\n\t"


def printable(text: str) -> str:
    """Text without control and direction characters; line breaks and tabs stay."""
    return "".join(char for char in text if char in _KEPT or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def one_line(text: str, width: int) -> str:
    """Text on one line, cut to `width` characters with `...` at the end."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= width else f"{flat[: max(0, width - 3)]}..."


class Screen:
    """Output of one command. `json` asks for one document, or one a line; `rich` is set on a real terminal only.

    JSON on a terminal is ASCII, since JSON itself escapes only some of the characters that can drive one.
    """

    def __init__(self, out: TextIO, err: TextIO, *, as_json: bool) -> None:
        self.json = as_json
        self._out = out
        self._err = err
        live = not as_json and out.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        self.rich: Console | None = Console(file=out, highlight=False, markup=False, emoji=False) if live else None

    def line(self, text: str = "", *, style: str | None = None) -> None:
        """One line, or several, of text."""
        clean = printable(text)
        if self.rich is not None:
            self.rich.print(Text(clean, style=style or ""), soft_wrap=True)
        else:
            print(clean, file=self._out, flush=True)

    def heading(self, text: str) -> None:
        """A line that begins a section."""
        self.line()
        self.line(text if self.rich else f"== {text}", style="bold")

    def note(self, text: str) -> None:
        """A line about the work itself, on standard error so that a pipe carries results only."""
        print(printable(text), file=self._err, flush=True)

    def document(self, value: Any) -> None:
        """One JSON document, on several lines."""
        print(json.dumps(_plain(value), ensure_ascii=self._out.isatty(), indent=2), file=self._out, flush=True)

    def record(self, value: Any) -> None:
        """One JSON document on one line."""
        print(json.dumps(_plain(value), ensure_ascii=self._out.isatty()), file=self._out, flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; in a pipe its columns are separated by two spaces or more, the last one is free text."""
        if self.rich is not None:
            self.rich.print(grid(columns, rows))
            return
        for row in aligned(columns, rows):
            print(row, file=self._out, flush=True)


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], *, live: bool = False) -> RenderableType:
    """The table for a terminal, states coloured; a `live` one cuts cells, so that every row stays one line."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="ellipsis" if live else "fold", no_wrap=live)
    for row in rows:
        table.add_row(*(Text(printable(cell), style=STYLES.get(cell, "")) for cell in row))
    return table


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same table as plain lines; an empty cell is `-`, so that every line has as many fields."""
    cells = [list(columns), *([one_line(cell, 400) or "-" for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def seconds(duration_ms: float | None) -> str:
    """A duration for people: `0.42 s`, `12.3 s`, `3 min 20 s`; empty for None."""
    if duration_ms is None:
        return ""
    value = duration_ms / 1000
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def mebibytes(size_bytes: int) -> str:
    """A size for people: `131 MiB`."""
    return f"{size_bytes / 1024**2:.0f} MiB"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
