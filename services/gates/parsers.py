"""How the findings of a command are read, by the `parser` of its gate: one row per format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from services.gates import json_reports, junit_report, line_report, ruff_report, unit_records
from services.gates.tool_run import Reading, ToolRun

PARSERS: Final[Mapping[str, Callable[[ToolRun], Reading]]] = {
    "lines": line_report.read,
    "pattern": line_report.read_pattern,
    "diff": line_report.read_diff,
    "ruff": ruff_report.read,
    "sarif": json_reports.read_sarif,
    "junit": junit_report.read,
    "mypy": json_reports.read_mypy,
    "shellcheck": json_reports.read_shellcheck,
    "rumdl": json_reports.read_rumdl,
    "tests": unit_records.read,
}
