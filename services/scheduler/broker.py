"""Calls between peers as a pure machine: bounded queues, credit, deadlines, re-attachment, one ending per call.

The hub's own steps and the requests of other peers are the same thing here: a `Call` for a capability, with a key
and somebody who waits. Every call ends exactly once, in `Ended`; when a worker dies the call is stranded and either
queued again (`retry_lost`) or ended with a PEER failure, through the same path as any answer.

Leaves to others: what an answer means (`machine.py`), sockets and clocks (`app.py`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from protocol.codec import pack_body
from protocol.header import Header
from protocol.kinds import family
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Hello, PeerState, Pong
from services.kit.registry import FailureCaps
from services.scheduler.admission import Admission
from services.scheduler.calls import Attached, Call, CancelAt, Command, Ended, Lost, PeerGone, Replaced, SendPing, Start
from services.scheduler.circuits import Circuits, fault_of, policy_of
from services.scheduler.deadlines import Deadlines
from services.scheduler.lines import Lines
from services.scheduler.peers import DEAD_MS, PING_MS, SUSPECT_MS, Peer
from services.scheduler.resources import Tokens
from services.scheduler.unserved import Unserved

MAX_QUEUED: Final = 10_000
"""Calls of other peers that may wait per capability; the hub's own steps are bounded by its tasks."""
REATTACH_MS: Final = 4_000
"""After a restart of the hub, running calls wait this long for their worker to bring them back."""
CLIENT_KEPT_MS: Final = 60_000
_KEPT_ENDINGS: Final = 4_096
_KEPT_GONE: Final = 256


@dataclass(slots=True)
class Welcoming:
    """What to answer a HELLO: keys to drop and results to send again."""

    drop: list[str]
    resend: list[str]


