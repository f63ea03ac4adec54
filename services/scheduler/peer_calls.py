"""What peers ask of each other through the hub: a client of a model, a gate of a judge, a planner of memory.

Checks such a call and has it queued, refused or cancelled. The hub's own calls are made by the engine; who works on a
call and what becomes of it is the broker's business; who the peer is and what it may send, the machine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from protocol.errors import BadFrame
from protocol.header import Header
from protocol.messages.reply import ErrorReply
from services.scheduler.broker import Broker
from services.scheduler.calls import Call, Command
from services.scheduler.checking import GATE
from services.scheduler.keys import check_joins, withdraws
from services.scheduler.loading import Loading
from services.scheduler.outbox import Outbox
from services.scheduler.peers import Peer
from services.scheduler.reloading import Registries
from services.scheduler.resources import Needs, asked_cores, inference_needs
from services.scheduler.unread import RETRY_AFTER_MS

_DEFAULT_DEADLINE_MS: Final = 600_000


@dataclass(slots=True)
class PeerCalls:
    """See the module."""

    outbox: Outbox
    broker: Broker
    loading: Loading
    registries: Registries
    settle: Callable[[Iterable[Command], int], None]
    """Has the machine carry out the broker's commands, at this time."""

    def on_request(self, peer: Peer, header: Header, body: bytes, at_ms: int) -> None:
        """A call for a capability. Raises BadFrame for one that is wrong, or whose key is another call's."""
        if header.key is None or header.dst is None:
            raise BadFrame("call.incomplete", f"{header.kind} needs the header fields key and dst")
        call = Call(
            key=header.key,
            kind=header.kind,
            target=header.dst,
            queued_ms=at_ms,
            interactive=header.prio != "batch",
            client=peer.service,
            needs=self._needs_of(header.dst, header.cores),
            body=body,
            requester=peer.identity,
            corr=header.id,
            outer_ms=header.deadline or at_ms + _DEFAULT_DEADLINE_MS,
            task=header.task,
            step=header.step,
            attempt=header.attempt,
            parent=header.parent,
            trace=header.trace,
        )
        known = self.broker.calls.get(call.key)
        if known is not None:
            check_joins(known, call)
        objection = self.outbox.unread.objection(peer.identity)
        if objection is not None:
            self.outbox.refuse(peer.identity, header, objection, RETRY_AFTER_MS)
            return
        stranger = self.loading.objection(call.target, at_ms)
        if stranger is not None:
            self.outbox.answer(peer.identity, header, "error", ErrorReply(failure=stranger))
            return
        objection = self.broker.objection(call)
        if objection is not None:
            pause_ms = self.broker.admission.retry_after_ms(call.target, at_ms)
            self.outbox.refuse(peer.identity, header, objection, pause_ms)
            return
        self.settle(self.broker.ask(call), at_ms)

    def on_cancel(self, peer: Peer, header: Header, at_ms: int) -> None:
        """Nobody wants the answer any more; only who waits for it may say so."""
        call = self.broker.calls.get(header.key or "")
        if call is not None and call.requester == peer.identity and withdraws(header.corr, call.corr):
            self.settle(self.broker.cancel(call.key), at_ms)

    def _needs_of(self, target: str, useful: int | None) -> Needs:
        """Tokens of the call. Its body is not read here, so a gate run counts as one that needs a core."""
        registry = self.registries.in_force
        return asked_cores(registry, 1, useful or 1) if target == GATE else inference_needs(registry, target)
