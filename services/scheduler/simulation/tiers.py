"""Processes with ordinary answers: a planner that keeps the plan, gates that pass, a memory that takes, model tiers.

What a step of a model tier takes is given as a function of task and step; its answer is the smallest one that yields
the outputs the step promises. Gates, planner and memory answer at once unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from protocol.codec import pack_body, unpack_body
from protocol.header import Header
from protocol.messages.artefact import ArtefactKind
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.infer import InferFinal
from protocol.messages.memory import MemoryFinal
from protocol.messages.plan import PlanFinal, PlanRequest
from protocol.messages.task import Output, Plan, Step
from services.scheduler.simulation.peers import Answer
from services.scheduler.simulation.world import World
from services.scheduler.tasks import StepRecord, TaskRecord

Seconds = Callable[[TaskRecord, StepRecord], float]
"""How long the inference of a step's newest attempt takes."""
_CORE_SLOTS: Final = 64
"""Calls that planner, gates and memory take at once: they are not what is simulated."""


@dataclass(frozen=True, slots=True)
class Tier:
    """All processes that serve one model entry."""

    model: str
    workers: int
    slots: int
    """Of each worker."""
    load_s: float | None = None
    """How long its model takes to load when it is needed; None = it is always in memory."""


def add_core(world: World) -> None:
    """Start a planner, gates and memory that answer at once."""
    world.add("planner", ("planner",), plan_as_given, _CORE_SLOTS)
    world.add("gates", ("gate",), gates_pass, _CORE_SLOTS)
    world.add("memory", ("memory",), memory_takes, _CORE_SLOTS)


def add_tiers(world: World, tiers: Sequence[Tier], seconds: Seconds) -> None:
    """Start the workers of these tiers; `seconds` says how long each step takes them."""
    answer = _Inference(world, seconds)
    for tier in tiers:
        for number in range(tier.workers):
            load_ms = None if tier.load_s is None else round(tier.load_s * 1000)
            world.add(f"inference-{tier.model}-{number}", (f"infer.{tier.model}",), answer, tier.slots, load_ms)


def plan_as_given(_header: Header, body: bytes) -> Answer:
    """Answer of a planner that keeps the client's plan; a task without one becomes one step of a worker."""
    task = unpack_body(PlanRequest, body).task
    if task.plan is None:
        step = Step(id="S1", actor="worker", action=task.objective, outputs=[Output(name="answer")], gates=[])
        task = task.model_copy(update={"plan": Plan(steps=[step])})
    return 0, PlanFinal(task=task, source="client", reason="as given")


def gates_pass(_header: Header, body: bytes) -> Answer:
    """Answer of gates that find nothing."""
    names = unpack_body(GateRequest, body).gates
    results = [GateResult(gate=name, verdict=Verdict.PASS, category="CODE", started_ms=0, ended_ms=0) for name in names]
    return 0, GateFinal(results=results)


def memory_takes(_header: Header, _body: bytes) -> Answer:
    """Answer of a memory that stores what it is told."""
    return 0, _STORED


class _Inference:
    """Answers for every tier; finals are packed once per shape of the outputs, since they are all alike."""

    def __init__(self, world: World, seconds: Seconds) -> None:
        self._world = world
        self._seconds = seconds
        self._finals: dict[tuple[tuple[str, ArtefactKind], ...], bytes] = {}

    def __call__(self, header: Header, _body: bytes) -> Answer:
        task = self._world.task(header.task or "")
        step = task.steps[header.step or ""]
        shape = tuple((output.name, output.kind) for output in step.spec.outputs)
        final = self._finals.get(shape)
        if final is None:
            final = self._finals[shape] = pack_body(_final(shape))
        return round(self._seconds(task, step) * 1000), final


def _final(shape: Sequence[tuple[str, ArtefactKind]]) -> InferFinal:
    text = "{}" if shape[0][1] is ArtefactKind.JSON else "simulated"
    if len(shape) > 1:
        parts = (f'"{name}":{"{}" if kind is ArtefactKind.JSON else chr(34) * 2}' for name, kind in shape)
        text = f"{{{','.join(parts)}}}"
    return InferFinal(
        text=text, finish_reason="stop", model="simulated", engine="sim", prompt_tokens=0, generated_tokens=0
    )


_STORED: Final = pack_body(MemoryFinal(stored=1))
