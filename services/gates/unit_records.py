"""Reads what `checks/run_tests.py` told through its channel: the only proof that tests have run, and have passed.

A pass needs all of it: records that are whole, in order and rightly signed; every test that the source declares and
every one that pytest collected, each through its three phases; at least one that ran; the test that must fail failed
by its assertion; and the exit status that follows from just that one failure. Pure; which attacks this leaves is said
in the README.
"""

from __future__ import annotations

import hmac
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from protocol.messages.failure import Finding
from services.gates.tool_run import Reading, ToolRun
from services.gates.traces import place_in, said_in

_PHASES: Final = ("setup", "call", "teardown")
_CANARY_ONLY: Final = 1
"""pytest's exit status when tests failed: the one that must."""
_Record = Mapping[str, Any]


class _Tampered(Exception):
    """The records are not what the runner wrote."""


@dataclass(slots=True)
class _Told:
    """The records, sorted."""

    expected: list[str] | None = None
    collected: list[str] = field(default_factory=list)
    count: int = -1
    uncollected: list[_Record] = field(default_factory=list)
    tests: dict[str, list[_Record]] = field(default_factory=lambda: defaultdict(list))
    canary: list[_Record] = field(default_factory=list)
    status: int | None = None


def read(run: ToolRun) -> Reading:
    """A finding per failed test, or one that says why the run as a whole proves nothing."""
    try:
        told = _sorted(_records(run.records, run.key))
    except (_Tampered, ValueError, TypeError, LookupError) as err:
        return Reading((run.finding(f"the results were tampered with: {err}", rule="tampered"),))
    findings = [finding for record in told.uncollected for finding in _uncollected(run, record)]
    findings += [finding for phases in told.tests.values() for finding in _failures(run, phases)]
    if findings:
        return Reading(tuple(findings))
    reason = _unproven(run, told)
    return Reading() if reason is None else Reading((run.finding(reason[1], rule=reason[0]),))


def _records(data: bytes, key: bytes) -> Iterator[_Record]:
    lines = data.split(b"\n")
    if lines.pop():
        raise _Tampered("the last record is not whole")
    for number, line in enumerate(lines):
        signature, _, content = line.partition(b" ")
        if not hmac.compare_digest(hmac.new(key, content, "sha256").hexdigest().encode(), signature):
            raise _Tampered("a record is not signed by the runner")
        record = json.loads(content)
        if record["number"] != number:
            raise _Tampered("a record is missing or repeated")
        yield record


def _sorted(records: Iterator[_Record]) -> _Told:
    told = _Told()
    for record in records:
        if told.status is not None:
            raise _Tampered("there are records behind the last one")
        match record["event"]:
            case "expected":
                told.expected = record["tests"]
            case "collected":
                told.collected, told.count = record["tests"], record["count"]
            case "collect":
                told.uncollected.append(record)
            case "test":
                told.tests[record["node"]].append(record)
            case "canary":
                told.canary.append(record)
            case "finished":
                told.status = record["status"]
    return told


def _unproven(run: ToolRun, told: _Told) -> tuple[str, str] | None:
    """Why a run without a failure is no pass, as rule and message; None if it is one."""
    if told.expected is None or told.status is None:
        return "no-report", f"the test run was ended before its end (exit status {run.status}); {run.said()}"
    if missing := [name for name in told.expected if name not in told.collected]:
        if not told.collected:
            return "no-tests", f"no test was collected, of {_some(told.expected)}"
        return "not-run", f"these tests stand in the file and were not collected: {_some(missing)}"
    if told.count < 1:
        return "no-tests", "no test was collected: add functions test_… with assertions to the file"
    whole = [phases for phases in told.tests.values() if tuple(one["when"] for one in phases) in (_PHASES, _SKIPPED)]
    if len(whole) != told.count or len(told.tests) != told.count:
        return "inconsistent-report", f"of {told.count} collected tests {len(whole)} have run to their end"
    passed = sum(all(phase["outcome"] == "passed" for phase in phases) for phases in whole)
    if not passed:
        return "no-tests", f"no test has passed: all {told.count} were skipped or expected to fail"
    calls = [one for one in told.canary if one["when"] == "call"]
    if len(calls) != 1 or calls[0]["outcome"] != "failed" or not calls[0]["assertion"]:
        return "tampered", "a test that must fail did not: something has changed how tests are run"
    if (told.status, run.status) != (_CANARY_ONLY, _CANARY_ONLY):
        return "exit-status", f"all tests passed, yet the run ended with exit status {run.status}; {run.said()}"
    return None


_SKIPPED: Final = ("setup", "teardown")


def _uncollected(run: ToolRun, record: _Record) -> Iterator[Finding]:
    if record["outcome"] == "failed":
        file, line = place_in(record["text"], run.artefacts)
        yield run.finding(f"cannot be collected: {said_in(record['text'])}", file=file, line=line, rule="error")


def _failures(run: ToolRun, phases: list[_Record]) -> Iterator[Finding]:
    for phase in phases:
        name = phase["test"].replace("::", ".")
        if phase["outcome"] == "failed":
            file, line = place_in(phase["text"], run.artefacts)
            rule = "failure" if phase["when"] == "call" else "error"
            yield run.finding(f"{name}: {said_in(phase['text'])}", file=file, line=line, rule=rule)
        elif phase["outcome"] == "skipped" or phase["expected_failure"]:
            # A test may skip itself. Code that is tested may not talk its way out of it.
            judged = [file for file in phase["passed_through"] if file in run.under_check and file != run.target]
            if judged:
                what = "expected to fail" if phase["expected_failure"] else "skipped"
                message = f"{name}: {what} from within the code under test: {phase['text']}"
                yield run.finding(message, file=judged[-1], rule="skipped-by-code")


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
