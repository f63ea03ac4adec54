"""Conveniences of tests over `services.scheduler.simulation`: a checked world, tasks from few words, scripted answers.

After every event the invariants of the broker and of the sessions are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.plan import PlanFinal
from protocol.messages.result import TaskView, Watch
from protocol.messages.task import TaskIR
from services.kit.registry import Registry, load_registry
from services.scheduler.events import Event
from services.scheduler.simulation import tiers, world
from services.scheduler.simulation.peers import Answer, SimPeer
from services.scheduler.views import view

CHECKOUT = Path(__file__).resolve().parents[2]

__all__ = ["Answer", "SimPeer", "World", "final_of", "plan_as_given", "say", "shipped_registry", "stack", "task_of"]


def shipped_registry() -> Registry:
    return load_registry(CHECKOUT / "registry", Path("/nonexistent"), check_files=False)


class World(world.World):
    """A world that checks all invariants after every event of the hub."""

    def __init__(self, registry: Registry | None = None) -> None:
        super().__init__(registry or shipped_registry())

    def feed(self, event: Event) -> None:
        super().feed(event)
        if self.hub is not None:
            self.hub.broker.check_invariants()
            self.hub.batches.check_invariants(self.hub.broker.calls)
            self.hub.outbox.unread.check_invariants()
            live = self.hub.engine.live.values()
            self.hub.engine.occupancy.check_invariants(live)
        for peer in self.peers.values():
            peer.session.check_invariants()

    def watch(self, task_id: str) -> None:
        self.client("task.watch", Watch(task_id=task_id))

    def view(self, task_id: str) -> TaskView:
        return view(self.recorded_tasks()[task_id])

    def finish(self, task_id: str, limit_ms: int = 120_000) -> TaskView:
        self.run(lambda: task_id in self.ended, limit_ms)
        return self.view(task_id)


def plan_as_given(header: Header, body: bytes) -> Answer:
    """A planner that keeps the client's plan, or makes one step; it takes 5 ms."""
    _, final = tiers.plan_as_given(header, body)
    assert isinstance(final, PlanFinal)
    return 5, final


def say(text: str, took_ms: int = 100) -> Callable[[Header, bytes], Answer]:
    def answer(header: Header, body: bytes) -> Answer:
        unpack_body(InferRequest, body)
        return took_ms, final_of(text)

    return answer


def final_of(text: str) -> InferFinal:
    return InferFinal(text=text, finish_reason="stop", model="m", engine="sim", prompt_tokens=10, generated_tokens=5)


def gates_pass(header: Header, body: bytes) -> Answer:
    return 20, tiers.gates_pass(header, body)[1]


def stack(answer: Callable[[Header, bytes], Answer] | None = None, *, slots: int = 4) -> World:
    """A world with a planner, gates, memory and one peer per shipped model."""
    made = World()
    made.add("planner", ("planner",), plan_as_given)
    made.add("gates", ("gate",), gates_pass)
    made.add("memory", ("memory",), tiers.memory_takes)
    for model in made.registry.models:
        made.add(f"inference-{model}", (f"infer.{model}",), answer or say("fine"), slots)
    made.run_for(50)
    return made


def task_of(steps: list[dict[str, object]], **fields: object) -> TaskIR:
    """A TaskIR with a plan; `actor`, `action` and one output `<id>.out` are filled in."""
    filled = [
        {"actor": "worker", "action": "do it", "outputs": [{"name": f"{step['id']}.out"}], "gates": []} | step
        for step in steps
    ]
    return TaskIR.model_validate({"objective": "test", "plan": {"steps": filled}} | fields)
