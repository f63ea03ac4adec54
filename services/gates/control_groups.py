"""Control groups around what gates run: exact bounds on memory and processes, where this process may make groups.

Without them memory is looked at four times a second, so a burst can be higher, and processes are counted per uid. With
them the kernel holds the bounds. A group may be made below a delegated one only (version 2: by systemd's `Delegate=`,
or to an ordinary user; version 1: to root in its own group): groups that somebody else manages are left alone. How a
command gets in before it runs is `sandbox`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.kit.hardware import control_groups

_PREFIX: Final = "tierline-gate-"
_OWN_PROCESSES: Final = 8
"""Room beside the command's own processes for those that set up the sandbox."""
_REMOVE_TRIES: Final = 200
_REMOVE_PAUSE_S: Final = 0.01
"""A group can be removed once its last process has been reaped: up to two seconds are waited for that."""


@dataclass(frozen=True, slots=True)
class Group:
    """One run's group: a folder, or in version 1 one per controller."""

    folders: tuple[Path, ...]

    def admit(self, pid: int) -> None:
        """Put a process into the group; its children of later are born there. One that has ended is no error."""
        for folder in self.folders:
            with contextlib.suppress(ProcessLookupError):
                _write(folder / "cgroup.procs", str(pid))

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has killed a process of this group because the group was at its bound."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(FileNotFoundError):
                lines = (self.folders[0] / name).read_text(encoding="ascii").splitlines()
                return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in lines)
        return False

    async def remove(self) -> None:
        """Remove the group, whose processes are dead; one that cannot be removed now goes with the next start."""
        for folder in self.folders:
            for _ in range(_REMOVE_TRIES):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    await asyncio.sleep(_REMOVE_PAUSE_S)


class ControlGroups:
    """Makes groups below `memory` and, in version 1, `pids`: folders in which this process may."""

    def __init__(self, memory: Path, pids: Path | None) -> None:
        self._parents = (memory,) if pids is None else (memory, pids)
        self._numbers = itertools.count(1)
        for parent in self._parents:
            _remove_leftovers(parent)

    @classmethod
    def found(cls, root: Path = Path("/")) -> ControlGroups | None:
        """The groups of this machine, None where none can be made. `root` is the top of the file system."""
        memory = next(_usable(root, "memory", ("memory.max", "memory.limit_in_bytes")), None)
        if memory is None:
            return None
        if (memory / "cgroup.subtree_control").exists():
            return cls(memory, None)
        return cls(memory, next(_usable(root, "pids", ("pids.max",)), None))

    @property
    def version(self) -> int:
        """Version of the control groups in use."""
        return 2 if (self._parents[0] / "cgroup.subtree_control").exists() else 1

    def make(self, memory_bytes: int, processes: int) -> Group:
        """A group with these bounds. Raises OSError where the kernel refuses it."""
        name = f"{_PREFIX}{os.getpid()}-{next(self._numbers)}"
        group = Group(tuple(parent / name for parent in self._parents))
        for folder in group.folders:
            folder.mkdir()
        bounds = {
            "memory.max": memory_bytes,
            "memory.swap.max": 0,
            "memory.oom.group": 1,
            "memory.limit_in_bytes": memory_bytes,
            "memory.memsw.limit_in_bytes": memory_bytes,
            "pids.max": processes + _OWN_PROCESSES,
        }
        for folder, (file, value) in itertools.product(group.folders, bounds.items()):
            if (folder / file).exists():  # kernels without swap, and the other version, have not all of them
                _write(folder / file, str(value))
        return group


def _usable(root: Path, controller: str, bounds: tuple[str, ...]) -> Iterator[Path]:
    """Groups around this process, its own first, in which a group with this controller can be made."""
    for number, folder in enumerate(control_groups(root, controller)):
        unified = (folder / "cgroup.subtree_control").exists()
        if number > 0 and not (unified and _delegated(folder)):
            continue
        if not os.access(folder, os.W_OK):
            continue
        if unified and not _enable(folder):
            continue
        probe = folder / f"{_PREFIX}{os.getpid()}-probe"
        try:
            probe.mkdir()
        except OSError:
            continue
        has_bounds = any((probe / name).exists() for name in bounds)
        probe.rmdir()
        if has_bounds:
            yield folder


def _delegated(folder: Path) -> bool:
    """Whether the manager of the groups leaves this one to its owner: systemd marks it so."""
    if os.geteuid() != 0 and folder.stat().st_uid == os.geteuid():
        return True
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _enable(folder: Path) -> bool:
    """Let groups below bound memory and processes; refused by the kernel where processes are in the folder itself."""
    try:
        there = (folder / "cgroup.subtree_control").read_text(encoding="ascii").split()
        if not {"memory", "pids"} <= set(there):
            _write(folder / "cgroup.subtree_control", "+memory +pids")
    except OSError:
        return False
    return True


def _remove_leftovers(parent: Path) -> None:
    """Groups of services that were killed: their processes died with them.

    Those of a service that lives stay, also empty ones: it may have made one this moment, for a process to come.
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        maker = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", maker).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _write(file: Path, value: str) -> None:
    file.write_text(value, encoding="ascii")
