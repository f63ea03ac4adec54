"""A server elsewhere that means harm: whatever bytes it sends, a request ends soon, typed, and in little memory.

The client alone, over real sockets, against a server that says exactly these bytes; what the service makes of its
errors is tested in `test_inference_remote.py`.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import ssl
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from services.inference import openai_http
from services.inference.llama_http import EngineError, EngineFaulty, EngineGone, Piece
from services.inference.openai_http import NoRoom, OpenAiServer, Rejected
from services.kit.registry import ModelEntry

Speaks = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
SOON_S = 20.0
"""Far more than any bound that is set here; a request that has none is still there then."""
BOMB = gzip.compress(gzip.compress(bytes(256 * 1024 * 1024)))


@pytest.fixture(autouse=True)
def short_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_http, "_PROBE_TIMEOUT_S", 1.0)


@asynccontextmanager
async def hostile(
    speaks: Speaks, tls: ssl.SSLContext | None = None, **remote: Any
) -> AsyncGenerator[OpenAiServer, None]:
    """A client of a server that treats every connection like this, once it has sent a request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await speaks(reader, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has had enough
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    port = listening.sockets[0].getsockname()[1]
    scheme = "http" if tls is None else "https"
    entry = ModelEntry(
        name="m", tier="A", engine="openai", base_url=f"{scheme}://localhost:{port}/v1", remote_model="big",
        context_tokens=512, remote={"first_token_timeout_s": 1.0, "silence_timeout_s": 1.0, **remote},
    )  # fmt: skip
    client = OpenAiServer(entry)
    try:
        yield client
    finally:
        await client.close()
        listening.close()


def says(*parts: bytes) -> Speaks:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)

    return speak


def drips(head: bytes, part: bytes, every_s: float) -> Speaks:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(every_s)

    return speak


async def chat(client: OpenAiServer) -> list[Piece]:
    payload = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True}
    async with aclosing(client.chat(payload)) as pieces:
        return [piece async for piece in pieces]


def error_of(speaks: Speaks, ask: str, tls: ssl.SSLContext | None = None, **remote: Any) -> EngineError:
    async def run() -> EngineError:
        async with hostile(speaks, tls, **remote) as client:
            with pytest.raises(EngineError) as refused:
                async with asyncio.timeout(SOON_S):
                    await (client.probe() if ask == "probe" else chat(client))
            return refused.value

    return asyncio.run(run())


OK = b"HTTP/1.1 200 OK\r\n"
STREAM = OK + b"content-type: text/event-stream\r\n\r\n"

REPLIES: dict[str, Speaks] = {
    "no HTTP": says(b"\x00\xff" * 500 + b"\r\n\r\n"),
    "endless header": drips(OK, b"x-a: " + b"a" * 60_000 + b"\r\n", 0),
    "endless header line": drips(OK + b"x-a: ", b"a" * 60_000, 0),
    "endless 100": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "head in drips": drips(b"HTTP/1.1 200 OK\r\nx-a: ", b"a", 0.1),
    "body in drips": drips(OK + b"\r\n", b" ", 0.1),
    "error in drips": drips(b"HTTP/1.1 500 No\r\n\r\n", b" ", 0.1),
    "endless body": drips(OK + b"\r\n", b" " * 60_000, 0),
    "endless comments": drips(STREAM, b": still here\n\n", 0),
    "no chunks": says(OK + b"transfer-encoding: chunked\r\n\r\nzzzz\r\n"),
    "endless chunk size": drips(OK + b"transfer-encoding: chunked\r\n\r\n", b"0", 0),
    "cut chunk": says(OK + b"transfer-encoding: chunked\r\n\r\nff\r\ndata: {"),
    "two lengths": says(OK + b"content-length: 5\r\ncontent-length: 7\r\n\r\nhello"),
    "huge length": says(OK + b"content-length: " + b"9" * 30 + b"\r\n\r\n{}"),
    "HTML": says(OK + b"content-type: text/html\r\n\r\n<html>sign in</html>"),
    "HTML without a type": says(OK + b"\r\n<html>sign in</html>"),
    "redirect": says(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n"),
    "redirect to no host": says(b"HTTP/1.1 307 No\r\nlocation: http://xn--zz--/\r\ncontent-length: 0\r\n\r\n"),
    "redirect to nonsense": says(b"HTTP/1.1 302 No\r\nlocation: http://[::1/\xff\r\ncontent-length: 0\r\n\r\n"),
    "bomb": says(OK + b"content-encoding: gzip, gzip\r\n\r\n" + BOMB),
    "bomb of an error": says(b"HTTP/1.1 500 No\r\ncontent-encoding: gzip, gzip\r\n\r\n" + BOMB),
    "stream in a bomb": says(STREAM[:-2] + b"content-encoding: gzip, gzip\r\n\r\n" + BOMB),
    "switching": says(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
}


@pytest.mark.parametrize("ask", ["probe", "chat"])
@pytest.mark.parametrize("reply", REPLIES)
def test_whatever_a_server_sends_a_request_ends_soon_in_a_typed_error_and_little_memory(reply: str, ask: str) -> None:
    tracemalloc.start()
    try:
        error = error_of(REPLIES[reply], ask)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(error)) < 1_000
    assert peak < 64 * 1024 * 1024
    if reply == "redirect":
        assert isinstance(error, Rejected)


@pytest.mark.parametrize("ask", ["probe", "chat"])
def test_garbage_inside_of_tls_is_a_broken_connection(ask: str, tmp_path: Path) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        await writer.drain()
        os.write(writer.get_extra_info("socket").fileno(), b"\x17\x03\x03\x00\x40" + b"\x00" * 64)
        await asyncio.sleep(0.2)

    error = error_of(speak, ask, context, ca_file=str(tmp_path / "ca.pem"))
    assert isinstance(error, EngineGone), repr(error)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"1000000000", 1e9),
        (b"9" * 50_000, None),
        (b"Sun, 01 Mar 1026 12:00:00 GMT", 0.0),
        (b"Sun, 01 Mar 99999999999999999999 12:00:00 GMT", None),
        (b"Sun, 01 Mar 2026 12:00:00 +99999999999999999999", None),
        (b"Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
    ],
)
def test_a_time_to_wait_that_no_clock_knows_is_still_no_room(value: bytes, seconds: float | None) -> None:
    error = error_of(says(b"HTTP/1.1 429 No\r\ncontent-length: 0\r\nretry-after: " + value + b"\r\n\r\n"), "chat")
    assert isinstance(error, NoRoom), repr(error)
    assert error.retry_after_s == seconds


def test_cookies_of_a_server_are_neither_kept_nor_sent() -> None:
    heard: list[bytes] = []

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cookies = b"".join(b"set-cookie: c%d-%d=%s\r\n" % (len(heard), n, b"x" * 500) for n in range(50))
        writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n" + cookies + b"\r\n")

    async def run() -> None:
        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(await reader.readuntil(b"\r\n\r\n"))
            await speak(reader, writer)
            await writer.drain()
            writer.close()

        listening = await asyncio.start_server(listen, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        entry = ModelEntry(
            name="m", tier="A", engine="openai", base_url=f"http://127.0.0.1:{port}/v1", remote_model="big",
            context_tokens=512,
        )  # fmt: skip
        client = OpenAiServer(entry)
        for _ in range(3):
            with pytest.raises(EngineFaulty):
                await client.probe()
        await client.close()
        listening.close()

    asyncio.run(run())
    assert len(heard) == 3
    assert not any(b"cookie" in request.lower() for request in heard)
