"""Finds, in the traceback of a failed test, the place in the workspace and what was said there."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Final

from services.gates.sandbox import WORKSPACE

_PLACE: Final = re.compile(rf"^(?:{re.escape(WORKSPACE)}/)?([\w.\-]+):(\d{{1,9}}): ", re.MULTILINE | re.ASCII)
"""A line of a short traceback that lies in the workspace."""
_ERROR: Final = re.compile(r"^E +(.*)$", re.MULTILINE)
_SYNTAX: Final = re.compile(
    rf'^E +File "(?:{re.escape(WORKSPACE)}/)?([\w.\-]+)", line (\d{{1,9}})$', re.MULTILINE | re.ASCII
)


def place_in(trace: str, files: Container[str]) -> tuple[str | None, int | None]:
    """File and line of the innermost place in these files, what is below it being a library's; None without one."""
    places = [(file, line) for file, line in _PLACE.findall(trace) + _SYNTAX.findall(trace) if file in files]
    return (places[-1][0], int(places[-1][1])) if places else (None, None)


def said_in(trace: str) -> str:
    """The lines of the error itself, or the end of the trace where there are none."""
    return "\n".join(_ERROR.findall(trace)) or trace[-500:]
