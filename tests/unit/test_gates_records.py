"""What a test run told through its channel, and the many ways in which that is not a pass."""

from __future__ import annotations

import hmac
import json
from typing import Any

import pytest

from protocol.messages.failure import Category
from services.gates import unit_records
from services.gates.tool_run import ToolRun

KEY = b"k" * 32


def phases(name: str, *outcomes: str, event: str = "test", **more: Any) -> list[dict[str, Any]]:
    told = []
    whens = ("setup", "call", "teardown") if len(outcomes) == 3 else ("setup", "teardown")
    for when, outcome in zip(whens, outcomes, strict=True):
        record = {"event": event, "test": name, "node": f"t.py::{name}", "when": when, "outcome": outcome}
        told.append(record | {"expected_failure": False, "assertion": False, "passed_through": [], "text": ""} | more)
    return told


EXPECTED = {"event": "expected", "tests": ["test_a"]}
COLLECTED = {"event": "collected", "count": 1, "tests": ["test_a"]}
PASSED = phases("test_a", "passed", "passed", "passed")
CANARY = phases("c", "passed", "failed", "passed", event="canary", assertion=True)
FINISHED = {"event": "finished", "status": 1}
GOOD = [EXPECTED, COLLECTED, *PASSED, *CANARY, FINISHED]


def signed(records: list[dict[str, Any]], key: bytes = KEY) -> bytes:
    lines = []
    for number, record in enumerate(records):
        content = json.dumps({"number": number, **record}).encode()
        lines.append(hmac.new(key, content, "sha256").hexdigest().encode() + b" " + content + b"\n")
    return b"".join(lines)


def rule_of(data: bytes, status: int = 1) -> str | None:
    run = ToolRun(
        gate="unit",
        category=Category.CODE,
        target="test_sums.py",
        artefacts={"sums.py": "sums", "test_sums.py": "tests"},
        status=status,
        out=b"",
        err=b"",
        under_check=frozenset({"sums.py"}),
        records=data,
        key=KEY,
    )
    findings = unit_records.read(run).findings
    return findings[0].rule if findings else None


def test_a_whole_run_in_which_only_the_canary_failed_is_a_pass() -> None:
    assert rule_of(signed(GOOD)) is None


@pytest.mark.parametrize(
    ("records", "rule"),
    [
        ([], "no-report"),
        (GOOD[:-1], "no-report"),
        ([COLLECTED, *PASSED, *CANARY, FINISHED], "no-report"),
        ([*GOOD, EXPECTED], "tampered"),
        ([EXPECTED, COLLECTED, *PASSED, FINISHED], "tampered"),
        (
            [EXPECTED, COLLECTED, *PASSED, *phases("c", "passed", "passed", "passed", event="canary"), FINISHED],
            "tampered",
        ),
        (
            [EXPECTED, COLLECTED, *PASSED, *phases("c", "passed", "skipped", "passed", event="canary"), FINISHED],
            "tampered",
        ),
        (
            [EXPECTED, COLLECTED, *PASSED, *phases("c", "passed", "failed", "passed", event="canary"), FINISHED],
            "tampered",
        ),
        ([EXPECTED, COLLECTED, *PASSED[:2], *CANARY, FINISHED], "inconsistent-report"),
        ([EXPECTED, {**COLLECTED, "count": 2}, *PASSED, *CANARY, FINISHED], "inconsistent-report"),
        ([{**EXPECTED, "tests": ["test_a", "test_b"]}, *GOOD[1:]], "not-run"),
        ([{**EXPECTED, "tests": []}, {**COLLECTED, "count": 0, "tests": []}, *CANARY, FINISHED], "no-tests"),
        ([EXPECTED, {**COLLECTED, "count": 0, "tests": []}, *CANARY, FINISHED], "no-tests"),
        ([EXPECTED, COLLECTED, *phases("test_a", "skipped", "passed"), *CANARY, FINISHED], "no-tests"),
        ([EXPECTED, COLLECTED, *phases("test_a", "passed", "failed", "passed"), *CANARY, FINISHED], "failure"),
        ([EXPECTED, COLLECTED, *phases("test_a", "failed", "passed"), *CANARY, FINISHED], "error"),
        ([EXPECTED, COLLECTED, *phases("test_a", "passed", "passed", "failed"), *CANARY, FINISHED], "error"),
        ([*GOOD[:-1], {"event": "finished", "status": 0}], "exit-status"),
        ([{"event": "collect", "outcome": "failed", "node": "t", "text": "E   SyntaxError: x"}, *GOOD], "error"),
        ([{"event": "test"}], "tampered"),
    ],
)
def test_anything_less_is_not(records: list[dict[str, Any]], rule: str) -> None:
    assert rule_of(signed(records)) == rule


def test_a_skip_that_came_from_the_code_under_test_is_a_failure_and_one_of_the_test_itself_is_not() -> None:
    more = phases("test_b", "passed", "skipped", "passed", passed_through=["test_sums.py", "sums.py"])
    own = phases("test_b", "passed", "skipped", "passed", passed_through=["test_sums.py"])
    two = {**COLLECTED, "count": 2, "tests": ["test_a", "test_b"]}
    assert rule_of(signed([EXPECTED, two, *PASSED, *more, *CANARY, FINISHED])) == "skipped-by-code"
    assert rule_of(signed([EXPECTED, two, *PASSED, *own, *CANARY, FINISHED])) is None


def test_what_is_not_signed_missing_repeated_or_cut_off_is_tampered_with() -> None:
    good = signed(GOOD)
    first, _, rest = good.partition(b"\n")
    for data in (signed(GOOD, b"other"), rest, first + b"\n" + good, good[:-5], b"x\n" + good, good + b"\n"):
        assert rule_of(data) == "tampered"


def test_the_exit_status_of_the_process_must_be_that_of_the_run() -> None:
    assert rule_of(signed(GOOD), status=0) == "exit-status"
