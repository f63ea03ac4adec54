"""What a tool left behind, and what a report parser makes of it: the seam between `sandbox` and the parsers.

A parser says what the tool found. Whether that is a pass is decided in `judge`, once for all tools.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Final

from protocol.messages.failure import Category, Finding
from services.gates.sandbox import WORKSPACE

_MAX_CHARS: Final = 1_500
"""Of one finding's message: it goes into a prompt, where room is dear."""


@dataclass(frozen=True, slots=True)
class ToolRun:
    """One command that exited by itself."""

    gate: str
    category: Category
    target: str
    """File in the workspace that it was started on."""
    artefacts: Mapping[str, str]
    """File in the workspace -> name of the artefact in it."""
    status: int
    """Exit status."""
    out: bytes
    err: bytes
    report: bytes | None = None
    """What it wrote to the report file; None if the tool has none."""
    pattern: str | None = None
    """For the parser `pattern`."""
    under_check: Set[str] = frozenset()
    """Files in the workspace that are judged; the others are context."""
    records: bytes = b""
    """What came through the channel of the tests."""
    key: bytes = b""
    """Key by which those records are signed."""

    def finding(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        column: int | None = None,
        rule: str | None = None,
    ) -> Finding:
        """A finding of this gate; `file` as the tool names it, the target where it names none."""
        name = (file or self.target).removeprefix(f"{WORKSPACE}/")
        return Finding(
            gate=self.gate,
            category=self.category,
            message=shortened(message),
            artefact=self.artefacts.get(name),
            file=name[:255],
            line=line,
            column=column,
            rule=rule,
        )

    def answer(self) -> bytes:
        """The report file where the tool has one, else its output: what parsers of formats read."""
        return self.out if self.report is None else self.report

    def said(self) -> str:
        """The end of what it printed, for people."""
        return shortened((self.err.strip() or self.out.strip()).decode("utf-8", "replace")[-_MAX_CHARS:])


@dataclass(frozen=True, slots=True)
class Reading:
    """What a parser understood."""

    findings: tuple[Finding, ...] = ()
    broken: str | None = None
    """Why the tool itself did not do its work, so that nothing is known about the artefact."""


def shortened(text: str) -> str:
    """Text that fits into a message, without the control characters a hostile artefact may print."""
    clean = "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
    return clean if len(clean) <= _MAX_CHARS else f"{clean[: _MAX_CHARS - 1]}\N{HORIZONTAL ELLIPSIS}"
