"""The wire spec is enough: a client of under 60 lines, without a line of ours, gets its task done."""

from __future__ import annotations

import ast
import asyncio
import json
import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from protocol.header import Header
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.result import TaskEvent, TaskState, TaskView
from protocol.messages.task import Accepted
from tests.fakes.hub import ScriptedHub

CLIENT = Path(__file__).with_name("minimal_client.py")
RESULT = TaskView(
    task_id="T1",
    state=TaskState.SUCCEEDED,
    objective="Say hello",
    task_type="chat",
    priority="interactive",
    created_ms=1,
    last_seq=2,
)


def event(seq: int) -> tuple[str, Message]:
    return "task.event", TaskEvent(task_id="T1", seq=seq, at_ms=seq, event="step.done", step=f"S{seq}")


async def run(address: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(CLIENT),
        address,
        "Say hello",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def finish(client: asyncio.subprocess.Process) -> tuple[list[str], dict[str, object], str]:
    """Lines of events, the result, and what went to stderr."""
    out, err = await asyncio.wait_for(client.communicate(), 30)
    lines = out.decode().splitlines()
    begin = lines.index("{") if "{" in lines else len(lines)
    return lines[:begin], json.loads("\n".join(lines[begin:]) or "{}"), err.decode()


def hub_with_result(address: str, *events: tuple[str, Message], epoch: str = "hub") -> ScriptedHub:
    hub = ScriptedHub(address, epoch)
    hub.answer("task.submit", lambda header, body: [("task.accepted", Accepted(task_id="T1"))])
    hub.answer("task.watch", lambda header, body: [*events, ("task.result", RESULT)])
    return hub


def test_it_is_short_and_uses_nothing_of_ours() -> None:
    source = CLIENT.read_text("utf-8")
    assert len(source.splitlines()) < 60
    imported = {
        name.name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert imported - sys.stdlib_module_names == {"msgpack", "zmq"}


async def test_it_submits_watches_and_prints_the_result(address: str) -> None:
    with hub_with_result(address, event(1), event(2)).serving():
        client = await run(address)
        events, result, err = await finish(client)
    assert client.returncode == 0, err
    assert [line.split() for line in events] == [["1", "step.done", "S1"], ["2", "step.done", "S2"]]
    assert result["state"] == "succeeded"


async def test_it_goes_on_after_a_restart_of_the_hub(address: str) -> None:
    first = ScriptedHub(address, "first")
    first.answer("task.submit", lambda header, body: [("task.accepted", Accepted(task_id="T1"))])
    first.answer("task.watch", lambda header, body: [event(1)])
    with first.serving():
        client = await run(address)
        async with asyncio.timeout(15):
            while not first.seen("task.watch"):  # noqa: ASYNC110  the hub is in a thread, without our loop
                await asyncio.sleep(0.02)
    with hub_with_result(address, event(2), epoch="second").serving():
        events, result, err = await finish(client)
    assert client.returncode == 0, err
    assert [line.split()[0] for line in events] == ["1", "2"]
    assert result["state"] == "succeeded"


async def test_it_says_what_the_hub_said_against_its_task(address: str) -> None:
    tries = count()

    def refuse(header: Header, body: bytes) -> Iterable[tuple[str, Message]]:
        next(tries)
        failure = Failure(
            code="task.invalid", category=Category.SCHEMA, origin="scheduler", message="objective: too dull"
        )
        return [("error", ErrorReply(failure=failure))]

    hub = ScriptedHub(address)
    hub.answer("task.submit", refuse)
    with hub.serving():
        client = await run(address)
        _, _, err = await finish(client)
    assert client.returncode == 1
    assert "too dull" in err
    assert next(tries) == 1
