"""What the schema check finds, and what a hostile schema or answer cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocol.messages.failure import Category
from services.inference import answer
from services.inference.answer import judge
from services.kit.json_schema import BadSchema, TooCostly, check_schema, problems_of

LIST = {"type": "array", "items": {"type": "integer"}}


def doubling(levels: int) -> dict[str, Any]:
    """A schema of which each level asks for the next one twice."""
    defs = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)}
    return {"$defs": {**defs, f"a{levels}": {}}, "$ref": "#/$defs/a0"}


def test_a_valid_answer_has_no_problems() -> None:
    assert problems_of("[1, 2]", LIST) == []


@pytest.mark.parametrize(
    "text", ["", "[1", "```json\n[1]\n```", "NaN,", "[NaN]", "[1e999]", '["\\ud800"]', "[" * 200_000]
)
def test_an_answer_that_is_not_json_is_one_problem(text: str) -> None:
    assert len(problems_of(text, LIST)) == 1


def test_the_problems_name_the_place_and_are_bounded() -> None:
    problems = problems_of(str(["x"] * 1_000).replace("'", '"'), LIST)
    assert len(problems) == 20
    assert problems[0].startswith("$[0]: ")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nothing"}, {"minimum": "a"}, {"properties": []},
        {"$schema": 5}, {"$schema": ["x"]}, {"$schema": "http://["},
    ],
)  # fmt: skip
def test_a_wrong_schema_is_named(schema: dict[str, object]) -> None:
    with pytest.raises(BadSchema):
        check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"$ref": "https://example.invalid/schema"}, "outside"),
        ({"$ref": "file:///etc/passwd"}, "outside"),
        ({"$ref": "#"}, "without end"),
        ({"$id": "http://[", "$ref": "x"}, "cannot be followed"),
        ({"$ref": "#/title", "title": "x"}, "cannot be followed"),
        ({"$ref": "#/const", "const": {"type": "nothing"}}, "cannot be followed"),
    ],
)
def test_references_that_lead_nowhere_are_the_schemas_fault(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSchema, match=said):
        problems_of("1", schema)


def test_what_a_check_costs_is_bounded_whatever_the_schema_asks_for() -> None:
    assert problems_of("{}", doubling(8)) == []
    with pytest.raises(TooCostly):
        problems_of("{}", doubling(60))
    with pytest.raises(TooCostly):
        problems_of("{}", {"$schema": "http://json-schema.org/draft-07/schema#", **doubling(60)})
    with pytest.raises(TooCostly):
        problems_of(str([{}] * 5_000), {"uniqueItems": True})


def test_an_expression_that_python_cannot_read_constrains_nothing() -> None:
    letters = {"patternProperties": {r"^\p{L}+$": {"type": "string"}}, "additionalProperties": False}
    check_schema({"pattern": r"^(?<year>\d+)$", **letters})
    assert problems_of('"x"', {"type": "string", "pattern": r"^\p{L}+$"}, None) == []
    assert problems_of('{"a": 1}', letters, None) == []
    assert len(problems_of('{"a": 1}', {"patternProperties": {"^a$": {"type": "string"}}}, None)) == 1


async def test_a_code_block_is_taken_off_only_where_nothing_constrained_the_answer() -> None:
    text = "```json\n[1, 2]\n```\n"
    assert await judge(text, {}, cut_off=False, origin="t", fenced=True) is None
    assert await judge(text, {}, cut_off=False, origin="t") is not None


async def test_expressions_are_checked_outside_the_service() -> None:
    schema = {"type": "string", "pattern": "^a+$"}
    assert await judge('"aaa"', schema, cut_off=False, origin="t") is None
    failure = await judge('"b"', schema, cut_off=True, origin="t")
    assert failure is not None
    assert failure.category is Category.SCHEMA
    assert len(failure.findings) == 2  # the mismatch, and that the answer was cut off


async def test_what_an_installation_says_at_the_start_of_every_program_is_no_part_of_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.stderr.write('watched by a profiler\\n')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert await judge('"aaa"', {"pattern": "^a+$"}, cut_off=False, origin="t") is None
    assert await judge('"b"', {"pattern": "^a+$"}, cut_off=False, origin="t") is not None


@pytest.mark.parametrize("schema", [{"pattern": "^(a+)+$"}, doubling(60)])
async def test_a_check_without_end_ends_with_the_bound(monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any]) -> None:
    monkeypatch.setattr(answer, "_CHECK_TIMEOUT_S", 1.5)
    failure = await judge('"' + "a" * 60 + '!"', schema, cut_off=False, origin="t")
    assert failure is not None
    assert "did not end" in failure.message


async def test_what_is_too_costly_here_is_checked_outside() -> None:
    numbers = {"items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "integer"}}}
    assert await judge(str(list(range(40_000))), numbers, cut_off=False, origin="t") is None
    failure = await judge(str([*range(40_000), "x"]).replace("'", '"'), numbers, cut_off=False, origin="t")
    assert failure is not None
    assert "$[40000]" in failure.message


async def test_a_large_schema_is_looked_at_outside() -> None:
    many: dict[str, Any] = {"properties": {f"p{n}": {"type": "string"} for n in range(1_000)}}
    await answer.check_schema(many)
    many["properties"]["p999"] = {"type": "nothing"}
    with pytest.raises(BadSchema, match="p999"):
        await answer.check_schema(many)


async def test_a_schema_found_wrong_outside_is_as_wrong() -> None:
    with pytest.raises(BadSchema, match="outside"):
        await judge('"a"', {"pattern": "a", "$ref": "file:///etc/passwd"}, cut_off=False, origin="t")
