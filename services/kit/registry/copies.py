"""Copies of the registries that were taken up, in the home of the stack, named by digest.

The files that an operator edits may be half written or wrong at any moment, and a process may be started at any
moment: so the services of a supervised stack read a copy that has passed every rule, through a link that moves in one
step. The hub finds here what a task of an earlier registry still needs. Who reads which is not decided here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from services.kit.registry.problems import Problem, RegistryError
from services.kit.registry.registry import Registry, load_registry
from services.kit.registry.sections import FILES, OPTIONAL

_KEPT: Final = 20
_TRIES: Final = 3


def keep_copy(folder: Path, models: Path, copies: Path, *, check_files: bool = True) -> Registry:
    """Check the registry in `folder`, copy it, and return it as the copy says it. Raises RegistryError, OSError.

    The copy is `copies/<digest>`; one that is there already becomes the newest.
    """
    for _ in range(_TRIES):
        registry = load_registry(folder, models, check_files=check_files)
        copy = copies / registry.digest
        if folder.resolve() == copy.resolve():
            os.utime(copy)
            return registry
        copies.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=copies, prefix=".new-") as name:
            fresh = Path(name) / "registry"
            fresh.mkdir(mode=0o700)
            for file in FILES:
                if file not in OPTIONAL or (folder / file).exists():
                    shutil.copyfile(folder / file, fresh / file)
            if load_registry(fresh, models, check_files=False).digest != registry.digest:
                continue  # somebody is writing: what was checked is not what was copied
            if copy.is_dir():
                os.utime(copy)
            else:
                fresh.replace(copy)
        _forget_old(copies)
        return registry
    raise RegistryError([Problem(folder.name, 1, "", "changing", "the files change while they are read; try again")])


def make_current(copies: Path, digest: str) -> str | None:
    """Let the link `current` show this copy, in one step; returns the digest it showed before."""
    link = copies / "current"
    before = link.readlink().name if link.is_symlink() else None
    draft = copies / f".current-{os.getpid()}"
    draft.unlink(missing_ok=True)
    draft.symlink_to(digest)
    draft.replace(link)
    return before


def past_registries(copies: Path, models: Path) -> Iterator[Registry]:
    """Copies that can be read, the newest first; one that no longer passes is left out."""
    for path in _by_age(copies):
        try:
            yield load_registry(path, models, check_files=False)
        except RegistryError:
            continue  # of an earlier version of the rules: there is nothing to repair


def _by_age(copies: Path) -> list[Path]:
    if not copies.is_dir():
        return []
    found = [path for path in copies.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != "."]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _forget_old(copies: Path) -> None:
    link = copies / "current"
    shown = link.readlink().name if link.is_symlink() else None
    for path in _by_age(copies)[_KEPT:]:
        if path.name != shown:
            shutil.rmtree(path, ignore_errors=True)
