"""Writes a persona that has earned it into the operator's personas.yaml: the hub's hand on the disk, in a thread.

Only this entry is taken up while the stack runs. Where the files have been changed besides, that is the operator's
business: the entry waits in them, together with the rest, for the next reload, and stays usable by name meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from protocol.messages.registry import EntryChange
from services.kit.config import Home
from services.kit.registry import (
    PersonaEntry,
    Registry,
    RegistryError,
    keep_copy,
    load_registry,
    make_current,
    persona_entry,
)
from services.kit.registry.personas_file import with_persona
from services.kit.registry.sections import FILES
from services.scheduler.personas import AdoptPersona
from services.scheduler.reloading import changes

_FILE: Final = "personas.yaml"


class NotWritten(Exception):
    """The file is as it was; the text says why and what helps."""


def adopt(asked: AdoptPersona, home: Home, declared: Registry) -> Registry | None:
    """Write it. Returns the registry to take up, or None where the files differ in more. Raises NotWritten."""
    source = home.registry_source
    path = (source / _FILE).resolve()
    entry = persona_entry(asked.persona)
    with _nobody_reloads(home):
        try:
            text = path.read_text(encoding="utf-8")
            text = with_persona(text, entry, f"Made at run time, adopted for its outcomes: {asked.note}")
            found = _tried(text, source, home, entry)
            _replace(path, text)
        except (OSError, UnicodeDecodeError, ValueError) as err:
            raise NotWritten(f"{path} could not be written: {err}") from err
        added = EntryChange(section="personas", name=entry.name, change="added")
        if found is None or changes(declared, found)[0] != [added]:
            return None
        try:
            registry = keep_copy(source, home.models, home.registry_copies, check_files=False)
            if home.registry.resolve() != source.resolve():  # supervised: the services read a copy
                make_current(home.registry_copies, registry.digest)
                home.started_registry.write_text(registry.digest, encoding="ascii")
        except RegistryError:
            return None  # changed in this moment
        except OSError as err:
            raise NotWritten(f"it stands in {path}, but no copy of the registry can be kept: {err}") from err
    return registry


def _tried(text: str, source: Path, home: Home, entry: PersonaEntry) -> Registry | None:
    """The registry with this text of personas.yaml, before anything is written; None if other entries have problems,
    since the operator is at work on them. Raises NotWritten where this one has.
    """
    with tempfile.TemporaryDirectory(prefix="tierline-") as name:
        folder = Path(name)
        for file in FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        (folder / _FILE).write_text(text, encoding="utf-8")
        try:
            return load_registry(folder, home.models, check_files=False)
        except RegistryError as err:
            field = f"personas.{entry.name}"
            for problem in err.problems:
                if problem.field == field or problem.field.startswith(f"{field}."):
                    raise NotWritten(f"the registry would refuse it: {problem}") from err
            return None


def _replace(path: Path, text: str) -> None:
    """In one step, so that nobody reads half a file, and for good."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(path, draft)
    draft.replace(path)


@contextmanager
def _nobody_reloads(home: Home) -> Iterator[None]:
    """Hold the lock of `up`, `down` and `reload`. Raises NotWritten where one of them has it."""
    descriptor = os.open(home.stack_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise NotWritten("`tierline up` or a reload is at work; it is tried again in a minute") from err
        yield
    finally:
        os.close(descriptor)
