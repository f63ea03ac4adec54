"""How much every peer was sent and has not been seen to read. Pure bookkeeping.

A socket tells how many messages wait in a pipe, not how large they are, and a peer that sends heartbeats need not read.
So after every `MARK_BYTES` the hub puts a ping behind what it sent, and its pong says that all before it was read. What
is unread bounds what a peer may ask for; one that cannot be told anything any more counts as gone. The account belongs
to the connection: a new HELLO on it changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Final

MARK_BYTES: Final = 4 * 1024 * 1024
"""Sent to a peer until it is asked for a sign that it reads."""
MAX_UNREAD_PER_PEER: Final = 32 * 1024 * 1024
"""Beyond this a peer may ask for nothing more; at twice as much it is gone."""
MAX_UNREAD: Final = 256 * 1024 * 1024
"""Of all peers together: as it fills, each may have no more than are left for the others."""
RETRY_AFTER_MS: Final = 500
"""A peer that reads has answered its ping by then."""
_SMALL_BYTES: Final = 64 * 1024
"""What a silent peer may have unread without being asked."""
_MOST_MARKS: Final = 64
_MOST_ACCOUNTS: Final = 4_096


@dataclass(slots=True)
class _Account:
    sent: int = 0
    read: int = 0
    marked: int = 0
    """`sent` at the newest mark."""
    marks: deque[tuple[str, int]] = field(default_factory=deque)
    """Pings without a pong, oldest first, and what had been sent before each."""


@dataclass(slots=True)
class Unread:
    """See the module. Peers are told by the identity of their connection."""

    _accounts: dict[bytes, _Account] = field(default_factory=dict)
    _all: int = 0
    _due: set[bytes] = field(default_factory=set)

    def sent(self, identity: bytes, size_bytes: int) -> None:
        """A message is on its way to this peer."""
        account = self._accounts.get(identity)
        if account is None:
            account = self._accounts[identity] = _Account()
            if len(self._accounts) > _MOST_ACCOUNTS:
                self.gone(next(iter(self._accounts)))
        account.sent += size_bytes
        self._all += size_bytes
        if account.sent - account.marked >= MARK_BYTES:
            self._due.add(identity)

    def take_due(self) -> list[bytes]:
        """Peers that should be pinged now; `mark` each."""
        if not self._due:
            return []
        due, self._due = sorted(self._due), set()
        return due

    def want_marks(self, joined: Container[bytes]) -> None:
        """Now and then: ask those too that were sent little since their mark, and connections without a session.

        The ping to a connection that is closed fails, and its account with it.
        """
        for identity in [identity for identity in self._accounts if identity not in joined]:
            if self.bytes_of(identity):
                self._due.add(identity)
            else:
                self.gone(identity)
        self._due |= {
            identity for identity, account in self._accounts.items() if account.sent - account.marked >= _SMALL_BYTES
        }

    def mark(self, identity: bytes, ping: str) -> None:
        """A ping with this id went to the peer behind all that it was sent."""
        account = self._accounts[identity]
        if len(account.marks) >= _MOST_MARKS:
            account.marks.pop()
        account.marks.append((ping, account.sent))
        account.marked = account.sent

    def on_pong(self, identity: bytes, ping: str | None) -> None:
        """The peer answers a ping: what was sent before that ping has been read."""
        account = self._accounts.get(identity)
        if account is None or all(ident != ping for ident, _ in account.marks):
            return
        while account.marks:
            ident, sent = account.marks.popleft()
            if ident == ping:
                self._all -= sent - account.read
                account.read = sent
                return

    def gone(self, identity: bytes) -> None:
        """The connection is closed, and its pipe with it."""
        account = self._accounts.pop(identity, None)
        if account is not None:
            self._all -= account.sent - account.read
        self._due.discard(identity)

    def bytes_of(self, identity: bytes) -> int:
        """What this peer has not been seen to read."""
        account = self._accounts.get(identity)
        return 0 if account is None else account.sent - account.read

    def objection(self, identity: bytes) -> str | None:
        """Why this peer may ask for nothing more now; None if it may."""
        unread = self.bytes_of(identity)
        if unread < self._limit():
            return None
        return f"{unread:,} bytes that were sent to you are not known to be read: answer session.ping as you read"

    def is_deaf(self, identity: bytes) -> bool:
        """True if nothing more can be sent to this peer: it counts as gone."""
        return self.bytes_of(identity) >= 2 * self._limit()

    def _limit(self) -> int:
        return min(MAX_UNREAD_PER_PEER, max(2 * MARK_BYTES, MAX_UNREAD - self._all))

    def check_invariants(self) -> None:
        """Raise AssertionError if the sum is not that of the accounts."""
        if self._all != sum(account.sent - account.read for account in self._accounts.values()):
            raise AssertionError("unread bytes do not add up")
