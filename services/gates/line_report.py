"""Reads `file:line[:column]: message` lines, which most compilers and checkers print; for tools without an own parser.

The exit status decides: 0 is a pass whatever was printed. A failure without any such line is one finding that carries
the end of the output.
"""

from __future__ import annotations

import re
from typing import Final

from services.gates.sandbox import WORKSPACE
from services.gates.tool_run import Reading, ToolRun

_LINE: Final = re.compile(
    rf"^(?:{re.escape(WORKSPACE)}/|\./)?([\w.\-]{{1,255}}):(\d{{1,9}}):(?:(\d{{1,9}}):)? *(\S.*)$",
    re.MULTILINE | re.ASCII,
)


def read(run: ToolRun) -> Reading:
    """Findings in files of the workspace, in the order printed."""
    if run.status == 0:
        return Reading()
    text = b"\n".join((run.out, run.err)).decode("utf-8", "replace")
    findings = tuple(
        run.finding(message, file=file, line=int(line), column=int(column) if column else None)
        for file, line, column, message in _LINE.findall(text)
        if file in run.artefacts
    )
    return Reading(findings or (run.finding(f"exit status {run.status}: {run.said()}", rule="exit-status"),))
