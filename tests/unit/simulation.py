"""A whole stack in virtual time: the real hub machine, real peer sessions, a network that delays, and no I/O.

Peers answer through a function; processes can be killed, frozen and restarted, the hub too, from its packed facts.
After every event the invariants of broker and sessions are checked.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from pathlib import Path

from protocol.codec import pack_body, unpack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.kinds import BODIES, family
from protocol.messages.base import Message
from protocol.messages.failure import Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.memory import MemoryFinal
from protocol.messages.plan import PlanFinal, PlanRequest
from protocol.messages.reply import ErrorReply
from protocol.messages.result import TaskView, Watch
from protocol.messages.session import Hello, PeerState, Pong
from protocol.messages.task import Plan, Step, Submit, TaskIR
from services.kit import session as s
from services.kit.registry import Registry, load_registry
from services.scheduler import facts as f
from services.scheduler.effects import Record
from services.scheduler.events import (
    Event,
    EventsRead,
    FrameIn,
    LookedUp,
    LookUp,
    Noted,
    ReadEvents,
    ReloadUnsettled,
    Restored,
    Send,
    Tick,
    Undeliverable,
)
from services.scheduler.machine import Hub
from services.scheduler.past import Past
from services.scheduler.tasks import TaskRecord, fold
from services.scheduler.views import view

CHECKOUT = Path(__file__).resolve().parents[2]
Answer = tuple[int, Message | Failure]
"""How many ms the work takes, and its ending."""


def shipped_registry() -> Registry:
    return load_registry(CHECKOUT / "registry", Path("/nonexistent"), check_files=False)


class SimPeer:
    """One process: a real session machine, and work that takes virtual time."""

    def __init__(
        self,
        world: World,
        service: str,
        capabilities: tuple[str, ...],
        slots: int,
        answer: Callable[[Header, bytes], Answer],
    ) -> None:
        self.world = world
        self.service = service
        self.capabilities = capabilities
        self.slots = slots
        self.answer = answer
        self.alive = False
        self.frozen = False
        self.boots = 0
        self.started: list[str] = []
        """Keys of all work ever begun, over all boots."""
        self.inbox: list[tuple[Header, bytes]] = []

    def start(self) -> None:
        self.boots += 1
        self.alive, self.frozen = True, False
        self.epochs = 0
        self.seq = 0
        self.working: dict[str, int] = {}
        self.session = s.PeerSession(self.service, self.capabilities, self.slots, pid=1, load_deadline_s=1)
        self.session.state = PeerState.READY
        self.open()

    def open(self) -> None:
        self.epochs += 1
        self.identity = f"{self.service}/{self.boots}/{self.epochs}".encode()
        self.world.identities[self.identity] = self
        self.feed(s.Opened(self.world.now, f"{self.service}{self.boots}-{self.epochs}"))

    def kill(self) -> None:
        self.alive = False
        self.world.identities.pop(self.identity, None)

    def feed(self, event: s.Event) -> None:
        for command in self.session.handle(event):
            self.carry_out(command)
        self.session.check_invariants()

    def carry_out(self, command: s.Command) -> None:
        boot = self.boots
        match command:
            case s.Transmit(header, body):
                self.transmit(header, body)
            case s.ReportState(corr, credit):
                pong = Pong(state=self.session.state, in_flight=len(self.session.in_flight), loop_lag_ms=0, rss_bytes=0)
                self.transmit(Header(kind="session.pong", id="", corr=corr, credit=credit), pack_body(pong))
            case s.StartWork(header, body):
                self.started.append(header.key or "")
                took, ending = self.answer(header, body)
                key = header.key or ""
                if isinstance(ending, Failure):
                    done = s.WorkEnded(key, "error", pack_body(ErrorReply(failure=ending)))
                else:
                    done = s.WorkEnded(key, f"{family(header.kind)}.final", pack_body(ending))
                self.world.later(took, lambda: self.alive and self.boots == boot and self.feed(done))
            case s.Reopen():
                self.world.identities.pop(self.identity, None)
                self.world.later(50, lambda: self.alive and self.boots == boot and self.open())
            case s.CancelWork() | s.Deliver():
                pass
            case s.Stop(reason):
                raise AssertionError(f"{self.service} was told to stop: {reason}")

    def transmit(self, header: Header, body: bytes) -> None:
        from dataclasses import replace

        self.seq += 1
        filled = replace(header, id=header.id or f"{self.service}-{self.seq}", src=self.service, seq=self.seq)
        filled = replace(filled, epoch=self.session.epoch)
        identity, data = self.identity, pack_header(filled)
        self.world.later(self.world.delay_ms, lambda: self.world.to_hub(identity, [data, body]))

    def receive(self, header: Header, body: bytes) -> None:
        if self.frozen:
            self.inbox.append((header, body))
        elif self.alive:
            self.feed(s.Received(self.world.now, header, body))

    def thaw(self) -> None:
        self.frozen = False
        for header, body in self.inbox:
            self.feed(s.Received(self.world.now, header, body))
        self.inbox.clear()


class World:
    """Clock, network, hub, peers, journal."""

    def __init__(self, registry: Registry | None = None) -> None:
        self.registry = registry or shipped_registry()
        self.now = 1_000_000
        self.delay_ms = 1
        self.order = itertools.count()
        self.heap: list[tuple[int, int, Callable[[], object]]] = []
        self.identities: dict[bytes, SimPeer] = {}
        self.peers: dict[str, SimPeer] = {}
        self.journal: list[tuple[str, int, str, bytes]] = []
        self.client_inbox: list[tuple[Header, Message]] = []
        self.hub: Hub | None = None
        self.notes: list[str] = []
        self.page = 256
        self.find: Callable[[str], TaskRecord | Past | None] = lambda task_id: self.recorded_tasks().get(task_id)
        self.boot_hub()
        self.tick()

    # Running

    def later(self, delay_ms: int, action: Callable[[], object]) -> None:
        heapq.heappush(self.heap, (self.now + delay_ms, next(self.order), action))

    def tick(self) -> None:
        if self.hub is not None:
            self.feed(Tick(self.now))
        for peer in list(self.peers.values()):
            if peer.alive and not peer.frozen:
                peer.feed(s.Ticked(self.now))
        self.later(100, self.tick)

    def run(self, until: Callable[[], bool], limit_ms: int = 120_000) -> None:
        end = self.now + limit_ms
        while not until():
            if self.now > end:
                raise AssertionError(f"not reached within {limit_ms} ms of virtual time: {self.notes[-20:]}")
            self.step()

    def run_for(self, duration_ms: int) -> None:
        end = self.now + duration_ms
        while self.heap[0][0] <= end:
            self.step()
        self.now = end

    def step(self) -> None:
        at, _, action = heapq.heappop(self.heap)
        self.now = max(self.now, at)
        action()

    # Hub

    def boot_hub(self) -> None:
        self.hub = Hub(epoch=f"hub{next(self.order)}", registry=self.registry)
        for task in self.recorded_tasks().values():
            if not (task.state.final and task.settled):
                self.feed(Restored(task, self.now))

    def kill_hub(self) -> None:
        self.hub = None

    def facts(self, task_id: str) -> list[f.Fact]:
        return [f.unpack_fact(kind, data) for task, _, kind, data in self.journal if task == task_id]

    def recorded_tasks(self) -> dict[str, TaskRecord]:
        history: dict[str, list[f.Fact]] = {}
        for task, _, kind, data in self.journal:
            history.setdefault(task, []).append(f.unpack_fact(kind, data))
        return {task: fold(facts) for task, facts in history.items()}

    def to_hub(self, identity: bytes, frames: list[bytes]) -> None:
        if self.hub is not None:
            self.feed(FrameIn(identity, frames, self.now))

    def feed(self, event: Event) -> None:
        if self.hub is None:
            return
        hub = self.hub
        reads: list[ReadEvents] = []
        for command in hub.handle(event):
            match command:
                case Record(fact, seq):
                    self.journal.append((fact.task, seq, type(fact).__name__, f.pack_fact(fact)))
                case Send(identity, header, body):
                    self.deliver(identity, header, body)
                case LookUp(task_id, identity, header, body):
                    self.feed(LookedUp(identity, header, body, self.find(task_id), self.now))
                case ReadEvents():
                    reads.append(command)
                case ReloadUnsettled():
                    for task in self.recorded_tasks().values():
                        if task.state.final and not task.settled:
                            self.feed(Restored(task, self.now))
                case Noted(event=told, fields=fields):
                    self.notes.append(f"{self.now} {told.name} {fields}")
        hub.broker.check_invariants()
        for read in reads:
            facts = self.facts(read.query.task_id)[read.query.after_seq :][: self.page]
            numbered = list(enumerate(facts, read.query.after_seq + 1))
            self.feed(EventsRead(read.identity, read.header, read.query, numbered))

    def deliver(self, identity: bytes, header: bytes, body: bytes) -> None:
        if identity == b"client":
            unpacked = unpack_header(header)
            self.client_inbox.append((unpacked, unpack_body(BODIES[unpacked.kind], body)))
            return
        peer = self.identities.get(identity)
        if peer is None:
            self.later(0, lambda: self.feed(Undeliverable(identity, self.now)))
            return
        self.later(self.delay_ms, lambda: identity in self.identities and peer.receive(unpack_header(header), body))

    # What tests do

    def add(
        self, service: str, capabilities: tuple[str, ...], answer: Callable[[Header, bytes], Answer], slots: int = 4
    ) -> SimPeer:
        peer = SimPeer(self, service, capabilities, slots, answer)
        self.peers[service] = peer
        peer.start()
        return peer

    def client(self, kind: str, body: Message, **fields: str) -> tuple[Header, Message]:
        """One request of a client; returns its (first) answer."""
        hello = Hello(service="client-test", protocol_min=1, protocol_max=1)
        if self.hub is None or b"client" not in self.hub.broker.peers:
            self.to_hub(b"client", [pack_header(Header(kind="session.hello", id="h")), pack_body(hello)])
        ident = f"c{next(self.order)}"
        self.to_hub(b"client", [pack_header(Header(kind=kind, id=ident, **fields)), pack_body(body)])
        answers = [(header, body) for header, body in self.client_inbox if header.corr == ident]
        if not answers:
            raise AssertionError(f"no answer to {kind}")
        return answers[0]

    def submit(self, task: TaskIR) -> str:
        _, body = self.client("task.submit", Submit(task=task.model_dump(mode="json", exclude_none=True)))
        task_id = getattr(body, "task_id", None)
        if not isinstance(task_id, str):
            raise AssertionError(f"not accepted: {body}")
        return task_id

    def watch(self, task_id: str) -> None:
        self.client("task.watch", Watch(task_id=task_id))

    def view(self, task_id: str) -> TaskView:
        return view(self.recorded_tasks()[task_id])

    def finish(self, task_id: str, limit_ms: int = 120_000) -> TaskView:
        def ended() -> bool:
            return any(task == task_id and kind == "TaskEnded" for task, _, kind, _ in self.journal)

        self.run(ended, limit_ms)
        return self.view(task_id)


# Peers with ordinary answers


def plan_as_given(header: Header, body: bytes) -> Answer:
    """A planner that keeps the client's plan, or makes one step."""
    task = unpack_body(PlanRequest, body).task
    if task.plan is None:
        step = Step.model_validate(
            {"id": "S1", "actor": "worker", "action": task.objective, "outputs": [{"name": "answer"}]}
        )
        task = task.model_copy(update={"plan": Plan(steps=[step])})
    return 5, PlanFinal(task=task, source="client", reason="as given")


