"""Gate runs: deterministic checks of artefacts, each with a typed verdict."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

from pydantic import Field

from protocol.messages.artefact import Artefact
from protocol.messages.base import CheckCommand, Message, Millis, Name, Text
from protocol.messages.failure import Category, Finding

MAX_CHECKED: Final = 64
"""Artefacts under check in one request."""
MAX_CONTEXT: Final = 256
"""Artefacts beside them."""


class Verdict(StrEnum):
    """`error` = the gate itself could not judge (tool missing, sandbox gone): never a pass."""

    PASS = "pass"  # noqa: S105  a verdict, not a password
    FAIL = "fail"
    ERROR = "error"
    SKIPPED = "skipped"


class GateRequest(Message):
    """Run the named gates on the artefacts under check."""

    gates: list[Name] = Field(min_length=1, max_length=16)
    artefacts: list[Artefact] = Field(min_length=1, max_length=MAX_CHECKED)
    """Under check: the outputs of one attempt, or the final artefacts of a task."""
    context: list[Artefact] = Field(default_factory=list, max_length=MAX_CONTEXT)
    """Also placed in the workspace, not judged: inputs such as the tests that came with the task."""
    json_schema: dict[str, Any] | None = None
    """For the schema gate."""
    check_command: CheckCommand | None = None
    """For gates that run the task's own command."""
    objective: Text = ""
    """For gates that a role judges: what the task is about."""
    criteria: list[Text] = Field(default_factory=list, max_length=64)
    """For gates that a role judges: the task's definition_of_done."""


class GateResult(Message):
    """One gate on all artefacts it applies to."""

    gate: str
    verdict: Verdict
    category: Category
    """Category of its failure: the gate's own for `fail`, RESOURCE or POLICY for `error`."""
    required: bool = True
    """False = advisory: whatever the verdict, it fails nothing; its findings are shown to the next attempt."""
    cached: bool = False
    """The same files were checked before by the same gate, and this is what it said then."""
    message: str = Field(default="", max_length=4_000)
    """Why, where the verdict is not `pass`; a judge's reasons, also where it is."""
    findings: list[Finding] = Field(default_factory=list, max_length=200)
    started_ms: Millis
    ended_ms: Millis


class GateFinal(Message):
    """Results in the order in which the gates were asked for, whichever finished first."""

    results: list[GateResult]
