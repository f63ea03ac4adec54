"""Reads JUnit XML from a tool's report file, or from its output: a finding per failed case.

A report is believed when it is whole, when its counts agree with the cases in it, and with the exit status. It is only
as trustworthy as the process that wrote it: a gate that runs the artefact's own tests should use the parser `tests`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from xml.etree import ElementTree

from protocol.messages.failure import Finding
from services.gates.tool_run import Reading, ToolRun
from services.gates.traces import place_in, said_in

_COUNTS: Final = ("tests", "failures", "errors", "skipped")


def read(run: ToolRun) -> Reading:
    """A finding per failed case, or one that says why the report proves nothing."""
    suites = _suites(run.answer())
    if suites is None:
        message = f"the run ended without a complete report (exit status {run.status}); {run.said()}"
        return Reading((run.finding(message, rule="no-report"),))
    cases = [case for suite in suites for case in suite.iter("testcase")]
    findings = [finding for case in cases for finding in _findings(run, case)]
    if findings:
        return Reading(tuple(findings))
    counted = {name: sum(_count(suite, name) for suite in suites) for name in _COUNTS}
    skipped = sum(case.find("skipped") is not None for case in cases)
    if counted != {"tests": len(cases), "failures": 0, "errors": 0, "skipped": skipped}:
        message = f"the report contradicts itself: it counts {counted}, and holds {len(cases)} cases"
        return Reading((run.finding(message, rule="inconsistent-report"),))
    if len(cases) == skipped:
        return Reading((run.finding(f"no test has run ({skipped} skipped)", rule="no-tests"),))
    if run.status != 0:
        message = f"all {len(cases)} reported tests passed, yet the exit status is {run.status}; {run.said()}"
        return Reading((run.finding(message, rule="exit-status"),))
    return Reading()


def _suites(report: bytes) -> list[ElementTree.Element] | None:
    try:
        text = report.decode("utf-8")
        # Entities could expand without end, and need a document type, which no report has.
        if "<!" in text.replace("<![CDATA[", ""):
            return None
        # Decoded already, and so the declaration of an encoding has no effect.
        root = ElementTree.fromstring(text)  # noqa: S314  without a document type there is nothing to expand
    except (UnicodeDecodeError, ElementTree.ParseError):
        return None
    suites = list(root) if root.tag == "testsuites" else [root]
    return suites if suites and all(suite.tag == "testsuite" for suite in suites) else None


def _count(suite: ElementTree.Element, name: str) -> int:
    text = suite.get(name, "0" if name == "skipped" else "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def _findings(run: ToolRun, case: ElementTree.Element) -> Iterator[Finding]:
    for kind in ("failure", "error"):
        for problem in case.findall(kind):
            trace = problem.text or ""
            test = ".".join(part for part in (case.get("classname"), case.get("name")) if part)
            file, line = place_in(trace, run.artefacts)
            said = said_in(trace) or problem.get("message") or ""
            yield run.finding(f"{test}: {said}", file=file, line=line, rule=kind)