@dataclass(slots=True)
class Broker:
    """Peers and calls. Every method takes the time and returns commands, in order."""

    tokens: Tokens
    weight_of: Callable[[str], float] = field(default=lambda _: 1.0)
    """Client -> its weight among those that wait for the same capability."""
    peers: dict[bytes, Peer] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    counters: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("started", "ended", "lost", "reattached", "duplicates", "expired"), 0)
    )
    gone_ms: dict[str, int] = field(default_factory=dict)
    """Capability -> when a peer that had it was last lost, in unix ms; the newest of them."""
    admission: Admission = field(default_factory=Admission)
    circuits: Circuits = field(default_factory=lambda: Circuits(policy_of(FailureCaps())))
    """Which capabilities are left alone for a while."""
    closed: set[str] = field(default_factory=set)
    """Capabilities for which nothing is handed out, although a worker may be READY: their model is to be unloaded."""
    unserved: Unserved = field(default_factory=Unserved)
    lines: Lines = field(init=False)
    """Calls that wait."""
    _ended: OrderedDict[str, None] = field(default_factory=OrderedDict)
    """Keys that have ended lately, to tell a duplicate from a stranger. In a plain dictionary the oldest one
    is found past the gaps of all that were removed since it last grew."""
    _children: dict[str, set[str]] = field(default_factory=dict)
    """Key of a call -> keys of the calls made during it."""
    _deadlines: Deadlines = field(init=False)
    _overdue: deque[Command] = field(default_factory=deque)
    """Ends of calls that were found expired when it was their turn."""
    _pinged_ms: int = 0

    def __post_init__(self) -> None:
        """Look after the deadlines of its calls, and after those that wait."""
        self._deadlines = Deadlines(self.calls)
        self.lines = Lines(self.calls)

    # Peers

    def on_hello(
        self, identity: bytes, hello: Hello, epoch: str, granted: int, at_ms: int
    ) -> tuple[Welcoming, list[Command]]:
        """Open a session; work that the peer brings along is re-attached if nobody else has it."""
        peer = Peer(
            identity=identity,
            service=hello.service,
            epoch=epoch,
            capabilities=tuple(hello.capabilities),
            pid=hello.pid,
            heard_ms=at_ms,
            state=hello.state,
            granted=granted,
            slots=granted + len(hello.in_flight),
        )
        commands: list[Command] = []
        # Same identity again, or an earlier session of the same process: that session is over. What it had is
        # queued first, so that the loop below finds it free to be attached.
        for old in [p for p in self.peers.values() if p.identity == identity or (p.is_worker and p.life == peer.life)]:
            commands.extend(self._remove(old, "replaced by its own new session", at_ms, blame=False))
        # A process that was killed and started again: the ping finds the broken connection of its earlier life now.
        same_name = [p for p in self.peers.values() if p.is_worker and p.service == peer.service]
        commands.extend(SendPing(other.identity) for other in same_name)
        self.peers[identity] = peer
        welcome = Welcoming([], [])
        for key in hello.in_flight:
            call = self.calls.get(key)
            if call is None or call.worker is not None or call.target not in peer.capabilities:
                welcome.drop.append(key)
                continue
            self._attach(call, peer, at_ms)
            commands.append(Attached(call, peer.service))
        for key in hello.finished:
            call = self.calls.get(key)
            if call is not None and call.worker is None and call.target in peer.capabilities:
                self._attach(call, peer, at_ms)
                commands.append(Attached(call, peer.service))
                welcome.resend.append(key)
        self.lines.touch(peer.capabilities)
        return welcome, commands

    def on_heard(self, peer: Peer, credit: int | None, at_ms: int) -> None:
        """Any message of a peer: it lives, and may grant more slots (a running total, so a repeat does no harm)."""
        if at_ms - peer.heard_ms >= SUSPECT_MS:
            self.lines.touch(peer.capabilities)
        peer.heard_ms = at_ms
        if credit is not None and credit > peer.granted:
            peer.granted = credit
            self.lines.touch(peer.capabilities)

    def on_pong(self, peer: Peer, pong: Pong) -> None:
        """Take the state a peer reports."""
        if pong.state is not peer.state:
            self.lines.touch(peer.capabilities)
        peer.state = pong.state
        peer.reason = pong.reason
        peer.loop_lag_ms = pong.loop_lag_ms
        peer.rss_bytes = pong.rss_bytes
        peer.metrics = pong.metrics
        peer.registry = pong.registry
        peer.model_bytes = pong.model_bytes
        peer.needs_bytes = pong.needs_bytes
        peer.order = pong.order

    def on_goodbye(self, peer: Peer) -> None:
        """A worker takes no new work and may finish what it has; a client is gone."""
        if peer.is_worker:
            peer.state = PeerState.DRAINING
        else:
            self.peers.pop(peer.identity, None)

    def on_messages_lost(self, peer: Peer, at_ms: int) -> list[Command]:
        """Something that was sent never arrived: a fresh session tells what there still is, and counts slots anew."""
        for key in peer.calls:
            self.calls[key].mislaid = True
        return self._remove(peer, "messages were lost", at_ms, blame=False)

    def on_unreachable(self, identity: bytes, at_ms: int, why: str = "disconnected") -> list[Command]:
        """The connection is gone, or cannot be used any more."""
        peer = self.peers.get(identity)
        if peer is None:
            return []
        return self._remove(peer, why, at_ms, blame=peer.state is not PeerState.DRAINING)

    def on_tick(self, at_ms: int) -> list[Command]:
        """Time: pings, silent peers, deadlines, calls whose hold is over."""
        commands: list[Command] = []
        if at_ms - self._pinged_ms >= PING_MS:
            self._pinged_ms = at_ms
            for peer in list(self.peers.values()):
                if not peer.is_worker:
                    if self.admission.waits(peer.identity):
                        commands.append(SendPing(peer.identity))  # a killed client is found by what cannot be sent
                    continue
                if at_ms - peer.heard_ms >= DEAD_MS:
                    commands.extend(
                        self._remove(peer, f"silent for {at_ms - peer.heard_ms} ms", at_ms, blame=True, silent=True)
                    )
                else:
                    commands.append(SendPing(peer.identity))
        for call in self._deadlines.passed(at_ms):
            commands.extend(self._expire(call))
        self.circuits.on_tick(at_ms)
        self.lines.touch(self.lines.queues)  # holds may be over, and pauses of circuits
        return commands

    def next_due_ms(self) -> int | None:
        """When a tick will find something to do, pings apart: a deadline, or the end of a hold; None = never."""
        due = [at_ms for at_ms in (self.lines.next_release_ms(), self._deadlines.next_ms()) if at_ms is not None]
        return min(due, default=None)

    def slots(self, target: str) -> int:
        """Calls for this capability that its peers, busy or not, can work on at the same time."""
        return sum(max(0, peer.granted - peer.used) + len(peer.calls) for peer in self._having(target))

    def why_unserved(self, target: str, after_ms: int, at_ms: int) -> str | None:
        """Why nobody works on calls for this capability now and for a while; None if somebody does, or soon may."""
        reason = self.circuits.reason(target)
        if reason is not None:
            return reason
        since_ms = self.unserved.since(target)
        if since_ms is None or at_ms - since_ms < after_ms:
            return None
        return f"no worker of {target} has been ready for {(at_ms - since_ms) / 1000:.1f} s"

    def serves(self, target: str, at_ms: int) -> bool:
        """Whether a worker of this capability is there, be its slots taken or not, and its circuit is closed."""
        ready = (peer.state is PeerState.READY and peer.is_heard(at_ms) for peer in self._having(target))
        return any(ready) and self.circuits.reason(target) is None

    # Calls

    def ask(self, call: Call) -> list[Command]:
        """Queue a call. The same key again attaches the new request to the call that is there, in place of the old."""
        known = self.calls.get(call.key)
        if known is not None:
            before = replace(known)
            self._unbook(known)
            known.requester, known.corr = call.requester, call.corr
            self._book(known)
            again = (before.requester, before.corr) == (known.requester, known.corr)
            return [] if again or before.requester not in self.peers else [Replaced(before)]
        self.calls[call.key] = call
        self._book(call)
        if call.parent is not None:
            self._children.setdefault(call.parent, set()).add(call.key)
        call.deadline_ms = call.outer_ms
        self._deadlines.watch(call)
        self.lines.push(call, self.weight_of(call.client))
        return []

    def objection(self, call: Call) -> str | None:
        """Why this call of another peer may not wait here; None if it may. A call that is there already may."""
        if call.key in self.calls or call.requester is None:
            return None
        if self.lines.is_full(call.target, MAX_QUEUED):
            return f"{call.target} has {MAX_QUEUED} calls waiting"
        return self.admission.objection(call.requester, len(call.body or b""))

    def cancel(self, key: str) -> list[Command]:
        """End a call without an answer, and the calls made during it. Its worker is told; its slot stays counted."""
        call = self.calls.pop(key, None)
        if call is None:
            return []
        self._remember(key)
        self._release(call)
        self._leave(call)
        self.circuits.withdrawn(call.target, key)
        commands: list[Command] = []
        if call.worker is not None and call.worker in self.peers:
            self.peers[call.worker].calls.discard(key)
            commands.append(CancelAt(call, call.worker))
        commands.extend(self._forget(call))
        return commands

    def cancel_for(self, identity: bytes) -> list[Command]:
        """Cancel every call that this peer waits for: it is gone."""
        commands: list[Command] = []
        for key in [call.key for call in self.calls.values() if call.requester == identity]:
            commands.extend(self.cancel(key))
        return commands

    def on_ending(self, peer: Peer, header: Header, body: bytes) -> list[Command]:
        """A worker's final or error. Anything but the first one from the worker that has it is a duplicate."""
        call = self.calls.get(header.key or "")
        if call is None or call.worker != peer.identity or not _ends(header.kind, call.kind):
            if self.has_ended(header.key):
                self.counters["duplicates"] += 1
            return []
        self.admission.drained(call.target, peer.heard_ms)
        fault = fault_of(header.kind, body)
        if fault is None:
            self.circuits.ended(call.target, call.key, peer.heard_ms)
        else:
            self.circuits.failed(call.target, call.key, f"{peer.service}: {fault}", peer.heard_ms)
        return list(self._end(call, header.kind, body, peer.service))

    def has_ended(self, key: str | None) -> bool:
        """True if a call with this key has ended lately: another ending for it is a duplicate."""
        return key in self._ended and key not in self.calls

    def forget_silent_clients(self, at_ms: int, keep: set[bytes]) -> None:
        """Drop sessions of clients that want nothing and have been silent; they say HELLO again when they come back."""
        waiting = {call.requester for call in self.calls.values()} | keep
        for peer in list(self.peers.values()):
            if not peer.is_worker and at_ms - peer.heard_ms >= CLIENT_KEPT_MS and peer.identity not in waiting:
                del self.peers[peer.identity]

    def running(self, peer: Peer, key: str | None) -> Call | None:
        """The call behind a partial, if this peer has it."""
        call = self.calls.get(key or "")
        return call if call is not None and call.worker == peer.identity else None

    def next_start(self, at_ms: int) -> Command | None:
        """The next call to hand out: first in its queue, to the peer with most free slots; None when nothing can go.

        One at a time, so that what follows from a start or a loss is known before the next choice. A call whose
        deadline has passed is not handed out: the next commands are its end.
        """
        if self._overdue:
            return self._overdue.popleft()
        dirty = self.lines.dirty
        while dirty or self._let_in():
            target = next(iter(dirty))
            start = self._start_one(target, at_ms)
            if start is not None:
                return start
            if self._overdue:
                return self._overdue.popleft()
            del dirty[target]
        return None

    def _let_in(self) -> bool:
        """True if somebody who found a door of the tokens closed may try again."""
        self.lines.touch(self.tokens.let_in())
        return bool(self.lines.dirty)

    def _start_one(self, target: str, at_ms: int) -> Start | None:
        lines = self.lines
        queue = lines.queues.get(target)
        if queue is None or target in self.closed:
            return None
        queue.release(at_ms)
        while (key := queue.first()) is not None:
            if not lines.holds(key):
                queue.drop()
                continue
            due_ms = self.calls[key].deadline_ms
            if due_ms is not None and due_ms <= at_ms:
                self._overdue.extend(self._expire(self.calls[key]))
                return None
            peer = self._freest(target, at_ms)
            self._note_served(target, peer, at_ms)
            if peer is None:
                self.tokens.unblock(target)  # it waits for a slot, not for tokens
                return None
            if not self.circuits.admits(target, at_ms):
                self.tokens.unblock(target)
                return None
            if not self.tokens.take(key, target, self.calls[key].needs, at_ms, self._waiting_parent(key)):
                return None
            queue.take()
            if queue.is_empty:
                del lines.dirty[target]
                self.unserved.forget(target)
                lines.tidy(target)
            return self._start(self.calls[key], peer, at_ms)
        self.tokens.unblock(target)
        self.unserved.forget(target)
        lines.tidy(target)
        return None

    def _waiting_parent(self, key: str) -> str | None:
        """The call during which this one was made, if it was made by the worker that has it."""
        call = self.calls[key]
        parent = self.calls.get(call.parent or "")
        return None if parent is None or parent.worker is None or parent.worker != call.requester else parent.key

    def refuse_waiting(self, target: str, failure: Failure, at_ms: int, after_ms: int = 0) -> list[Command]:
        """End every call that has waited so long for this capability with a failure; those that are held back stay."""
        body = pack_body(ErrorReply(failure=failure))
        commands: list[Command] = []
        for call in self.lines.waiting(target):
            gone = call.key not in self.calls  # with its parent
            if not gone and max(call.queued_ms, call.hold_until_ms) <= at_ms - after_ms:
                commands.extend(self._end(call, "error", body, "scheduler"))
        return commands

    def _release(self, call: Call) -> None:
        """A call that ran is over at its worker, as far as we know: its tokens are free."""
        if self.tokens.give_back(call.key):
            self.lines.touch(self.tokens.blocked())

    def check_invariants(self) -> None:
        """Raise AssertionError if the state contradicts itself; called by tests after every event."""
        self.tokens.check_invariants()
        asked = [call for call in self.calls.values() if call.requester is not None]
        if self.admission.held() != (len(asked), sum(len(call.body or b"") for call in asked)):
            raise AssertionError("what requesters have here is not what is booked for them")
        for peer in self.peers.values():
            for key in peer.calls:
                if key not in self.calls or self.calls[key].worker != peer.identity:
                    raise AssertionError(f"{peer.service} is booked for {key}, which it does not have")
            if peer.used < 0:
                raise AssertionError(f"{peer.service} has negative use")
        self.lines.check_invariants()
        for key, call in self.calls.items():
            if call.worker is not None and (call.worker not in self.peers or key not in self.peers[call.worker].calls):
                raise AssertionError(f"call {key} runs at nobody")

    # Inside

    def _having(self, target: str) -> Iterator[Peer]:
        return (peer for peer in self.peers.values() if target in peer.capabilities)

    def _freest(self, target: str, at_ms: int) -> Peer | None:
        best: Peer | None = None
        most = 0
        for peer in self._having(target):
            free = peer.free(at_ms)
            if free > most or (best is not None and free == most and peer.identity < best.identity):
                best, most = peer, free
        return best

    def _note_served(self, target: str, free: Peer | None, at_ms: int) -> None:
        """Calls wait for this capability: is there a READY worker at all, be its slots taken or not?"""
        if free is None and not any(peer.state is PeerState.READY for peer in self._having(target)):
            self.unserved.begin(target, at_ms)
        else:
            self.unserved.end(target, at_ms)

    def _start(self, call: Call, peer: Peer, at_ms: int) -> Start:
        peer.used += 1
        peer.calls.add(call.key)
        call.worker = peer.identity
        call.begin(at_ms)
        self._deadlines.watch(call)
        self.circuits.started(call.target, call.key, at_ms)
        self.counters["started"] += 1
        return Start(call, peer, self.unserved.last(call.target, call.queued_ms))

    def _attach(self, call: Call, peer: Peer, at_ms: int) -> None:
        # No credit is spent: in its new epoch the peer did not grant the slots that running work holds. Tokens are
        # taken whether or not they are free: the work runs already, and the account shows it as soon as it can.
        self.tokens.book(call.key, call.needs)
        call.worker = peer.identity
        peer.calls.add(call.key)
        call.begin(at_ms, again=True)
        self._deadlines.watch(call)
        self.lines.discard(call.target)
        self.counters["reattached"] += 1

    def _end(self, call: Call, kind: str, body: bytes, worker: str) -> Iterator[Command]:
        del self.calls[call.key]
        self._remember(call.key)
        self._release(call)
        self._leave(call)
        if call.worker is not None and call.worker in self.peers:
            self.peers[call.worker].calls.discard(call.key)
        self.counters["ended"] += 1
        yield Ended(call, kind, body, worker)
        yield from self._forget(call)

    def _book(self, call: Call) -> None:
        if call.requester is not None:
            self.admission.took(call.requester, len(call.body or b""))

    def _unbook(self, call: Call) -> None:
        if call.requester is not None:
            self.admission.released(call.requester, len(call.body or b""))

    def _leave(self, call: Call) -> None:
        """A call is over: it counts no longer, and its entry in the queue, where it waited, is stale."""
        self._unbook(call)
        if call.worker is None:
            self.lines.discard(call.target)

    def _forget(self, call: Call) -> list[Command]:
        """Cancel what was asked during a call that is over, and leave its parent's list."""
        if call.parent in self._children:
            siblings = self._children[call.parent]
            siblings.discard(call.key)
            if not siblings:
                del self._children[call.parent]
        commands: list[Command] = []
        for child in sorted(self._children.pop(call.key, ())):
            commands.extend(self.cancel(child))
        return commands

    def _expire(self, call: Call) -> list[Command]:
        self.counters["expired"] += 1
        self.circuits.withdrawn(call.target, call.key)
        commands: list[Command] = []
        if call.worker is not None:
            commands.append(CancelAt(call, call.worker))
        where = "while it was worked on" if call.worker else "while it waited for a slot"
        failure = Failure(
            code="call.expired", category=Category.TIMEOUT, origin="scheduler", message=f"the deadline passed {where}"
        )
        commands.extend(self._end(call, "error", pack_body(ErrorReply(failure=failure)), "scheduler"))
        return commands

    def _remove(self, peer: Peer, why: str, at_ms: int, *, blame: bool, silent: bool = False) -> list[Command]:
        """End a session. Its calls are queued again or ended with PEER; `blame` says whether they count as killers."""
        self.peers.pop(peer.identity, None)
        for target in peer.capabilities:
            self.gone_ms.pop(target, None)
            self.gone_ms[target] = at_ms
        while len(self.gone_ms) > _KEPT_GONE:
            del self.gone_ms[next(iter(self.gone_ms))]
        commands: list[Command] = [PeerGone(peer, why, silent)]
        for key in sorted(peer.calls):
            call = self.calls[key]
            call.worker = None
            self._release(call)
            call.hold_until_ms = 0
            call.deadline_ms = call.outer_ms
            self.counters["lost"] += 1
            if blame:
                self.circuits.failed(call.target, key, f"{peer.service} is gone ({why})", at_ms)
            else:
                self.circuits.withdrawn(call.target, key)
            if call.retry_lost:
                self.lines.push(call, self.weight_of(call.client))
                if blame:
                    commands.append(Lost(call, peer.service))
                continue
            failure = Failure(
                code="peer.lost",
                category=Category.PEER,
                origin="scheduler",
                message=f"{peer.service} is gone ({why}) while it worked on this call; ask again",
            )
            commands.extend(self._end(call, "error", pack_body(ErrorReply(failure=failure)), peer.service))
        peer.calls.clear()
        return commands

    def _remember(self, key: str) -> None:
        self._ended[key] = None
        while len(self._ended) > _KEPT_ENDINGS:
            self._ended.popitem(last=False)


def _ends(kind: str, request: str) -> bool:
    return kind == "error" or kind == f"{family(request)}.final"
