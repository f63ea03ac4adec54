"""Sets fields of one entry in the text of models.yaml; everything else in it, comments included, stays as it was.

It makes text: whether the registry is good with it, the reader decides (`load_registry`). A field is never taken out,
since the comments that follow it in the file would go with it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

_MARK: Final = "tuned "
"""Begins the part of a comment that is ours: the next one replaces it."""
_INDENTED: Final = re.compile(r"^models:[^\n]*\n(?:[ ]*(?:#[^\n]*)?\n)*([ ]+)[^\s#]", re.MULTILINE)
"""The first entry, with the spaces before it: people indent by two, by four."""
_HEAD: Final = re.compile(r"\A(?:[ ]*(?:#[^\n]*)?\n)*---[ ]*\n")
"""What stands before the document with the mark that begins it: ruamel.yaml would drop both."""
_EOL: Final = 2
"""Where ruamel.yaml keeps the comment behind a key, with all lines up to the next key."""


def with_settings(text: str, model: str, settings: Mapping[str, Any], note: str | None = None) -> str:
    """The text with these fields (`threads`, `speculation.type`) of an entry set, and with a note behind each of them.

    Raises KeyError where there is no such entry, and ValueError where the text is no YAML that can be written back.
    """
    line_end = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"  # where they differ: that of most lines
    text = text.replace("\r\n", "\n")
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4_096
    indented = _INDENTED.search(text)
    yaml.indent(mapping=len(indented[1]) if indented else 2, sequence=4, offset=2)
    head = marked[0] if (marked := _HEAD.match(text)) else ""
    document = yaml.load(text[len(head) :])
    noted: dict[tuple[int, str], CommentedMap] = {}
    for path, value in settings.items():
        owner, shown, name = _reached(document, ("models", model), path.split("."))
        _put(owner, name, value)
        noted[id(shown[0]), shown[1]] = shown[0]
    if note is not None:
        for (_, name), owner in noted.items():
            _note(owner, name, note)
    out = io.StringIO()
    yaml.dump(document, out)
    return (head + out.getvalue()).replace("\n", line_end)


def _reached(
    document: CommentedMap, entry: Sequence[str], field: Sequence[str]
) -> tuple[CommentedMap, tuple[CommentedMap, str], str]:
    """The mapping that holds a field, where a comment about it can stand (not inside of braces), and its key."""
    owner, shown, in_braces = document, (document, entry[0]), False
    for number, name in enumerate((*entry, *field)):
        in_braces = in_braces or bool(owner.fa.flow_style())
        if not in_braces:
            shown = (owner, name)
        if number == len(entry) + len(field) - 1:
            break
        if name not in owner and number >= len(entry):
            fresh = CommentedMap()
            fresh.fa.set_flow_style()
            _put(owner, name, fresh)
        owner = owner[name]
    return owner, shown, field[-1]


def _put(owner: CommentedMap, name: str, value: Any) -> None:
    """Set a key; a new one goes before the last, to which the lines up to the next entry belong."""
    if name in owner or not owner or owner.fa.flow_style():
        owner[name] = value
    else:
        owner.insert(len(owner) - 1, name, value)


def _note(owner: CommentedMap, name: str, note: str) -> None:
    """Put a note behind a key, after what stands there already, except for an older note."""
    items = owner.ca.items.get(name)
    token = items[_EOL] if items else None
    said, rest = "", ""
    if token is not None:
        said, line_end, rest = token.value.partition("\n")
        rest = line_end + rest
    kept = said.lstrip("# ").partition(_MARK)[0].rstrip("; ")
    words = f"# {kept + '; ' if kept else ''}{_MARK}{note}"
    if token is None:
        owner.ca.items[name] = [None, None, CommentToken(words + "\n", CommentMark(0), None), None]
    else:
        token.value = words + rest
