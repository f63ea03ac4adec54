"""Reads text: `file:line[:column]: message` lines, lines by a pattern of gates.yaml, and unified diffs.

The exit status decides: 0 is a pass whatever was printed. A failure without anything that can be read is one finding
that carries the end of the output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from protocol.messages.failure import Finding
from services.gates.sandbox import WORKSPACE
from services.gates.tool_run import Reading, ToolRun

_LINE: Final = re.compile(
    rf"^(?:{re.escape(WORKSPACE)}/|\./)?([\w.\-]{{1,255}}):(\d{{1,9}}):(?:(\d{{1,9}}):)? *(\S.*)$",
    re.MULTILINE | re.ASCII,
)
_HUNK: Final = re.compile(r"^@@ -(\d{1,9})(?:,(\d{1,9}))? \+\d{1,9}(?:,\d{1,9})? @@", re.ASCII)
_OF_FILE: Final = re.compile(rf"^\+\+\+ (?:{re.escape(WORKSPACE)}/)?([\w.\-]{{1,255}})", re.ASCII)
_MAX_LINE_CHARS: Final = 2_000
"""Longer lines are nobody's finding, and a pattern could take long over them."""


def read(run: ToolRun) -> Reading:
    """Findings in files of the workspace, in the order printed."""
    if run.status == 0:
        return Reading()
    findings = tuple(
        run.finding(message, file=file, line=int(line), column=int(column) if column else None)
        for file, line, column, message in _LINE.findall(_text(run))
        if file in run.artefacts
    )
    return _or_the_end(run, findings)


def read_pattern(run: ToolRun) -> Reading:
    """Findings by the gate's own pattern; a match without a message gives the place of the next one that has one."""
    if run.status == 0:
        return Reading()
    return _or_the_end(run, tuple(_matches(run, re.compile(run.pattern or ""))))


def read_diff(run: ToolRun) -> Reading:
    """A finding per hunk of a unified diff between what is and what should be."""
    if run.status == 0:
        return Reading()
    hunks = tuple(_hunks(run))
    return Reading(hunks) if hunks else read(run)


def _text(run: ToolRun) -> str:
    return b"\n".join((run.answer(), run.err)).decode("utf-8", "replace")


def _or_the_end(run: ToolRun, findings: tuple[Finding, ...]) -> Reading:
    return Reading(findings or (run.finding(f"exit status {run.status}: {run.said()}", rule="exit-status"),))


def _matches(run: ToolRun, pattern: re.Pattern[str]) -> Iterator[Finding]:
    place: dict[str, str | None] = {}
    for line in _text(run).splitlines():
        match = pattern.search(line) if len(line) <= _MAX_LINE_CHARS else None
        if match is None:
            continue
        found = {**place, **{name: value for name, value in match.groupdict().items() if value is not None}}
        place = {}
        if (message := found.get("message")) is None:
            place = found
            continue
        file = (found.get("file") or run.target).removeprefix(f"{WORKSPACE}/")
        if file in run.artefacts:
            line_no, column = (_number(found.get(name)) for name in ("line", "column"))
            yield run.finding(message, file=file, line=line_no, column=column, rule=found.get("rule"))


def _hunks(run: ToolRun) -> Iterator[Finding]:
    file, first, body = run.target, 0, list[str]()
    for line in [*_text(run).splitlines(), "@@"]:
        if first and (line.startswith(("@@", "diff ", "--- "))):
            yield run.finding(
                "not formatted; it should read:\n" + "\n".join(body), file=file, line=first, rule="format"
            )
            first, body = 0, []
        if named := _OF_FILE.match(line):
            file = named[1]
        elif hunk := _HUNK.match(line):
            first = max(1, int(hunk[1]))
        elif first and line[:1] in (" ", "+"):
            body.append(line[1:])


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 10 else None
