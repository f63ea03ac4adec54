"""The task that a command line describes: an objective or a file, files as inputs, and the switches on top.

`run`, `submit` and `plan` share it, so that what is shown by a dry run is what a run would send.
"""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.artefact import SUFFIXES, Artefact, ArtefactKind
from protocol.messages.task import Priority, TaskIR, TaskType
from services.ctl.outcomes import BadInput
from services.ctl.task_file import checked_task, read_task_fields
from services.kit.registry import Registry
from services.kit.registry.yaml_lines import Document

CONTENT_TYPES: Final[Mapping[str, str]] = {suffix: content_type for content_type, suffix in SUFFIXES.items()}
"""Suffix of an input file -> content type of the code in it."""

_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_.\-]+")
_NAMED: Final = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63})=(?P<file>.+)\Z", re.DOTALL)


def add_task_arguments(parser: ArgumentParser) -> None:
    """Add what describes a task to a command."""
    parser.add_argument("objective", nargs="?", help="what you want, in words")
    parser.add_argument("--file", "--task", dest="file", type=Path, metavar="TASK", help="a TaskIR as .yaml or .json")
    parser.add_argument(
        "--input",
        dest="inputs",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a file the task works on, repeatable; by suffix .py .sh .c .js are code, .json is json, others are text",
    )
    parser.add_argument("--type", dest="task_type", choices=[item.value for item in TaskType], help="kind of work")
    parser.add_argument("--priority", choices=[item.value for item in Priority], help="interactive overtakes batch")
    parser.add_argument("--gates", metavar="GATE,…", help="checks of the final artefacts")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="the task fails if not done by then")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens that all attempts together may generate")


@dataclass(frozen=True, slots=True)
class GivenTask:
    """A task, and where each part of it was written."""

    task: TaskIR
    document: Document


def task_from(args: Namespace, registry: Registry | None = None) -> GivenTask:
    """The task that the arguments describe, checked as `checked_task` says. Raises BadInput."""
    if (args.objective is None) == (args.file is None):
        raise BadInput('give either an objective in quotes, as in: tierline run "compare these files", or --file TASK')
    document = Document("the command line", {}, {}) if args.file is None else read_task_fields(args.file)
    fields: dict[str, Any] = dict(document.data)
    given: dict[str, Any] = {
        "objective": args.objective,
        "task_type": args.task_type,
        "priority": args.priority,
        "deadline_s": args.deadline,
        "gates": [name.strip() for name in args.gates.split(",") if name.strip()] if args.gates is not None else None,
    }
    fields |= {name: value for name, value in given.items() if value is not None}
    if args.max_tokens is not None:
        budget = fields.get("budget")
        fields["budget"] = {**(budget if isinstance(budget, dict) else {}), "max_tokens": args.max_tokens}
    if args.inputs:
        written = fields.get("inputs", [])
        read = [artefact.model_dump(mode="json") for artefact in map(read_input, args.inputs)]
        fields["inputs"] = [*(written if isinstance(written, list) else []), *read]
        _refuse_equal_names(fields["inputs"])
    document = Document(document.file, fields, document.lines)
    return GivenTask(checked_task(document, registry), document)


def read_input(given: str) -> Artefact:
    """The artefact in `FILE` or `NAME=FILE`; its name is the file's, its kind follows from the suffix."""
    path, name = Path(given), ""
    named = _NAMED.match(given)
    if named is not None and not path.exists():
        path, name = Path(named["file"]), named["name"]
    try:
        # A character of UTF-8 has at most 4 bytes: a larger file need not be read to be refused.
        if path.stat().st_size > 4 * MAX_ARTEFACT_CHARS:
            raise BadInput(f"--input {path}: {path.stat().st_size} bytes; an input has at most 1 MiB of text")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise BadInput(f"--input {path}: not UTF-8 text (byte {err.start}); inputs are text, code or JSON") from err
    except OSError as err:
        raise BadInput(f"--input {path}: {err.strerror}") from err
    kind, content_type, value = ArtefactKind.TEXT, None, text
    if path.suffix in CONTENT_TYPES:
        kind, content_type = ArtefactKind.CODE, CONTENT_TYPES[path.suffix]
    elif path.suffix == ".json":
        kind = ArtefactKind.JSON
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise BadInput(f"--input {path}: not valid JSON: {err}") from err
    try:
        return Artefact(name=name or _name_of(path), kind=kind, value=value, content_type=content_type)
    except ValidationError as err:
        raise BadInput(f"--input {path}: {err.errors(include_url=False)[0]['msg']}") from err


def _name_of(path: Path) -> str:
    """A file's name as an artefact's name: odd characters become `_`."""
    return _NOT_IN_NAMES.sub("_", path.name)[:64].lstrip(".-") or "input"


def _refuse_equal_names(inputs: list[Any]) -> None:
    names = [item["name"] for item in inputs if isinstance(item, dict) and isinstance(item.get("name"), str)]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"two inputs are named {name!r}; name one of them yourself: --input other={name}")
