"""The folder of one request outside the sandbox, and which of its files each gate is for.

Artefacts and context become files under their file names, which are names and never paths. The folder is private to
the user; commands see its files one by one, read-only (`sandbox`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from protocol.errors import CallFailed
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.failure import Category, Failure
from services.kit.registry import GateEntry

_LANGUAGES: Final[Mapping[str, str]] = {
    "text/x-python": "python",
    "text/x-shellscript": "shell",
    "text/x-c": "c",
    "text/javascript": "javascript",
    "application/json": "json",
    "application/yaml": "yaml",
    "application/toml": "toml",
    "text/markdown": "markdown",
    ".py": "python",
    ".sh": "shell",
    ".bash": "shell",
    ".c": "c",
    ".h": "c",
    ".js": "javascript",
    ".mjs": "javascript",
    ".json": "json",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".md": "markdown",
}
"""Language, as gates.yaml names it, per content type and per suffix."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One artefact as a file."""

    artefact: str
    file: str
    """Its name in the workspace."""
    path: Path
    """Where it lies outside."""
    kind: ArtefactKind
    judged: bool
    """False for context, which is there to be read by gates but not judged."""
    language: str | None
    digest: bytes
    """sha256 of the content."""

    @property
    def is_test(self) -> bool:
        """Whether pytest would take it for a file of tests by its name."""
        name = PurePosixPath(self.file)
        return name.suffix == ".py" and (name.stem.startswith("test_") or name.stem.endswith("_test"))


@dataclass(frozen=True, slots=True)
class Workspace:
    """The files of one request. `folder` also holds what gates write outside the sandbox's view."""

    folder: Path
    subjects: tuple[Subject, ...]

    def files(self) -> dict[str, Path]:
        """Name in the workspace -> file outside."""
        return {subject.file: subject.path for subject in self.subjects}

    def names(self) -> dict[str, str]:
        """Name in the workspace -> artefact."""
        return {subject.file: subject.artefact for subject in self.subjects}

    def judged_by(self, gate: GateEntry) -> list[Subject]:
        """The artefacts under check that this gate is for."""
        return [subject for subject in self.subjects if subject.judged and applies(gate, subject)]

    def tests_for(self, gate: GateEntry) -> list[Subject]:
        """The test files, under check or not; without any, the artefacts themselves, which may hold tests."""
        return [subject for subject in self.subjects if subject.is_test] or self.judged_by(gate)

    def content(self) -> Iterator[bytes]:
        """What the files are, for the key of a cached verdict: names, roles and content."""
        for subject in sorted(self.subjects, key=lambda one: one.file):
            about = (subject.file, subject.artefact, subject.kind.value, subject.judged, subject.language)
            yield repr(about).encode()
            yield subject.digest

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)


def applies(gate: GateEntry, subject: Subject) -> bool:
    """Whether a gate can judge an artefact, by kind and language."""
    return subject.kind in gate.kinds and (not gate.languages or subject.language in gate.languages)


def make_workspace(parent: Path, artefacts: Iterable[Artefact], context: Iterable[Artefact]) -> Workspace:
    """Write the files into a new private folder below `parent`.

    Where context and an artefact under check have one file name, the artefact wins: it is the newer version. Raises
    CallFailed (POLICY) if two under check do.
    """
    taken: dict[str, tuple[Artefact, bool]] = {}
    for artefact in artefacts:
        name = _safe_name(artefact)
        if name in taken:
            message = f"artefacts {taken[name][0].name!r} and {artefact.name!r} are both {name!r} as a file: rename one"
            raise _refused("gates.duplicate_file", message)
        taken[name] = artefact, True
    for artefact in context:
        taken.setdefault(_safe_name(artefact), (artefact, False))
    folder = Path(tempfile.mkdtemp(dir=parent))  # 0700
    subjects = []
    for name, (artefact, judged) in taken.items():
        path = folder / f"in-{name}"
        content = artefact.text().encode("utf-8", "replace")
        path.write_bytes(content)
        path.chmod(0o444)  # another uid reads it in the sandbox; the folder around it keeps everybody else out
        digest = hashlib.sha256(content).digest()
        subjects.append(Subject(artefact.name, name, path, artefact.kind, judged, _language(artefact), digest))
    return Workspace(folder, tuple(subjects))


def private_folder(home: Path) -> Path:
    """A folder below `home` for the workspaces of this process; what dead processes left there is removed."""
    parent = home / "gates"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in parent.iterdir():
        if not Path(f"/proc/{old.name}").exists():
            shutil.rmtree(old, ignore_errors=True)  # another one that starts now may remove it as well
    own = parent / str(os.getpid())
    own.mkdir(mode=0o700, exist_ok=True)
    return own


def _safe_name(artefact: Artefact) -> str:
    name = artefact.file_name()
    if PurePosixPath(name).name != name or name.startswith(".") or len(name) > 255:
        raise _refused("gates.bad_name", f"artefact {artefact.name!r} would become the file {name!r}: not a plain name")
    return name


def _language(artefact: Artefact) -> str | None:
    return _LANGUAGES.get(artefact.content_type or PurePosixPath(artefact.file_name()).suffix)


def _refused(code: str, message: str) -> CallFailed:
    return CallFailed(Failure(code=code, category=Category.POLICY, origin="gates", message=message))
