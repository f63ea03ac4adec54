"""Puts a task's artefacts into a folder of the user's, and nowhere else.

Names come from plans that models wrote. The protocol refuses names that are paths; this file does not rely on it, and
never writes through a link that lies in the folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from protocol.messages.artefact import Artefact
from services.ctl.outcomes import BadInput


def check_folder(folder: Path) -> None:
    """Make the folder, before any work is paid for. Raises BadInput where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise BadInput(f"--output {folder}: {err.strerror}; name a folder that can be made or written") from err
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"--output {folder}: no permission to write there")


def write_artefacts(folder: Path, artefacts: Sequence[Artefact]) -> list[Path]:
    """Write each artefact under its own file name, replacing older files; returns the paths in the same order."""
    written: list[Path] = []
    taken: set[str] = set()
    for artefact in artefacts:
        name = artefact.file_name()
        if name in taken:  # `facts` of kind json and an artefact named facts.json
            name = next(other for number in range(2, 1_000) if (other := f"{number}-{name}") not in taken)
        taken.add(name)
        if Path(name).name != name or name.startswith("."):
            raise BadInput(
                f"the artefact {artefact.name!r} has no usable file name; read it with: tierline show --json"
            )
        written.append(_replace(folder, name, artefact.text()))
    return written


def _replace(folder: Path, name: str, text: str) -> Path:
    target = folder / name
    handle, draft = tempfile.mkstemp(prefix=".tierline-", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text if text.endswith("\n") else f"{text}\n")
    Path(draft).chmod(0o644)
    Path(draft).replace(target)  # a link of that name is replaced, not followed
    return target
