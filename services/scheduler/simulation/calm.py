"""The calm pace of virtual time: the real hub machine, workers that never fail, and objects instead of bytes.

What is decided (admission, order, credit, tokens, attempts, failures, deadlines) is decided by the machine that
decides in production. Left out is what decides nothing: sockets and sessions (each worker says HELLO once and is never
silent), encoded frames, prompts, watchers, reports, the journal. Time jumps to whatever is due next, so how long the
virtual time is costs nothing. Processes that die and messages that are lost are the business of `world.py`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.codec import Unpacked
from protocol.header import Header
from protocol.kinds import family
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal
from protocol.messages.memory import MemoryFinal
from protocol.messages.plan import PlanFinal
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Hello, PeerState, Pong, Reside
from protocol.messages.task import TaskIR
from services.kit.plan_check import plan_problems
from services.kit.registry import Registry
from services.scheduler import calls as c
from services.scheduler import events as ev
from services.scheduler import facts as f
from services.scheduler.durations import Durations
from services.scheduler.effects import Record
from services.scheduler.machine import Hub
from services.scheduler.peers import PING_MS, Peer
from services.scheduler.ranks import Ranking
from services.scheduler.simulation.peers import SimulationError
from services.scheduler.simulation.tiers import Seconds, Tier, Wanted, all_pass, planned, smallest_final, wanted_of
from services.scheduler.simulation.world import NotReachedError, RefusedError
from services.scheduler.tasks import TaskRecord

CLIENT: Final = "client-simulated"
_START_MS: Final = 1_000_000
_CORE_SLOTS: Final = 64
"""Calls that planner, gates and memory take at once: they are not what is simulated."""
_STORED: Final = Unpacked(MemoryFinal(stored=1))

Answer = tuple[int, Unpacked]
"""How many ms the work takes, and the body of its final."""


class _CalmHub(Hub):
    """The hub machine with its hands tied to objects: calls that go out are kept as calls, not sent as frames."""

    def __init__(self, registry: Registry, durations: Durations) -> None:
        super().__init__(epoch="simulated", registry=registry, durations=durations)
        self.handed: list[c.Call] = []
        """Calls that have gone to their workers since the last look."""
        self.stopped: list[tuple[c.Call, bytes]] = []
        """Calls that their workers were told to stop, and these."""
        self.told: list[tuple[bytes, Reside]] = []
        """Workers that were told to load their model, or to unload it."""
        self.loading.message = self._tell_service

    def _carry_out(self, command: c.Command, at_ms: int) -> None:
        match command:
            case c.Start(call, peer, unserved_ms):
                self.engine.on_started(call, peer.service, at_ms, unserved_ms=unserved_ms)
                self.handed.append(call)
            case c.CancelAt(call, identity):
                self.stopped.append((call, identity))
            case _:
                super()._carry_out(command, at_ms)

    def _tell_service(self, identity: bytes, kind: str, body: Message) -> ev.Send:
        if isinstance(body, Reside):
            self.told.append((identity, body))
        return self.outbox.unpromised(identity, kind, body)

    def submitted(self, task: TaskIR, task_id: str, at_ms: int) -> None:
        """A client submits a task. Raises RefusedError."""
        problems = plan_problems(task, self.registry)
        if problems:
            raise RefusedError(f"not accepted: {'; '.join(str(one) for one in problems[:10])}", None)
        refused = self.requests.admit(task, task_id, CLIENT, 0, at_ms)
        if refused is not None:
            raise RefusedError(f"not accepted: {refused.reason}", refused.retry_after_ms)

    def joined(self, peer: Hello, identity: bytes, at_ms: int) -> None:
        """A worker says HELLO, with its slots as the first credit."""
        _, commands = self.broker.on_hello(identity, peer, f"{peer.service}-1", 0, at_ms)
        self.loading.joined(self.broker.peers[identity], at_ms)
        self._settle(commands, at_ms)

    def reported(self, peer: Peer, state: PeerState, order: int, at_ms: int) -> None:
        """A worker says what became of its model."""
        pong = Pong(state=state, in_flight=len(peer.calls), loop_lag_ms=0, rss_bytes=0, order=order)
        self.broker.on_pong(peer, pong)
        self.loading.ponged(peer, at_ms)
        self._settle([], at_ms)

    def answered(self, peer: Peer, call: c.Call, kind: str, body: bytes, at_ms: int) -> None:
        """The worker that has the call ends it, and its slot is free again."""
        self.broker.on_heard(peer, peer.granted + 1, at_ms)
        ending = Header(kind=kind, id="", key=call.key)
        self._settle(self.broker.on_ending(peer, ending, body), at_ms)

    def given_back(self, peer: Peer, at_ms: int) -> None:
        """A worker has stopped a call that nobody wants any more: its slot is free again."""
        self.broker.on_heard(peer, peer.granted + 1, at_ms)
        self._settle([], at_ms)

    def take(self) -> list[ev.Command]:
        """What the hub would have done to the outside since the last look."""
        return self.outbox.take()


@dataclass(frozen=True, slots=True)
class _Due:
    """Work that ends, if it is still the current one of its call by then."""

    call: c.Call
    worker: bytes
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model that is in memory then, if its worker has not been told otherwise by then."""

    worker: bytes
    order: int


