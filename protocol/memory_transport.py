"""The ports inside one process: the real transport's twin, for tests of peers without sockets.

It keeps the promises that matter (unknown peer raises, full pipe raises, order per peer) and none of the timing.
"""

from __future__ import annotations

import os
from collections import deque

from protocol.errors import SendLater, StrandPeer


class MemoryRouter:
    """A hub's port; peers are made with `connect`."""

    def __init__(self, pipe_size: int = 1_000) -> None:
        self._pipe_size = pipe_size
        self._inbox: deque[tuple[bytes, list[bytes]]] = deque()
        self._peers: dict[bytes, deque[list[bytes]]] = {}

    def connect(self) -> MemoryDealer:
        """A new peer of this hub."""
        identity = os.urandom(13)
        self._peers[identity] = deque()
        return MemoryDealer(self, identity)

    def send(self, identity: bytes, header: bytes, body: bytes) -> None:
        """See RouterPort."""
        pipe = self._peers.get(identity)
        if pipe is None:
            raise StrandPeer(identity)
        if len(pipe) >= self._pipe_size:
            raise SendLater
        pipe.append([header, body])

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        """See RouterPort."""
        return self._inbox.popleft() if self._inbox else None

    def wait(self, timeout_ms: int) -> bool:
        """True if a message is there; nothing can arrive while one thread waits, so it never blocks."""
        return bool(self._inbox)

    def close(self) -> None:
        """See RouterPort."""
        self._peers.clear()

    def _accept(self, identity: bytes, frames: list[bytes]) -> None:
        if len(self._inbox) >= self._pipe_size:
            raise SendLater
        self._inbox.append((identity, frames))

    def _pipe(self, identity: bytes) -> deque[list[bytes]]:
        return self._peers.get(identity, deque())

    def _forget(self, identity: bytes) -> None:
        self._peers.pop(identity, None)


class MemoryDealer:
    """A peer's port."""

    def __init__(self, router: MemoryRouter, identity: bytes) -> None:
        self._router = router
        self.identity = identity

    def send(self, header: bytes, body: bytes) -> None:
        """See DealerPort."""
        self._router._accept(self.identity, [header, body])

    def receive(self) -> list[bytes] | None:
        """See DealerPort."""
        pipe = self._router._pipe(self.identity)
        return pipe.popleft() if pipe else None

    def wait(self, timeout_ms: int) -> bool:
        """True if a message is there; never blocks, as for MemoryRouter."""
        return bool(self._router._pipe(self.identity))

    def reconnected(self) -> bool:
        """Never: a connection inside one process does not break."""
        return False

    def fileno(self) -> int:
        """There is no descriptor to watch; raises, so that a test which needs one uses real sockets."""
        raise OSError("a memory port has no file descriptor: poll it with wait(), or use ZmqDealer")

    def close(self) -> None:
        """See DealerPort."""
        self._router._forget(self.identity)
