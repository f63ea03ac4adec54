"""Every gate that ships, with its real tool in the real sandbox: good passes, and bad is found at its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from protocol.codec import pack_body
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.base import Message
from protocol.messages.gate import GateFinal, GateRequest, Verdict
from protocol.messages.reply import ErrorReply
from services.kit.config import CHECKOUT
from services.kit.registry import load_registry
from tests.system.test_gates_service import Stack, python, started

TASK = {"objective": "x", "plan": {"steps": [{"id": "S1", "actor": "a", "action": "b", "outputs": [{"name": "o"}]}]}}
UNPLANNABLE = {"objective": "x", "plan": {"steps": [TASK["plan"]["steps"][0] | {"inputs": ["nowhere"]}]}}  # type: ignore[index]
TESTS = "from sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with started() as running:
        yield running


def artefact(name: str, value: Any, kind: ArtefactKind = ArtefactKind.CODE) -> Artefact:
    return Artefact(name=name, kind=kind, value=value)


JSON, TEXT = ArtefactKind.JSON, ArtefactKind.TEXT

#: gate, a good artefact, a bad one, rule and line of the first finding
SAMPLES = [
    ("schema", artefact("d", [1], JSON), artefact("d", ["x"], JSON), "type", None),
    ("taskir", artefact("t", TASK, JSON), artefact("t", {"objective": ""}, JSON), "string_too_short", None),
    ("taskir", artefact("t", TASK, JSON), artefact("t", UNPLANNABLE, JSON), "plan", None),
    ("data", artefact("a.yaml", "a: 1\n", TEXT), artefact("a.yaml", "a: 1\na: 2\n", TEXT), None, 2),
    ("data", artefact("a.toml", "a = 1\n", TEXT), artefact("a.toml", "a = 1\nb =\n", TEXT), None, 2),
    ("data", artefact("a.json", '{"a": 1}', TEXT), artefact("a.json", '{\n"a": 1,}', TEXT), None, 2),
    ("shellcheck", artefact("a.sh", "#!/bin/sh\necho hi\n"), artefact("a.sh", "#!/bin/sh\necho $x\n"), "SC2154", 2),
    ("shfmt", artefact("a.sh", "if a; then\n  b\nfi\n"), artefact("a.sh", "if a; then\nb\nfi\n"), "format", 1),
    ("format", python("a", "x = 1\n"), python("a", "x =  1\n"), "unformatted", 1),
    ("lint", python("a", "import os\n"), python("a", "x = 1\nprint(y)\n"), "F821", 2),
    ("security", python("a", "x = 1\n"), python("a", "import os\n\nos.system('ls ' + x)  # noqa\n"), "S605", 3),
    ("typecheck", python("a", "x: int = 1\n"), python("a", "x: int = 'a'\n"), "assignment", 1),
    ("unit", python("sums", "def add(a, b):\n    return a + b\n"), python("sums", "add = pow\n"), "failure", 5),
    ("integration", artefact("a.sh", "exit 0\n"), artefact("a.sh", "exit 3\n"), "exit-status", None),
    ("markdown", artefact("a.md", "# A\n\nb\n", TEXT), artefact("a.md", "# A\n\n### B\n", TEXT), "MD001", 3),
    ("c_syntax", artefact("a.c", "int x;\n"), artefact("a.c", "int x;\nint\n"), None, 2),
    ("js_syntax", artefact("a.js", "let x = 1;\n"), artefact("a.js", "let x = 1;\nlet x =\n"), None, 2),
]


@pytest.mark.parametrize(("gate", "good", "bad", "rule", "line"), SAMPLES)
def test_good_passes_and_bad_is_found_at_its_place(
    stack: Stack, gate: str, good: Artefact, bad: Artefact, rule: str | None, line: int | None
) -> None:
    fields: dict[str, Any] = {"json_schema": {"items": {"type": "integer"}}, "check_command": ["sh", "a.sh"]}
    context = [python("test_sums", TESTS)] if gate == "unit" else []
    (passed,) = stack.ask(gate, artefacts=[good], context=context, **fields)
    if passed.verdict is Verdict.ERROR and passed.message.startswith("gate.tool_missing"):
        pytest.skip(passed.message)  # a compiler or node is no part of the installation
    assert passed.verdict is Verdict.PASS, passed
    (failed,) = stack.ask(gate, artefacts=[bad], context=context, **fields)
    assert failed.verdict is Verdict.FAIL, failed
    assert failed.findings[0].rule == rule
    assert line is None or line in {finding.line for finding in failed.findings}, failed


def test_no_shipped_gate_is_without_a_sample() -> None:
    shipped = load_registry(CHECKOUT / "registry", CHECKOUT, check_files=False).gates
    assert {sample[0] for sample in SAMPLES} == set(shipped) - {"definition_of_done"}


def test_a_verdict_is_found_again_until_artefact_context_or_command_change(stack: Stack) -> None:
    def cached(source: str, tests: str) -> bool:
        (result,) = stack.ask("unit", artefacts=[python("sums", source)], context=[python("test_sums", tests)])
        return result.cached

    add = "def add(a, b):\n    return a + b  # cached\n"
    assert [cached(add, TESTS), cached(add, TESTS)] == [False, True]
    assert not cached(f"{add}\n", TESTS)
    assert not cached(add, f"{TESTS}\n")
    assert stack.hub.newest_pong("gates").metrics["cache_hits"] >= 1


def test_a_tool_that_hangs_is_not_the_artefacts_fault_and_is_asked_again_next_time(stack: Stack) -> None:
    for _ in range(2):
        (result,) = stack.ask("slowtool", artefacts=[python("a", "x = 1\n")])
        assert (result.verdict, result.category.value, result.cached) == (Verdict.ERROR, "RESOURCE", False)
        assert "timed out" in result.message
        assert result.ended_ms - result.started_ms > 1_900


def test_a_tool_that_prints_a_gigabyte_is_cut_off(stack: Stack) -> None:
    (result,) = stack.ask("loudtool", artefacts=[python("a", "x = 1\n")])
    assert (result.verdict, result.findings[0].rule) == (Verdict.FAIL, "flooded")


@pytest.mark.parametrize("megabytes", [2, 100])
def test_an_artefact_that_is_too_large_is_refused_by_name_and_size(stack: Stack, megabytes: int) -> None:
    value = "x" * (megabytes << 20)
    with pytest.raises(ValueError, match="larger than"):
        artefact("big", value)
    if len(value) > 60 << 20:
        return  # no frame of this size is read at all; the sender's own check is what refuses it
    artefacts = [Artefact.model_construct(name="big", kind=ArtefactKind.CODE, value=value)]
    body: Message = stack.hub.ask(
        "gates", "gate.request", GateRequest.model_construct(gates=["lint"], artefacts=artefacts)
    )
    assert isinstance(body, ErrorReply)
    assert "larger than 1048576 characters" in body.failure.message
    assert len(pack_body(body)) < 10_000


def test_binary_and_empty_artefacts_get_a_verdict(stack: Stack) -> None:
    binary = "".join(chr(number % 256) for number in range(5_000))
    for source, expected in ((binary, "fail"), ("", "pass")):
        results = stack.ask("lint", "unit", "format", artefacts=[python("sums", source)])
        assert results[0].verdict.value == expected
        assert results[1].verdict is not Verdict.PASS, "an empty file has no tests"
        assert all(result.verdict is not Verdict.ERROR for result in results), results


def test_without_a_command_the_gate_that_runs_one_says_so(stack: Stack) -> None:
    (result,) = stack.ask("integration", artefacts=[python("a", "x = 1\n")])
    assert (result.verdict, result.category.value) == (Verdict.ERROR, "POLICY")
    assert result.message.startswith("gate.no_command: ")


def test_when_a_required_gate_fails_the_others_that_cost_cores_are_stopped(stack: Stack) -> None:
    sleeping = python("a", "import time\ntime.sleep(300)\n")
    body = stack.hub.ask(
        "gates",
        "gate.request",
        GateRequest(gates=["patient", "integration"], artefacts=[sleeping], check_command=["sh", "-c", "exit 1"]),
        cores=2,
    )
    assert isinstance(body, GateFinal)
    patient, integration = body.results
    assert (patient.verdict, integration.verdict) == (Verdict.SKIPPED, Verdict.FAIL)
    assert patient.message == "stopped: integration, which is required, has failed"
    assert stack.inside() == []
