"""Writes the supervisord program of every model entry of the registry into the home's conf.d.

Launch commands come from the registry alone and are never edited by hand; a model that left the registry takes its
program with it. How a program looks stands in deploy/inference.conf.in.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from services.ctl.outcomes import BadInput, CommandError
from services.kit.config import CHECKOUT, Home
from services.kit.registry import Registry, RegistryError, load_registry

TEMPLATE: Final = CHECKOUT / "deploy" / "inference.conf.in"

_LOCK_TIMEOUT_S: Final = 120.0
_PLACE: Final = "@MODEL@"


def checked_registry(home: Home, *, check_files: bool = True) -> Registry:
    """The registry of this home. Raises BadInput with every problem as `file:line: field: message`."""
    try:
        return load_registry(home.registry, home.models, check_files=check_files, hardware_file=home.hardware)
    except RegistryError as err:
        count = len(err.problems)
        raise BadInput(
            f"the registry in {home.registry} has {count} problem{'s' if count > 1 else ''}",
            details=tuple(str(problem) for problem in err.problems),
        ) from err


def registry_changed(home: Home, registry: Registry) -> bool:
    """True where this home was started with another registry, which its services have read; remembers this one."""
    path = home.conf_d / "registry.digest"
    before = path.read_text(encoding="ascii") if path.is_file() else None
    path.write_text(registry.digest, encoding="ascii")
    return before not in (None, registry.digest)


def write_programs(home: Home, registry: Registry) -> set[str]:
    """One program per model entry that is served; returns the names of those whose file changed, came or went."""
    try:
        template = TEMPLATE.read_text(encoding="utf-8")
    except OSError as err:
        raise CommandError(f"{TEMPLATE}: {err.strerror}; 'tierline up' works from a checkout of the project") from err
    wanted = {f"inference-{name}.conf": template.replace(_PLACE, name) for name in registry.served}
    changed = set()
    for name, text in wanted.items():
        path = home.conf_d / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            draft = path.with_suffix(".part")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
            changed.add(path.stem)
    for path in sorted(home.conf_d.glob("inference-*.conf")):
        if path.name not in wanted:
            path.unlink()
            changed.add(path.stem)
    return changed


@contextmanager
def stack_lock(home: Home) -> Iterator[None]:
    """One `up` or `down` at a time; the lock ends with its process, however that ends. Raises CommandError."""
    path: Path = home.run / "stack.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() > deadline:
                    raise CommandError(f"another 'tierline up' or 'down' has held {path} for long; see: ps") from err
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)
