"""The turn of a planning model: under which schema it is written, and what of it is a tool call or the answer.

A turn is one JSON object, `{"calls": […]}` or `{"answer": …}`. The schema constrains decoding, and is not relied on:
engines may fail open and peers may say anything. So every call is read by itself, and one that is wrong becomes a
`BadCall` with the reason, which the model is told; it neither spoils the others nor is it carried out. Whether a call
that is well formed may be carried out (names, limits) is decided in `swarm.py`. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from protocol.errors import CallFailed
from protocol.messages.artefact import ArtefactKind
from protocol.messages.failure import Category, Failure, Finding
from protocol.messages.task import Step
from services.scheduler.answers import parse_json

CREATE: Final = "create_subagent"
ASSIGN: Final = "assign_task"
MAX_CALLS_PER_TURN: Final = 256
"""Calls of one turn that are looked at; further ones are counted and refused."""
MAX_NAME_CHARS: Final = 24
MAX_SYSTEM_CHARS: Final = 4_000
MAX_PROMPT_CHARS: Final = 16_000
_CALLS_IN_GRAMMAR: Final = 64
"""Calls that decoding is held to: grammars repeat their rules, and a longer turn can be made two."""
_NAME_PATTERN: Final = r"[a-z][a-z0-9-]{0,23}"
_NAME: Final = re.compile(rf"{_NAME_PATTERN}\Z")
_FIELDS: Final = {CREATE: {"name", "system_prompt", "role"}, ASSIGN: {"agent", "prompt"}}
_SHOWN_CHARS: Final = 64
_CALLING: Final = re.compile(r'\s*(?:```\w*\s*)?(?:\[\s*)?\{\s*"(?:calls|tool)"')
_BEGUN: Final = re.compile(r'\s*\{\s*"answer"\s*:\s*"((?:[^"\\]|\\.)*+)', re.DOTALL)
#: Half an escape, or half a pair of them, where a text breaks off.
_BROKEN_END: Final = re.compile(r"(?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\u[0-9a-fA-F]{0,3})?\Z")


@dataclass(frozen=True, slots=True)
class Create:
    """`create_subagent`."""

    agent: str
    system_prompt: str | None
    """None = that of the persona with this name."""
    role: str | None


@dataclass(frozen=True, slots=True)
class Assign:
    """`assign_task`."""

    agent: str
    prompt: str


@dataclass(frozen=True, slots=True)
class BadCall:
    """A call that is none; `tool` and `agent` are what it said, cut and made printable."""

    tool: str
    agent: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Calls:
    """A turn that calls tools."""

    asked: tuple[Create | Assign | BadCall, ...]
    unread: int = 0
    """Calls beyond `MAX_CALLS_PER_TURN`."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A turn that answers; the text is cut like that of any other step."""

    text: str


def turn_schema(
    spec: Step, roles: Sequence[str], most_calls: int, text_chars: int, *, may_create: bool = True
) -> dict[str, Any]:
    """JSON Schema of a turn: at most so many calls, none = it must answer; texts of at most so many characters.

    Without `may_create` no further sub-agent can be made, only those there are be given work.
    """
    answer: dict[str, Any] = {"type": "string", "minLength": 1}
    if spec.outputs[0].kind is ArtefactKind.JSON:
        answer = spec.json_schema or {"type": "object"}
    answered = _object({"answer": answer})
    if most_calls < 1:
        return answered
    name = {"type": "string", "pattern": f"^{_NAME_PATTERN}$"}
    optional = {"role": {"enum": list(roles)}} if len(roles) > 1 else {}
    tools = [
        _object(
            {"tool": {"const": CREATE}, "name": name, "system_prompt": _text(min(text_chars, MAX_SYSTEM_CHARS))},
            optional,
        ),
        _object({"tool": {"const": ASSIGN}, "agent": name, "prompt": _text(min(text_chars, MAX_PROMPT_CHARS))}),
    ]
    calls = {
        "type": "array",
        "minItems": 1,
        "maxItems": min(most_calls, _CALLS_IN_GRAMMAR),
        "items": {"anyOf": tools if may_create else tools[1:]},
    }
    return {"anyOf": [_object({"calls": calls}), answered]}


