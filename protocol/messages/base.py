"""Base of every body: frozen, bounded, and forgiving about fields it does not know.

pydantic builds the checks of a class when the first value is made or read, not at import (`defer_build`): there are
over a hundred classes, a program needs a few of them, and building all took a quarter of what a short command takes.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field


class Message(BaseModel):
    """Frozen value; unknown fields are ignored so that a newer peer can speak to an older one."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class Strict(BaseModel):
    """Frozen value written by people: an unknown field is a typing mistake and is refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}$")]
"""Name of an artefact, step, role or model: safe as a file name inside a workspace, never a path."""

REGISTRY_NAME_PATTERN: Final = r"^[a-z][a-z0-9_-]{0,31}$"
"""Names become parts of process names, file names and log fields, hence so narrow."""

RegistryName = Annotated[str, Field(pattern=REGISTRY_NAME_PATTERN)]
"""Name of an entry that may stand in the registry's files."""

Text = Annotated[str, Field(max_length=64 * 1024)]
"""Prose a person or a model wrote: objective, action, reason."""

Millis = Annotated[int, Field(ge=0)]
"""Unix time, or a duration, in milliseconds."""

CheckCommand = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4_096)]], Field(min_length=1, max_length=64)
]
"""A command and its arguments, never a line for a shell."""
