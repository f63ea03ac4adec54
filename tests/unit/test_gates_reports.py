"""Reports of tools into findings, and the many ways in which a test run is not a pass."""

from __future__ import annotations

import json

import pytest

from protocol.messages.failure import Category
from services.gates import junit_report, line_report, ruff_report
from services.gates.tool_run import ToolRun
from services.gates.tools import missing, tool_name


def tool_run(*, status: int = 0, out: str = "", err: str = "", report: str | None = None) -> ToolRun:
    return ToolRun(
        gate="g",
        category=Category.CODE,
        target="a.py",
        artefacts={"a.py": "a", "test_a.py": "tests"},
        status=status,
        out=out.encode(),
        err=err.encode(),
        report=None if report is None else report.encode(),
    )


def junit(cases: str, *, tests: int, failures: int = 0, errors: int = 0, skipped: int = 0) -> str:
    counts = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
    return f'<?xml version="1.0"?><testsuites><testsuite {counts}>{cases}</testsuite></testsuites>'


PASSED = '<testcase classname="test_a" name="test_x" file="test_a.py" line="1"/>'


def only_rule(run: ToolRun) -> str | None:
    (finding,) = junit_report.read(run).findings
    return finding.rule


def test_a_whole_report_with_exit_0_is_a_pass() -> None:
    assert junit_report.read(tool_run(out="collected 1 item\n", report=junit(PASSED, tests=1))).findings == ()


@pytest.mark.parametrize("out", ["", "collected 2 items\n", "collected 1 item / 1 skipped\n"])
def test_a_report_with_fewer_tests_than_were_collected_is_not_believed(out: str) -> None:
    assert only_rule(tool_run(out=out, report=junit(PASSED, tests=1))) == "inconsistent-report"


@pytest.mark.parametrize(
    ("report", "status", "rule"),
    [
        ("", 0, "no-report"),
        (junit(PASSED, tests=1)[:-5], 0, "no-report"),
        ("<html></html>", 0, "no-report"),
        ("<testsuites></testsuites>", 0, "no-report"),
        ('<!DOCTYPE x [<!ENTITY a "b">]>' + junit(PASSED, tests=1), 0, "no-report"),
        (junit(PASSED, tests=2), 0, "inconsistent-report"),
        (junit(PASSED, tests=1, failures=1), 0, "inconsistent-report"),
        (junit(PASSED, tests=1).replace('tests="1"', 'tests="²"'), 0, "inconsistent-report"),
        (junit("", tests=0), 0, "no-tests"),
        (junit("", tests=0), 5, "no-tests"),
        (junit('<testcase name="t"><skipped/></testcase>', tests=1, skipped=1), 0, "no-tests"),
        (junit(PASSED, tests=1), 1, "exit-status"),
        (junit(PASSED, tests=1), 3, "exit-status"),
    ],
)
def test_anything_less_is_not(report: str, status: int, rule: str) -> None:
    collected = f"collected {report.count('<testcase')} items\n"
    assert only_rule(tool_run(out=collected, report=report, status=status)) == rule


def test_a_failure_is_found_at_the_innermost_line_of_the_workspace() -> None:
    trace = (
        "test_a.py:9: in test_x\n    f()\n/workspace/a.py:3: in f\n    json.loads('x')\n"
        "/usr/lib/python3.11/json/__init__.py:346: in loads\nE   ValueError: no\n"
    )
    case = (
        f'<testcase classname="test_a" name="test_x" file="test_a.py" line="7"><failure message="m">{trace}'
        "</failure></testcase>"
    )
    (finding,) = junit_report.read(tool_run(status=1, report=junit(case, tests=1, failures=1))).findings
    assert (finding.file, finding.line, finding.artefact, finding.rule) == ("a.py", 3, "a", "failure")
    assert finding.message == "test_a.test_x: ValueError: no"


def test_ruff_diagnostics_have_place_and_rule() -> None:
    item = {"code": "F401", "filename": "/workspace/a.py", "location": {"row": 2, "column": 8}, "message": "unused"}
    (finding,) = ruff_report.read(tool_run(status=1, out=json.dumps([item]))).findings
    assert (finding.rule, finding.file, finding.line, finding.column) == ("F401", "a.py", 2, 8)


@pytest.mark.parametrize(("out", "status"), [("", 2), ("{}", 2), ("[]", 2), ("[1]", 1), ("oops", 0), ("[" * 99_999, 1)])
def test_ruff_without_diagnostics_has_not_worked(out: str, status: int) -> None:
    assert ruff_report.read(tool_run(status=status, out=out)).broken


def test_line_reports_keep_to_files_of_the_workspace() -> None:
    out = "a.py:3:7: bad thing\n/etc/passwd:1: other\nnothing\n"
    (finding,) = line_report.read(tool_run(status=1, out=out)).findings
    assert (finding.line, finding.column, finding.message) == (3, 7, "bad thing")


def test_a_silent_failure_is_still_a_finding_and_control_characters_do_not_travel() -> None:
    (finding,) = line_report.read(tool_run(status=3, err="\x1b[31mboom")).findings
    assert finding.rule == "exit-status"
    assert "\x1b" not in finding.message


def test_a_tool_is_known_by_its_module_or_its_command() -> None:
    assert tool_name(["{python}", "-m", "ruff", "check"]) == "ruff"
    assert tool_name(["/usr/bin/shellcheck", "x"]) == "shellcheck"
    assert missing(["{python}", "-m", "no_such_module_at_all"], lambda _: None) is not None
    assert missing(["{python}", "-m", "pytest"], lambda _: None) is None
    assert missing(["nosuch"], lambda _: None) is not None
