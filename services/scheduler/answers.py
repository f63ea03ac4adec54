"""Cuts the promised outputs out of a model's answer. The answer is hostile input: nothing in it is trusted.

What does not hold the outputs is a typed failure with findings for the next attempt. Whether an output is any good
is for the gates; whether json fits its schema was checked where it was decoded and is checked again by the schema gate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from protocol.codec import check_value
from protocol.errors import BadFrame, CallFailed
from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.failure import Category, Failure, Finding
from protocol.messages.task import Output

#: Lines of our own prompt's frame that small models repeat at the edges of their answers.
_FRAME: Final = re.compile(r"\A(?:\s*</?material[^>\n]*>[ \t]*\n)+|(?:\s*</?material[^>\n]*>\s*)+\Z")
_FENCE: Final = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def cut_outputs(answer: str, outputs: Sequence[Output]) -> list[Artefact]:
    """Return one artefact per promised output. Raises CallFailed with FORMAT or SCHEMA and what was missing."""
    if len(answer) > MAX_ARTEFACT_CHARS:
        raise _fail(Category.FORMAT, "answer.too_large", f"the answer is longer than {MAX_ARTEFACT_CHARS} characters")
    if not answer.strip():
        raise _fail(Category.FORMAT, "answer.empty", "the answer is empty")
    if len(outputs) == 1:
        return [_artefact(outputs[0], _cut_one(answer, outputs[0]))]
    parts = parse_json(answer)
    if not isinstance(parts, dict):
        raise _fail(Category.SCHEMA, "answer.not_an_object", "expected one JSON object with a member per output")
    made = []
    for output in outputs:
        if output.name not in parts:
            raise _fail(Category.SCHEMA, "answer.output_missing", f"the JSON object has no member {output.name!r}")
        value = parts[output.name]
        if output.kind is not ArtefactKind.JSON and not isinstance(value, str):
            raise _fail(Category.SCHEMA, "answer.output_type", f"member {output.name!r} must be a string")
        made.append(_artefact(output, value))
    return made


def schema_of_parts(outputs: Sequence[Output]) -> dict[str, Any]:
    """JSON Schema of the object that carries several outputs at once."""
    members: dict[str, Any] = {
        output.name: {"type": "object"} if output.kind is ArtefactKind.JSON else {"type": "string"}
        for output in outputs
    }
    return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}


def _cut_one(answer: str, output: Output) -> Any:
    if output.kind is ArtefactKind.JSON:
        return parse_json(answer)
    if output.kind is ArtefactKind.TEXT:
        return _FRAME.sub("", answer).strip() or answer.strip()
    blocks = [block for block in _FENCE.findall(answer) if block.strip()]
    # The longest block: models show usage examples and commands beside the code they were asked for.
    return max(blocks, key=len) if blocks else answer.strip("\n") + "\n"


def parse_json(answer: str) -> Any:
    """The JSON that an answer is, a code block around it apart. Raises CallFailed (SCHEMA)."""
    text = answer.strip()
    if text.startswith("```") and (block := _FENCE.search(text)):
        text = block.group(1)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        check_value(value)  # JSON can say what no message can carry: 1e999, "\ud800", lists in lists without end
    except (ValueError, RecursionError, BadFrame) as err:
        raise _fail(Category.SCHEMA, "answer.not_json", f"expected JSON: {err}", evidence=answer[:500]) from err
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _artefact(output: Output, value: Any) -> Artefact:
    try:
        return Artefact(name=output.name, kind=output.kind, value=value, content_type=output.content_type)
    except ValueError as err:
        raise _fail(Category.FORMAT, "answer.output_invalid", f"output {output.name!r}: {err}"[:2_000]) from err


def _fail(category: Category, code: str, message: str, evidence: str | None = None) -> CallFailed:
    return CallFailed(
        Failure(
            code=code,
            category=category,
            origin="scheduler",
            message=message,
            evidence={} if evidence is None else {"answer": evidence},
            findings=[Finding(gate="answer", category=category, message=message)],
        )
    )
