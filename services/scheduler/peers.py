"""Who is on the bus, what they can do and how much more they may be given. Pure bookkeeping, no policy of tasks.

One peer is one session: an epoch of a process under one socket identity. A silent peer gets no new work after
`suspect_ms` and loses its session after `dead_ms`; a process that comes back is a new session, which may bring its
running work along. Slowness is not death: only silence and a broken connection count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from protocol.messages.session import PeerReport, PeerState

PING_MS: Final = 1_000
SUSPECT_MS: Final = 3_000
DEAD_MS: Final = 10_000
_KEPT_SEQS: Final = 1_024
"""How far a message may be overtaken and still be told from a repeat."""
_KEPT_PINGS: Final = 2 * DEAD_MS // PING_MS
"""More are never without a pong: a peer that answers none of them is gone before."""
_SEQ_WINDOW: Final = (1 << _KEPT_SEQS) - 1


@dataclass(slots=True)
class Peer:
    """One session."""

    identity: bytes
    service: str
    epoch: str
    capabilities: tuple[str, ...]
    pid: int
    heard_ms: int
    state: PeerState
    granted: int
    slots: int = 0
    """Most slots that it was seen to have in this epoch, free ones and taken ones together."""
    used: int = 0
    """Calls handed over in this epoch; `granted - used` are free."""
    last_seq: int = -1
    """Highest sequence number heard in this epoch."""
    _seen: int = 0
    """Bit n is set if the message with number `last_seq - n` was heard."""
    calls: set[str] = field(default_factory=set)
    """Keys it is working on."""
    reason: str | None = None
    loop_lag_ms: float = 0
    rss_bytes: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    registry: str | None = None
    """Digest of the registry that its newest pong names."""
    model_bytes: int = 0
    needs_bytes: int = 0
    order: int = 0
    """Newest `session.reside` it has heard in this session."""
    told: int = 0
    """Newest one it was sent."""
    told_ms: int = 0
    _asked: dict[str, tuple[frozenset[str], int]] = field(default_factory=dict)
    """Ping without a pong -> `calls` and `used` when that was sent."""
    _lacks: bool = False
    """By its newest pong to one of those, something that was sent is missing."""

    @property
    def is_worker(self) -> bool:
        """Clients have no capabilities; they are neither pinged nor given work."""
        return bool(self.capabilities)

    @property
    def life(self) -> str:
        """The process behind the epoch: the same for all sessions of one boot."""
        return self.epoch.rpartition("-")[0] or self.epoch

    def is_heard(self, now_ms: int) -> bool:
        """False once it has been silent for so long that it gets no new work."""
        return now_ms - self.heard_ms < SUSPECT_MS

    def is_repeat(self, seq: int) -> bool:
        """True for a message that was heard before, or is too late to tell; notes it as heard.

        A message that others have overtaken is not a repeat: it may be the one final of its call.
        """
        behind = self.last_seq - seq
        if behind < 0:
            self._seen = (self._seen << -behind | 1) & _SEQ_WINDOW if -behind <= _KEPT_SEQS else 1
            self.last_seq = seq
            return False
        if behind >= _KEPT_SEQS or self._seen >> behind & 1:
            return True
        self._seen |= 1 << behind
        return False

    def pinged(self, ping: str) -> None:
        """A ping is on its way, behind the calls that it was given by now."""
        self._asked[ping] = (frozenset(self.calls), self.used)
        while len(self._asked) > _KEPT_PINGS:
            del self._asked[next(iter(self._asked))]

    def has_lost_messages(self, ping: str | None, in_flight: int) -> bool:
        """True if its pongs say twice in a row that a request or an answer never arrived. Once, it may be on its way,
        overtaken by the ping or the pong.

        An answer is missing where it works on fewer calls than it was given before the ping and has not ended before
        the pong; a request where a slot was used that is neither free nor taken.
        """
        asked = self._asked.pop(ping or "", None)
        if asked is None:
            return False
        calls, used = asked
        slots = self.granted - used + in_flight
        self.slots = max(self.slots, slots)
        lacked, self._lacks = self._lacks, len(calls & self.calls) > in_flight or slots < self.slots
        return lacked and self._lacks

    def free(self, now_ms: int) -> int:
        """Calls it may be given now."""
        if self.state is not PeerState.READY or not self.is_heard(now_ms):
            return 0
        return self.granted - self.used

    def report(self, now_ms: int) -> PeerReport:
        """As `session.report` shows it."""
        silent = max(0, now_ms - self.heard_ms)
        suspect = self.is_worker and silent >= SUSPECT_MS
        return PeerReport(
            service=self.service,
            epoch=self.epoch,
            state="suspect" if suspect else self.state.value,
            reason=self.reason,
            capabilities=list(self.capabilities),
            granted=self.granted,
            used=self.used,
            in_flight=sorted(self.calls),
            silent_ms=silent,
            pid=self.pid,
            loop_lag_ms=self.loop_lag_ms,
            rss_bytes=self.rss_bytes,
            metrics=self.metrics,
            registry=self.registry,
        )
