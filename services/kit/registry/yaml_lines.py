"""Reads one YAML file of an operator without losing the line numbers, and refuses what YAML lets slip by.

Plain `yaml.safe_load` keeps the last of two equal keys without a word (that once changed a production model), expands
aliases without bound and forgets where a value stood. This loader refuses duplicate keys, aliases, merge keys, tags,
deep nesting and large files, and returns plain data together with the line of every key and list item. It knows
nothing of what the fields mean: `sections` does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

import yaml

try:
    from yaml import CSafeLoader as _Parser
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader as _Parser  # type: ignore[assignment]

from services.kit.registry.problems import Problem

MAX_FILE_BYTES: Final = 1024 * 1024
"""A registry file of a large installation has a few hundred lines; anything near this is not a registry file."""

MAX_DEPTH: Final = 16
"""The deepest registry field lies 4 levels down; the bound keeps the recursion of the parser bounded too."""

FieldPath: TypeAlias = tuple[str | int, ...]
"""Keys and list positions from the top of the file to a field."""

_PLAIN_TAGS: Final = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))
_MERGE_TAG: Final = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class Document:
    """The content of one file and where each part of it stands."""

    file: str
    data: Any
    lines: Mapping[FieldPath, int]

    def line_of(self, path: FieldPath) -> int:
        """Return the 1-based line of a field, or of its nearest ancestor that exists in the file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: FieldPath, rule: str, message: str) -> Problem:
        """Make a problem about one field of this file."""
        return Problem(self.file, self.line_of(path), ".".join(map(str, path)), rule, message)


class UnreadableFileError(Exception):
    """The file cannot be taken as data at all: repair the line that the problems name."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


def read_document(path: Path) -> Document:
    """Read one YAML file of at most `MAX_FILE_BYTES` into plain data with line numbers.

    Raises `UnreadableFileError`, with every duplicate key at once, or with the first place where parsing stopped.
    """

    def refuse(line: int, rule: str, message: str) -> NoReturn:
        raise UnreadableFileError(Problem(path.name, line, "", rule, message))

    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        refuse(1, "file-missing", f"there is no such file in {path.parent}; copy it from the shipped registry folder")
    except OSError as error:
        refuse(1, "file-unreadable", f"cannot be read: {error.strerror}; check its type and permissions")
    if len(raw) > MAX_FILE_BYTES:
        refuse(1, "file-size", f"larger than {MAX_FILE_BYTES} bytes; a registry file is settings only")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(raw.count(b"\n", 0, error.start) + 1, "encoding", "not UTF-8; save the file as UTF-8")

    try:
        return _read_text(path.name, text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        refuse(mark.line + 1 if mark else 1, "yaml-syntax", f"not valid YAML: {message}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        refuse(line, "yaml-syntax", f"character {error.character!r} is not allowed in YAML; remove it")


def _read_text(file: str, text: str) -> Document:
    """Read it with the compiled parser where both agree: it accepts some tabs that PyYAML's own refuses, and words what
    it refuses in its own way."""
    if "\t" not in text:
        try:
            return _Reader(file, text, _CompiledLoader).read()
        except yaml.YAMLError:
            pass  # the other one says what is wrong
    return _Reader(file, text, _PythonLoader).read()


class _Bounded(yaml.composer.Composer):
    """Makes a tree of bounded depth of the parser's events: no aliases, so no content is ever multiplied."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node, refusing aliases and nesting beyond `MAX_DEPTH`."""
        mark = self.peek_event().start_mark  # type: ignore[attr-defined]  # the parser's, which the loaders add
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]  # likewise
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed; write the value out", mark)
        if self._depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _PythonLoader(_Bounded, yaml.SafeLoader):
    """PyYAML's own parser."""

    def __init__(self, text: str) -> None:
        yaml.SafeLoader.__init__(self, text)


class _CompiledLoader(_Bounded, _Parser):
    """libyaml's, which reads the shipped files in a seventh of the time; where it is missing, the other one again."""

    def __init__(self, text: str) -> None:
        _Parser.__init__(self, text)
        yaml.composer.Composer.__init__(self)  # libyaml's loader has none, and composes without bounds


class _Reader:
    """Turns the nodes of one file into plain data, filling the line table on the way."""

    def __init__(self, file: str, text: str, loader: type[_CompiledLoader | _PythonLoader]) -> None:
        self._file = file
        self._loader = loader(text)
        self._lines: dict[FieldPath, int] = {}
        self._problems: list[Problem] = []

    def read(self) -> Document:
        try:
            node = self._loader.get_single_node()
            data = None if node is None else self._plain(node, ())
        finally:
            self._loader.dispose()
        if self._problems:
            raise UnreadableFileError(*self._problems)
        return Document(self._file, data, self._lines)

    def _plain(self, node: yaml.Node, path: FieldPath) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._plain_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self._plain(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
            try:
                return self._loader.construct_object(node)
            except ValueError:  # PyYAML passes on what int() says to 0x_ or to 5,000 digits
                self._refuse(node, path, "yaml-number", "a number that cannot be read; quote the value if it is text")
                return None
        self._refuse(
            node, path, "yaml-tag", f"YAML type {node.tag.rpartition(':')[2]!r} is not used here; quote the value"
        )
        return None

    def _plain_mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG:
                self._refuse(key_node, path, "yaml-merge", "merge keys (<<) are not allowed; write the fields out")
                continue
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                self._refuse(
                    key_node, path, "key-type", "a key here is not text to YAML (as on, no, 1); put it in quotes"
                )
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in result:
                self._refuse(
                    key_node, here, "duplicate-key", f"the key is already set in line {self._lines[here]}; remove one"
                )
                continue
            self._lines[here] = key_node.start_mark.line + 1
            result[key] = self._plain(value_node, here)
        return result

    def _refuse(self, node: yaml.Node, path: FieldPath, rule: str, message: str) -> None:
        self._problems.append(
            Problem(self._file, node.start_mark.line + 1, ".".join(map(str, path)), rule, message),
        )
