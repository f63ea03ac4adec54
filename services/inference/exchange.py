"""One request to an engine of this machine, on a connection of its own, for the price of a few system calls.

What a call costs here is taken from cores that read prompts and decode, most of it while somebody waits for a first
word. A client for any server of the world spends twice as much: it resolves names, races addresses, keeps a pool and
hands a socket through several turns of the event loop. To this machine a connection is made and a request sent at once.

A connection carries one request and is closed behind it. So an answer that is left early is cancelled by closing it,
and a reader that lets bytes gather in the kernel (`gathering`) is woken by the end. `httptools` takes the answer apart;
what it means, and how large a body may be, is `llama_http`'s business.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

import httptools

_HOST: Final = "127.0.0.1"
_READ_BYTES: Final = 64 * 1024
_MOST_WAITING: Final = 1024 * 1024
"""So many bytes of a body may wait here for their reader; the next ones wait in the kernel, and then in the engine."""
_MOST_HEAD: Final = 64 * 1024
"""No engine has so much to say before its answer."""


class ExchangeBroken(Exception):
    """The connection could not be made, broke before the answer was whole, or brought something that is no HTTP."""


class Exchange:
    """One request and its answer: `ask` first, then `status` and `parts`; `close` must follow in any case.

    Made and used in one event loop, by one reader. Raises ExchangeBroken where no more sockets are to be had.
    """

    def __init__(self) -> None:
        try:
            self.socket: Final = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        except OSError as err:
            raise ExchangeBroken(err.strerror or type(err).__name__) from err
        self.socket.setblocking(False)
        self.status = 0
        """Of HTTP; 0 until an answer has begun."""
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._parts: list[bytes] = []
        self._waiting_bytes = 0
        self._whole = False
        self._framed = False
        """Whether the answer says where it ends; else that is where the connection does."""
        self._broken: str | None = None
        self._reading = False
        self._news: asyncio.Future[None] | None = None

    async def ask(self, port: int, request: bytes, least_bytes: int = 1) -> None:
        """Send a whole request, with `Connection: close` in its head, and return when the head of its answer has come.

        With `least_bytes` the kernel does not wake anybody for fewer, unless no more will come. Raises ExchangeBroken.
        """
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least_bytes)
            with suppress(BlockingIOError):  # it is made by the time of sending, or that waits for it
                self.socket.connect((_HOST, port))
            await self._loop.sock_sendall(self.socket, request)
        except OSError as err:
            raise ExchangeBroken(self._broken or err.strerror or type(err).__name__) from err
        while not self.status:
            await self._more()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, in pieces as large as they have come since the last one. Raises ExchangeBroken."""
        while True:
            if self._parts:
                found, self._parts, self._waiting_bytes = b"".join(self._parts), [], 0
                yield found
            elif self._whole:
                return
            else:
                await self._more()

    def break_off(self, reason: str) -> None:
        """End it for both sides: whoever waits for it here gets ExchangeBroken."""
        self._broken = self._broken or reason
        with suppress(OSError):  # not connected yet: then the engine is not there
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the engine sees that and ends an answer that is not whole. Again does no harm."""
        self._pause()
        self.socket.close()

    async def _more(self) -> None:
        if self._broken is not None:
            raise ExchangeBroken(self._broken)
        if not self._reading:
            # By its number: to look for a socket that it does not know yet, `selectors` first describes it in words.
            self._loop.add_reader(self.socket.fileno(), self._read)
            self._reading = True
        self._news = self._loop.create_future()
        await self._news

    def _read(self) -> None:
        try:
            data = self.socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as err:
            self._ended(err.strerror or type(err).__name__)
            return
        if not data:
            self._whole = self._whole or (self.status > 0 and not self._framed)
            self._ended("it was closed before the answer was whole")
            return
        self._head_bytes += 0 if self.status else len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as err:
            self._ended(f"what came is no HTTP ({type(err).__name__})")
            return
        if not self.status and self._head_bytes > _MOST_HEAD:
            self._ended(f"more than {_MOST_HEAD} bytes came before an answer")
            return
        if self._waiting_bytes > _MOST_WAITING:
            self._pause()
        self._tell()

    def _ended(self, reason: str) -> None:
        self._pause()
        if not self._whole:
            self._broken = self._broken or reason
        self._tell()

    def _pause(self) -> None:
        if self._reading:
            self._loop.remove_reader(self.socket.fileno())
            self._reading = False

    def _tell(self) -> None:
        news, self._news = self._news, None
        if news is not None and not news.done():
            news.set_result(None)

    # What the parser calls, all of it while it is fed.

    def on_header(self, name: bytes, _value: bytes) -> None:
        """A line of the head."""
        self._framed = self._framed or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """The head of the answer is there."""
        self.status = self._parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        """A piece of the body, without what HTTP puts around it."""
        self._parts.append(part)
        self._waiting_bytes += len(part)

    def on_message_complete(self) -> None:
        """Nothing more belongs to the answer."""
        self._whole = True
