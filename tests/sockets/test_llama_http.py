"""The client of a model server against one that sends whatever a test says, byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import pytest

from services.inference.llama_http import EngineFaulty, LlamaServer

HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"


@asynccontextmanager
async def endless() -> AsyncIterator[LlamaServer]:
    """A server whose answers do not end, and its client."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        try:
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
        except ConnectionError:
            return

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    client = LlamaServer(server.sockets[0].getsockname()[1], "key")
    try:
        yield client
    finally:
        await client.close()
        server.close()


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
