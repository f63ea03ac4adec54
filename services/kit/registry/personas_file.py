"""Adds an entry to the text of personas.yaml; everything else in it, comments included, stays as it was.

It makes text. Who decides that a persona is added is the hub (`services/scheduler/personas.py`), whether the registry
is good with it the reader (`load_registry`).
"""

from __future__ import annotations

import io
from typing import Final

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import LiteralScalarString

from services.kit.registry.entries import PersonaEntry

_SECTION: Final = "personas"


def with_persona(text: str, entry: PersonaEntry, note: str) -> str:
    """The text with this entry at the end of its section, under a comment that says why it is there.

    One that has the very entry already comes back as it is. Raises ValueError where the text is no YAML that can be
    written back, has another entry of this name, or would not say afterwards what it is meant to.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4_096
    try:
        document = yaml.load(text)
    except YAMLError as err:
        raise ValueError(f"it is no YAML: {str(err).splitlines()[0]}") from err
    if not isinstance(document, CommentedMap):
        raise ValueError(f"it does not hold '{_SECTION}:' at the top")
    if not isinstance(document.get(_SECTION), CommentedMap) or not document[_SECTION]:
        document[_SECTION] = CommentedMap()  # `{}`, or nothing
    section = document[_SECTION]
    if entry.name in section:
        _compare(text, entry)  # written before, by a hub that was killed before it could say so
        return text
    section[entry.name] = _fields(entry)
    section.yaml_set_comment_before_after_key(entry.name, before=" ".join(note.split()), indent=2)
    out = io.StringIO()
    yaml.dump(document, out)
    made = out.getvalue()
    _compare(made, entry)
    return made


def _fields(entry: PersonaEntry) -> CommentedMap:
    fields = CommentedMap()
    fields["description"] = entry.description
    fields["prompt"] = LiteralScalarString(entry.prompt + "\n")
    fits = CommentedMap()
    for name, values in (("roles", entry.fits.roles), ("task_types", entry.fits.task_types)):
        if values:
            fits[name] = CommentedSeq(str(value) for value in values)
            fits[name].fa.set_flow_style()
    if fits:
        fits.fa.set_flow_style()
        fields["fits"] = fits
    if not entry.by_rule:
        fields["by_rule"] = False
    return fields


def _compare(text: str, entry: PersonaEntry) -> None:
    """What was written says what was meant, whatever characters there are in it."""
    fields = YAML(typ="safe").load(text)[_SECTION][entry.name] or {}
    try:
        read = PersonaEntry.model_validate({**fields, "name": entry.name})
    except ValidationError as err:
        raise ValueError(f"{entry.name!r} would be read back as something that is no persona") from err
    if read != entry:
        raise ValueError(f"{entry.name!r} would not be read back as it is")
