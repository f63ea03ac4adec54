"""Does an answer satisfy the JSON Schema it was asked for? Checked by us, since constrained decoding may fail open.

What is checked, `json_schema` knows. Here is where: what is cheap in the service itself, and what may take long (a
schema with regular expressions, one that is large, one whose references multiply) in a process of its own, so that the
service goes on answering the hub meanwhile. What becomes of a failing answer is decided by the failure table.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Final

from protocol.messages.failure import Category, Failure, Finding
from services.inference.probe import ProbeFailed, probe
from services.kit import json_schema
from services.kit.json_schema import BadSchema, TooCostly

_CHECK_TIMEOUT_S: Final = 10.0
_SMALL_CHARS: Final = 8 * 1024
"""A schema up to so large is looked at here, which holds up the service for some 70 ms at most."""
_EVIDENCE_CHARS: Final = 500
_FENCE: Final = re.compile(r"\s*```[^\n`]*\n(.*?)(?:```\s*|\Z)", re.DOTALL)


async def check_schema(schema: dict[str, Any]) -> None:
    """Raise BadSchema unless it is a JSON Schema."""
    if len(json.dumps(schema)) <= _SMALL_CHARS:
        json_schema.check_schema(schema)
        return
    try:
        await _outside(None, schema)
    except ProbeFailed as err:
        raise BadSchema(f"it could not be checked: {err}") from err


async def judge(
    text: str, schema: dict[str, Any], *, cut_off: bool, origin: str, fenced: bool = False
) -> Failure | None:
    """None if the text is JSON that the schema allows, else the SCHEMA failure with its findings.

    `cut_off` = the token limit ended the answer, which the next attempt should know; `fenced` = the JSON may stand in a
    code block, as models write it when nothing constrains them. Raises BadSchema where the schema turns out to be none.
    """
    answer = text
    if fenced and (block := _FENCE.fullmatch(text)):
        text = block.group(1)
    problems = await _problems(text, schema)
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


async def _problems(text: str, schema: dict[str, Any]) -> list[str]:
    if not json_schema.unbounded(schema):
        try:
            return json_schema.problems_of(text, schema)
        except TooCostly:
            pass
    try:
        return await _outside(text, schema)
    except ProbeFailed as err:
        return [f"the answer could not be checked against the schema: {err}"]


async def _outside(text: str | None, schema: Mapping[str, Any]) -> list[str]:
    """The problems of a text, or none for None. Raises BadSchema; ProbeFailed where the check does not end."""
    probed = await probe(
        [sys.executable, "-m", json_schema.__name__],
        timeout_s=_CHECK_TIMEOUT_S,
        data=json.dumps({"text": text, "schema": schema}).encode(),
    )
    if probed.status != 0:
        raise ProbeFailed(probed.last_line[:300])
    verdict = json.loads(probed.last_line)
    if "bad_schema" in verdict:
        raise BadSchema(verdict["bad_schema"])
    problems: list[str] = verdict["problems"]
    return problems
