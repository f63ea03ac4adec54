"""Reports of tools into findings, and the many ways in which a test run is not a pass."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest

from protocol.messages.failure import Category
from services.gates import json_reports, junit_report, line_report, ruff_report
from services.gates.parsers import PARSERS
from services.gates.tool_run import ToolRun
from services.kit.registry.entries import Parser


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
    assert junit_report.read(tool_run(report=junit(PASSED, tests=1))).findings == ()
    assert junit_report.read(tool_run(out=junit(PASSED, tests=1))).findings == ()


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
    assert only_rule(tool_run(report=report, status=status)) == rule


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


def test_a_pattern_reads_lines_and_joins_a_place_with_the_message_below_it() -> None:
    pattern = r"^(?:(?P<file>\S+):(?P<line>\d+)$|(?P<rule>\w+)Error: (?P<message>.*)$)"
    run = tool_run(status=1, err="/workspace/a.py:3\nSyntaxError: no\nother\nTypeError: yes\n")
    first, second = line_report.read_pattern(replace(run, pattern=pattern)).findings
    assert (first.file, first.line, first.rule, first.message) == ("a.py", 3, "Syntax", "no")
    assert (second.file, second.line, second.rule) == ("a.py", None, "Type")


def test_a_diff_is_a_finding_per_hunk_that_says_how_it_should_read() -> None:
    diff = "--- a.py.orig\n+++ a.py\n@@ -1,2 +1,2 @@\n-x\n+y\n z\n@@ -9,1 +9,1 @@\n-p\n+q\n"
    first, second = line_report.read_diff(tool_run(status=1, out=diff)).findings
    assert (first.line, first.message) == (1, "not formatted; it should read:\ny\nz")
    assert second.line == 9


def test_shellcheck_mypy_and_rumdl_have_place_and_rule() -> None:
    shell = {"comments": [{"file": "a.py", "line": 2, "column": 6, "code": 2154, "message": "m", "level": "warning"}]}
    types = {"file": "a.py", "line": 2, "column": 5, "message": "m", "hint": None, "code": "attr", "severity": "error"}
    note = {**types, "severity": "note"}
    text = [{"file": "a.py", "line": 2, "column": 6, "rule": "MD022", "message": "m"}]
    for read, out, rule in (
        (json_reports.read_shellcheck, json.dumps(shell), "SC2154"),
        (json_reports.read_mypy, f"{json.dumps(types)}\n{json.dumps(note)}\n", "attr"),
        (json_reports.read_rumdl, json.dumps(text), "MD022"),
    ):
        (finding,) = read(tool_run(status=1, out=out)).findings
        assert (finding.file, finding.line, finding.column, finding.rule) == ("a.py", 2, 6, rule)


def test_sarif_leaves_notes_out_and_reads_a_report_file_before_the_output() -> None:
    place = {"physicalLocation": {"artifactLocation": {"uri": "file:///workspace/a.py"}, "region": {"startLine": 4}}}
    results = [
        {"ruleId": "R1", "level": "error", "message": {"text": "bad"}, "locations": [place]},
        {"ruleId": "R2", "level": "note", "message": {"text": "fine"}},
    ]
    report = json.dumps({"version": "2.1.0", "runs": [{"results": results}]})
    (finding,) = json_reports.read_sarif(tool_run(status=1, out="noise", report=report)).findings
    assert (finding.file, finding.line, finding.rule, finding.message) == ("a.py", 4, "R1", "bad")


@pytest.mark.parametrize("out", ["", "{}", "[1]", "[" * 99_999, '{"runs": [{"results": [1]}]}', "\x00"])
def test_an_analyser_whose_output_cannot_be_read_has_not_worked(out: str) -> None:
    for read in (json_reports.read_shellcheck, json_reports.read_sarif, json_reports.read_mypy):
        assert read(tool_run(status=2, out=out)).broken


def test_every_parser_of_the_registry_is_there() -> None:
    assert tuple(PARSERS) == get_args(Parser)
