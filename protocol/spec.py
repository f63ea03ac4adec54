"""Writes the tables of `protocol/README.md` from the code, so that the spec cannot differ from what the code does.

`python -m protocol.spec` rewrites what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; a test fails when
that would change anything. The prose around it, which says what peers must do, is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from protocol import limits
from protocol.codec import pack_body
from protocol.docstrings import Described, attribute_docstrings, docstrings_in
from protocol.header import Count, Header, pack_header
from protocol.kinds import BODIES, CALL_REQUESTS, HUB_REQUESTS, family
from protocol.messages.base import REGISTRY_NAME_PATTERN, Message, Name
from protocol.messages.session import Hello, Welcome
from protocol.messages.task import Accepted, Submit

README: Final = Path(__file__).with_name("README.md")
_BOUNDS: Final = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}
_NAMES: Final = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "nil"}
_NAME_PATTERN: Final = TypeAdapter(Name).json_schema()["pattern"]
_SESSION_DIRECTIONS: Final = {
    "session.hello": "peer → hub",
    "session.pong": "peer → hub",
    "session.goodbye": "peer → hub",
    "session.ping": "hub → peer",
    "registry.changed": "hub → service",
    "persona.trials": "hub → planner",
    "session.reside": "hub → service",
}


def render(text: str) -> str:
    """The README with every generated part made anew. Raises ValueError if the marks of a part are missing."""
    for name, make in _PARTS.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{README.name}: the marks of the part {name!r} are missing")
        text = f"{before}{begin}{make()}{end}{after}"
    return text


def header_table() -> str:
    """One row per header field, with the docstring it has in the code."""
    notes = attribute_docstrings(Header)
    rows = []
    for field in msgspec.structs.fields(Header):
        kind = "integer" if field.type in (Count, Count | None) else "text"
        needed = "yes" if field.required or field.name == "v" else ""
        rows.append((f"`{field.name}`", kind, needed, _prose(notes.get(field.name, ""))))
    return _table(("field", "type", "required", "meaning"), rows)


def kinds_table() -> str:
    """One row per kind: who sends it to whom, its body, and what may end it."""
    rows = []
    for kind, body in BODIES.items():
        rows.append((f"`{kind}`", _direction(kind), _link(body.__name__), _ends_in(kind)))
    return _table(("kind", "direction", "body", "ends in"), rows)


def bodies() -> str:
    """One table per body and per value inside a body."""
    models = [(model, "validation") for model in dict.fromkeys(BODIES.values())]
    _, schema = models_json_schema(models, ref_template="{model}", schema_generator=Described)  # type: ignore[arg-type]  # a list is a sequence
    parts = []
    for name, definition in schema["$defs"].items():
        parts.append(f"#### {name}\n\n{_prose(definition.get('description', ''))}\n")
        if "enum" in definition:
            parts.append("One of " + ", ".join(f"`{value}`" for value in definition["enum"]) + ".\n")
            continue
        required = definition.get("required", [])
        rows = [
            (f"`{field}`", _type(value), _default(value, field in required), _prose(value.get("description", "")))
            for field, value in definition.get("properties", {}).items()
        ]
        parts.append(_table(("field", "type", "default", "meaning"), rows) if rows else "No fields.\n")
    return "\n".join(parts)


def limits_table() -> str:
    """One row per bound of `protocol.limits`."""
    notes = _module_docstrings(limits)
    rows = [(f"`{name}`", f"{getattr(limits, name):,}", note) for name, note in notes.items()]
    return _table(("limit", "value", "meaning"), rows)


def example() -> str:
    """Four messages of a client's first second, as JSON for people and as the bytes of both frames."""
    me: dict[str, Any] = {"src": "client-1", "epoch": "c0ffee-1"}
    hub: dict[str, Any] = {"src": "scheduler", "epoch": "a1b2c3"}
    deadline = 1_700_000_010_000
    task = {"objective": "Say hello", "idempotency_key": "order-42"}
    messages: list[tuple[str, Header, Message]] = [
        (
            "The client says HELLO.",
            Header(kind="session.hello", id="c1", seq=1, **me),
            Hello(service="client-1", protocol_min=1, protocol_max=1),
        ),
        (
            "The hub knows it from now on.",
            Header(kind="session.welcome", id="h1", corr="c1", seq=1, **hub),
            Welcome(protocol=1, hub_epoch="a1b2c3", ping_ms=1_000),
        ),
        (
            "The client submits a task.",
            Header(kind="task.submit", id="c2", seq=2, deadline=deadline, **me),
            Submit(task=task),
        ),
        (
            "The task is on disk.",
            Header(kind="task.accepted", id="h2", corr="c2", seq=2, **hub),
            Accepted(task_id="T-1"),
        ),
    ]
    parts = []
    for what, header, body in messages:
        frames = pack_header(header), pack_body(body)
        shown = {name: value for name, value in msgspec.structs.asdict(header).items() if value is not None}
        lines = [f"header {json.dumps(shown)}", *_hex(frames[0])]
        lines += [f"body   {body.model_dump_json(exclude_none=True)}", *_hex(frames[1])]
        parts.append(f"{what}\n\n```\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


_PARTS: Final = {
    "header": header_table,
    "kinds": kinds_table,
    "limits": limits_table,
    "example": example,
    "bodies": bodies,
}


def _direction(kind: str) -> str:
    if kind in _SESSION_DIRECTIONS:
        return _SESSION_DIRECTIONS[kind]
    if kind in HUB_REQUESTS or kind == "batch.cancel":
        return "client → hub"
    if kind.startswith("batch."):
        return "hub → peer"
    if kind in CALL_REQUESTS or kind.endswith(".cancel"):
        return "asker → hub → worker"
    if kind.endswith((".final", ".partial")):
        return "worker → hub → asker"
    return "hub or worker → asker" if kind == "error" else "hub → peer"


def _ends_in(kind: str) -> str:
    final = HUB_REQUESTS.get(kind) or (f"{family(kind)}.final" if kind in CALL_REQUESTS else None)
    return f"`{final}`, `error` or `refused`" if final else ""


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in words; what has a table of its own is linked."""
    if "$ref" in schema:
        return _link(schema["$ref"])
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices if choice.get("type") != "null"))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "array":
            item = _type(schema.get("items", {}))
            name = f"list of ({item})" if "," in item else f"list of {item}"
        case "object":
            values = schema.get("additionalProperties")
            name = f"map to {_type(values)}" if isinstance(values, dict) and values else "map"
        case None:
            name = "any JSON value"
        case "string" if schema.get("pattern") == _NAME_PATTERN:
            name = "name"
        case "string" if schema.get("pattern") == REGISTRY_NAME_PATTERN:
            name = "name in small letters, at most 32"
        case plain:
            name = _NAMES[plain]
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return ", ".join([name, *bounds])


def _default(schema: Mapping[str, Any], required: bool) -> str:
    if required:
        return "required"
    if "default" not in schema:
        return "empty"  # made anew for each message, so the schema does not show it
    value = schema["default"]
    return "absent" if value is None else f"`{json.dumps(value)}`"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _prose(text: str) -> str:
    return " ".join(text.split())


def _hex(data: bytes) -> Iterator[str]:
    yield from (f"       {line}" for line in textwrap.wrap(data.hex(" "), 96))


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _module_docstrings(module: Any) -> dict[str, str]:
    return {name: _prose(text) for name, text in docstrings_in(ast.parse(inspect.getsource(module)).body).items()}


if __name__ == "__main__":
    README.write_text(render(README.read_text("utf-8")), "utf-8")
