"""The builtin schema gate as the program it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.gates.schema_check import check

NAMED = {"type": "object", "required": ["name"], "properties": {"tags": {"items": {"type": "string"}}}}


def verdict(tmp_path: Path, value: Any, schema: Any = None) -> dict[str, Any]:
    file, schema_file = tmp_path / "a.json", tmp_path / "schema"
    file.write_text(json.dumps(value))
    schema_file.write_text(json.dumps(schema))
    return check(None if schema is None else schema_file, [file])


def test_findings_carry_the_path_and_the_rule(tmp_path: Path) -> None:
    found = verdict(tmp_path, {"tags": ["a", 7]}, NAMED)["findings"]
    assert {(item["path"], item["rule"]) for item in found} == {("$", "required"), ("$.tags[1]", "type")}


@pytest.mark.parametrize("value", [{"name": "x"}, '{"name": "x"}'])
def test_a_value_that_follows_the_schema_passes_parsed_or_not(tmp_path: Path, value: Any) -> None:
    assert verdict(tmp_path, value, NAMED) == {"findings": []}


@pytest.mark.parametrize("value", ['{"name": ', "[1,]", float("nan"), {"x": float("inf")}])
def test_what_is_not_json_is_found_without_a_schema(tmp_path: Path, value: Any) -> None:
    (finding,) = verdict(tmp_path, value)["findings"]
    assert finding["rule"] == "parse"


def test_a_plain_string_is_json(tmp_path: Path) -> None:
    assert verdict(tmp_path, "hello", {"type": "string"}) == {"findings": []}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "http://example.com/x.json"},
        {"$ref": "#/$defs/none"},
        {"$ref": "#"},
        {"properties": {"a": {"pattern": "("}}},
    ],
)
def test_an_unusable_schema_is_said_so_and_nothing_is_fetched(tmp_path: Path, schema: Any) -> None:
    assert "schema_error" in verdict(tmp_path, {"a": "b"}, schema)


def test_the_number_of_findings_is_bounded(tmp_path: Path) -> None:
    assert len(verdict(tmp_path, list(range(5_000)), {"items": {"type": "string"}})["findings"]) == 201