class CalmWorld:
    """See the module. `now` is in virtual ms."""

    def __init__(self, registry: Registry, durations: Durations) -> None:
        self.registry = registry
        self.now = _START_MS
        self.ended: dict[str, TaskRecord] = {}
        """Tasks that have ended, in that order."""
        self._hub = _CalmHub(registry, durations)
        self._answers: dict[str, Callable[[c.Call], Answer]] = {}
        """Capability -> what its workers answer."""
        self._working: dict[str, _Due] = {}
        """Key -> the work that is under way for it."""
        self._heap: list[tuple[int, int, _Due | _Loaded | None]] = []
        """When, in which order, which work ends or model is loaded; None = a moment that only wants a tick."""
        self._load_ms: dict[bytes, int] = {}
        """How long the models of workers take to load that do not have them from the start."""
        self._order = itertools.count()
        self._beat_ms = self.now

    # Set-up

    @property
    def ranking(self) -> Ranking:
        """Ranks and estimates of the hub."""
        return self._hub.engine.ranking

    def add_core(self) -> None:
        """Start a planner that keeps the plan, gates that pass and a memory that takes, all at once."""
        self._answers |= {"planner": self._plan, "gate": self._check, "memory": lambda _: (0, _STORED)}
        for service, capability in (("planner", "planner"), ("gates", "gate"), ("memory", "memory")):
            self._join(service, capability, _CORE_SLOTS)

    def add_tiers(self, tiers: Sequence[Tier], seconds: Seconds) -> None:
        """Start the workers of these tiers; `seconds` says how long each step takes them."""
        finals: dict[tuple[bool, tuple[Wanted, ...]], Unpacked] = {}

        def infer(call: c.Call) -> Answer:
            task = self.task(call.task or "")
            step = task.steps[call.step or ""]
            wanted = wanted_of(task, step)
            final = finals.get((step.is_turn, wanted))
            if final is None:
                final = finals[step.is_turn, wanted] = Unpacked(smallest_final(wanted, turn=step.is_turn))
            return round(seconds(task, step) * 1000), final

        for tier in tiers:
            self._answers[f"infer.{tier.model}"] = infer
            for number in range(tier.workers):
                self._join(f"inference-{tier.model}-{number}", f"infer.{tier.model}", tier.slots, tier.load_s)

    def _join(self, service: str, capability: str, slots: int, load_s: float | None = None) -> None:
        state = PeerState.READY if load_s is None else PeerState.PARKED
        hello = Hello(service=service, protocol_min=1, protocol_max=1, capabilities=[capability], state=state, pid=1)
        identity = service.encode()
        if load_s is not None:
            self._load_ms[identity] = round(load_s * 1000)
        self._hub.joined(hello, identity, self.now)
        self._hub.broker.on_heard(self._hub.broker.peers[identity], slots, self.now)

    # Running

    def submit(self, task: TaskIR) -> str:
        """Submit a task; returns its id. Raises RefusedError."""
        task_id = f"t-{next(self._order)}"
        self._hub.submitted(task, task_id, self.now)
        if task.deadline_s is not None:
            heapq.heappush(self._heap, (self.now + int(task.deadline_s * 1000), next(self._order), None))
        self._go_on()
        return task_id

    def ended_beyond(self, count: int) -> Callable[[], bool]:
        """Condition for `run`: more than so many tasks have ended."""
        return lambda: len(self.ended) > count

    def run(self, until: Callable[[], bool]) -> None:
        """Run until this holds. Raises NotReachedError if it never will."""
        while not until():
            self._step()

    def task(self, task_id: str) -> TaskRecord:
        """A task as the hub knows it now. Raises SimulationError for one it does not have."""
        found = self.ended.get(task_id) or self._hub.engine.find(task_id)
        if found is None:
            raise SimulationError(f"the hub has no task {task_id!r}")
        return found

    def _step(self) -> None:
        """Let the next thing happen."""
        heap = self._heap
        if not heap or heap[0][0] > self.now:
            waits = self._hub.next_due_ms()
            if waits is not None and (not heap or waits <= heap[0][0]):
                self._jump(waits)
                self._tick()
                return
            if not heap:
                raise NotReachedError(f"nothing is left that could happen; {len(self._hub.engine.live)} tasks wait")
            self._jump(heap[0][0])
        _, _, due = heapq.heappop(heap)
        if due is None:
            self._tick()
        elif isinstance(due, _Loaded):
            peer = self._hub.broker.peers[due.worker]
            if peer.order == due.order:
                self._hub.reported(peer, PeerState.READY, due.order, self.now)
                self._go_on()
        elif self._working.get(due.call.key) is due:
            del self._working[due.call.key]
            self._hub.answered(self._hub.broker.peers[due.worker], due.call, due.kind, due.body, self.now)
            self._go_on()

    def _jump(self, to_ms: int) -> None:
        """Move the clock; every worker has been heard meanwhile."""
        self.now = max(self.now, to_ms)
        if self.now - self._beat_ms >= PING_MS:
            self._beat_ms = self.now
            for peer in self._hub.broker.peers.values():
                self._hub.broker.on_heard(peer, None, self.now)

    def _tick(self) -> None:
        for command in self._hub.handle(ev.Tick(self.now)):
            self._note(command)
        self._go_on()

    def _go_on(self) -> None:
        """See what the hub has done, and let its workers begin and stop, until nothing more follows."""
        hub = self._hub
        while True:
            for command in hub.take():
                self._note(command)
            if hub.handed:
                handed, hub.handed = hub.handed, []
                for call in handed:
                    self._begin(call)
            elif hub.stopped:
                call, worker = hub.stopped.pop()
                self._working.pop(call.key, None)
                hub.given_back(hub.broker.peers[worker], self.now)
            elif hub.told:
                self._reside(*hub.told.pop(0))
            else:
                return

    def _reside(self, worker: bytes, word: Reside) -> None:
        """A worker is told to load its model, or to unload it."""
        peer = self._hub.broker.peers[worker]
        self._hub.reported(peer, PeerState.LOADING if word.loaded else PeerState.PARKED, word.order, self.now)
        if word.loaded:
            due = self.now + self._load_ms[worker]
            heapq.heappush(self._heap, (due, next(self._order), _Loaded(worker, word.order)))

    def _begin(self, call: c.Call) -> None:
        if call.worker is None:
            return  # cancelled in the very turn in which it was handed out; its worker is told to stop
        took_ms, body = self._answers[call.target](call)
        kind = f"{family(call.kind)}.final"
        left_ms = took_ms if call.deadline_ms is None else call.deadline_ms - self.now
        if left_ms < took_ms:
            failure = Failure(
                code="call.deadline", category=Category.TIMEOUT, origin=call.target, message="the work was stopped"
            )
            took_ms, kind, body = left_ms, "error", Unpacked(ErrorReply(failure=failure))
        due = self._working[call.key] = _Due(call, call.worker, kind, body)
        heapq.heappush(self._heap, (self.now + took_ms, next(self._order), due))

    def _note(self, command: ev.Command) -> None:
        if isinstance(command, Record) and isinstance(command.fact, f.TaskEnded):
            task = self._hub.engine.find(command.fact.task)
            if task is not None:
                self.ended[task.id] = task

    # Answers

    def _plan(self, call: c.Call) -> Answer:
        task = self.task(call.task or "").ir
        return 0, Unpacked(PlanFinal(task=planned(task), source="client", reason="as given"))

    def _check(self, call: c.Call) -> Answer:
        task = self.task(call.task or "")
        gates = task.ir.gates if call.step is None else task.steps[call.step].spec.gates or []
        return 0, Unpacked(GateFinal(results=all_pass(gates)))
