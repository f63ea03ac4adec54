"""The docstrings below the fields of messages and entries, for what is generated from them.

They are read from the source when a generator asks. Pydantic can do so at every start of every process
(`use_attribute_docstrings`), which was a third of the time that a service took to import its messages.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema


class Described(GenerateJsonSchema):
    """JSON Schema in which every field that has a docstring says it: give it to pydantic as `schema_generator`."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """The schema of one model, its fields described."""
        made = super().model_schema(schema)
        fields: Mapping[str, Any] = made.get("properties", {})
        for name, text in attribute_docstrings(schema["cls"]).items():
            if name in fields:
                fields[name].setdefault("description", text)
        return made


def attribute_docstrings(cls: type) -> dict[str, str]:
    """Field -> the string below it, of a class and of those of its bases whose source can be read."""
    notes: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        notes |= _own(one)
    return notes


@cache
def _own(cls: type) -> Mapping[str, str]:
    """Kept, for the base of all messages is the base of each, and to find a class its whole file is parsed."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError):  # built in, or made without a source
        return {}
    return docstrings_in(tree.body) if isinstance(tree, ast.ClassDef) else {}


def docstrings_in(body: list[ast.stmt]) -> dict[str, str]:
    """Assigned name -> the string that stands below it."""
    notes = {}
    for assigned, below in pairwise(body):
        if not isinstance(assigned, ast.AnnAssign) or not isinstance(assigned.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            notes[assigned.target.id] = inspect.cleandoc(below.value.value)
    return notes
