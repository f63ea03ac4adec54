"""Reads the JUnit XML that pytest writes: the only proof that tests have run, have all run, and have passed.

Exit status 0 alone proves nothing: `os._exit(0)` in a test gives it too. A report is believed when it is whole, when
its counts agree with the cases in it and with the number of tests that pytest said it collected (`pytest.exit` in a
fixture leaves out the rest without a trace in the report), and when it agrees with the exit status. The report is
written by the process that runs the code under test, so code that sets out to forge it can; what this rules out is
every way of ending a run early, and runs in which nothing was tested.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final
from xml.etree import ElementTree

from protocol.messages.failure import Finding
from services.gates.sandbox import REPORT, WORKSPACE
from services.gates.tool_run import Reading, ToolRun

ARGUMENTS: Final = ("--junit-xml", REPORT, "-o", "junit_family=xunit1", "--verbosity", "0")
"""What pytest needs to write it; only the xunit1 family has files and lines, and -q hides how many were collected."""

_COLLECTED: Final = re.compile(rb"^collected (\d{1,9}) items?(.*)$", re.MULTILINE)

_PLACE: Final = re.compile(rf"^(?:{re.escape(WORKSPACE)}/)?([\w.\-]+):(\d+): ", re.MULTILINE | re.ASCII)
"""A line of a short traceback that lies in the workspace."""
_ERROR: Final = re.compile(r"^E +(.*)$", re.MULTILINE)
_SYNTAX: Final = re.compile(rf'^E +File "(?:{re.escape(WORKSPACE)}/)?([\w.\-]+)", line (\d+)$', re.MULTILINE | re.ASCII)
_COUNTS: Final = ("tests", "failures", "errors", "skipped")


def read(run: ToolRun) -> Reading:
    """A finding per failed test, or one that says why the run as a whole proves nothing."""
    suites = _suites(run.report or b"")
    if suites is None:
        message = (
            f"the test run ended without a complete report (exit status {run.status}): something ended the process"
        )
        return Reading((run.finding(f"{message}; {run.said()}", rule="no-report"),))
    cases = [case for suite in suites for case in suite.iter("testcase")]
    findings = [finding for case in cases for finding in _findings(run, case)]
    if findings:
        return Reading(tuple(findings))
    counted = {name: sum(_count(suite, name) for suite in suites) for name in _COUNTS}
    skipped = sum(case.find("skipped") is not None for case in cases)
    if counted != {"tests": len(cases), "failures": 0, "errors": 0, "skipped": skipped}:
        message = f"the report contradicts itself: it counts {counted}, and holds {len(cases)} cases"
        return Reading((run.finding(message, rule="inconsistent-report"),))
    collected = _collected(run.out)
    if collected != len(cases):
        message = f"of {collected} collected tests {len(cases)} are reported: something ended the run early"
        return Reading((run.finding(message, rule="inconsistent-report"),))
    if len(cases) == skipped:
        message = f"no test has run ({skipped} skipped): add functions test_… with assertions to the file"
        return Reading((run.finding(message, rule="no-tests"),))
    if run.status != 0:
        message = (
            f"all {len(cases)} reported tests passed, yet pytest ended with exit status {run.status}; {run.said()}"
        )
        return Reading((run.finding(message, rule="exit-status"),))
    return Reading()


def _suites(report: bytes) -> list[ElementTree.Element] | None:
    try:
        text = report.decode("utf-8")
        # Entities could expand without end, and need a document type; pytest writes none.
        if "<!" in text.replace("<![CDATA[", ""):
            return None
        # Decoded already, and so the declaration of an encoding has no effect.
        root = ElementTree.fromstring(text)  # noqa: S314  without a document type there is nothing to expand
    except (UnicodeDecodeError, ElementTree.ParseError):
        return None
    suites = list(root) if root.tag == "testsuites" else []
    return suites if suites and all(suite.tag == "testsuite" for suite in suites) else None


def _collected(out: bytes) -> int | None:
    """How many cases a report must have; a file skipped as a whole is one, though no item was collected from it."""
    line = _COLLECTED.search(out)
    if line is None:
        return None
    extra = {name: int(number) for number, name in re.findall(rb"(\d{1,9}) (deselected|skipped)", line[2])}
    return int(line[1]) - extra.get(b"deselected", 0) + extra.get(b"skipped", 0)


def _count(suite: ElementTree.Element, name: str) -> int:
    text = suite.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def _findings(run: ToolRun, case: ElementTree.Element) -> Iterator[Finding]:
    for kind in ("failure", "error"):
        for problem in case.findall(kind):
            trace = problem.text or ""
            test = ".".join(part for part in (case.get("classname"), case.get("name")) if part)
            said = "\n".join(_ERROR.findall(trace)) or problem.get("message") or trace[-500:]
            # The innermost place in the workspace: what is below it is a library's.
            places = _PLACE.findall(trace) + _SYNTAX.findall(trace)
            file, line = places[-1] if places else (case.get("file"), None)
            known = file if file in run.artefacts else None
            number = int(line) if line is not None and known and len(line) < 10 else _line(case)
            yield run.finding(f"{test}: {said}", file=known, line=number, rule=kind)


def _line(case: ElementTree.Element) -> int | None:
    """Line of the test function, which the report counts from 0."""
    text = case.get("line", "")
    return int(text) + 1 if text.isascii() and text.isdigit() and len(text) < 10 else None
