"""Clock, network, hub, peers and journal of a simulated stack; nothing in it takes real time.

Heartbeats are messages, hub and peers tick ten times a second, frames are bytes that can be lost, repeated and
overtaken, and facts are packed into a journal from which a killed hub is booted again: tests of failures need all that.
Where nothing fails `calm.py` runs the same hub machine many times faster.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Final

from protocol.codec import pack_body, unpack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.kinds import BODIES
from protocol.messages.base import Message
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.session import Hello
from protocol.messages.task import Accepted, Submit, TaskIR
from services.kit import session as s
from services.kit.registry import Registry
from services.scheduler import events as ev
from services.scheduler import facts as f
from services.scheduler.durations import LearnedDurations
from services.scheduler.effects import Record
from services.scheduler.fold import fold
from services.scheduler.machine import Hub
from services.scheduler.past import Past
from services.scheduler.personas import AdoptPersona, KeepPersona
from services.scheduler.simulation.peers import Answer, SimPeer, SimulationError
from services.scheduler.tasks import TaskRecord

CLIENT: Final = b"client"
"""Socket identity of the one client, whose messages take no time."""
_TICK_MS: Final = 100
_START_MS: Final = 1_000_000
_KEPT_NOTES: Final = 20


class NotReachedError(SimulationError):
    """What was waited for did not happen within its virtual time."""


class RefusedError(SimulationError):
    """The hub did not accept a task; `retry_after_ms` is None where it never will."""

    def __init__(self, message: str, retry_after_ms: int | None) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class World:
    """See the module. `now` is in virtual ms; `delay_ms` is how long a message between hub and peer is under way."""

    def __init__(self, registry: Registry, *, delay_ms: int = 1) -> None:
        self.registry = registry
        self.past: Registry | None = None
        """An earlier registry that a restarted hub finds, for tasks that use what the present one has not."""
        self.delay_ms = delay_ms
        self.now = _START_MS
        self.identities: dict[bytes, SimPeer] = {}
        self.peers: dict[str, SimPeer] = {}
        self.journal: list[tuple[str, int, str, bytes]] = []
        """Task, sequence number, kind and packed fact."""
        self.personas: dict[str, bytes] = {}
        """Rows of personas made at run time."""
        self.adopting: list[AdoptPersona] = []
        """What would be written into the registry's files."""
        self.ended: dict[str, TaskRecord] = {}
        """Tasks that have ended, in that order."""
        self.client_inbox: list[tuple[Header, Message]] = []
        self.notes: list[str] = []
        """What the hub would have logged last."""
        self.hub: Hub | None = None
        self.page = 256
        """Facts that a late watcher is told at once."""
        self._order = itertools.count()
        self._heap: list[tuple[int, int, Callable[[], object]]] = []
        self.boot_hub()
        self._tick()

    # Running

    def later(self, delay_ms: int, action: Callable[[], object]) -> None:
        """Do this after so many ms, after everything else that was planned for that moment before."""
        heapq.heappush(self._heap, (self.now + delay_ms, next(self._order), action))

    def step(self) -> None:
        """Let the next thing happen."""
        at, _, action = heapq.heappop(self._heap)
        self.now = max(self.now, at)
        action()

    def run(self, until: Callable[[], bool], limit_ms: int = 120_000) -> None:
        """Run until this holds. Raises NotReachedError after `limit_ms` of virtual time."""
        end = self.now + limit_ms
        while not until():
            if self.now > end:
                raise NotReachedError(f"not reached within {limit_ms} ms of virtual time: {self.notes}")
            self.step()

    def run_for(self, duration_ms: int) -> None:
        """Run for so long."""
        end = self.now + duration_ms
        while self._heap[0][0] <= end:
            self.step()
        self.now = end

    def _tick(self) -> None:
        self.feed(ev.Tick(self.now))
        for peer in list(self.peers.values()):
            if peer.alive and not peer.frozen:
                peer.feed(s.Ticked(self.now))
        self.later(_TICK_MS, self._tick)

    # Hub

    def boot_hub(self) -> None:
        """Start a hub; tasks in the journal that are not settled are taken up where they stood."""
        self.hub = Hub(
            epoch=f"hub{next(self._order)}", registry=self.registry, started_ms=self.now, durations=LearnedDurations()
        )
        self.hub.restore_personas(self.personas.values())
        for task in self.recorded_tasks().values():
            if not (task.state.final and task.settled):
                self.feed(ev.Restored(task, self.now, self.past if self.hub.lacks(task) else None))

    def kill_hub(self) -> None:
        """End the hub; its peers notice by its silence."""
        self.hub = None

    def facts(self, task_id: str) -> list[f.Fact]:
        """The facts of a task in the journal, in order."""
        return [f.unpack_fact(kind, data) for task, _, kind, data in self.journal if task == task_id]

    def find(self, task_id: str) -> TaskRecord | Past | None:
        """What the journal knows of a task that the hub does not have in memory."""
        return self.recorded_tasks().get(task_id)

    def recorded_tasks(self) -> dict[str, TaskRecord]:
        """All tasks as the journal tells them."""
        history: dict[str, list[f.Fact]] = {}
        for task, _, kind, data in self.journal:
            history.setdefault(task, []).append(f.unpack_fact(kind, data))
        return {task: fold(facts) for task, facts in history.items()}

    def feed(self, event: ev.Event) -> None:
        """Give the hub an event and do what it says; without a hub it is lost."""
        if self.hub is None:
            return
        while self._handle(self.hub, event):
            event = ev.OthersServed(self.now)

    def _handle(self, hub: Hub, event: ev.Event) -> bool:
        """True if the hub has more to do."""
        reads: list[ev.ReadEvents] = []
        put_off = False
        for command in hub.handle(event):
            if isinstance(command, ev.ReadEvents):
                reads.append(command)  # after the facts of this very turn
            elif isinstance(command, ev.ServeOthers):
                put_off = True
            else:
                self._carry_out(command)
        for read in reads:
            after = read.query.after_seq
            facts = self.facts(read.query.task_id)[after:][: self.page]
            self.feed(ev.EventsRead(read.identity, read.header, read.query, list(enumerate(facts, after + 1))))
        return put_off

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case Record(fact, seq):
                self._record(fact, seq)
            case ev.Send(identity, header, body):
                self._deliver(identity, header, body)
            case ev.LookUp(task_id, identity, header, body):
                self.feed(ev.LookedUp(identity, header, body, self.find(task_id), self.now))
            case ev.ReloadUnsettled():
                self._restore_unsettled()
            case ev.Noted(event=told, fields=fields):
                self.notes.append(f"{self.now} {told.name} {fields}")
                del self.notes[:-_KEPT_NOTES]
            case KeepPersona(name, data):
                self.personas.pop(name, None) if data is None else self.personas.update({name: data})
            case AdoptPersona():
                self.adopting.append(command)
            case ev.ReadListing() | ev.ReadStatus() | ev.ReadEvents() | ev.ReadRegistry():
                raise SimulationError("listings and reports are the business of the process, not of its machine")

    def _restore_unsettled(self) -> None:
        for task in self.recorded_tasks().values():
            if self.hub is None or task.id in self.hub.engine.live or not task.state.final or task.settled:
                continue
            if not self.hub.engine.occupancy.has_room:
                self.hub.engine.settling.deferred = True
                return
            self.feed(ev.Restored(task, self.now))

    def _record(self, fact: f.Fact, seq: int) -> None:
        self.journal.append((fact.task, seq, type(fact).__name__, f.pack_fact(fact)))
        if isinstance(fact, f.TaskEnded) and self.hub is not None:
            task = self.hub.engine.find(fact.task)
            if task is not None:
                self.ended[fact.task] = task

    # Network

    def carry_to_hub(self, identity: bytes, frames: list[bytes]) -> None:
        """Move a message of a peer to the hub."""
        self.later(self.delay_ms, lambda: self.to_hub(identity, frames))

    def to_hub(self, identity: bytes, frames: list[bytes]) -> None:
        """A message arrives at the hub."""
        self.feed(ev.FrameIn(identity, frames, self.now))

    def carry_to_peer(self, identity: bytes, header: bytes, body: bytes) -> None:
        """Move a message of the hub to a peer."""
        self.later(self.delay_ms, lambda: self.to_peer(identity, header, body))

    def to_peer(self, identity: bytes, header: bytes, body: bytes) -> None:
        """A message arrives at a peer, if its connection still is there."""
        peer = self.identities.get(identity)
        if peer is not None:
            peer.receive(unpack_header(header), body)

    def _deliver(self, identity: bytes, header: bytes, body: bytes) -> None:
        if identity == CLIENT:
            unpacked = unpack_header(header)
            self.client_inbox.append((unpacked, unpack_body(BODIES[unpacked.kind], body)))
        elif identity in self.identities:
            self.carry_to_peer(identity, header, body)
        else:
            self.later(0, lambda: self.feed(ev.Undeliverable(identity, self.now)))

    # Processes and clients

    def add(
        self,
        service: str,
        capabilities: tuple[str, ...],
        answer: Callable[[Header, bytes], Answer],
        slots: int = 4,
        load_ms: int | None = None,
    ) -> SimPeer:
        """Start a process that answers calls for these capabilities; `load_ms` is how long its model takes to load."""
        peer = SimPeer(self, service, capabilities, slots, answer, load_ms)
        self.peers[service] = peer
        peer.start()
        return peer

    def client(self, kind: str, body: Message) -> tuple[Header, Message]:
        """One request of the client; returns its first answer. Raises SimulationError if there is none."""
        if self.hub is None or CLIENT not in self.hub.broker.peers:
            hello = Hello(service="client-simulated", protocol_min=1, protocol_max=1)
            self.to_hub(CLIENT, [pack_header(Header(kind="session.hello", id="h")), pack_body(hello)])
        ident = f"c{next(self._order)}"
        self.to_hub(CLIENT, [pack_header(Header(kind=kind, id=ident)), pack_body(body)])
        for header, answer in self.client_inbox:
            if header.corr == ident:
                return header, answer
        raise SimulationError(f"no answer to {kind}")

    def submit(self, task: TaskIR) -> str:
        """Submit a task; returns its id. Raises RefusedError."""
        self.client_inbox.clear()
        _, body = self.client("task.submit", Submit(task=task.model_dump(mode="json", exclude_none=True)))
        match body:
            case Accepted(task_id=task_id):
                return task_id
            case Refused(reason=reason, retry_after_ms=after_ms):
                raise RefusedError(f"not accepted: {reason}", after_ms)
            case ErrorReply(failure=failure):
                raise RefusedError(f"not accepted: {failure.message}", None)
            case _:
                raise SimulationError(f"a {type(body).__name__} in answer to a submit")
