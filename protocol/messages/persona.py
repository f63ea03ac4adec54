"""Personas at run time: a prompt overlay that a client, the planner or a step's work makes while the stack runs.

One that is made for a task belongs to that task at once and for as long as it lives. By name it is known to everybody
else as long as it is on trial; outcomes decide whether the registry adopts it. What is said here came from a program
or a model, so every field is bounded and checked where it comes in.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, field_validator

from protocol.messages.base import Message, Millis, RegistryName, Strict
from protocol.messages.task import TaskType

NO_PERSONA: Final = "none"
"""What a step or a plan names that wants no persona, and what that choice is called; no persona has this name."""
MAX_PERSONA_PROMPT_CHARS: Final = 4_000
MAX_PERSONAS_AT_ONCE: Final = 100
"""Of one plan or one extension of a task."""

_UNPRINTABLE: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, and those without a width or that turn the direction of text: a person who reads the prompt in
the registry must see what the model sees."""

PersonaState: TypeAlias = Literal["registered", "trial", "adopted", "dropped"]
"""registered = declared in the registry's files; trial = known by name, its outcomes are counted; adopted = it came
from a trial and is in the files now; dropped = it is known no more, except to the tasks that have it."""


class Persona(Strict):
    """A persona as whoever makes it describes it."""

    name: RegistryName
    """What steps call it."""
    description: Annotated[str, Field(min_length=1, max_length=200)]
    """One sentence on when to choose it."""
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PERSONA_PROMPT_CHARS)]
    """Added to the system prompt of the role."""
    roles: list[RegistryName] = Field(default_factory=list, max_length=32)
    """Roles it may be chosen for; empty = any. A step that names it may have any role."""
    task_types: list[TaskType] = Field(default_factory=list, max_length=5)
    """Types of task it may be chosen for; empty = any."""

    @field_validator("name")
    @classmethod
    def _not_none(cls, name: str) -> str:
        if name == NO_PERSONA:
            raise ValueError(f"{NO_PERSONA!r} means no persona; take another name")
        return name

    @field_validator("description")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if "\n" in text or "\t" in text:
            raise ValueError("must be a single line")
        return _readable(text)

    @field_validator("prompt")
    @classmethod
    def _printable(cls, text: str) -> str:
        return _readable(text)


class MakePersona(Message):
    """Body of `persona.make`: have a persona from now on.

    The same name with the same prompt asked for again is the same persona, so that asking twice makes nothing twice.
    """

    persona: Persona
    task_id: str | None = Field(default=None, max_length=128)
    """An unfinished task that it is made for: its steps may name it from the answer on, whatever becomes of the
    trial."""
    rename: bool = False
    """What happens where the name is taken by another prompt: false = the request is refused, true = it gets a free
    name that begins alike, which the answer tells."""


class PersonaMade(Message):
    """It is on disk, and steps may name it."""

    name: str
    """What steps call it."""
    state: PersonaState
    duplicate: bool = False
    """True where it was known already, with this prompt."""
    why: str = ""
    """Why it is not on trial, if it is not: then only the task that it was made for knows it."""


class PersonaQuery(Message):
    """Body of `persona.list`: all that the registry declares and all that were made at run time."""


class PersonaView(Message):
    """One persona and what has become of it."""

    name: str
    description: str
    prompt: str
    roles: list[str] = Field(default_factory=list)
    task_types: list[str] = Field(default_factory=list)
    state: PersonaState
    why: str = ""
    """What led to the state, with the figures behind it."""
    made_by: str = ""
    """Client or service that made it; empty for one that was declared."""
    task_id: str | None = None
    """Task that it was made for."""
    made_ms: Millis = 0
    changed_ms: Millis = 0
    """When its state last changed."""


class PersonaListing(Message):
    """Answer to `persona.list`, the declared ones first."""

    personas: list[PersonaView] = Field(default_factory=list)


class PersonasOnTrial(Message):
    """To every planner, when it joins and whenever they change: all personas that may be chosen beside the registry's,
    those that have waited longest for outcomes first."""

    personas: list[Persona] = Field(default_factory=list)


def _readable(text: str) -> str:
    if found := _UNPRINTABLE.search(text):
        raise ValueError(
            f"holds the character U+{ord(found.group()):04X} at {found.start()}; only text that shows is taken"
        )
    if not text.strip():
        raise ValueError("is empty")
    return text.strip()
