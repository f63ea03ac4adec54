"""Errors of the bus, named by what the one who catches them does next.

BusError
├── BadFrame(reason)            these bytes are not a message: answer the sender with `error`, go on with the others
├── SendLater                   nothing left this process: keep the message and its credit, try again
├── StrandPeer(peer)            the peer is gone: fence its epoch, answer its calls with an error
├── Rejoin                      the hub is silent, new, or does not know us: fresh socket, HELLO again
├── AddressTaken(address)       another hub is alive there: stop this one, it would steal the address
└── CallError                   a request of ours has ended without a result
    ├── CallFailed(failure)     typed failure from the other side: its category says whether to retry
    ├── CallRefused(retry…)     the hub's queue is full: wait `retry_after_ms`, then ask again
    └── DeadlineExceeded        the answer did not come in time: the work may still happen, ask with the same key
        └── HubUnreachable      there was no session with a hub all the while: start the stack, or look at its address
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protocol.messages.failure import Failure


class BusError(Exception):
    """Anything that goes wrong between two peers."""


class BadFrame(BusError):
    """Bytes that are not a message. `code` and `evidence` are for programs, the text for people."""

    def __init__(self, code: str, message: str, evidence: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.evidence = evidence or {}


class SendLater(BusError):
    """The outgoing pipe is full; nothing was sent."""


class StrandPeer(BusError):
    """The named peer cannot be reached any more."""

    def __init__(self, peer: bytes) -> None:
        super().__init__(f"peer {peer.hex()} is not connected")
        self.peer = peer


class Rejoin(BusError):
    """The session with the hub is over; start a new one."""


class AddressTaken(BusError):
    """A live process holds the address."""

    def __init__(self, address: str, holder: str) -> None:
        super().__init__(f"{address} is held by {holder}: stop that stack (tierline down) or set another TIERLINE_HOME")


class CallError(BusError):
    """A request has ended without a result."""


class CallFailed(CallError):
    """The other side answered with a typed failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.code}: {failure.message}")
        self.failure = failure


class CallRefused(CallError):
    """The hub is full or draining; nothing was accepted."""

    def __init__(self, reason: str, retry_after_ms: int) -> None:
        super().__init__(f"refused: {reason}; try again in {retry_after_ms} ms")
        self.reason = reason
        self.retry_after_ms = retry_after_ms


class DeadlineExceeded(CallError):
    """No answer within the caller's deadline."""


class HubUnreachable(DeadlineExceeded):
    """No hub answered at that address within the caller's deadline."""
