"""Writes `registry/schema/*.json`: JSON Schemas by which editors complete and check the registry files while typing.

Generated from the classes that the loader checks with, so the two cannot disagree; a test fails when the files are
stale. Only shapes are in a schema: what entries must agree on is checked by `tierline registry check`.

    python -m services.kit.registry.schema [FOLDER]
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

from protocol.docstrings import Described
from protocol.messages.base import REGISTRY_NAME_PATTERN
from protocol.messages.failure import Category
from services.kit.registry.entries import CLIENT_PATTERN
from services.kit.registry.sections import FILES, Section

DEFAULT_FOLDER: Final = Path("registry/schema")


def schema_texts() -> dict[str, str]:
    """Return the content of every schema file by its name, as `models.schema.json`."""
    return {
        file.replace(".yaml", ".schema.json"): json.dumps(_file_schema(file, sections), indent=2) + "\n"
        for file, sections in FILES.items()
    }


def _file_schema(file: str, sections: tuple[Section, ...]) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    for section in sections:
        entry = section.entry.model_json_schema(schema_generator=Described)
        definitions.update(entry.pop("$defs", {}))
        properties[section.key] = _section_schema(section, entry)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Tierline registry: {file}",
        "type": "object",
        "properties": properties,
        "required": [section.key for section in sections if not section.may_be_empty],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _section_schema(section: Section, entry: dict[str, Any]) -> dict[str, Any]:
    if section.keys == "field":
        return {**entry, "type": ["object", "null"]}
    if section.keys == "category":
        categories = [category.value for category in Category]
        return {
            "type": "object",
            "propertyNames": {"enum": categories},
            "additionalProperties": entry,
            "required": categories,
        }
    del entry["properties"]["name"]  # the key is the name
    entry["required"] = [name for name in entry.get("required", ()) if name != "name"]
    return {
        "type": ["object", "null"] if section.may_be_empty else "object",
        "propertyNames": {"pattern": CLIENT_PATTERN if section.keys == "client" else REGISTRY_NAME_PATTERN},
        "additionalProperties": entry,
        **({} if section.may_be_empty else {"minProperties": 1}),
    }


def main(arguments: list[str]) -> int:
    """Write every schema into the folder given, or into `DEFAULT_FOLDER`."""
    folder = Path(arguments[0]) if arguments else DEFAULT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schema_texts().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
