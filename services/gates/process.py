"""One bounded run of a command: so much time, so much output, so much memory, then everything of it is killed.

It knows nothing of sandboxes or gates. Every limit holds from outside, so a command cannot talk its way out of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import psutil

from services.kit.children import die_with_parent

_CHUNK_BYTES: Final = 64 * 1024
_LOOK_S: Final = 0.25
"""How often the memory of a run is looked at, in seconds."""
_REAP_S: Final = 0.005
_GONE_S: Final = 5.0
"""Killed processes are reaped within this time, or the machine has a problem of its own."""


class How(Enum):
    """How a run ended."""

    EXITED = "exited"
    TIMED_OUT = "timed out"
    FLOODED = "wrote too much"
    GREW = "used too much memory"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits that hold from outside."""

    timeout_s: float
    output_bytes: int
    """For stdout and stderr each; what comes after is not read."""
    memory_bytes: int
    """Resident memory of all its processes together. Looked at four times a second: a burst can be higher."""
    grown: Callable[[], bool] = lambda: False
    """Looked at as often, and at the end: whether somebody else, like the kernel, has found that they used too much."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What is left of a run."""

    how: How
    status: int
    """Exit status; meaningless unless `how` is EXITED."""
    out: bytes
    err: bytes
    report: bytes = b""
    """What came through the report pipe, where there was one."""


class _Flooded(Exception):
    """More output than allowed."""


class _Grown(Exception):
    """More memory than allowed."""


async def run_bounded(
    argv: Sequence[str],
    *,
    bounds: Bounds,
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    report_fds: tuple[int, int] | None = None,
    dies_with_us: bool = True,
    admit: Callable[[int], Awaitable[None]] | None = None,
) -> Ended:
    """Run a command in its own session; returns when it has ended and its output is closed by all who held it.

    `report_fds` is a pipe (end to read, end to write) whose write end is among `pass_fds`; both ends are closed here.
    With `dies_with_us` False the command must see to it by itself that it dies with this process; it then starts
    faster, without a copy of this process. `admit` is given its process id right after the start, within its time.
    Cancelling this kills the command first. Raises OSError if it cannot be started.
    """
    try:
        child, cancelled = await _started(argv, env, pass_fds, _die_with_us if dies_with_us else None)
    except BaseException:
        for descriptor in report_fds or ():
            os.close(descriptor)
        raise
    out, err, report = bytearray(), bytearray(), bytearray()
    out_stream, err_stream = _streams(child)
    jobs: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(_read(out_stream, out, bounds.output_bytes)),
        asyncio.ensure_future(_read(err_stream, err, bounds.output_bytes)),
        asyncio.ensure_future(child.wait()),
    ]
    transport: asyncio.ReadTransport | None = None
    if report_fds is not None:
        os.close(report_fds[1])
        report_stream, transport = await pipe_stream(report_fds[0])
        jobs.append(asyncio.ensure_future(_read(report_stream, report, bounds.output_bytes)))
    watch = asyncio.ensure_future(_watch(child.pid, bounds))
    how: How | None = None
    try:
        if cancelled:
            raise asyncio.CancelledError
        async with asyncio.timeout(bounds.timeout_s):
            if admit is not None:
                await admit(child.pid)
            await _first_failure(jobs, watch)
        how = How.GREW if bounds.grown() else How.EXITED
    except TimeoutError:
        how = How.TIMED_OUT
    except _Flooded:
        how = How.FLOODED
    except _Grown:
        how = How.GREW
    finally:
        for job in (*jobs, watch):
            job.cancel()
        await asyncio.gather(*jobs, watch, return_exceptions=True)
        if transport is not None:
            transport.close()
        await _make_sure_it_is_gone(child, kill=how is not How.EXITED)
    return Ended(how, child.returncode or 0, bytes(out), bytes(err), bytes(report))


async def _started(
    argv: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int], before: Callable[[], None] | None
) -> tuple[asyncio.subprocess.Process, bool]:
    """The child, and whether this was cancelled meanwhile: the caller kills all of it then.

    asyncio itself would kill the first process only and wait for the end of pipes that its children hold open: a run
    that was cancelled while its sandbox was being set up would never end.
    """
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(env),
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            preexec_fn=before,
        )
    )
    cancelled = False
    while not starting.done():
        try:
            await asyncio.wait({starting})
        except asyncio.CancelledError:
            cancelled = True
    return starting.result(), cancelled


async def pipe_stream(descriptor: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    """The end to read of a pipe as a stream; closing the transport closes it."""
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb")
    )
    return stream, transport


def _die_with_us() -> None:
    die_with_parent(signal.SIGKILL)


async def _first_failure(jobs: Sequence[asyncio.Future[Any]], watch: asyncio.Future[None]) -> None:
    """Wait for all jobs; raise as soon as one of them, or the watch, raises."""
    waiting = set(jobs)
    while waiting:
        done, _ = await asyncio.wait({*waiting, watch}, return_when=asyncio.FIRST_COMPLETED)
        for job in done:
            job.result()
        waiting -= done


async def _read(stream: asyncio.StreamReader, into: bytearray, limit: int) -> None:
    while chunk := await stream.read(_CHUNK_BYTES):
        into += chunk[: limit - len(into)]
        if len(into) >= limit:
            raise _Flooded


async def _watch(pid: int, bounds: Bounds) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        if bounds.grown() or _tree_bytes(pid) > bounds.memory_bytes:
            raise _Grown


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _tree_bytes(pid: int) -> int:
    total = 0
    for process in _tree(pid):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue  # ended while we looked
    return total


async def _make_sure_it_is_gone(child: asyncio.subprocess.Process, *, kill: bool) -> None:
    """Kill the session, read its pipes to the end, and wait for every process of the tree to be dead.

    In a sandbox the tree holds the first process of its own PID namespace, which dies last.
    """
    tree = _tree(child.pid) if kill else []
    if kill:
        with contextlib.suppress(ProcessLookupError):  # all of it has just ended by itself
            os.killpg(child.pid, signal.SIGKILL)
    async with asyncio.timeout(_GONE_S):
        for stream in _streams(child):
            while await stream.read(_CHUNK_BYTES):
                continue
        await child.wait()
        while any(_alive(process) for process in tree):  # noqa: ASYNC110  no event tells that a grandchild has died
            await asyncio.sleep(_REAP_S)


def _streams(child: asyncio.subprocess.Process) -> tuple[asyncio.StreamReader, asyncio.StreamReader]:
    if child.stdout is None or child.stderr is None:
        raise TypeError("the child was not started with pipes")
    return child.stdout, child.stderr


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
