"""ZeroMQ behind the ports, with the options that keep it honest.

ROUTER_MANDATORY, since a default ROUTER drops silently; bounded linger; ZMTP heartbeats, which see a frozen host;
a random identity per dealer, since a reused one receives its predecessor's answers. An `ipc://` address is guarded
by a lock file, because a second bind on a live path steals it without an error.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

import zmq

from protocol.errors import AddressTaken, SendLater, StrandPeer
from protocol.limits import MAX_FRAME_BYTES

_LINGER_MS: Final = 500
_HEARTBEAT_MS: Final = 1_000
_HEARTBEAT_TIMEOUT_MS: Final = 10_000
_HIGH_WATER: Final = 20_000  # a tripwire: credit and bounded queues keep pipes far below it
_MAX_IPC_PATH: Final = 107  # sun_path of a unix socket


def _set_options(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)


def check_address(address: str) -> None:
    """Raise ValueError, saying what to change, for an address this build will not use."""
    if not address.startswith("ipc://"):
        raise ValueError(f"{address}: only ipc:// is supported (tcp:// would need CURVE keys); set TIERLINE_HOME")
    path = address.removeprefix("ipc://")
    if len(os.fsencode(path)) > _MAX_IPC_PATH:
        raise ValueError(f"{path}: longer than {_MAX_IPC_PATH} bytes; choose a shorter TIERLINE_HOME")


class ZmqRouter:
    """The hub's socket, bound to `address`; its directory is made private, its lock held for life."""

    def __init__(self, address: str) -> None:
        check_address(address)
        path = Path(address.removeprefix("ipc://"))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        self._lock = _lock(path.with_suffix(".lock"), address)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        _set_options(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.bind(address)

    def send(self, identity: bytes, header: bytes, body: bytes) -> None:
        """See RouterPort."""
        try:
            self._socket.send_multipart((identity, header, body), zmq.NOBLOCK)
        except zmq.Again as err:
            raise SendLater from err
        except zmq.ZMQError as err:
            if err.errno == zmq.EHOSTUNREACH:
                raise StrandPeer(identity) from err
            raise

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        """See RouterPort."""
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return frames[0], frames[1:]

    def wait(self, timeout_ms: int) -> bool:
        """See RouterPort."""
        return bool(zmq.zmq_poll([(self._socket, zmq.POLLIN)], max(0, timeout_ms)))

    def close(self) -> None:
        """See RouterPort."""
        self._socket.close()
        os.close(self._lock)


class ZmqDealer:
    """A peer's socket. Connecting succeeds whether or not the hub is there; libzmq keeps trying."""

    def __init__(self, address: str) -> None:
        check_address(address)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        _set_options(self._socket)
        self._socket.setsockopt(zmq.IDENTITY, b"\x01" + os.urandom(12))
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1_000)
        self._socket.connect(address)

    def send(self, header: bytes, body: bytes) -> None:
        """See DealerPort."""
        try:
            self._socket.send_multipart((header, body), zmq.NOBLOCK)
        except zmq.Again as err:
            raise SendLater from err

    def receive(self) -> list[bytes] | None:
        """See DealerPort."""
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def wait(self, timeout_ms: int) -> bool:
        """See DealerPort."""
        return bool(zmq.zmq_poll([(self._socket, zmq.POLLIN)], max(0, timeout_ms)))

    def fileno(self) -> int:
        """See DealerPort."""
        return int(self._socket.getsockopt(zmq.FD))

    def close(self) -> None:
        """See DealerPort."""
        self._socket.close()


def _lock(path: Path, address: str) -> int:
    """Take the exclusive lock beside a socket, or raise AddressTaken naming the process that holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        holder = os.read(handle, 32).decode("ascii", "replace").strip() or "another process"
        os.close(handle)
        raise AddressTaken(address, f"pid {holder}") from err
    os.ftruncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())
    return handle
