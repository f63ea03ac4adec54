"""The one shape of a failure. It is typed where the fact is known and never derived from a message text.

Which action follows from a category stands in `registry/failures.yaml` and nowhere else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from protocol.messages.base import Message


class Category(StrEnum):
    """What kind of thing went wrong; decides who tries again, and where."""

    FORMAT = "FORMAT"
    SCHEMA = "SCHEMA"
    CODE = "CODE"
    LOGIC = "LOGIC"
    TIMEOUT = "TIMEOUT"
    EARLY_ABORT = "EARLY_ABORT"
    PEER = "PEER"
    RESOURCE = "RESOURCE"
    POLICY = "POLICY"


class Finding(Message):
    """One thing a gate or a check found in an artefact."""

    gate: str
    category: Category
    message: str = Field(max_length=4_000)
    artefact: str | None = None
    file: str | None = None
    line: int | None = Field(default=None, ge=0)
    column: int | None = Field(default=None, ge=0)
    rule: str | None = None


class Failure(Message):
    """Why a call, an attempt, a step or a task did not succeed."""

    code: str = Field(max_length=128)
    """Stable name for programs, for example `peer.lost` or `gate.unit`."""
    category: Category
    origin: str = Field(max_length=128)
    """Service or part in which it was raised."""
    message: str = Field(max_length=8_000)
    """For people: what happened and what to do next."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    """Values that support the message."""
    findings: list[Finding] = Field(default_factory=list, max_length=200)
    """What the next attempt should see."""
