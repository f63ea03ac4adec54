"""One request for a capability, and what the broker wants done about requests and peers."""

from __future__ import annotations

import msgspec

from services.scheduler.peers import Peer
from services.scheduler.resources import NOTHING, Needs


class Call(msgspec.Struct):
    """One request for a capability. `requester` None = the hub itself."""

    key: str
    kind: str
    target: str
    queued_ms: int
    interactive: bool = True
    client: str = ""
    """Who it is for: clients share a capability fairly."""
    rank_s: float = 0.0
    """Upward rank in seconds; see `queues.Place`."""
    needs: Needs = NOTHING
    """Tokens of the machine that it holds while it runs."""
    body: bytes | None = None
    """None = composed when it starts."""
    requester: bytes | None = None
    corr: str | None = None
    """Id of the requester's message, repeated in the answer."""
    outer_ms: int | None = None
    """Unix ms after which nobody wants the answer, however often the work is begun."""
    timeout_ms: int | None = None
    """Bound from the start of the work."""
    deadline_ms: int | None = None
    """The bound in force: `outer_ms`, and while somebody works on it also `limit_ms`."""
    limit_ms: int | None = None
    """Unix ms by which the work that was begun last has to be over, whoever comes back with it."""
    task: str | None = None
    step: str | None = None
    attempt: int | None = None
    parent: str | None = None
    trace: str | None = None
    retry_lost: bool = False
    """Queue again without telling when its worker is lost; else the requester gets a PEER failure."""
    worker: bytes | None = None
    """Identity of the peer that has it; None while queued."""
    hold_until_ms: int = 0
    """Not handed out before this time: its worker may bring it back."""
    mislaid: bool = False
    """A session that had it ended because messages were lost."""

    def begin(self, at_ms: int, *, again: bool = False) -> None:
        """Somebody works on it from now on, or `again` under a new session. Neither that nor a lost message gives the
        work more time: both could happen for ever, the second to an answer that never gets through.
        """
        if self.timeout_ms is None:
            return
        if self.limit_ms is None or not (again or self.mislaid):
            self.limit_ms = at_ms + self.timeout_ms
        self.deadline_ms = self.limit_ms if self.outer_ms is None else min(self.limit_ms, self.outer_ms)


# Commands


class Start(msgspec.Struct, frozen=True):
    """Hand this call to that peer."""

    call: Call
    peer: Peer
    unserved_ms: tuple[int, int] | None = None
    """The last stretch of its wait in which no worker of its target was READY; None if one always was."""


class CancelAt(msgspec.Struct, frozen=True):
    """Tell that peer to stop."""

    call: Call
    identity: bytes


class Ended(msgspec.Struct, frozen=True):
    """A call has its ending: `kind` is a final, or `error`."""

    call: Call
    kind: str
    body: bytes
    worker: str


class Replaced(msgspec.Struct, frozen=True):
    """Another request waits for a call now: `call` is as it was, with the one that does not any more."""

    call: Call


class Lost(msgspec.Struct, frozen=True):
    """A call's worker is gone; the call is queued again."""

    call: Call
    worker: str


class Attached(msgspec.Struct, frozen=True):
    """A worker came back with this running call: nothing is computed again."""

    call: Call
    worker: str


class SendPing(msgspec.Struct, frozen=True):
    """Ping that peer."""

    identity: bytes


class PeerGone(msgspec.Struct, frozen=True):
    """A session is over."""

    peer: Peer
    why: str
    silent: bool = False
    """It said nothing any more; its process may live, with all it has in memory."""


Command = Start | CancelAt | Ended | Replaced | Lost | Attached | SendPing | PeerGone
