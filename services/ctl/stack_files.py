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
from typing import Final

from services.ctl.outcomes import BadInput, CommandError
from services.kit.config import CHECKOUT, Home
from services.kit.registry import Registry, RegistryError, keep_copy, load_registry, make_current

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


def made_home(home: Home) -> Home:
    """The home with its folders. Raises BadInput where they cannot be made."""
    try:
        return home.make()
    except OSError as err:
        raise BadInput(
            f"the home {home.root} cannot be used: {err.strerror} ({err.filename}); set TIERLINE_HOME to a folder that "
            "you may write to"
        ) from err


def registry_changed(home: Home, registry: Registry) -> bool:
    """True where this home was started with another registry, which its services have read; remembers this one."""
    path = home.started_registry
    before = path.read_text(encoding="ascii") if path.is_file() else None
    remember_registry(home, registry)
    return before not in (None, registry.digest)


def taken_up(home: Home) -> tuple[Registry, str | None]:
    """Check the registry of this home and make a copy of it the one that services read.

    Returns it with the digest of the one they read before. Raises BadInput with every problem.
    """
    checked_registry(home)
    try:
        registry = keep_copy(home.registry, home.models, home.registry_copies)
        return registry, make_current(home.registry_copies, registry.digest)
    except RegistryError as err:  # changed in this moment
        raise BadInput(str(err)) from err
    except OSError as err:
        raise CommandError(f"no copy of the registry can be kept in {home.registry_copies}: {err}") from err


def remember_registry(home: Home, registry: Registry) -> None:
    """Note that the running services have this registry, or are told of it: `up` need not restart them."""
    home.started_registry.write_text(registry.digest, encoding="ascii")


def write_programs(home: Home, registry: Registry, *, remove: bool = True) -> set[str]:
    """One program per model entry that is served; returns the names of those whose file changed, came or went.

    Without `remove` the programs of models that have left the registry stay: they may still have work.
    """
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
    for path in sorted(home.conf_d.glob("inference-*.conf")) if remove else ():
        if path.name not in wanted:
            path.unlink()
            changed.add(path.stem)
    return changed


@contextmanager
def stack_lock(home: Home) -> Iterator[None]:
    """One `up` or `down` at a time; the lock ends with its process, however that ends. Raises CommandError."""
    path = home.stack_lock
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
