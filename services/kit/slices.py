"""How long a process that computes keeps a core while others wait for it.

Since Linux 6.12 a process may ask for slices of its own length, and one that wakes up with a shorter one (1.4 to 2.8 ms
by default) takes the core of one with a longer one at once; otherwise it waits for that slice to end. An engine whose
threads hold all cores so lets every message pass: with the demo model on both cores of a machine, first words of four
answers at once came 11 to 13 ms later over the bus than around it with default slices, 6 to 7 with longer ones.
What either gets in all stays the same. Older kernels ignore it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}.get(os.uname().machine)
"""Number of the system call; the C library has no name for it before glibc 2.41."""
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
"""`struct sched_attr` in its first version: size, policy, flags, nice, priority, runtime, deadline, period."""
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def take_slices_of(milliseconds: int) -> None:
    """Ask the kernel for it, for this thread and all that it starts; it stays as it is where the kernel cannot.

    Policy and niceness are kept. Whoever was given a policy without slices, such as SCHED_IDLE, keeps that.
    """
    policy = os.sched_getscheduler(0)
    if _SCHED_SETATTR is None or policy not in (os.SCHED_OTHER, os.SCHED_BATCH):
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, milliseconds * 1_000_000, 0, 0)
    _LIBC.syscall(_SCHED_SETATTR, 0, attributes, 0)
