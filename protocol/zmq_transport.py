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
from zmq.backend import Socket as _Backend

from protocol.errors import AddressTaken, SendLater, StrandPeer
from protocol.limits import MAX_FRAME_BYTES

_LINGER_MS: Final = 500
_HEARTBEAT_MS: Final = 1_000
_HEARTBEAT_TIMEOUT_MS: Final = 10_000
_RECONNECT_MS: Final = 50
_RECONNECT_MAX_MS: Final = 200
"""The hub is on this machine: asking a few times a second costs nothing, and its restart is noticed at once."""
_HIGH_WATER: Final = 20_000  # a tripwire: credit and bounded queues keep pipes far below it
_MAX_IPC_PATH: Final = 107  # sun_path of a unix socket
# Plain integers: an operation on pyzmq's flags makes a new flag, which takes longer than sending a frame.
_POLLIN: Final = int(zmq.POLLIN)
_AT_ONCE: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)


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
            _send(self._socket, identity, header, body)
        except zmq.Again as err:
            raise SendLater from err
        except zmq.ZMQError as err:
            if err.errno == zmq.EHOSTUNREACH:
                raise StrandPeer(identity) from err
            raise

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        """See RouterPort."""
        frames = _receive(self._socket)
        return None if frames is None else (frames[0], frames[1:])

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
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        self._connections: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._connected = False
        self._socket.connect(address)

    def send(self, header: bytes, body: bytes) -> None:
        """See DealerPort."""
        try:
            _send(self._socket, header, body)
        except zmq.Again as err:
            raise SendLater from err

    def receive(self) -> list[bytes] | None:
        """See DealerPort."""
        return _receive(self._socket)

    def wait(self, timeout_ms: int) -> bool:
        """See DealerPort."""
        return bool(zmq.zmq_poll([(self._socket, zmq.POLLIN)], max(0, timeout_ms)))

    def reconnected(self) -> bool:
        """See DealerPort."""
        again = False
        while self._connections.poll(0):
            self._connections.recv_multipart(zmq.NOBLOCK)
            again, self._connected = self._connected, True
        return again

    def fileno(self) -> int:
        """See DealerPort."""
        return int(self._socket.getsockopt(zmq.FD))

    def close(self) -> None:
        """See DealerPort."""
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._socket.close()


# pyzmq's send and recv without its Python layer, which costs more than the message: these are the two calls that
# every step of every task makes several times.


def _send(socket: zmq.Socket[bytes], *frames: bytes) -> None:
    """Queue all frames or none: libzmq refuses the first frame of a message it has no room for."""
    *first, last = frames
    for frame in first:
        _Backend.send(socket, frame, _MORE)
    _Backend.send(socket, last, _AT_ONCE)


def _receive(socket: zmq.Socket[bytes]) -> list[bytes] | None:
    """All frames of the next message. Asks first: an exception for `nothing there` costs more than the question."""
    if not int(_Backend.get(socket, zmq.EVENTS)) & _POLLIN:
        return None
    try:
        frames = [_Backend.recv(socket, _AT_ONCE)]
    except zmq.Again:
        return None  # a message cut short by its sender's death
    while _Backend.get(socket, zmq.RCVMORE):
        frames.append(_Backend.recv(socket))
    return frames


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