def say(text: str, took_ms: int = 100) -> Callable[[Header, bytes], Answer]:
    def answer(header: Header, body: bytes) -> Answer:
        unpack_body(InferRequest, body)
        return took_ms, final_of(text)

    return answer


def final_of(text: str) -> InferFinal:
    return InferFinal(text=text, finish_reason="stop", model="m", engine="sim", prompt_tokens=10, generated_tokens=5)


def gates_pass(header: Header, body: bytes) -> Answer:
    request = unpack_body(GateRequest, body)
    results = [
        GateResult(gate=name, verdict=Verdict.PASS, category="CODE", started_ms=0, ended_ms=1) for name in request.gates
    ]
    return 20, GateFinal(results=results)


def memory_takes(header: Header, body: bytes) -> Answer:
    return 1, MemoryFinal(stored=1)


def stack(answer: Callable[[Header, bytes], Answer] | None = None, *, slots: int = 4) -> World:
    """A world with a planner, gates, memory and one peer per shipped model."""
    world = World()
    world.add("planner", ("planner",), plan_as_given)
    world.add("gates", ("gate",), gates_pass)
    world.add("memory", ("memory",), memory_takes)
    for model in world.registry.models:
        world.add(f"inference-{model}", (f"infer.{model}",), answer or say("fine"), slots)
    world.run_for(50)
    return world


def task_of(steps: list[dict[str, object]], **fields: object) -> TaskIR:
    """A TaskIR with a plan; `actor`, `action` and one output `<id>.out` are filled in."""
    filled = [
        {"actor": "worker", "action": "do it", "outputs": [{"name": f"{step['id']}.out"}], "gates": []} | step
        for step in steps
    ]
    return TaskIR.model_validate({"objective": "test", "plan": {"steps": filled}} | fields)
