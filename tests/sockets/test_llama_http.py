"""The client of a model server against one that sends whatever a test says, byte by byte."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import pytest

from services.inference import llama_http
from services.inference.llama_http import EngineFaulty, EngineGone, LlamaServer

HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"


@asynccontextmanager
async def serving(
    write: Callable[[asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[LlamaServer]:
    """A server that answers whatever it is asked with what `write` writes and then closes, and its client."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        try:
            await write(writer)
        except ConnectionError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = LlamaServer(server.sockets[0].getsockname()[1], "key")
    try:
        yield client
    finally:
        await client.close()
        server.close()


def endless() -> AbstractAsyncContextManager[LlamaServer]:
    """A server whose answers do not end, and its client."""

    async def write(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x" * 65_536)
            await writer.drain()

    return serving(write)


@pytest.mark.parametrize(
    "ask",
    [
        LlamaServer.metrics,
        LlamaServer.busy_slots,
        lambda client: client.ready(1),
        lambda client: client.read({}),
        lambda client: client.save_slot(0, "name"),
    ],
)
async def test_an_answer_without_end_is_given_up(ask: Callable[[LlamaServer], Awaitable[object]]) -> None:
    async with endless() as client, asyncio.timeout(60):
        with pytest.raises(EngineFaulty, match="where a short answer belongs"):
            await ask(client)


async def test_a_health_check_without_end_is_none_that_went_well() -> None:
    async with endless() as client, asyncio.timeout(60):
        assert await client.alive() is False


async def test_no_more_sockets_are_an_error_of_the_engine_and_not_a_bug() -> None:
    async with serving(tokens) as client:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(EngineGone, match="Too many open files"):
                await client.read({})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


TOKENS: Final = 60


def event(text: str, finish: str | None = None) -> bytes:
    """As long as those of llama.cpp, which say more about themselves than about the answer."""
    told = {
        "id": f"chatcmpl-{'x' * 32}",
        "model": "worker",
        "system_fingerprint": "b1-0123456789",
        "created": 1_790_000_000,
    }
    choice = {"delta": {"content": text}, "finish_reason": finish, "index": 0}
    return f"data: {json.dumps({'choices': [choice], 'object': 'chat.completion.chunk', **told})}\n\n".encode()


async def tokens(writer: asyncio.StreamWriter) -> None:
    """One event after the other, each in a packet of its own, as a model writes them."""
    for number in range(TOKENS):
        writer.write(event(f"{number} "))
        await writer.drain()
        await asyncio.sleep(0.004)
    writer.write(event("", "stop") + b"data: [DONE]\n\n")


async def looks(client: LlamaServer) -> list[str]:
    """The text of one answer as it was read: what came together is one piece."""
    pieces, whole = [""], ""
    async for piece in client.chat({}):
        pieces[-1] += piece.text
        whole += piece.text
        if not piece.more:
            pieces.append("")
    assert whole == "".join(f"{number} " for number in range(TOKENS))
    return [text for text in pieces if text]


async def test_an_answer_that_has_begun_is_looked_at_now_and_then_and_its_end_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_http, "GATHER_S", 600.0)
    async with serving(tokens) as client, asyncio.timeout(60):
        first, rest = await looks(client)
    assert first == "0 "
    assert rest.startswith("1 2 3 ")


async def test_what_has_gathered_is_read_when_its_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_http, "GATHER_S", 0.05)
    async with serving(tokens) as client, asyncio.timeout(60):
        pieces = await looks(client)
        assert 3 <= len(pieces) < TOKENS // 2
        at_once = await asyncio.gather(*(looks(client) for _ in range(3)))
    assert max(len(pieces) for pieces in at_once) < TOKENS // 4, "each of three is looked at a third as often"


async def test_an_answer_that_stops_in_the_middle_is_read_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine that hangs has said before is not kept for its next word."""
    monkeypatch.setattr(llama_http, "GATHER_S", 0.02)
    seen = asyncio.Event()

    async def hangs(writer: asyncio.StreamWriter) -> None:
        for number in range(10):
            writer.write(event(f"{number} "))
            await writer.drain()
            await asyncio.sleep(0.002)
        await seen.wait()

    async with serving(hangs) as client, asyncio.timeout(60):
        text = ""
        async for piece in client.chat({}):
            text += piece.text
            if text.endswith("9 "):
                seen.set()
    assert text.endswith("9 ")
