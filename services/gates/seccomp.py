"""The system-call filter of the sandbox: a second wall behind the namespaces.

A gate runs as real root's drop to another uid, so without this it could make a user namespace of its own and reach
kernel code that only root reaches otherwise. The filter refuses what no compiler, linter or test needs: new
namespaces, mounts, tracing, keys, BPF, io_uring, modules, and sockets other than unix, inet and netlink (vsock, which
reaches a virtual machine's host, belongs to no network namespace). It refuses with an error number instead of a
kill, so that programs that only probe go on. Layouts: sock_filter and seccomp_data in the headers below <linux/>.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_KILL: Final = 0x80000000

_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_FIRST_ARGUMENT_AT: Final = 16  # low half: both machines are little-endian

_NEW_NAMESPACES: Final = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME."""

_FAMILIES: Final = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK, which asks for the list of interfaces."""

_X32: Final = 0x40000000
"""From here on numbers of x86_64 mean the x32 interface, which would go round the filter."""

_SHARED: Final = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442)
"""io_uring_{setup,enter,register}, open_tree, move_mount, fs{open,config,mount,pick}, pidfd_getfd, mount_setattr."""

_CLONE3: Final = 435
"""Takes its flags by pointer, which a filter cannot follow: ENOSYS makes the C library use clone."""


@dataclass(frozen=True, slots=True)
class _Machine:
    audit: int
    clone: int
    socket: int
    refused: tuple[int, ...]


_MACHINES: Final[Mapping[str, _Machine]] = {
    # refused: unshare setns mount umount2 pivot_root chroot ptrace process_vm_{readv,writev} add_key request_key keyctl
    # bpf perf_event_open userfaultfd kexec_{load,file_load} {init,finit,delete}_module open_by_handle_at syslog
    "x86_64": _Machine(
        0xC000003E,
        56,
        41,
        (272, 308, 165, 166, 155, 161, 101, 310, 311, 248, 249, 250, 321, 298, 323, 246, 320, 175, 313, 176, 304, 103),
    ),
    "aarch64": _Machine(
        0xC00000B7,
        220,
        198,
        (97, 268, 40, 39, 41, 51, 117, 270, 271, 217, 218, 219, 280, 241, 282, 104, 294, 105, 273, 106, 265, 116),
    ),
}


def program(machine: str) -> bytes | None:
    """The filter for `platform.machine()`, as bwrap reads it; None for a machine whose numbers are not known here."""
    known = _MACHINES.get(machine)
    if known is None:
        return None
    code = [
        _step(_LOAD, _ARCHITECTURE_AT),
        _step(_EQUAL, known.audit, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
    ]
    if machine == "x86_64":
        code += [_step(_AT_LEAST, _X32, 0, 1), _refuse(errno.ENOSYS)]
    for number in (*known.refused, *_SHARED):
        code += [_step(_EQUAL, number, 0, 1), _refuse(errno.EPERM)]
    code += [_step(_EQUAL, _CLONE3, 0, 1), _refuse(errno.ENOSYS)]
    # The two that depend on an argument come last, since reading it replaces the number.
    code += [
        _step(_EQUAL, known.clone, 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT_AT),
        _step(_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        _refuse(errno.EPERM),
        _step(_RETURN, _ALLOW),
        _step(_EQUAL, known.socket, 1, 0),
        _step(_RETURN, _ALLOW),
        _step(_LOAD, _FIRST_ARGUMENT_AT),
    ]
    for family in _FAMILIES:
        code += [_step(_EQUAL, family, 0, 1), _step(_RETURN, _ALLOW)]
    return b"".join([*code, _refuse(errno.EAFNOSUPPORT)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; the jumps count the instructions to leave out."""
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _refuse(number: int) -> bytes:
    return _step(_RETURN, _ERRNO | number)
