"""The hub as one pure machine: frames, time and lookups in; messages, facts and notes out.

It joins the broker (peers and calls) with the engine (tasks), answers clients, and checks everything that comes
from a peer before it is used. The driver (`app.py`) owns socket, journal, clock and log; it must write the facts of
a batch before it sends the messages of that batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from msgspec.structs import replace

from protocol.codec import pack_body, unpack_body
from protocol.errors import BadFrame
from protocol.header import Header, unpack_header
from protocol.kinds import BODIES, CALL_REQUESTS, HUB_REQUESTS, UNKNOWN_PEER
from protocol.limits import MAX_BODY_BYTES, PROTOCOL_VERSION
from protocol.messages.failure import Category
from protocol.messages.infer import InferPartial
from protocol.messages.persona import PersonasOnTrial
from protocol.messages.plan import PlanPartial
from protocol.messages.registry import Reloaded
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Hello, Pong, Reject, StatusReport, Welcome
from services.kit.logs import LogEvent
from services.kit.registry import Registry
from services.scheduler import broker as b
from services.scheduler import calls as c
from services.scheduler import engine as e
from services.scheduler import facts as f
from services.scheduler.admission import DrainRate
from services.scheduler.batches import Batches, Tell
from services.scheduler.circuits import Circuits, policy_of
from services.scheduler.client_requests import ClientRequests
from services.scheduler.clients import client_reports
from services.scheduler.degraded import given_up
from services.scheduler.durations import Durations, LearnedDurations
from services.scheduler.effects import Ask, Drop, Record
from services.scheduler.events import (
    Command,
    Event,
    EventsRead,
    FrameIn,
    LookedUp,
    MemorySeen,
    OthersServed,
    PersonaWritten,
    RegistryChanged,
    RegistryRefused,
    ReloadUnsettled,
    Reported,
    Restored,
    Tick,
    Undeliverable,
)
from services.scheduler.keys import superseded
from services.scheduler.lateral import strandings
from services.scheduler.loading import Loading
from services.scheduler.outbox import Outbox
from services.scheduler.peer_calls import PeerCalls
from services.scheduler.peers import PING_MS, Peer
from services.scheduler.personas import AdoptPersona, KeepPersona, Personas
from services.scheduler.planning import PLANNER
from services.scheduler.ranks import Ranking
from services.scheduler.reloading import Registries, kept_names, refusal, removed, used_by
from services.scheduler.residency import TRUST_MS
from services.scheduler.resources import Tokens
from services.scheduler.showing import Showing
from services.scheduler.tasks import TaskRecord
from services.scheduler.waiting import reasons
from services.scheduler.watchers import Watchers

MAX_SESSIONS: Final = 1_000
"""Of clients, and as many of workers, so that neither can shut the others out."""
_KEPT_WEIGHTS: Final = 1_024
_TICKS_BETWEEN_CLEANUPS_MS: Final = 5_000

PEER_JOINED = LogEvent("peer.joined", "peer epoch capabilities in_flight reattached dropped resend")
PEER_GONE = LogEvent("peer.gone", "peer epoch reason")
FRAME_REFUSED = LogEvent("frame.refused", "peer code reason", "warning")
CIRCUIT_OPENED = LogEvent("circuit.opened", "capability reason", "warning")
CIRCUIT_CLOSED = LogEvent("circuit.closed", "capability")
REGISTRY_TAKEN = LogEvent("registry.taken", "digest previous draining kept")
REGISTRY_REFUSED = LogEvent("registry.refused", "problems reason", "warning")
REGISTRY_LET_GO = LogEvent("registry.let_go", "kept")
PERSONA_ADOPTED = LogEvent("persona.adopted", "persona problem taken")
RESULT_DUPLICATE = LogEvent("result.duplicate", "peer key task step", "warning")


@dataclass(slots=True)
class Hub:
    """State of the hub. `handle` is the only door."""

    epoch: str
    registry: Registry
    pid: int = 0
    started_ms: int = 0
    durations: Durations = field(default_factory=LearnedDurations)
    broker: b.Broker = field(init=False)
    engine: e.Engine = field(init=False)
    registries: Registries = field(init=False)
    """`registry` is the one in force; new tasks are held to the declared one."""
    loading: Loading = field(init=False)
    batches: Batches = field(init=False)
    outbox: Outbox = field(init=False)
    showing: Showing = field(init=False)
    watchers: Watchers = field(init=False)
    requests: ClientRequests = field(init=False)
    peer_calls: PeerCalls = field(init=False)
    _at_ms: int = 0
    """When the newest event happened."""
    _drain: DrainRate = field(default_factory=DrainRate)
    """How fast tasks end: behind `retry_after_ms`."""
    _cleaned_ms: int = 0

    def __post_init__(self) -> None:
        """The engine shares the registry and what is known of durations."""
        self.outbox = Outbox(self.epoch)
        self.registries = Registries(self.registry, self.registry)
        self.broker = b.Broker(Tokens(self.registry.hardware.cores), self._weights())
        self.broker.circuits = Circuits(policy_of(self.registry.failures.caps))
        ranking = Ranking(self.registry, self.durations, lambda model: self.broker.slots(f"infer.{model}"))
        self.engine = e.Engine(self.registry, ranking, Personas(lambda: self.registries.declared))
        self.showing = Showing(
            self.outbox, lambda task, at_ms: reasons(self.broker, self.loading, task, self.started_ms, at_ms)
        )
        self.watchers = Watchers(self.outbox, self.showing, self.engine.watched, self.engine.find)
        self.loading = Loading(self.registry, self.broker, ranking, self.engine.live, self.outbox.unpromised)
        self.loading.declare(self.registry)
        self.loading.residency.trust_ms = self.started_ms + TRUST_MS
        self.batches = Batches(lambda: self.registries.declared, self.broker.slots)
        self.requests = ClientRequests(
            self.outbox,
            self.showing,
            self.watchers,
            self.broker,
            self.engine,
            self.loading,
            self.batches,
            self.registries,
            self._drain,
            lambda at_ms: self._settle([], at_ms),
        )
        self.peer_calls = PeerCalls(self.outbox, self.broker, self.loading, self.registries, self._settle)

    def handle(self, happened: Event) -> list[Command]:
        """Take one event; return what to do, in order."""
        if not isinstance(happened, EventsRead):
            self._at_ms = happened.at_ms
        match happened:
            case FrameIn(identity, frames, at_ms):
                self._on_frame(identity, frames, at_ms)
            case LookedUp(identity, header, body, task, at_ms):
                self.requests.on_looked_up(identity, header, body, task, at_ms)
            case Tick(at_ms):
                self._on_tick(at_ms)
            case MemorySeen(available_bytes, at_ms):
                self.loading.machine_memory(available_bytes)
                self._settle([], at_ms)
            case EventsRead(identity, header, query, facts):
                self.watchers.read(identity, header, query, facts)
            case Undeliverable(identity, at_ms, full):
                if not full:
                    self.outbox.unread.gone(identity)
                self._settle(self.broker.on_unreachable(identity, at_ms), at_ms)
            case Restored(task, at_ms, past):
                if task.id not in self.engine.live or not task.state.final:
                    self._on_restored(task, past, at_ms)
            case RegistryChanged():
                self._on_registry_changed(happened)
            case RegistryRefused():
                self._on_registry_refused(happened)
            case PersonaWritten():
                self._on_persona_written(happened)
            case Reported(identity, header, kind, body):
                self.outbox.push_packed(identity, header, kind, body)
            case OthersServed():
                self.showing.on_served(happened)
        if self.engine.personas.changed:
            self._on_personas_changed()
        while self.outbox.deaf:
            gone = self.broker.on_unreachable(self.outbox.deaf.pop(), self._at_ms, "does not read")
            self._settle(gone, self._at_ms)
        for identity in self.outbox.unread.take_due():
            self.outbox.ping(identity, self._at_ms, mark=True)
        return self.outbox.take()

    def status(self, task_counts: dict[str, int], at_ms: int) -> StatusReport:
        """The report of `session.status`."""
        return StatusReport(
            hub_epoch=self.epoch,
            hub_pid=self.pid,
            uptime_ms=max(0, at_ms - self.started_ms),
            peers=[peer.report(at_ms) for peer in self.broker.peers.values() if peer.is_worker],
            queued=self.broker.lines.lengths(),
            tasks=task_counts,
            counters=self.broker.counters | self.loading.residency.counters,
            models=self.loading.reports(at_ms),
            memory=self.loading.budget(),
            registry=self.registries.declared.digest,
            clients=client_reports(self.broker, self.engine.occupancy.active),
            circuits=self.broker.circuits.open() or None,
        )

    def restore_personas(self, rows: Iterable[bytes]) -> None:
        """Take up those that were made at run time, before any task."""
        self.engine.personas.restore(rows)
        self.engine.personas.on_registry(self.started_ms, reloaded=False)
        self._on_personas_changed()

    def lacks(self, task: TaskRecord) -> dict[str, set[str]]:
        """What an unfinished task uses and the registry in force has not, by section."""
        return used_by([task]).missing(self.registry)

    # Frames

    def _on_frame(self, identity: bytes, frames: list[bytes], at_ms: int) -> None:
        header: Header | None = None
        try:
            if len(frames) != 2:
                raise BadFrame("frame.count", f"{len(frames)} frames after the identity, expected header and body")
            header = unpack_header(frames[0])
            if len(frames[1]) > MAX_BODY_BYTES:
                raise BadFrame("body.too_large", f"body of {len(frames[1])} bytes, at most {MAX_BODY_BYTES} are read")
            if header.kind not in BODIES:
                raise BadFrame("kind.unknown", f"there is no kind {header.kind!r} in protocol version {header.v}")
            self._on_message(identity, header, frames[1], at_ms)
        except BadFrame as err:
            peer = self.broker.peers.get(identity)
            name = peer.service if peer else identity.hex()
            self.outbox.note(FRAME_REFUSED, peer=name, code=err.code, reason=str(err)[:500])
            self.outbox.error(identity, header, err.code, Category.POLICY, str(err), err.evidence)

    def _on_message(self, identity: bytes, header: Header, body: bytes, at_ms: int) -> None:
        if header.kind == "session.hello":
            self._on_hello(identity, header, unpack_body(Hello, body), at_ms)
            return
        peer = self.broker.peers.get(identity)
        if peer is None and header.kind == "session.pong":
            self.outbox.unread.on_pong(identity, header.corr)  # of a client whose session was forgotten meanwhile
            return
        if peer is None:
            self.outbox.error(
                identity, header, UNKNOWN_PEER, Category.PEER, "say session.hello first: this hub has not met you"
            )
            return
        if header.epoch is not None and header.epoch != peer.epoch:
            raise BadFrame("header.epoch", f"epoch {header.epoch} is over, this session is {peer.epoch}")
        if header.seq is not None and peer.is_repeat(header.seq):
            return  # it was handled the first time
        self.broker.on_heard(peer, header.credit, at_ms)
        self._route(peer, header, body, at_ms)

    def _route(self, peer: Peer, header: Header, body: bytes, at_ms: int) -> None:
        kind = header.kind
        if kind == "session.pong":
            pong = unpack_body(Pong, body)
            self.outbox.unread.on_pong(peer.identity, header.corr)
            if header.seq is None or header.seq == peer.last_seq:  # else a later message has overtaken it
                self.broker.on_pong(peer, pong)
                self.loading.ponged(peer, at_ms)
            lost: list[c.Command] = []
            if peer.has_lost_messages(header.corr, pong.in_flight):
                lost = self.broker.on_messages_lost(peer, at_ms)
                self.outbox.error(
                    peer.identity, None, UNKNOWN_PEER, Category.PEER, "messages were lost: say hello again"
                )
            self._settle(lost, at_ms)
        elif kind == "session.goodbye":
            if not peer.is_worker:
                self._settle([c.PeerGone(peer, "said goodbye")], at_ms)
            self.broker.on_goodbye(peer)
        elif kind in HUB_REQUESTS:
            self.requests.on_request(peer.identity, header, body, at_ms)
        elif kind in CALL_REQUESTS:
            self.peer_calls.on_request(peer, header, body, at_ms)
        elif kind == "batch.cancel":
            self.batches.cancel(header.key, peer.identity, header.corr)
            self._settle([], at_ms)
        elif kind.endswith(".cancel"):
            self.peer_calls.on_cancel(peer, header, at_ms)
        elif kind.endswith(".partial"):
            self._on_partial(peer, header, body, at_ms)
        elif kind == "error" or kind.endswith(".final"):
            if self.broker.has_ended(header.key):
                self.outbox.note(
                    RESULT_DUPLICATE, peer=peer.service, key=header.key, task=header.task, step=header.step
                )
                self.engine.on_duplicate(header.task or "", header.step, header.key or "", peer.service, at_ms)
            self._settle(self.broker.on_ending(peer, header, body), at_ms)
        else:
            raise BadFrame("kind.direction", f"{kind} is for peers, not for the hub")

    def _on_hello(self, identity: bytes, header: Header, hello: Hello, at_ms: int) -> None:
        if not hello.protocol_min <= PROTOCOL_VERSION <= hello.protocol_max:
            offered = f"{hello.protocol_min}-{hello.protocol_max}"
            reject = Reject(code="version", message=f"this hub speaks {PROTOCOL_VERSION}, you offer {offered}")
            self.outbox.answer(identity, header, "session.reject", reject)
            return
        if identity not in self.broker.peers:
            alike = sum(1 for one in self.broker.peers.values() if one.is_worker is bool(hello.capabilities))
            if alike >= MAX_SESSIONS:
                reject = Reject(code="full", message=f"{MAX_SESSIONS} sessions of this kind are open; try again later")
                self.outbox.answer(identity, header, "session.reject", reject)
                return
        epoch = header.epoch or identity.hex()
        known = self.broker.peers.get(identity)
        if known is not None and known.epoch == epoch and header.seq is not None and known.is_repeat(header.seq):
            return  # starting this session anew would take its running work from it
        welcoming, commands = self.broker.on_hello(identity, hello, epoch, header.credit or 0, at_ms)
        if header.seq is not None:
            self.broker.peers[identity].is_repeat(header.seq)
        self.loading.joined(self.broker.peers[identity], at_ms)
        welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            hub_epoch=self.epoch,
            ping_ms=PING_MS,
            drop=welcoming.drop,
            resend=welcoming.resend,
            registry=self.registries.declared.digest,
        )
        self.outbox.add(replace(self.outbox.reply(identity, header, "session.welcome", welcome), promises=False))
        self.outbox.note(
            PEER_JOINED,
            peer=hello.service,
            epoch=epoch,
            capabilities=hello.capabilities,
            in_flight=len(hello.in_flight),
            reattached=sum(1 for command in commands if isinstance(command, c.Attached)),
            dropped=len(welcoming.drop),
            resend=len(welcoming.resend),
        )
        if PLANNER in hello.capabilities:
            self._tell_trials(identity)
        self._settle(commands, at_ms)

    def _on_partial(self, peer: Peer, header: Header, body: bytes, at_ms: int) -> None:
        call = self.broker.running(peer, header.key)
        if call is None:
            return  # its call has ended or was cancelled
        if call.requester is not None:
            self.outbox.forward(call, header.kind, body)
            return
        if call.kind == "plan.request":
            self.engine.on_plan_partial(call, unpack_body(PlanPartial, body), at_ms)
            self._settle([], at_ms)
            return
        task = self.engine.live.get(call.task or "")
        if task is not None and self.watchers.sees_tokens(task.id):
            self.watchers.tell_tokens(task, call, unpack_body(InferPartial, body), at_ms)

    # The registry

    def _on_registry_changed(self, event: RegistryChanged) -> None:
        told = self._take_up(event.registry, event.at_ms)
        self.outbox.answer(event.identity, event.header, "registry.reloaded", told)
        self._tell_services(event.at_ms)
        self._settle([], event.at_ms)

    def _take_up(self, registry: Registry, at_ms: int) -> Reloaded:
        told = self.registries.take_up(registry, self.engine.live.values(), self.batches.models())
        self._use(self.registries.in_force)
        self.outbox.note(
            REGISTRY_TAKEN, digest=told.digest, previous=told.previous, draining=told.draining, kept=told.kept
        )
        self.engine.personas.on_registry(at_ms, reloaded=True)
        return told

    def _on_persona_written(self, event: PersonaWritten) -> None:
        """A persona on trial stands in the files, or could not be written there."""
        if event.registry is not None:
            self._take_up(event.registry, event.at_ms)
            self._tell_services(event.at_ms)
        taken = event.registry is not None
        self.engine.personas.on_written(event.name, event.problem, event.at_ms, taken=taken)
        self.outbox.note(PERSONA_ADOPTED, persona=event.name, problem=event.problem, taken=taken)
        self._settle([], event.at_ms)

    def _on_personas_changed(self) -> None:
        """Other personas are on trial: they are known to plans and steps from now on, and to all planners."""
        self.engine.personas.changed = False
        trials = self.engine.personas.on_trial()
        self.registries.try_out(trials)
        self.registry = self.engine.registry = self.registries.in_force
        for peer in self.broker.peers.values():
            if PLANNER in peer.capabilities:
                self._tell_trials(peer.identity)

    def _tell_trials(self, planner: bytes) -> None:
        told = PersonasOnTrial(personas=self.engine.personas.on_trial())
        self.outbox.add(self.outbox.unpromised(planner, "persona.trials", told))

    def _on_registry_refused(self, event: RegistryRefused) -> None:
        self.outbox.note(REGISTRY_REFUSED, problems=len(event.problems), reason=event.reason)
        failure = refusal(event.reason, event.problems)
        self.outbox.answer(event.identity, event.header, "error", ErrorReply(failure=failure))

    def _on_restored(self, task: TaskRecord, past: Registry | None, at_ms: int) -> None:
        if past is not None:
            self.registries.bring_back(past, [task])
            self._use(self.registries.in_force)
        self.engine.forget_ended(task.id)
        lacking = self.lacks(task)
        if lacking.keys() & {"roles", "models"}:
            self.engine.give_up(task, removed(lacking), at_ms)
        else:
            self.engine.restore(task, at_ms)
        self._settle([], at_ms)

    def _weights(self) -> Callable[[str], float]:
        """The registry's weights, found once for each client."""
        return lru_cache(_KEPT_WEIGHTS)(self.registry.weight_of)

    def _use(self, registry: Registry) -> None:
        self.registry = registry
        self.broker.weight_of = self._weights()
        self.broker.tokens.resize(registry.hardware.cores)
        self.broker.circuits.policy = policy_of(registry.failures.caps)
        self.engine.take_up(registry)
        self.loading.declare(registry)

    def _tell_services(self, at_ms: int) -> None:
        workers = [peer for peer in self.broker.peers.values() if peer.is_worker]
        for peer, told in self.registries.lagging(workers, at_ms):
            self.outbox.add(self.outbox.unpromised(peer.identity, "registry.changed", told))

    # Time

    def _on_tick(self, at_ms: int) -> None:
        self.engine.on_tick(at_ms)
        self.loading.passed()
        self.engine.personas.on_tick(at_ms)
        self._settle(self.broker.on_tick(at_ms), at_ms)
        self.batches.on_tick(at_ms)
        self._settle(self.loading.strangers(at_ms), at_ms)
        for call, reason in strandings(self.broker, self.registry, at_ms):
            if self.batches.owns(call.key):
                self.batches.move(call, lambda model: self.broker.serves(f"infer.{model}", at_ms), at_ms)
            else:
                self.engine.move(call, reason, lambda model: self.broker.serves(f"infer.{model}", at_ms), at_ms)
        self._settle([], at_ms)
        self._settle(given_up(self.broker, self.registry.failures.caps.degraded_wait_ms, at_ms), at_ms)
        for target, why in self.broker.circuits.take():
            if why is None:
                self.outbox.note(CIRCUIT_CLOSED, capability=target)
            else:
                self.outbox.note(CIRCUIT_OPENED, capability=target, reason=why)
        if self.registries.let_go(self.engine.live.values(), at_ms, self.batches.models()):
            self._use(self.registries.in_force)
            self.outbox.note(REGISTRY_LET_GO, kept=kept_names(self.registries.declared, self.registry))
        self._tell_services(at_ms)
        if at_ms - self._cleaned_ms >= _TICKS_BETWEEN_CLEANUPS_MS:
            self._cleaned_ms = at_ms
            self.broker.forget_silent_clients(at_ms, self.watchers.identities() | self.batches.requesters())
            self.outbox.unread.want_marks(self.broker.peers)
        if self.engine.settling.deferred and self.engine.occupancy.has_room:
            self.engine.settling.deferred = False  # unless not all come back
            self.outbox.add(ReloadUnsettled())

    # Joining broker and engine

    def _settle(self, commands: Iterable[c.Command], at_ms: int) -> None:
        """Carry out the broker's commands and the engine's effects until neither has any, then hand out calls."""
        todo = deque(commands)
        looked = False
        while True:
            for effect in (*self.engine.take(), *self.batches.take(), *self.engine.personas.take()):
                match effect:
                    case Record():
                        self._record(effect)
                    case Ask(call):
                        todo.extend(self.broker.ask(call))
                    case Drop(key):
                        todo.extend(self.broker.cancel(key))
                    case Tell(identity, request, kind, body):
                        self.outbox.answer(identity, request, kind, body)
                    case KeepPersona() | AdoptPersona():
                        self.outbox.add(effect)
            if todo:
                self._carry_out(todo.popleft(), at_ms)
            elif (start := self.broker.next_start(at_ms)) is not None:
                self._carry_out(start, at_ms)
            elif not looked and self.loading.has_guests and self.loading.wants_a_look():
                said, refused = self.loading.look(at_ms)
                self.outbox.extend(said)
                todo.extend(refused)
                looked = not refused
            else:
                return

    def next_due_ms(self) -> int | None:
        """When a tick will find something to do, pings apart; None = never."""
        due = [at_ms for at_ms in (self.broker.next_due_ms(), self.loading.next_due_ms()) if at_ms is not None]
        return min(due, default=None)

    def _carry_out(self, command: c.Command, at_ms: int) -> None:
        match command:
            case c.Start(call, peer, unserved_ms):
                self._start(call, peer, unserved_ms, at_ms)
            case c.Ended(call, kind, body, worker):
                self.loading.ended(call.target)
                if call.requester is None:
                    self._owner(call).on_ended(call, kind, body, worker, at_ms)
                else:
                    self.outbox.forward(call, kind, body)
            case c.Replaced(call):
                self.outbox.forward(call, "error", pack_body(superseded(call.key)))
            case c.Lost(call, worker):
                if call.requester is None:
                    self._owner(call).on_lost(call, worker, at_ms)
            case c.Attached(call, worker):
                if call.requester is None:
                    self._owner(call).on_started(call, worker, at_ms, reattached=True)
            case c.CancelAt(call, identity):
                self.loading.ended(call.target)
                self.outbox.cancel(identity, call)
            case c.SendPing(identity):
                ping = self.outbox.ping(identity, at_ms)
                pinged = self.broker.peers.get(identity)
                if pinged is not None and pinged.is_worker:  # what a client has in flight is its own business
                    pinged.pinged(ping)
            case c.PeerGone(peer, why, silent):
                self.loading.gone(peer, at_ms, silent=silent)
                self.outbox.note(PEER_GONE, peer=peer.service, epoch=peer.epoch, reason=why)
                if not peer.is_worker:
                    self._forget_client(peer.identity, at_ms)

    def _owner(self, call: c.Call) -> e.Engine | Batches | Personas:
        """Who asked for one of the hub's own calls: what is done for a task, the engine has asked for."""
        if call.task is not None:
            return self.engine
        if self.engine.personas.owns(call.key):
            return self.engine.personas
        return self.batches if self.batches.owns(call.key) else self.engine

    def _start(self, call: c.Call, peer: Peer, unserved_ms: tuple[int, int] | None, at_ms: int) -> None:
        body = call.body if call.body is not None else self._owner(call).body_of(call, at_ms)
        if call.requester is None:
            self._owner(call).on_started(call, peer.service, at_ms, unserved_ms=unserved_ms)
        for effect in self.engine.take():
            if isinstance(effect, Record):
                self._record(effect)
        self.outbox.work(peer.identity, call, body, cores=self.broker.tokens.held(call.key))

    def _record(self, record: Record) -> None:
        """Have a fact written, and tell whoever follows its task."""
        self.outbox.add(record)
        self.watchers.tell(record.fact, record.seq)
        if isinstance(record.fact, f.TaskEnded):
            self._drain.ended(record.fact.at_ms)

    def _forget_client(self, identity: bytes, at_ms: int) -> None:
        self.watchers.forget(identity)
        for command in self.broker.cancel_for(identity):
            self._carry_out(command, at_ms)
        self.batches.cancel_for(identity)
