"""Planning calls: a task goes in, the same task with a plan comes out, and the reasons with it."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from protocol.messages.base import Message
from protocol.messages.memory import Advised, Episode, Lesson
from protocol.messages.persona import MAX_PERSONAS_AT_ONCE, Persona
from protocol.messages.task import TaskIR

PlanSource: TypeAlias = Literal["client", "rules", "model"]
"""Who made the steps of a plan."""


class PlanRequest(Message):
    """Plan this task; where it has a plan already, discover its parallelism and choose personas and gates."""

    task: TaskIR
    personas: list[Persona] = Field(default_factory=list)
    """Those that were made for this task so far: its steps may name them."""


class RemovedEdge(Message):
    """A dependency that was dropped because no data flows along it."""

    step: str
    depends_on: str
    reason: str


class RoutingDecision(Message):
    """A choice that will be scored by its outcome, with what it was chosen from."""

    decision_id: str = Field(max_length=128)
    subject: Literal["role", "persona", "decomposition"]
    step: str | None = None
    """Absent for decisions about the whole task."""
    choice: str
    alternatives: list[str] = Field(default_factory=list, max_length=64)
    propensity: float = Field(gt=0, le=1)
    """Probability with which this choice was taken; 1 for a rule."""
    rule: str
    """The rule or evidence behind it, for people."""
    task_type: str
    features: dict[str, float] = Field(default_factory=dict)
    """What the choice was based on, as numbers."""
    cluster: str = Field(default="", max_length=128)
    """Kind of work, as in DecisionRecord."""
    advice: Advised | None = None
    """What memory advised; given once for all steps that share it."""


class PlanFinal(Message):
    """The planned task."""

    task: TaskIR
    source: PlanSource
    reason: str
    """Why this source: what was wrong with the model's plan where the rules' plan is used."""
    removed_edges: list[RemovedEdge] = Field(default_factory=list)
    decisions: list[RoutingDecision] = Field(default_factory=list)
    similar: list[Episode] = Field(default_factory=list, max_length=16)
    """Earlier tasks that informed the plan."""
    lessons: list[Lesson] = Field(default_factory=list, max_length=16)
    """What such tasks have failed with and what helped; goes into the prompts of the steps."""
    generated_tokens: int = Field(default=0, ge=0)
    """Tokens the planning model spent."""
    personas: list[Persona] = Field(default_factory=list, max_length=MAX_PERSONAS_AT_ONCE)
    """Made for this task with the plan, whose steps name them; the hub may give one another name
    (`MakePersona.rename`), then in the steps as well."""
