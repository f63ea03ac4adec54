"""The baseline of `bench overhead`: messages of the same kind over a bare ROUTER and DEALER, with nothing around them.

Plain pyzmq with poll loops on both sides, in two processes, as one would write it by hand. This module run as a
program is the other side: `python services/ctl/bench/raw_zmq.py ADDRESS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import msgpack
import zmq

from services.kit.config import CHECKOUT

_WAIT_MS: Final = 5_000
_HEADER: Final = {"kind": "infer.request", "id": "x" * 16, "key": "k" * 32, "task": "t" * 18, "step": "S1"}
_BODY_BYTES: Final = 400


class BaselineFailedError(Exception):
    """The other side did not answer in time."""


def measure(folder: Path, count: int, window: int) -> float:
    """Microseconds per round trip of `count` messages with `window` of them under way at once."""
    address = f"ipc://{folder}/raw.sock"
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    router.linger = 0
    router.bind(address)
    # By path: run as a module it would be imported twice, once as part of its package.
    echo = subprocess.Popen(
        [sys.executable, __file__, address], cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
    )
    try:
        identity = _next(router)[0]
        message = (identity, bytes(msgpack.packb(_HEADER)), bytes(_BODY_BYTES))
        _exchange(router, message, count, window)  # first use of everything
        began = time.perf_counter()
        _exchange(router, message, count, window)
        return (time.perf_counter() - began) * 1e6 / count
    finally:
        echo.kill()
        echo.wait()
        router.close()


def _exchange(router: zmq.Socket[bytes], message: tuple[bytes, bytes, bytes], count: int, window: int) -> None:
    sent = received = 0
    while received < count:
        while sent < count and sent - received < window:
            router.send_multipart(message)
            sent += 1
        _next(router)
        received += 1


def _next(socket: zmq.Socket[bytes]) -> list[bytes]:
    if not socket.poll(_WAIT_MS):
        raise BaselineFailedError(f"no message within {_WAIT_MS} ms")
    return socket.recv_multipart()


def _echo(address: str) -> None:
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(address)
    dealer.send_multipart((b"ready", b""))
    while dealer.poll(_WAIT_MS * 6):
        dealer.send_multipart(dealer.recv_multipart())


if __name__ == "__main__":
    _echo(sys.argv[1])