def read_turn(text: str, spec: Step, *, cut_off: bool) -> Calls | Answered:
    """What a turn says. Of one that was cut off, the calls that are complete.

    Raises CallFailed (SCHEMA) where it neither calls anything nor answers.
    """
    try:
        value = parse_json(text)
    except CallFailed:
        found = _complete_calls(text) if cut_off else []
        if not found:
            raise
        value = {"calls": found}
    if isinstance(value, dict) and value.keys() == {"answer"}:
        return Answered(_as_text(value["answer"], spec))
    calls = value.get("calls") if isinstance(value, dict) else None
    if not isinstance(calls, list) or not calls or value.keys() != {"calls"}:
        raise turn_failure("turn.shape", 'expected {"calls": [one call or more]} or {"answer": the result}')
    asked = tuple(_read_call(call) for call in calls[:MAX_CALLS_PER_TURN])
    return Calls(asked, len(calls) - len(asked))


def begun_answer(text: str) -> str | None:
    """The words of a textual answer as far as they were written; None for a turn that does not begin to answer."""
    found = _BEGUN.match(text)
    if found is None:
        return None
    try:
        words = parse_json(f'"{_BROKEN_END.sub("", found.group(1))}"')
    except CallFailed:
        return None
    return words if isinstance(words, str) and words.strip() else None


def is_calling(text: str) -> bool:
    """Whether a text that is no turn began as one with calls."""
    return _CALLING.match(text) is not None


def turn_failure(code: str, message: str) -> CallFailed:
    """A turn that cannot be used, as the failure table takes it."""
    finding = Finding(gate="answer", category=Category.SCHEMA, message=message)
    return CallFailed(
        Failure(code=code, category=Category.SCHEMA, origin="scheduler", message=message, findings=[finding])
    )


def _read_call(call: Any) -> Create | Assign | BadCall:
    if not isinstance(call, dict):
        return BadCall("", "", "call.not_an_object", "a call is an object with the member tool")
    tool, agent = _shown(call.get("tool")), _shown(call.get("name", call.get("agent")))
    fields = _FIELDS.get(tool)
    if fields is None:
        return BadCall(tool, agent, "tool.unknown", f"there is no tool {tool!r}; there are {CREATE} and {ASSIGN}")
    unknown = sorted(_shown(key) for key in call.keys() - fields - {"tool"})
    if unknown:
        return BadCall(tool, agent, "call.unknown_field", f"{tool} has no {', '.join(unknown[:5])}")
    wrong = [key for key in sorted(call.keys() - {"tool"}) if not isinstance(call[key], str)]
    if wrong:
        return BadCall(tool, agent, "call.field_type", f"{wrong[0]} of {tool} must be a string")
    return _read_create(call, agent) if tool == CREATE else _read_assign(call, agent)


def _read_create(call: dict[str, str], agent: str) -> Create | BadCall:
    name, prompt = call.get("name", ""), call.get("system_prompt")
    if not _NAME.match(name):
        message = f"name must be a small letter and up to {MAX_NAME_CHARS - 1} small letters, digits or -"
        return BadCall(CREATE, agent, "agent.name", message)
    if prompt is not None and not 0 < len(prompt.strip()) <= MAX_SYSTEM_CHARS:
        return BadCall(CREATE, agent, "agent.prompt", f"system_prompt must have 1 to {MAX_SYSTEM_CHARS} characters")
    return Create(name, prompt.strip() if prompt is not None else None, call.get("role"))


def _read_assign(call: dict[str, str], agent: str) -> Assign | BadCall:
    prompt = call.get("prompt", "")
    if "agent" not in call:
        return BadCall(ASSIGN, agent, "call.field_missing", f"{ASSIGN} needs the member agent")
    if not 0 < len(prompt.strip()) <= MAX_PROMPT_CHARS:
        return BadCall(ASSIGN, agent, "task.prompt", f"prompt must have 1 to {MAX_PROMPT_CHARS} characters")
    return Assign(agent, prompt.strip())


def _complete_calls(text: str) -> list[Any]:
    """The calls at the beginning of a list that breaks off."""
    found: list[Any] = []
    decoder = json.JSONDecoder()
    place = text.find("[") + 1
    while place > 0 and len(found) <= MAX_CALLS_PER_TURN and (start := text.find("{", place)) >= 0:
        try:
            call, place = decoder.raw_decode(text, start)
            parse_json(json.dumps(call))  # what no message can carry is no call
        except (ValueError, RecursionError, CallFailed):
            break
        found.append(call)
    return found


def _as_text(answer: Any, spec: Step) -> str:
    """The answer as any step would have given it, for `answers.cut_outputs`."""
    if spec.outputs[0].kind is ArtefactKind.JSON:
        return json.dumps(answer)
    if not isinstance(answer, str):
        raise turn_failure("turn.answer_type", "answer must be a string")
    return answer


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return "".join(char if char.isprintable() else " " for char in text[:_SHOWN_CHARS])


def _text(most_chars: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": most_chars}


def _object(members: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": members | (optional or {}),
        "required": list(members),
        "additionalProperties": False,
    }
