"""Reads files of recorded outcomes: one JSON object a line, with `prompt`, `weak_correct`, `strong_correct`.

`domain`, where a line has it, is the task's cluster. A line that cannot be used ends the command with
`file:line: field: reason`, since figures over half a file would pass for figures over the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.ctl.outcomes import BadInput

_MAX_LINE_BYTES: Final = 1024 * 1024


class RecordedOutcome(BaseModel):
    """What both models made of one prompt."""

    model_config = ConfigDict(frozen=True, strict=True)

    prompt: str = Field(min_length=1, max_length=65_536)
    weak_correct: bool
    strong_correct: bool
    domain: str = Field(default="", max_length=128)


def read_outcomes(path: Path) -> list[RecordedOutcome]:
    """All rows of a file; empty lines are skipped. Raises BadInput with file, line and field."""
    rows = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > _MAX_LINE_BYTES:
                    raise BadInput(f"{path}:{number}: longer than {_MAX_LINE_BYTES} bytes")
                if line.strip():
                    rows.append(_row(line, f"{path}:{number}"))
    except OSError as err:
        raise BadInput(f"{path} cannot be read: {err.strerror}") from err
    return rows


def _row(line: bytes, where: str) -> RecordedOutcome:
    try:
        return RecordedOutcome.model_validate(json.loads(line))
    except ValidationError as err:
        first = err.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        raise BadInput(f"{where}: {field}: {first['msg']}") from err
    except (ValueError, RecursionError) as err:
        raise BadInput(f"{where}: it is not JSON: {err}") from err
