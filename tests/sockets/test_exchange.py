"""One request and its answer over a real connection, against a server that does whatever a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeAlias

import pytest

from services.inference.exchange import Exchange, ExchangeBroken

HEAD: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END: Final = b"0\r\n\r\n"
REQUEST: Final = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@asynccontextmanager
async def asked(serve: Serve) -> AsyncIterator[tuple[Exchange, int]]:
    """An exchange that has not begun, and the port of a server that does what `serve` does; ends within a minute."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except ConnectionError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=2**26)
    exchange = Exchange()
    try:
        async with asyncio.timeout(60):
            yield exchange, server.sockets[0].getsockname()[1]
    finally:
        exchange.close()
        server.close()


def says(*parts: bytes) -> Serve:
    """The server that answers with these, whatever it is asked, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()

    return serve


async def body(exchange: Exchange) -> bytes:
    return b"".join([part async for part in exchange.parts()])


async def whole(exchange: Exchange, port: int) -> bytes:
    await exchange.ask(port, REQUEST)
    return await body(exchange)


@pytest.mark.parametrize(
    "answer",
    [
        (HEAD, chunk(b"one "), chunk(b"two"), END),
        (HEAD + chunk(b"one ") + chunk(b"two") + END,),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", b"one two"),
        (b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\none", b" two"),
        tuple((HEAD + chunk(b"one ") + chunk(b"two") + END)[n : n + 1] for n in range(75)),
    ],
    ids=["chunks", "one packet", "length", "to the end of the connection", "byte by byte"],
)
async def test_an_answer_is_read_however_it_is_cut(answer: tuple[bytes, ...]) -> None:
    async with asked(says(*answer)) as (exchange, port):
        await exchange.ask(port, REQUEST)
        assert exchange.status == 200
        assert await body(exchange) == b"one two"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        HEAD + chunk(b"one")[:-3],
        HEAD + chunk(b"one"),
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\none",
    ],
    ids=["nothing", "half a head", "half a chunk", "no last chunk", "less than its length"],
)
async def test_what_is_cut_off_is_not_taken_for_an_answer(answer: bytes) -> None:
    async with asked(says(answer)) as (exchange, port):
        with pytest.raises(ExchangeBroken, match="closed before the answer was whole"):
            await whole(exchange, port)


async def test_what_is_no_http_is_said_to_be_none() -> None:
    async with asked(says(b"220 mail.example ESMTP\r\n")) as (exchange, port):
        with pytest.raises(ExchangeBroken, match="no HTTP"):
            await exchange.ask(port, REQUEST)


async def test_a_head_without_end_is_given_up() -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-More: " + b"x" * 1_000 + b"\r\n")
            await writer.drain()

    async with asked(serve) as (exchange, port):
        with pytest.raises(ExchangeBroken, match="before an answer"):
            await exchange.ask(port, REQUEST)


async def test_nobody_there_is_said_at_once() -> None:
    async with asked(says()) as (exchange, port):
        pass
    exchange = Exchange()
    try:
        with pytest.raises(ExchangeBroken, match="refused"):
            await exchange.ask(port, REQUEST)
    finally:
        exchange.close()


async def test_a_request_that_is_larger_than_any_buffer_arrives_whole() -> None:
    sent = b"x" * 20_000_000

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)  # until nothing more fits between the two
        got = await reader.readexactly(len(sent))
        writer.write(HEAD + chunk(b"%d" % got.count(b"x")) + END)

    async with asked(serve) as (exchange, port):
        await exchange.ask(port, sent)
        assert await body(exchange) == b"%d" % len(sent)


async def test_a_head_alone_wakes_nobody_where_more_was_asked_for_and_the_end_always_does() -> None:
    more = asyncio.Event()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await writer.drain()
        await more.wait()
        writer.write(chunk(b"x" * 256))
        await writer.drain()
        await asyncio.sleep(3600)

    async with asked(serve) as (exchange, port):
        asking = asyncio.create_task(exchange.ask(port, REQUEST, least_bytes=256))
        await asyncio.sleep(0.2)
        assert not asking.done()
        more.set()
        await asking
        async for part in exchange.parts():
            assert part == b"x" * 256
            break
    async with asked(says(HEAD + END)) as (exchange, port):
        await exchange.ask(port, REQUEST, least_bytes=256)
        assert await body(exchange) == b"", "shorter than that, and whole"


async def test_an_answer_that_nobody_reads_waits_in_the_server() -> None:
    written = 0

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(HEAD)
        while True:
            writer.write(chunk(b"x" * 65_536))
            await writer.drain()
            written += 65_536

    async with asked(serve) as (exchange, port):
        await exchange.ask(port, REQUEST)
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.3)
        assert 0 < written < 64 * 1024**2, "what the kernel and a bounded buffer hold"
        read = 0
        async for part in exchange.parts():
            read += len(part)
            if read > 2 * before:
                break
        assert written > before, "and goes on when it is read"


async def test_closing_it_is_what_the_server_sees() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + chunk(b"one"))
        await reader.read()
        gone.set()

    async with asked(serve) as (exchange, port):
        await exchange.ask(port, REQUEST)
        exchange.close()
        await gone.wait()


@pytest.mark.parametrize("begun", [False, True], ids=["before its head", "in its body"])
async def test_what_is_broken_off_says_why_to_whoever_waits(begun: bool) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if begun:
            writer.write(HEAD)
        await asyncio.sleep(3600)

    async with asked(serve) as (exchange, port):
        reading = asyncio.create_task(whole(exchange, port))
        await asyncio.sleep(0.1)
        exchange.break_off("another engine takes its place")
        with pytest.raises(ExchangeBroken, match="another engine"):
            await reading


async def test_a_request_that_is_not_taken_can_be_broken_off_too() -> None:
    async def serve(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async with asked(serve) as (exchange, port):
        asking = asyncio.create_task(exchange.ask(port, b"x" * 200_000_000))
        await asyncio.sleep(0.2)
        assert not asking.done()
        exchange.break_off("another engine takes its place")
        with pytest.raises(ExchangeBroken, match="another engine"):
            await asking
