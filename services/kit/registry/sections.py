"""Turns the registry files into checked entries, each complaint with its file, line and dotted field.

Every entry is validated by itself, so one bad entry hides neither the others nor their problems. What entries must
agree on between each other is left to `rules`.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from protocol.messages.failure import Category
from services.kit.registry.entries import (
    ClientEntry,
    ClientPattern,
    FailureCaps,
    FailureRule,
    GateEntry,
    GatePolicy,
    HardwareEntry,
    LearningEntry,
    ModelEntry,
    PersonaEntry,
    RoleEntry,
    TrialPolicy,
)
from services.kit.registry.entry import Entry, Name
from services.kit.registry.problems import Problem
from services.kit.registry.yaml_lines import Document, FieldPath, UnreadableFileError, read_document

EntryT = TypeVar("EntryT", bound=Entry)


@dataclass(frozen=True, slots=True)
class Section:
    """One top-level key of one registry file."""

    key: str
    entry: type[Entry]
    keys: Literal["name", "client", "category", "field"]
    """What the keys below are: names of entries, patterns of clients' names, failure categories, or the fields of a
    single entry."""
    may_be_empty: bool = False


#: file -> its sections. The JSON Schemas are generated from this table, so editor and loader cannot disagree.
FILES: Final[Mapping[str, tuple[Section, ...]]] = {
    "models.yaml": (Section("models", ModelEntry, "name"),),
    "roles.yaml": (Section("roles", RoleEntry, "name"),),
    "personas.yaml": (Section("personas", PersonaEntry, "name", may_be_empty=True),),
    "gates.yaml": (
        Section("gates", GateEntry, "name", may_be_empty=True),
        Section("policy", GatePolicy, "field", may_be_empty=True),
    ),
    "failures.yaml": (
        Section("failures", FailureRule, "category"),
        Section("caps", FailureCaps, "field", may_be_empty=True),
    ),
    "hardware.yaml": (Section("hardware", HardwareEntry, "field", may_be_empty=True),),
    "learning.yaml": (
        Section("learning", LearningEntry, "field", may_be_empty=True),
        Section("trials", TrialPolicy, "field", may_be_empty=True),
    ),
    "clients.yaml": (Section("clients", ClientEntry, "client", may_be_empty=True),),
}
OPTIONAL: Final = frozenset({"clients.yaml", "learning.yaml"})
"""Files that a registry may do without."""

FILE_OF: Final[Mapping[str, str]] = {section.key: file for file, sections in FILES.items() for section in sections}

_UNSHOWN: Final = frozenset({"api_key_env", "base_url", "proxy"})
"""Fields into which a secret may have been put by mistake: errors do not repeat it."""

_NAME: Final = TypeAdapter[str](Name)
_CLIENT: Final = TypeAdapter[str](ClientPattern)


@dataclass(slots=True)
class Draft:
    """What could be read so far: valid entries by section and key, the problems, and the lines of everything."""

    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)
    singles: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _documents: dict[str, Document] = field(default_factory=dict)

    def valid(self, section: str, entry: type[EntryT]) -> dict[str, EntryT]:
        """Return the valid entries of a section by key, in the order of the file."""
        return {key: value for key, value in self.entries.get(section, {}).items() if isinstance(value, entry)}

    def single(self, section: str, entry: type[EntryT]) -> EntryT:
        """Return a section that is one entry; its defaults where it is absent or invalid."""
        value = self.singles.get(section)
        return value if isinstance(value, entry) else entry()

    def declares(self, section: str, key: str) -> bool:
        """Tell whether a key stands in a section, valid or not; True for a section that could not be read at all.

        So a reference to an entry that has its own problem is not reported as a second one.
        """
        document = self._documents.get(FILE_OF[section])
        if document is None or not isinstance(document.data, dict) or not isinstance(document.data.get(section), dict):
            return True
        return key in document.data[section]

    def document(self, section: str) -> Document:
        """Return the file that holds a section; it must have been read."""
        return self._documents[FILE_OF[section]]

    def line_of(self, *path: str | int) -> int:
        """Return the line of a field; the first element of its path is the section."""
        return self._documents[FILE_OF[str(path[0])]].line_of(path)

    def problem(self, path: FieldPath, rule: str, message: str) -> Problem:
        """Make a problem about a field of a file that was read; the first element of its path is the section."""
        return self._documents[FILE_OF[str(path[0])]].problem(path, rule, message)

    def read(self, path: Path, file: str | None = None) -> None:
        """Read and validate one of `FILES`, adding its entries and its problems; `file` says which, if another name."""
        file = file or path.name
        if path.is_fifo() or path.is_char_device():  # whoever opens one may wait for ever: a check, or the hub
            self.problems.append(Problem(file, 1, "", "file-unreadable", "is a pipe or a device; make it a file"))
            return
        try:
            document = read_document(path)
        except UnreadableFileError as error:
            self.problems.extend(error.problems)
            return
        self._documents[file] = document
        sections = FILES[file]
        keys = " and ".join(f"'{section.key}:'" for section in sections)
        if not isinstance(document.data, dict):
            self.problems.append(document.problem((), "file-shape", f"must hold {keys} at the top"))
            return
        known = [section.key for section in sections]
        for key in document.data.keys() - known:
            self.problems.append(document.problem((key,), "extra_forbidden", f"unknown key; this file holds {keys}"))
        for section in sections:
            self.problems.extend(self._read_section(document, section))

    def _read_section(self, document: Document, section: Section) -> Iterator[Problem]:
        data = document.data.get(section.key)
        if data is None:  # a section whose fields are all commented out
            data = {}
        if not isinstance(data, dict):
            yield document.problem((section.key,), "section-shape", "must hold fields, one 'key: value' a line")
            return
        if section.keys == "field":
            entry, problems = _validated(document, (section.key,), section.entry, data)
            if entry is not None:
                self.singles[section.key] = entry
            yield from problems
            return
        if not data and not section.may_be_empty:
            yield document.problem((section.key,), "section-empty", "needs at least one entry; see registry/README.md")
        entries = self.entries.setdefault(section.key, {})
        for key, fields in data.items():
            path = (section.key, key)
            if not isinstance(fields, dict):
                yield document.problem(path, "entry-shape", "must hold fields, one 'field: value' a line")
                continue
            if section.keys == "category":
                if key not in Category.__members__:
                    known = ", ".join(Category)
                    yield document.problem(path, "unknown-category", f"no such category; the categories are {known}")
                    continue
                named = fields
            else:
                yield from _name_problems(document, path, fields, section)
                named = {**fields, "name": key}
            entry, problems = _validated(document, path, section.entry, named)
            if entry is not None:
                entries[key] = entry
            yield from problems


def read_files(folder: Path, hardware_file: Path | None = None) -> Draft:
    """Read every registry file of a folder, or `hardware_file` in its place; what is wrong is in the `problems`."""
    draft = Draft()
    for file in FILES:
        elsewhere = hardware_file if file == FILE_OF["hardware"] else None
        if elsewhere is not None or file not in OPTIONAL or (folder / file).exists():
            draft.read(elsewhere or folder / file, file)
    return draft


def _name_problems(
    document: Document, path: FieldPath, fields: Mapping[str, Any], section: Section
) -> Iterator[Problem]:
    try:
        (_CLIENT if section.keys == "client" else _NAME).validate_python(path[-1])
    except ValidationError:
        rule = "a name is 1 to 32 small letters, digits, '-' or '_', beginning with a letter"
        if section.keys == "client":
            rule = "a client's name is 1 to 64 letters, digits, '-', '_' or '.', with '*' and '?' as wildcards"
        yield document.problem(path, "name", rule)
    if "name" in fields:
        yield document.problem((*path, "name"), "extra_forbidden", "the key above is the name; remove this field")


def _validated(
    document: Document, path: FieldPath, entry: type[Entry], fields: Mapping[str, Any]
) -> tuple[Entry | None, list[Problem]]:
    try:
        # Strict, and by way of JSON: there a list may become a tuple and text a path, but "4" or true never a number.
        return entry.model_validate_json(json.dumps(fields), strict=True), []
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            if detail["loc"] == ("name",):
                continue  # said already, at the key
            here = (*path, *detail["loc"])
            problems.append(document.problem(here, detail["type"], _message(entry, detail)))
        return None, problems


def _message(entry: type[Entry], detail: Mapping[str, Any]) -> str:
    rule, leaf = detail["type"], str(detail["loc"][-1]) if detail["loc"] else ""
    if rule == "missing":
        return "the field is missing; add it"
    if rule == "extra_forbidden":
        near = difflib.get_close_matches(leaf, sorted(_field_names(entry)), n=1)
        return f"unknown field; did you mean '{near[0]}'?" if near else "unknown field; registry/README.md lists them"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if leaf in _UNSHOWN:
        return f"{message[:1].lower()}{message[1:]}"
    return f"{message[:1].lower()}{message[1:]}, got {_shortened(detail['input'])}"


def _field_names(entry: type[Entry]) -> set[str]:
    """Return the fields of an entry and of the entries inside it, its key excepted."""
    names = set(entry.model_fields) - {"name"}
    for info in entry.model_fields.values():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Entry):
            names |= _field_names(info.annotation)
    return names


def _shortened(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
