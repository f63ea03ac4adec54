"""Does an answer satisfy the JSON Schema it was asked for? Checked by us, since constrained decoding may fail open.

The schema may come from a model: references are never fetched, and a schema with regular expressions is checked in a
process of its own (`python -m services.inference.answer`), because a bad expression can compute for ever and would
hold up the whole service. What becomes of a failing answer is decided by the failure table.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from protocol.codec import check_value
from protocol.errors import BadFrame
from protocol.messages.failure import Category, Failure, Finding
from services.inference.probe import ProbeFailed, probe

_MAX_FINDINGS: Final = 20
_CHECK_TIMEOUT_S: Final = 10.0
_EVIDENCE_CHARS: Final = 500
_FENCE: Final = re.compile(r"\s*```[^\n`]*\n(.*?)(?:```\s*|\Z)", re.DOTALL)
_REGEX_KEYWORDS: Final = frozenset({"pattern", "patternProperties"})


class BadSchema(Exception):
    """The schema itself is wrong; the message says where."""


def check_schema(schema: dict[str, Any]) -> None:
    """Raise BadSchema unless it is a JSON Schema."""
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as err:
        raise BadSchema(f"{err.json_path}: {err.message}"[:1_000]) from err
    except RecursionError as err:
        raise BadSchema("it nests too deep") from err


async def judge(
    text: str, schema: dict[str, Any], *, cut_off: bool, origin: str, fenced: bool = False
) -> Failure | None:
    """None if the text is JSON that the schema allows, else the SCHEMA failure with its findings.

    `cut_off` = the token limit ended the answer, which the next attempt should know; `fenced` = the JSON may stand in a
    code block, as models write it when nothing constrains them.
    """
    answer = text
    if fenced and (block := _FENCE.fullmatch(text)):
        text = block.group(1)
    if _uses_regex(schema):
        problems = await _check_outside(text, schema)
    else:
        problems = problems_of(text, schema)
    if not problems:
        return None
    if cut_off:
        problems.append("the answer was cut off at max_tokens: ask for less, or raise max_tokens")
    return Failure(
        code="answer.schema",
        category=Category.SCHEMA,
        origin=origin,
        message=f"the answer is not the JSON that was asked for: {problems[0]}"[:2_000],
        evidence={"answer": answer[:_EVIDENCE_CHARS]},
        findings=[Finding(gate="schema", category=Category.SCHEMA, message=problem[:2_000]) for problem in problems],
    )


def problems_of(text: str, schema: dict[str, Any]) -> list[str]:
    """What the schema has against the text, at most 20 sentences; empty = valid."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as err:
        return [f"the answer is not JSON: {err}"]
    except RecursionError:
        return ["the answer nests too deep"]
    try:
        check_value(value)
    except BadFrame as err:
        return [f"the answer is JSON that no message can carry: {err}"]
    validator = validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())
    problems: list[str] = []
    try:
        for error in validator.iter_errors(value):
            problems.append(f"{error.json_path}: {error.message[:500]}")
            if len(problems) == _MAX_FINDINGS:
                break
    except Unresolvable as err:
        problems.append(f"the schema refers to something outside of it: {err}")
    except RecursionError:
        problems.append("the schema refers to itself without end")
    return problems


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _uses_regex(schema: Any) -> bool:
    level = [schema]
    while level:
        item = level.pop()
        if isinstance(item, dict):
            if _REGEX_KEYWORDS & item.keys():
                return True
            level.extend(item.values())
        elif isinstance(item, list):
            level.extend(item)
    return False


async def _check_outside(text: str, schema: dict[str, Any]) -> list[str]:
    try:
        probed = await probe(
            [sys.executable, "-m", __name__],
            timeout_s=_CHECK_TIMEOUT_S,
            data=json.dumps({"text": text, "schema": schema}).encode(),
        )
    except ProbeFailed as err:
        return [f"the answer could not be checked against the schema's regular expressions: {err}"]
    if probed.status != 0:
        return [f"the answer could not be checked against the schema's regular expressions: {probed.last_line[:300]}"]
    problems: list[str] = json.loads(probed.last_line)
    return problems


if __name__ == "__main__":
    question = json.load(sys.stdin)
    sys.stdout.write(json.dumps(problems_of(question["text"], question["schema"])))
