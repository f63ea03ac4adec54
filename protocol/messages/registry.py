"""The registry at run time: a client asks the hub to take up what the files say now, the hub tells the services."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.messages.base import Message

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""sha256 in hex over the content of the registry; comments and order of the files do not change it."""


class Reload(Message):
    """Read the registry again, check it, and take it up whole; one with errors changes nothing."""

    digest: Digest | None = None
    """What the caller has checked: if the files say something else by now, they are refused."""


class EntryChange(Message):
    """One entry of the registry that is not what it was."""

    section: str
    """Such as `models` or `roles`; a section without names, such as `hardware`, has its own name as `name`."""
    name: str
    change: Literal["added", "changed", "removed"]


class Reloaded(Message):
    """The hub works with this registry from now on; services follow when they are told."""

    digest: Digest
    previous: Digest
    changes: list[EntryChange] = Field(default_factory=list)
    unchanged: int = Field(ge=0)
    """Entries that are what they were."""
    draining: list[str] = Field(default_factory=list)
    """Models whose process finishes what it has: removed ones, and changed ones, which begin anew then."""
    kept: list[str] = Field(default_factory=list)
    """Removed entries that running tasks and batches still use, as `roles.translator`: kept until those have ended."""


class RegistryChanged(Message):
    """To every service: the hub works with this registry; read it again. Repeated to those whose pong says another."""

    digest: Digest
    needed: bool = True
    """False = the model that this service serves is in the registry no more and no running task needs it: drain."""
