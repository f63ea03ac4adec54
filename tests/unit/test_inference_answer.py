"""What the schema check finds, and what a hostile schema or answer cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.messages.failure import Category
from services.inference import answer
from services.inference.answer import BadSchema, check_schema, judge, problems_of

LIST = {"type": "array", "items": {"type": "integer"}}


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


@pytest.mark.parametrize("schema", [{"type": "nothing"}, {"minimum": "a"}, {"properties": []}])
def test_a_wrong_schema_is_named(schema: dict[str, object]) -> None:
    with pytest.raises(BadSchema):
        check_schema(schema)


def test_references_are_neither_fetched_nor_followed_for_ever() -> None:
    assert "outside" in problems_of("1", {"$ref": "https://example.invalid/schema"})[0]
    assert "outside" in problems_of("1", {"$ref": "file:///etc/passwd"})[0]
    assert problems_of("1", {"$ref": "#"})


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


async def test_an_endless_expression_ends_with_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "_CHECK_TIMEOUT_S", 1.5)
    failure = await judge('"' + "a" * 60 + '!"', {"pattern": "^(a+)+$"}, cut_off=False, origin="t")
    assert failure is not None
    assert "did not end" in failure.message
