"""What is known about the programs that gates run: one row per tool, found by the gate's argv.

The table of gates (registry/gates.yaml) says what to run; a row here says how to read it. A tool without a row is
judged by its exit status and by `file:line: message` lines.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from services.gates import junit_report, line_report, ruff_report
from services.gates.tool_run import Reading, ToolRun

PYTHON: Final = "{python}"
"""Placeholder of the interpreter in the argv of a gate."""


@dataclass(frozen=True, slots=True)
class Tool:
    """How a program is started and read."""

    read: Callable[[ToolRun], Reading]
    runs_artefact: bool = True
    """Whether it executes what it judges: then hanging or eating memory is the artefact's fault, not the tool's."""
    on_tests: bool = False
    """Started on the test files of the workspace instead of on the artefacts under check."""
    arguments: tuple[str, ...] = ()
    """Added to every call: what its report needs."""
    reports: bool = False
    """It fills the report file."""


TOOLS: Final[Mapping[str, Tool]] = {
    "ruff": Tool(ruff_report.read, runs_artefact=False),
    "pytest": Tool(junit_report.read, on_tests=True, arguments=junit_report.ARGUMENTS, reports=True),
}

OTHER: Final = Tool(line_report.read)


def tool_name(argv: Sequence[str]) -> str:
    """The program behind an argv: the module of `{python} -m module`, else the command's own name."""
    if len(argv) > 2 and argv[0] == PYTHON and argv[1] == "-m":
        return argv[2]
    return "python" if argv[0] == PYTHON else PurePosixPath(argv[0]).name


def missing(argv: Sequence[str], find: Callable[[str], str | None]) -> str | None:
    """What this argv needs and the sandbox does not have, None if nothing; `find` looks commands up in it."""
    if argv[0] != PYTHON:
        return None if find(argv[0]) else f"the command {argv[0]!r}"
    # The sandbox shows the installation this process runs from, so what can be imported is the same.
    if len(argv) > 2 and argv[1] == "-m" and importlib.util.find_spec(argv[2].partition(".")[0]) is None:
        return f"the Python module {argv[2]!r}"
    return None
