"""What this process may use of the machine: cores, NUMA nodes and memory, read from /proc and /sys.

The smallest bound counts: of the cores, affinity and the CPU quota of every control group above this process; of the
memory, what is installed and the groups' limits (version 1 and 2 of the interface). It reads and decides nothing; what
an operator sets instead stands in registry/hardware.yaml.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAX_CORE: Final = 65_535
_KIB: Final = 1024
_RANGES: Final = re.compile(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*")
_MEM_AVAILABLE: Final = re.compile(r"MemAvailable:\s+(\d+) kB")
_INACTIVE_FILE: Final = re.compile(r"^(?:total_)?inactive_file (\d+)$", re.MULTILINE)
_MEM_TOTAL: Final = re.compile(r"MemTotal:\s+(\d+) kB")


@dataclass(frozen=True, slots=True)
class Node:
    """One NUMA node: memory is near to its cores and far from others'."""

    cores: tuple[int, ...]
    """Numbers of the cores as Linux counts them, ascending."""
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. Every core of a node is usable; a CPU quota may allow less than all of them together."""

    cores: int
    memory_bytes: int
    nodes: tuple[Node, ...]
    cores_bound: str
    """What bounds the cores: `affinity` or `quota of a control group`."""
    memory_bound: str
    """What bounds the memory: `installed` or `limit of a control group`."""
    siblings: tuple[tuple[int, ...], ...] = ()
    """Numbers that are threads of one physical core, ascending, for each that has several; where the kernel tells."""

    @property
    def threads_per_core(self) -> int:
        """Most threads that one physical core has."""
        return max(map(len, self.siblings), default=1)


def parse_cores(text: str) -> tuple[int, ...]:
    """Numbers in a list of ranges such as `0-3,8`, ascending. Raises ValueError for anything else."""
    if not _RANGES.fullmatch(text):
        raise ValueError(f"{text!r} is no list of cores such as '0-3,8'")
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        begin, end = int(first), int(last or first)
        if not begin <= end <= MAX_CORE:
            raise ValueError(f"{part!r} in {text!r} must rise and stay below {MAX_CORE + 1}")
        cores.update(range(begin, end + 1))
    return tuple(sorted(cores))


def format_cores(cores: Iterable[int]) -> str:
    """The shortest text that `parse_cores` reads as these cores."""
    parts: list[list[int]] = []
    for core in sorted(set(cores)):
        if parts and core == parts[-1][-1] + 1:
            parts[-1][1:] = [core]
        else:
            parts.append([core])
    return ",".join("-".join(map(str, part)) for part in parts)


def detect(root: Path = Path("/"), usable: Set[int] | None = None) -> Machine:
    """Look at the machine below `root`; `usable` are the cores of this process, by default its affinity.

    Raises OSError where /proc/meminfo cannot be read: then this is no Linux.
    """
    cores = frozenset(os.sched_getaffinity(0)) if usable is None else frozenset(usable)
    installed = _mem_total(root / "proc/meminfo") or 0
    limit = min(_group_memory(root), default=installed)
    quota = min(_group_cores(root), default=float(len(cores)))
    # Rounded down, since threads beyond the quota are throttled; one core must always do.
    count = max(1, min(len(cores), int(quota)))
    memory = min(installed, limit)
    return Machine(
        cores=count,
        memory_bytes=memory,
        nodes=tuple(_nodes(root, cores, installed)),
        cores_bound="affinity" if count == len(cores) else "quota of a control group",
        memory_bound="installed" if memory == installed else "limit of a control group",
        siblings=_siblings(root, cores),
    )


def numbered_siblings(nodes: Iterable[Node], threads_per_core: int) -> tuple[tuple[int, ...], ...]:
    """The threads of each physical core as Linux numbers them on most machines: those of a node's first threads come
    first, in the order of the cores, then those of the second ones. For a machine that cannot be asked.
    """
    found: list[tuple[int, ...]] = []
    for node in nodes:
        physical = -(-len(node.cores) // threads_per_core)
        found += [node.cores[core::physical] for core in range(physical)]
    return tuple(sorted(group for group in found if len(group) > 1))


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that could still be used without swapping: what the kernel estimates, or less where a control group ends
    earlier; its own cache of files does not count against it. None where the kernel does not tell.
    """
    found = _MEM_AVAILABLE.search(_read(root / "proc/meminfo") or "")
    if found is None:
        return None
    return min([int(found[1]) * _KIB, *_group_room(root)])


def _group_room(root: Path) -> Iterator[int]:
    for folder in control_groups(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _read(folder / limit_name), _read(folder / used_name)
            if not (limit and limit.isdecimal() and used and used.isdecimal()):
                continue
            cache = _INACTIVE_FILE.search(_read(folder / "memory.stat") or "")
            yield max(0, int(limit) - int(used) + (int(cache[1]) if cache else 0))


def _nodes(root: Path, usable: frozenset[int], installed: int) -> Iterator[Node]:
    """Nodes with at least one usable core; a single one with everything where the kernel names none.

    A node that is the only one has all memory that is installed, whatever it says itself: in a virtual machine whose
    host lends memory page by page it tells what is lent at the moment, and a registry would change by itself.
    """
    folders = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    found = False
    for folder in folders:
        text = _read(folder / "cpulist")
        near = usable.intersection(parse_cores(text)) if text else frozenset()
        if near:
            found = True
            own = None if len(folders) == 1 else _mem_total(folder / "meminfo")
            yield Node(tuple(sorted(near)), own or installed)
    if not found:
        yield Node(tuple(sorted(usable)), installed)


def _siblings(root: Path, usable: frozenset[int]) -> tuple[tuple[int, ...], ...]:
    texts = {_read(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in usable}
    groups = (usable.intersection(parse_cores(text)) for text in texts if text)
    return tuple(sorted(tuple(sorted(group)) for group in groups if len(group) > 1))


def _mem_total(path: Path) -> int | None:
    found = _MEM_TOTAL.search(path.read_text(encoding="ascii"))
    return int(found[1]) * _KIB if found else None


def _group_memory(root: Path) -> Iterator[int]:
    for folder in control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text and text.isdecimal():  # not "max"; version 1 writes a number beyond any memory instead
                yield int(text)


def _group_cores(root: Path) -> Iterator[float]:
    for folder in control_groups(root, "cpu"):
        quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:  # neither "max" nor -1: no bound
            yield int(quota) / int(period)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups around this process, from its own up to the top: each may set a bound.

    Some are only where they might be: not all of them exist.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            mounts = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / controllers]
        else:
            continue
        inside = Path(path.lstrip("/"))
        for mount in mounts:
            yield from (mount / folder for folder in (inside, *inside.parents))


def _read(path: Path) -> str | None:
    """Text of a small file; None where there is none: many of these exist on some machines only."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
