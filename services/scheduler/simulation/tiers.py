"""Ordinary answers of simulated processes: a planner that keeps the plan, gates that pass, a memory that takes.

The answer of a step is the smallest one that yields the outputs the step promises.
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
from protocol.messages.task import Output, Plan, Step, TaskIR
from services.scheduler.simulation.peers import Answer
from services.scheduler.tasks import StepRecord, TaskRecord

WRITTEN: Final = "simulated"
"""What a step writes as text."""
_LIST: Final = f'["{WRITTEN}"]'
Seconds = Callable[[TaskRecord, StepRecord], float]
"""How long the inference of a step's newest attempt takes."""


@dataclass(frozen=True, slots=True)
class Tier:
    """All processes that serve one model entry."""

    model: str
    workers: int
    slots: int
    """Of each worker."""
    load_s: float | None = None
    """How long its model takes to load when it is needed; None = it is always in memory."""


def planned(task: TaskIR) -> TaskIR:
    """The task with the client's plan; one without a plan becomes one step of a worker."""
    if task.plan is not None:
        return task
    step = Step(id="S1", actor="worker", action=task.objective, outputs=[Output(name="answer")], gates=[])
    return task.model_copy(update={"plan": Plan(steps=[step])})


def all_pass(gates: Sequence[str]) -> list[GateResult]:
    """Results of gates that find nothing."""
    return [GateResult(gate=name, verdict=Verdict.PASS, category="CODE", started_ms=0, ended_ms=0) for name in gates]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer must hold for one output."""

    name: str
    kind: ArtefactKind
    listed: bool = False
    """A later step is mapped over it, so it is a list; how long a one only shows at run time: here, of one item."""

    def smallest(self) -> str:
        """Its smallest value in JSON."""
        return _LIST if self.listed else "{}" if self.kind is ArtefactKind.JSON else '""'


def wanted_of(task: TaskRecord, step: StepRecord) -> tuple[Wanted, ...]:
    """What the answer of a step must hold for the task to go on."""
    readers = (task.steps[name].spec for name in task.dependents[step.spec.id])
    lists = {reader.map_over for reader in readers if reader.map_over is not None}
    return tuple(Wanted(output.name, output.kind, output.name in lists) for output in step.spec.outputs)


def smallest_final(wanted: Sequence[Wanted], *, turn: bool = False) -> InferFinal:
    """An answer that yields these outputs; as a `turn` of a spawning step, without any sub-agent."""
    first = wanted[0]
    is_text = first.kind is not ArtefactKind.JSON and not first.listed
    text = WRITTEN if is_text else first.smallest()
    if turn:
        text = f'{{"answer":{chr(34) + text + chr(34) if is_text else text}}}'
    if len(wanted) > 1:
        parts = (f'"{one.name}":{one.smallest()}' for one in wanted)
        text = f"{{{','.join(parts)}}}"
    return InferFinal(
        text=text, finish_reason="stop", model="simulated", engine="sim", prompt_tokens=0, generated_tokens=0
    )


def plan_as_given(_header: Header, body: bytes) -> Answer:
    """Answer of a planner that keeps the client's plan."""
    return 0, PlanFinal(task=planned(unpack_body(PlanRequest, body).task), source="client", reason="as given")


def gates_pass(_header: Header, body: bytes) -> Answer:
    """Answer of gates that find nothing."""
    return 0, GateFinal(results=all_pass(unpack_body(GateRequest, body).gates))


def memory_takes(_header: Header, _body: bytes) -> Answer:
    """Answer of a memory that stores what it is told."""
    return 0, _STORED


_STORED: Final = pack_body(MemoryFinal(stored=1))
