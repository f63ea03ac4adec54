"""The seam between messages and wires: two narrow ports, non-blocking, that a machine's driver can poll.

`protocol.zmq_transport` is the real one, `protocol.memory_transport` its twin inside one process, for tests of
ours and of users; both pass `tests/contract/test_transport.py`. Ports move frames and know nothing of sessions.
"""

from __future__ import annotations

from typing import Protocol


class RouterPort(Protocol):
    """The hub's end: many peers, each addressed by its identity."""

    def send(self, identity: bytes, header: bytes, body: bytes) -> None:
        """Hand over one message. Raises StrandPeer if that peer is not connected, SendLater if its pipe is full."""
        ...

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        """Return the next message as (identity, frames), or None when there is none right now."""
        ...

    def wait(self, timeout_ms: int) -> bool:
        """Block until a message can be received or the time is over; True if one can."""
        ...

    def close(self) -> None:
        """Give the address back; what is still unsent is dropped after a bounded linger."""
        ...


class DealerPort(Protocol):
    """A peer's end: one hub."""

    def send(self, header: bytes, body: bytes) -> None:
        """Hand over one message. Raises SendLater if the pipe is full."""
        ...

    def receive(self) -> list[bytes] | None:
        """Return the frames of the next message, or None when there is none right now."""
        ...

    def wait(self, timeout_ms: int) -> bool:
        """Block until a message can be received or the time is over; True if one can."""
        ...

    def reconnected(self) -> bool:
        """True once after a broken connection has come back: the hub may be a new one, what was under way lost."""
        ...

    def fileno(self) -> int:
        """Descriptor to watch. It signals changes, not states: after any call, receive until None."""
        ...

    def close(self) -> None:
        """End the connection; what is still unsent is dropped after a bounded linger."""
        ...
