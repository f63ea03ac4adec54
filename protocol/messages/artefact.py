"""An artefact: a named piece of content that goes into a step or comes out of one."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

from pydantic import Field, model_validator

from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.base import Name, Strict


class ArtefactKind(StrEnum):
    """What the content is; decides how it is cut out of an answer and which gates apply to it."""

    TEXT = "text"
    CODE = "code"
    JSON = "json"


class Artefact(Strict):
    """Named content, carried inline."""

    name: Name
    kind: ArtefactKind = ArtefactKind.TEXT
    value: Any = None
    """A string for text and code, any JSON value for json."""
    content_type: str | None = Field(default=None, max_length=128)
    """MIME type; for code it names the language, for example `text/x-python`."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Artefact:
        if self.kind is not ArtefactKind.JSON and not isinstance(self.value, str):
            raise ValueError(f"value of {self.kind.value} artefact {self.name!r} must be a string")
        if len(self.text()) > MAX_ARTEFACT_CHARS:
            raise ValueError(f"artefact {self.name!r} is larger than {MAX_ARTEFACT_CHARS} characters")
        return self

    def text(self) -> str:
        """The content as it goes into a prompt or a file."""
        if self.kind is ArtefactKind.JSON:
            return json.dumps(self.value, ensure_ascii=False, indent=1)
        return str(self.value)

    def file_name(self) -> str:
        """Name of the file that holds it in a workspace: the name itself, with a suffix where it has none."""
        if "." in self.name:
            return self.name
        if self.kind is ArtefactKind.JSON:
            return f"{self.name}.json"
        if self.kind is ArtefactKind.CODE:
            return f"{self.name}{SUFFIXES.get(self.content_type or 'text/x-python', '.txt')}"
        return f"{self.name}{TEXT_SUFFIXES.get(self.content_type or 'text/markdown', '.md')}"


SUFFIXES: dict[str, str] = {
    "text/x-python": ".py",
    "text/x-shellscript": ".sh",
    "text/x-c": ".c",
    "text/javascript": ".js",
}
"""File suffix per content type of code; Python where none is given."""

TEXT_SUFFIXES: dict[str, str] = {
    "application/json": ".json",
    "application/yaml": ".yaml",
    "application/toml": ".toml",
}
"""File suffix per content type of text; Markdown where none is given."""
