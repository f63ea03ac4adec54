"""Child processes that cannot outlive us: own process group, parent-death signal, killed as a group.

kill -9 of supervisord or of a service leaves children behind otherwise, with a model's memory and a port.
`spawn` must be called from the main thread: the kernel sends the parent-death signal when the *thread* that
forked ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: signal.Signals) -> None:
    """Ask the kernel to send this process `number` when its parent dies. Linux only, like all of Tierline."""
    if _LIBC.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _die_with_spawner() -> None:
    die_with_parent(signal.SIGKILL)


async def spawn(
    argv: Sequence[str], *, output: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> asyncio.subprocess.Process:
    """Start a child in a new session, stdout and stderr appended to `output`. Raises OSError if it cannot start."""
    with output.open("ab") as sink:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_die_with_spawner,
        )


async def end(child: asyncio.subprocess.Process, *, grace_s: float) -> int:
    """SIGTERM to the whole group, SIGKILL after `grace_s`; returns the exit status once it is reaped."""
    if child.returncode is None:
        _signal_group(child.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(child.wait(), grace_s)
        except TimeoutError:
            _signal_group(child.pid, signal.SIGKILL)
    status = await child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # grandchildren that outlived their parent
    return status


def resident_bytes(pid: int) -> int:
    """Resident memory of one process in bytes; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def proportional_bytes(pid: int) -> int:
    """Resident memory of one process in bytes, each page divided by the number of processes that share it.

    Where the kernel does not tell that, plain resident memory; 0 when the process is gone.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return resident_bytes(pid)
    kib = next((line.split()[1] for line in text.splitlines() if line.startswith("Pss:")), None)
    return resident_bytes(pid) if kib is None else int(kib) * 1024


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # already gone, which is what we want
