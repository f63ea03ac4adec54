"""Planning calls: a task goes in, the same task with a plan comes out, and the reasons with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from protocol.limits import MAX_STEPS
from protocol.messages.base import Message, Millis, Text
from protocol.messages.failure import Failure
from protocol.messages.memory import Advised, Episode, Lesson
from protocol.messages.persona import MAX_PERSONAS_AT_ONCE, Persona
from protocol.messages.task import Output, Step, TaskIR

DecisionId: TypeAlias = Annotated[str, Field(max_length=128)]

PlanSource: TypeAlias = Literal["client", "rules", "model"]
"""Who made the steps of a plan."""


ReplanTrigger: TypeAlias = Literal["failed", "contradicted", "late"]
"""Why the rest of a plan is made anew: a step or the final checks failed for good, a result contradicts the plan, or
the deadline is expected to be missed."""


class Revision(Message):
    """The rest of a running task's plan is to be made anew; what is finished or runs stays as it is.

    The answer is a plan of those open steps that are kept, by their ids, and of new ones. What it does not hold of
    `open` is dropped.
    """

    version: int = Field(ge=2)
    """Number that the plan will have; the first one has 1."""
    trigger: ReplanTrigger
    failed: str | None = None
    """Step of the plan that could not be done; its outputs may be made by another one."""
    failure: Failure | None = None
    open: list[str] = Field(default_factory=list, max_length=MAX_STEPS)
    """Steps of the plan that may be dropped, the failed one not among them."""
    finished: list[Output] = Field(default_factory=list)
    """Artefacts that are there beside the task's inputs; new steps may read them."""
    notes: str | None = None
    """The artefact among them that tells what happened."""
    left_s: float | None = Field(default=None, ge=0)
    """Seconds until the deadline."""
    step_s: dict[str, float] = Field(default_factory=dict)
    """Role -> seconds that a step of it is expected to take at the role's own limit of tokens."""


class PlanRequest(Message):
    """Plan this task; where it has a plan already, discover its parallelism and choose personas and gates."""

    task: TaskIR
    personas: list[Persona] = Field(default_factory=list)
    """Those that were made for this task so far: its steps may name them."""
    revision: Revision | None = None
    """Make the rest of the plan anew; the plan as it stands is in the task."""
    begun: list[Step] | None = None
    """Steps of an earlier answer to this request that was streamed and never ended: they run, so they stay."""


class PlanPartial(Message):
    """Steps of a plan in the making that can start. All of them so far, so that a lost piece does no harm."""

    steps: list[Step] = Field(min_length=1, max_length=MAX_STEPS)
    personas: list[Persona] = Field(default_factory=list, max_length=MAX_PERSONAS_AT_ONCE)
    """Made for these steps, which name them; as in `PlanFinal`."""


class RemovedEdge(Message):
    """A dependency that was dropped because no data flows along it."""

    step: str
    depends_on: str
    reason: str


class AddedEdge(Message):
    """A dependency that the plan lacked: without it, the order of two steps would decide what a file holds."""

    step: str
    depends_on: str
    reason: str


class PlanShape(Message):
    """How parallel a plan is, by the durations known when it was looked at."""

    width: int = Field(ge=1)
    """Most steps on one level."""
    levels: int = Field(ge=1)
    critical: list[str]
    """The longest chain by expected durations, first step first."""
    critical_ms: Millis
    """Its inference."""
    predicted_ms: Millis
    """No less than `critical_ms`, nor than the work of the busiest model over its slots."""


class PlanVersion(Message):
    """One version of a task's plan: what asked for it, and what it changed."""

    version: int = Field(ge=1)
    at_ms: Millis
    """When it was asked for."""
    trigger: Literal["planned", "failed", "contradicted", "late"]
    reason: Text
    rule: str = ""
    """The rule that allowed it, with its line in failures.yaml; empty for the first plan."""
    adopted_ms: Millis | None = None
    """When it took effect; absent while it is in the making, and for one that was given up."""
    abandoned: str | None = None
    """Why it never took effect."""
    how: str = ""
    """How it was made: the planner's own words."""
    kept: list[str] = Field(default_factory=list)
    """Steps that stay: finished, running, or still to come."""
    dropped: list[str] = Field(default_factory=list)
    added: list[str] = Field(default_factory=list)


class RoutingDecision(Message):
    """A choice that will be scored by its outcome, with what it was chosen from.

    Steps for which the same was chosen, with the same in view, share one: a plan of a thousand like steps has a few.
    """

    ids: dict[str, DecisionId] = Field(min_length=1, max_length=MAX_STEPS)
    """Step -> id under which the choice is scored for that step. The empty name stands for the whole task."""
    subject: Literal["role", "persona", "decomposition"]
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
    registry_digest: str = ""
    """As in DecisionRecord, like the next two: what was chosen from is known here, and may have changed by the end."""
    model: str = Field(default="", max_length=128)
    prompt: str = Field(default="", max_length=128)
    advice: Advised | None = None
    """What memory advised; given once for all decisions that share it."""

    @model_validator(mode="before")
    @classmethod
    def _of_one_step(cls, values: Any) -> Any:
        """As written when each step had a decision of its own: `decision_id`, and `step` where it was about one."""
        if not isinstance(values, dict) or "ids" in values or "decision_id" not in values:
            return values
        about = {values.get("step") or "": values["decision_id"]}
        return {name: value for name, value in values.items() if name not in ("decision_id", "step")} | {"ids": about}


class PlanFinal(Message):
    """The planned task."""

    task: TaskIR
    source: PlanSource
    reason: str
    """Why this source: what was wrong with the model's plan where the rules' plan is used."""
    removed_edges: list[RemovedEdge] = Field(default_factory=list)
    added_edges: list[AddedEdge] = Field(default_factory=list)
    broke_off: str | None = Field(default=None, max_length=128)
    """Code of what ended the model's plan before it was whole: steps of it that had begun stay, rules made the rest."""
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
