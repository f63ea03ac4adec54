"""Reads requests that somebody has labelled: JSON lines with `request` and `decomposable` (1, 0, true or false).

A line that cannot be used is an error that names file, line and field: a judge that was trained on half a file would
pass for one that was trained on all of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.planner.divide import Judge, RuleJudge

MAX_ROWS: Final = 5_000
"""Training takes time with the cube of the rows: two seconds for a thousand, some minutes for five thousand."""
_MAX_FILE_BYTES: Final = 64 * 1024 * 1024


class BadRow(ValueError):
    """A file that cannot be used; the text names file, line and field."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A request, and whether its answer divides into independent points."""

    request: str
    divides: bool


def read_labelled(path: Path) -> list[Labelled]:
    """All rows of a file; empty lines are skipped. Raises BadRow."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise BadRow(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        lines = path.read_bytes().split(b"\n")
    except OSError as err:
        raise BadRow(f"{path}: {err.strerror}") from err
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(line, f"{path}:{number}"))
        if len(rows) > MAX_ROWS:
            raise BadRow(f"{path}:{number}: more than {MAX_ROWS} rows")
    if not rows:
        raise BadRow(f"{path}: no row in it")
    return rows


def trained_on(rows: list[Labelled]) -> Judge:
    """A judge that has learned from these rows. Raises ValueError where they are too few or all of one label."""
    from services.planner.trained import TrainedJudge  # here, since NumPy takes 50 ms and few planners have rows

    return TrainedJudge([row.request for row in rows], [row.divides for row in rows])


def judge_of(path: Path) -> Judge:
    """The judge that an operator's file asks for: trained where it exists, the rules otherwise. Raises BadRow."""
    if not path.exists():
        return RuleJudge()
    rows = read_labelled(path)
    try:
        return trained_on(rows)
    except ValueError as err:
        raise BadRow(f"{path}: {err}") from err


def _row(line: bytes, where: str) -> Labelled:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise BadRow(f"{where}: not JSON: {err}") from err
    if not isinstance(value, dict):
        raise BadRow(f"{where}: expected an object")
    request, divides = value.get("request"), value.get("decomposable")
    if not isinstance(request, str) or not request.strip():
        raise BadRow(f"{where}: request: expected a text")
    if divides not in (0, 1) or isinstance(divides, float):
        raise BadRow(f"{where}: decomposable: expected 1 or 0, got {divides!r}")
    return Labelled(request, bool(divides))
