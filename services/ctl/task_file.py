"""Reads a TaskIR that a person wrote, and says about every mistake in which field and line it is.

The hub checks a submitted task again; checking here first costs no round trip, works without a hub (`tierline plan`),
and can name the line, which the hub cannot since it never sees the file; for what only the hub knows, such as the names
in its registry, its refusal names the field, and the line is found here. That a `json_schema` is one is seen only here
and by the inference service, to which the hub leaves it. What the words mean is up to
`protocol.messages.task`, whether the plan is a graph that can run to `protocol.plan_graph`, and whether a registry has
what it names to `services.kit.plan_check`.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from protocol.messages.failure import Failure
from protocol.messages.task import TaskIR
from protocol.plan_graph import find_problems
from services.ctl.outcomes import BadInput
from services.kit.plan_check import more_than, plan_problems, problems_in, schema_problems
from services.kit.registry import Registry
from services.kit.registry.yaml_lines import MAX_FILE_BYTES, Document, UnreadableFileError, read_document

MAX_TASK_BYTES: Final = MAX_FILE_BYTES
"""Largest task file; longer texts come with --input."""

_MAX_PROBLEMS: Final = 20


def read_task_fields(path: Path) -> Document:
    """Read a task file, .json as JSON and anything else as YAML, into fields. Raises BadInput."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= MAX_TASK_BYTES and path.suffix == ".json" else ""
    except FileNotFoundError as err:
        raise BadInput(f"there is no task file {path}") from err
    except (OSError, UnicodeDecodeError) as err:
        raise BadInput(f"the task file {path} cannot be read: {err}") from err
    if size > MAX_TASK_BYTES:
        raise BadInput(
            f"the task file {path} has {size} bytes, the limit is {MAX_TASK_BYTES}; give long texts with --input FILE"
        )
    if path.suffix == ".json":
        document = Document(path.name, _parse_json(path, text), {})
    else:
        try:
            document = read_document(path)
        except UnreadableFileError as err:
            raise BadInput(f"the task file {path} is not usable", details=tuple(map(str, err.problems))) from err
    if not isinstance(document.data, dict):
        raise BadInput(f"the task file {path} must hold fields at the top, such as 'objective: …'")
    return document


def checked_task(document: Document, registry: Registry | None = None) -> TaskIR:
    """The task in these fields. Raises BadInput with every problem as `file:line: field: message`.

    Without a registry roles, gates and personas may have any name: whoever has one checks them, see `refused_task`.
    """
    try:
        task = TaskIR.model_validate(document.data)
    except ValidationError as err:
        details = [_problem(document, tuple(item["loc"]), _message(item)) for item in err.errors(include_url=False)]
        raise BadInput(_headline(document, details), details=_bounded(details)) from err
    found = find_problems(task) if registry is None else plan_problems(task, registry)
    details = [_problem(document, one.place(task.plan), one.message) for one in [*found, *schema_problems(task)]]
    if details:
        raise BadInput(_headline(document, details), details=_bounded(details))
    return task


def refused_task(document: Document, task: TaskIR, failure: Failure) -> BadInput | None:
    """What the hub has found wrong with this task, with file and line; None where it failed for another reason."""
    problems = problems_in(failure.evidence)
    if not problems:
        return None
    details = [_problem(document, found.place(task.plan), found.message) for found in problems]
    more = more_than(details, failure.evidence)
    return BadInput(_headline(document, details, more), details=_bounded(details, more))


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise BadInput(f"the task file {path} is not valid JSON: {err}") from err


def _headline(document: Document, details: Sequence[str], more: int = 0) -> str:
    count = len(details) + more
    return f"{document.file} is not a task that can run: {count} problem{'s' if count > 1 else ''}"


def _bounded(details: Sequence[str], more: int = 0) -> tuple[str, ...]:
    more += max(0, len(details) - _MAX_PROBLEMS)
    return (*details[:_MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else ()))


def _problem(document: Document, at: tuple[int | str, ...], message: str) -> str:
    line = f":{document.line_of(at)}" if document.lines else ""
    field = _dotted(document.data, at)
    return f"{document.file}{line}: {field + ': ' if field else ''}{message}"


def _dotted(data: Any, at: tuple[int | str, ...]) -> str:
    """`plan.steps[S3].inputs[0]`: list items by id or name where they have one, else by position."""
    text = ""
    for part in at:
        inside = None
        if isinstance(data, Mapping):
            inside = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            inside = data[part]
        if isinstance(part, int):
            named = (inside.get("id") or inside.get("name")) if isinstance(inside, Mapping) else None
            text += f"[{named if isinstance(named, str) else part}]"
        else:
            text += f".{part}" if text else part
        data = inside
    return text


def _message(item: Mapping[str, Any]) -> str:
    if item["type"] == "missing":
        return "the field is missing"
    if item["type"] == "extra_forbidden":
        known = _known_fields(tuple(item["loc"])[:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        return f"unknown field; did you mean {near[0]!r}?" if near else f"unknown field; there are: {', '.join(known)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = json.dumps(item["input"], default=str, ensure_ascii=False)
    return f"{message[:1].lower()}{message[1:]}, got {given if len(given) <= 60 else given[:57] + '...'}"


def _known_fields(at: tuple[int | str, ...]) -> list[str]:
    """Fields of the model at this place of a TaskIR."""
    model: type[BaseModel] = TaskIR
    for part in at:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None`, `list[Model]` or an Annotated of these."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for inner in typing.get_args(annotation) if (found := _model_in(inner)) is not None), None)
