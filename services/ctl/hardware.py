"""`doctor --detect [--write]`: registry/hardware.yaml as this machine would fill it, shown or written.

What is written is first read back by the registry's own reader, and replaces the file in one step: a crash leaves the
old one or the new one.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final

from services.ctl.commands import Context
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.screen import mebibytes
from services.kit.hardware import Machine, detect
from services.kit.registry.hardware_file import with_machine
from services.kit.registry.sections import Draft

FILE: Final = "hardware.yaml"


def show_hardware(context: Context, *, write: bool) -> ExitCode:
    """Print what was detected; with `write` put it into the registry. Raises BadInput where it cannot."""
    path = context.home.registry / FILE
    try:
        machine = detect()
        text = with_machine(path.read_text(encoding="utf-8") if path.exists() else "", machine)
        if write:
            _replace(path, text)
    except UnicodeDecodeError as err:
        raise BadInput(
            f"{path} is not UTF-8 (byte {err.start}); save it as UTF-8, or move it away: it is made anew"
        ) from err
    except OSError as err:
        where = "TIERLINE_REGISTRY names its folder, which must be there and writable"
        raise BadInput(f"cannot detect or write {path}: {err.strerror}; {where}") from err
    if context.screen.json:
        context.screen.document({**asdict(machine), "file": str(path), "written": write})
        return ExitCode.OK
    context.screen.line(text.rstrip("\n"))
    context.screen.note(_summary(machine))
    context.screen.note(
        f"written to {path}; 'tierline up' applies it" if write else "'--write' puts this into the file"
    )
    return ExitCode.OK


def _summary(machine: Machine) -> str:
    return (
        f"{machine.cores} cores (bound by {machine.cores_bound}), {mebibytes(machine.memory_bytes)} of memory "
        f"(bound by {machine.memory_bound}), {len(machine.nodes)} NUMA node(s)"
    )


def _replace(path: Path, text: str) -> None:
    """Write through a checked temporary file beside it. Raises BadInput if the registry could not read it."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".detect-") as folder:
        fresh = Path(folder) / path.name
        fresh.write_text(text, encoding="utf-8")
        draft = Draft()
        draft.read(fresh)
        if draft.problems:
            details = tuple(str(problem) for problem in draft.problems)
            raise BadInput(f"{path} is not in a form that can be filled in; repair it first", details=details)
        if path.exists():
            fresh.chmod(path.stat().st_mode & 0o777)
        os.replace(fresh, path)
