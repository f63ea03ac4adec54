"""Names of the artefacts that a plan makes: unique, safe as file names, and never in the way of an input.

Two names collide also where the files they are kept in would: `notes` becomes `notes.md`, and file systems exist that
do not tell `Notes` from `notes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.task import Output

_MAX_STEM_CHARS: Final = 40
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")


class Names:
    """The names taken so far in one plan."""

    def __init__(self, inputs: Iterable[Artefact]) -> None:
        self._taken: set[str] = set()
        for artefact in inputs:
            self._taken |= {artefact.name.casefold(), artefact.file_name().casefold()}

    def new(self, wish: str, kind: ArtefactKind = ArtefactKind.TEXT, content_type: str | None = None) -> Output:
        """Return an output named as wished, or with the smallest number that makes it unique."""
        stem = _UNSAFE.sub("_", wish).strip("_-")[:_MAX_STEM_CHARS] or "artefact"
        number = 1
        while True:
            output = Output(name=stem if number == 1 else f"{stem}_{number}", kind=kind, content_type=content_type)
            claims = {output.name.casefold(), output_file(output).casefold()}
            if not claims & self._taken:
                self._taken |= claims
                return output
            number += 1


def output_file(output: Output) -> str:
    """Name of the file in which an output is kept in a workspace."""
    value = None if output.kind is ArtefactKind.JSON else ""
    return Artefact(name=output.name, kind=output.kind, value=value, content_type=output.content_type).file_name()


def stem(name: str) -> str:
    """The name of an input without its suffix: `report` of `report.md`."""
    return name.rpartition(".")[0] or name
