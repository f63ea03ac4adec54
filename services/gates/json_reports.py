"""Reads the JSON of shellcheck, mypy and rumdl, and SARIF, which many analysers write: findings with place and rule.

All of them analyse and run nothing, so that output which cannot be read means that the tool did not work; it says
nothing about the artefact. ruff has a file of its own, because of what its formatter prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import unquote

from protocol.messages.failure import Finding
from services.gates.tool_run import Reading, ToolRun


def read_shellcheck(run: ToolRun) -> Reading:
    """`--format json1`."""
    return _read(run, _shellcheck)


def read_mypy(run: ToolRun) -> Reading:
    """`--output json`: an object a line; notes explain the error above them."""
    return _read(run, _mypy)


def read_rumdl(run: ToolRun) -> Reading:
    """`--output-format json`."""
    return _read(run, _rumdl)


def read_sarif(run: ToolRun) -> Reading:
    """SARIF 2.1.0; results of level `none` and `note` are not findings."""
    return _read(run, _sarif)


def _read(run: ToolRun, findings_of: Callable[[ToolRun, str], Iterator[Finding]]) -> Reading:
    try:
        findings = tuple(findings_of(run, run.answer().decode("utf-8")))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return Reading(broken=f"its output cannot be read (exit status {run.status}): {run.said()}")
    if run.status != 0 and not findings:
        return Reading(broken=f"it stopped with exit status {run.status}: {run.said()}")
    return Reading(findings)


def _shellcheck(run: ToolRun, text: str) -> Iterator[Finding]:
    for item in json.loads(text)["comments"]:
        yield run.finding(
            item["message"], file=item["file"], line=item["line"], column=item["column"], rule=f"SC{item['code']}"
        )


def _mypy(run: ToolRun, text: str) -> Iterator[Finding]:
    for line in text.splitlines():
        if not line.strip():
            continue
        item = json.loads(line)
        if item["severity"] == "error":
            column = max(0, item["column"] + 1)
            hint = f" ({item['hint']})" if item.get("hint") else ""
            yield run.finding(
                f"{item['message']}{hint}",
                file=item["file"],
                line=max(0, item["line"]),
                column=column,
                rule=item["code"],
            )


def _rumdl(run: ToolRun, text: str) -> Iterator[Finding]:
    for item in json.loads(text):
        yield run.finding(
            item["message"], file=item["file"], line=item["line"], column=item["column"], rule=item["rule"]
        )


_SILENT: Final = ("none", "note")


def _sarif(run: ToolRun, text: str) -> Iterator[Finding]:
    for one in json.loads(text)["runs"]:
        for result in one.get("results", []):
            if result.get("level", "warning") in _SILENT:
                continue
            locations: list[dict[str, Any]] = result.get("locations", [])
            place: dict[str, Any] = locations[0].get("physicalLocation", {}) if locations else {}
            region = place.get("region", {})
            uri = place.get("artifactLocation", {}).get("uri")
            yield run.finding(
                result["message"]["text"],
                file=unquote(uri).removeprefix("file://") if uri else None,
                line=region.get("startLine"),
                column=region.get("startColumn"),
                rule=result.get("ruleId"),
            )
