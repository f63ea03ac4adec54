"""A bounded run on real processes: whatever happens to it, nothing of it is left and nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import uuid

import psutil
import pytest

from services.gates.process import Bounds, How, run_bounded

BOUNDS = Bounds(timeout_s=60, output_bytes=100_000, memory_bytes=1 << 30)
ENV = {"PATH": os.environ["PATH"]}


def marked(mark: str) -> list[int]:
    """Processes of a run, told by a word in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.cmdline():
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def holds_its_pipes(mark: str) -> list[str]:
    """A shell and a child of it that keeps stdout open, for a minute."""
    return ["sh", "-c", "sh -c 'sleep 60' \"$0\" & sleep 60", mark]


@pytest.mark.parametrize("after_ms", [0, 1, 2, 5, 10, 20, 50])
async def test_a_run_that_is_cancelled_while_it_starts_ends_at_once_and_leaves_nothing(after_ms: int) -> None:
    mark = f"run-{uuid.uuid4().hex}"
    run = asyncio.create_task(run_bounded(holds_its_pipes(mark), bounds=BOUNDS, env=ENV))
    await asyncio.sleep(after_ms / 1000)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(60):
            await run
    assert marked(mark) == []


async def test_a_run_that_is_cancelled_again_and_again_while_it_starts_still_ends() -> None:
    mark = f"run-{uuid.uuid4().hex}"
    run = asyncio.create_task(run_bounded(holds_its_pipes(mark), bounds=BOUNDS, env=ENV))
    await asyncio.sleep(0)
    run.cancel()
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(60):
            await run
    assert marked(mark) == []


async def test_a_command_that_is_not_there_is_an_error_and_a_short_one_ends_by_itself() -> None:
    with pytest.raises(FileNotFoundError):
        await run_bounded(["/nonexistent/tool"], bounds=BOUNDS, env=ENV)
    ended = await run_bounded(["sh", "-c", "echo out; echo err >&2; exit 3"], bounds=BOUNDS, env=ENV)
    assert (ended.how, ended.status, ended.out, ended.err) == (How.EXITED, 3, b"out\n", b"err\n")
