"""Reads what `ruff check` and `ruff format --check` print with `--output-format json`: both use one shape.

A list of objects with code, message, filename and location (row, column, from 1). Each place the formatter would
change is an edit of the single diagnostic it gives for a file, and becomes a finding of its own here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from protocol.messages.failure import Finding
from services.gates.tool_run import Reading, ToolRun

_UNFORMATTED: Final = "unformatted"


def read(run: ToolRun) -> Reading:
    """Findings per diagnostic. Anything but such a list, or a failure without one, means that ruff did not work."""
    try:
        diagnostics = json.loads(run.answer())
        findings = tuple(finding for item in diagnostics for finding in _findings(run, item))
    except (ValueError, TypeError, LookupError, RecursionError):
        return Reading(broken=f"ruff gave no diagnostics (exit status {run.status}): {run.said()}")
    if run.status != 0 and not findings:
        return Reading(broken=f"ruff stopped with exit status {run.status}: {run.said()}")
    return Reading(findings)


def _findings(run: ToolRun, item: Mapping[str, Any]) -> Iterator[Finding]:
    rule, file = item["code"], item["filename"]
    if rule != _UNFORMATTED:
        place = item["location"]
        yield run.finding(item["message"], file=file, line=place["row"], column=place["column"], rule=rule)
        return
    for edit in item["fix"]["edits"]:
        first, last = edit["location"], edit["end_location"]
        lines = f"line {first['row']}" if first["row"] == last["row"] else f"lines {first['row']} to {last['row']}"
        message = f"not formatted: at {lines} put {json.dumps(edit['content'], ensure_ascii=False)}"
        yield run.finding(message, file=file, line=first["row"], column=first["column"], rule=rule)
