"""The state of tasks, steps and attempts, as plain records. What changes them is `fold.py` alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from protocol.messages.artefact import Artefact
from protocol.messages.failure import Failure
from protocol.messages.gate import GateResult
from protocol.messages.memory import Lesson
from protocol.messages.persona import Persona
from protocol.messages.plan import PlanVersion
from protocol.messages.result import StepState, TaskState
from protocol.messages.task import Step, TaskIR
from services.scheduler.swarm_state import Swarm
from services.scheduler.timeline import Timeline


class JournalError(Exception):
    """The facts contradict each other."""


_KEPT_SETBACKS: Final = 20


@dataclass(frozen=True, slots=True)
class Setback:
    """Work that came to nothing and was done again, or given up, without a word about the answer."""

    at_ms: int
    work: str
    category: str
    code: str
    message: str
    action: str
    rule: str
    delay_ms: int = 0


@dataclass(slots=True)
class Setbacks:
    """The newest of them, and how often each kind of work was done again for each category."""

    newest: list[Setback] = field(default_factory=list)
    repeats: dict[str, int] = field(default_factory=dict)
    """`<work>.<category>` -> count."""

    def count(self, work: str, category: str) -> int:
        """How often this work was done again for this category."""
        return self.repeats.get(f"{work}.{category}", 0)

    def answered(self, work: str) -> int:
        """How often this work was done again after a worker's answer, rather than after the loss of the worker."""
        lost = f"{work}.PEER"
        return sum(times for key, times in self.repeats.items() if key.startswith(f"{work}.") and key != lost)

    def add(self, one: Setback) -> None:
        """Take one more."""
        self.newest = [*self.newest, one][-_KEPT_SETBACKS:]
        if one.action in ("rerun", "backoff"):
            key = f"{one.work}.{one.category}"
            self.repeats[key] = self.repeats.get(key, 0) + 1


@dataclass(slots=True)
class Attempt:
    """One try of a step."""

    number: int
    role: str
    model: str
    key: str
    queued_ms: int
    constrained: bool = False
    timeline: Timeline = field(default_factory=Timeline)
    started_ms: int | None = None
    inferred_ms: int | None = None
    ended_ms: int | None = None
    worker: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    first_token_ms: float = 0
    repaired: bool = False
    draft_tokens: int = 0
    accepted_tokens: int = 0
    generate_ms: float = 0
    artefacts: list[Artefact] = field(default_factory=list)
    gates: list[GateResult] = field(default_factory=list)
    failure: Failure | None = None
    action: str | None = None
    arm: str | None = None
    told_chars: int = 0
    """Room in its prompt for what earlier attempts got wrong."""
    setbacks: Setbacks = field(default_factory=Setbacks)
    moves: int = 0
    """How often it was given to another model."""


@dataclass(slots=True)
class StepRecord:
    """A step with its history."""

    spec: Step
    needs: frozenset[str]
    waiting_for: set[str]
    """Needs that are not done yet."""
    state: StepState = StepState.WAITING
    attempts: list[Attempt] = field(default_factory=list)
    ready_ms: int | None = None
    ended_ms: int | None = None
    losses: int = 0
    """Workers that died with it, not counting those whose work was re-attached."""
    failure: Failure | None = None
    joined: list[Artefact] = field(default_factory=list)
    """Outputs of a mapped or a spawning step, which has no attempts of its own."""
    swarm: str | None = None
    """The spawning step that this one is a turn of, or whose sub-agent it is an assignment of."""
    agent: str | None = None
    """That sub-agent; None for a turn, and for any step outside of a swarm."""
    changed: int = 0
    """Number of the newest fact that changed anything here but `waiting_for`; 0 = as it was planned."""

    @property
    def attempt(self) -> Attempt:
        """The newest attempt; raises JournalError before the first."""
        try:
            return self.attempts[-1]
        except IndexError:
            raise JournalError(f"step {self.spec.id} has no attempt yet") from None

    @property
    def role(self) -> str:
        """Who does it: the role of the newest attempt, the planned one before the first."""
        return self.attempts[-1].role if self.attempts else self.spec.actor

    @property
    def is_turn(self) -> bool:
        """True for a turn of a spawning step."""
        return self.swarm is not None and self.agent is None


@dataclass(frozen=True, slots=True)
class PlanOrigin:
    """How the plan came about; the plan itself is in the task's IR."""

    source: str
    reason: str
    removed_edges: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    similar: list[dict[str, Any]]
    lessons: tuple[Lesson, ...] = ()
    """What similar tasks have failed with and what helped; every prompt of the task tells it."""
    added_edges: list[dict[str, Any]] = field(default_factory=list)
    as_written: dict[str, Any] | None = None
    as_run: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Revising:
    """A new version of the plan that is in the making."""

    version: int
    trigger: str
    step: str | None
    """The step that could not be done, of the plan itself: the mapped one for a sub-step; None for the final checks and
    for a deadline."""
    failure: Failure | None
    held: frozenset[str]
    """Steps that do not begin before it is there: it may drop them."""
    notes: str
    """Artefact that tells what happened."""


@dataclass(slots=True)
class TaskRecord:
    """A task as it stands. What led there is in the journal only, so that memory does not grow with history."""

    id: str
    ir: TaskIR
    client: str
    created_ms: int
    state: TaskState = TaskState.PLANNING
    planned_ms: int | None = None
    ended_ms: int | None = None
    plan: PlanOrigin | None = None
    predicted_ms: int | None = None
    """Expected length of the longest chain of steps when the plan was adopted; None in journals before it was kept."""
    predicted_steps: list[str] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)
    """Slots per model when the plan was adopted."""
    steps: dict[str, StepRecord] = field(default_factory=dict)
    swarms: dict[str, Swarm] = field(default_factory=dict)
    """Spawning step -> its sub-agents."""
    dependents: dict[str, list[str]] = field(default_factory=dict)
    """Step id -> steps that need it."""
    artefacts: dict[str, Artefact] = field(default_factory=dict)
    """Inputs, and the outputs of steps that are done."""
    personas: dict[str, Persona] = field(default_factory=dict)
    """Its own, by name: they come before the registry's."""
    gates: list[GateResult] = field(default_factory=list)
    failure: Failure | None = None
    unfinished: int = 0
    """Steps not in a final state."""
    generated_tokens: int = 0
    setbacks: Setbacks = field(default_factory=Setbacks)
    """Of its plan, its final checks and its outcomes."""
    losses: dict[str, int] = field(default_factory=dict)
    """Work of the task itself -> workers that died with it."""
    plan_open: bool = False
    """Its plan is still in the making: steps of it run, more will come."""
    versions: list[PlanVersion] = field(default_factory=list)
    """Of its plan, oldest first; those that were given up count too."""
    revising: Revising | None = None
    settled: bool = False
    """Memory knows the outcomes."""
    seq: int = 0
    """Facts so far; the newest event's number."""

    @property
    def deadline_ms(self) -> int | None:
        """Unix ms at which the task fails with TIMEOUT."""
        return None if self.ir.deadline_s is None else self.created_ms + int(self.ir.deadline_s * 1000)
