"""Wakes the reader of a streamed answer a few times a second instead of once for every token.

llama.cpp sends an event for each token. To be woken, to cut the event out and to run the task that waits for it costs
a third of a millisecond on a machine whose cores all decode, and is taken from them: 3 % of a core at 100 tokens a
second. Nobody needs every token at once, as what goes on to the hub is joined anyway. So once an answer has begun, the
kernel is told to keep what comes (`SO_RCVLOWAT`) until a time has passed. The end is not kept: the engine closes the
connection behind its answer, and for that the kernel wakes at once.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

_KEPT_BYTES: Final = 64 * 1024
"""More than an engine sends in any interval. If it does send more, it is read a little earlier."""


class Gathering:
    """`with Gathering(connection, interval) as gathering`: each `rest` lets what comes gather, for as many seconds as
    `interval` says at that moment."""

    def __init__(self, connection: socket.socket, interval: Callable[[], float]) -> None:
        self._socket = connection
        self._interval = interval
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def rest(self) -> None:
        """What has come is read; the next time is after the interval, or when the connection is closed."""
        if self._timer is not None:
            self._timer.cancel()
        self._wake_at(_KEPT_BYTES)
        self._timer = asyncio.get_running_loop().call_later(self._interval(), self._wake_at, 1)

    def _wake_at(self, size: int) -> None:
        with suppress(OSError):  # it has been closed meanwhile
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
