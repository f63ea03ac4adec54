"""TaskIR: one job, carried whole from the client to the result.

This module says what a task looks like. Whether its plan is a graph that can run (producers, cycles, duplicate
ids) is the business of `protocol.plan_graph`; what is done with it, of the services.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, field_validator

from protocol.limits import MAX_STEPS
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.base import CheckCommand, Message, Name, Strict, Text


class TaskType(StrEnum):
    """What kind of work the task is; chooses the planner's template and groups its experience."""

    CHAT = "chat"
    DOC = "doc"
    CODE = "code"
    INGEST = "ingest"
    MANAGE = "manage"


class Priority(StrEnum):
    """Interactive overtakes batch; batch is never starved."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class Output(Strict):
    """An artefact that a step promises."""

    name: Name
    kind: ArtefactKind = ArtefactKind.TEXT
    content_type: str | None = Field(default=None, max_length=128)


class Spawns(Strict):
    """Leave for a step to make sub-agents and give them work while it runs; see "Sub-agents" above."""

    roles: list[Name] = Field(default_factory=list, max_length=8)
    """Roles that its sub-agents may have, the first one where the model names none; empty = the planner chooses."""
    max_tokens: int | None = Field(default=None, ge=1, le=131_072)
    """Bound on generated tokens of one attempt of one assignment; absent = the role's."""
    max_turns: int | None = Field(default=None, ge=1, le=1_000)
    """Turns of its model, the one that answers included; absent = 32."""


class Step(Strict):
    """One piece of work for one role."""

    id: Name
    """`S1`, `S2`, …; unique within the plan."""
    actor: Name
    """Role from `registry/roles.yaml`."""
    action: Text
    """What to do, in words, for the model."""
    inputs: list[Name] = Field(default_factory=list, max_length=2_000)
    """Artefacts that go into the prompt; their producers become dependencies."""
    outputs: list[Output] = Field(min_length=1, max_length=16)
    depends_on: list[Name] = Field(default_factory=list, max_length=2_000)
    """Control dependencies; dropped by the planner where no data flows, unless `ordered`."""
    parallel_group: Name | None = None
    """Steps that their author takes to be independent: a hint, never an order. A `depends_on` within a group goes, and
    what keeps its steps apart all the same is reported."""
    map_over: Name | None = None
    """An artefact that holds a list: at run time one sub-step per item, whose outputs are joined in order."""
    ordered: bool = False
    """Keep the control dependencies although no data flows along them."""
    gates: list[Name] | None = Field(default=None, max_length=16)
    """Checks of this step's outputs; absent = the planner chooses by kind, empty = none."""
    check_command: CheckCommand | None = None
    """Command of the gates that run one, such as `integration`, started in the workspace without a shell. May use
    {workspace} and {python}; absent = the task's."""
    persona: Name | None = None
    """Prompt overlay: of the registry, or made at run time; `none` = without one; absent = the plan's, else the planner
    chooses."""
    timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    """Wall clock of one attempt, from dispatch; absent = the role's."""
    max_tokens: int | None = Field(default=None, ge=1, le=131_072)
    """Bound on generated tokens of one attempt; absent = the role's."""
    json_schema: dict[str, Any] | None = None
    """JSON Schema of the one json output: decoding is constrained by it and the answer is checked against it."""
    grammar: Text | None = None
    """GBNF grammar that constrains decoding."""
    spawns: Spawns | None = None
    """The step plans: it may call `create_subagent` and `assign_task`, turn by turn, before it answers."""

    @field_validator("outputs")
    @classmethod
    def _distinct(cls, outputs: list[Output]) -> list[Output]:
        names = [output.name for output in outputs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"output {name!r} is listed twice")
        return outputs


class Plan(Strict):
    """The steps of a task; their order in the list means nothing."""

    steps: Annotated[list[Step], Field(min_length=1, max_length=MAX_STEPS)]
    persona: Name | None = None
    """Of every step that names none itself; absent = the planner chooses for each."""


class Escalation(Strict):
    """How far a failing step may climb."""

    max_level: int = Field(default=2, ge=0, le=8)
    """Roles above the first that a step may reach; 0 = never escalate."""
    max_replans: int | None = Field(default=None, ge=0, le=16)
    """How often the rest of the plan may be made anew, never more than the registry's cap; absent = the cap for a plan
    of the planner, never for a plan that came with the task."""


class Budget(Strict):
    """What one task may spend."""

    max_tokens: int = Field(default=200_000, ge=1)
    """Generated tokens over all attempts; no further attempt starts beyond it."""
    max_steps: int = Field(default=1_000, ge=1, le=MAX_STEPS)
    """Steps together with whatever the graph grows by: items of mapped steps, turns and assignments of swarms."""
    max_subagents: int = Field(default=100, ge=0, le=1_000)
    """Sub-agents that all spawning steps together may make."""
    max_tool_calls: int = Field(default=1_500, ge=0, le=10_000)
    """Calls of tools by all spawning steps together; one that is refused counts as well."""


class TaskIR(Strict):
    """One job: what is wanted, with what, within which limits, and how (once planned)."""

    ir_version: int = Field(default=1, ge=1, le=1)
    task_id: Name | None = None
    """Minted by the hub where absent."""
    created_at: int | None = Field(default=None, ge=0)
    """Unix milliseconds; set by the hub."""
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=128)
    """The same key submitted twice is one task."""
    task_type: TaskType = TaskType.CHAT
    priority: Priority = Priority.INTERACTIVE
    deadline_s: float | None = Field(default=None, gt=0, le=30 * 86_400)
    """Seconds after acceptance at which the task fails with TIMEOUT."""
    objective: Text = Field(min_length=1)
    context: Text = ""
    constraints: list[Text] = Field(default_factory=list, max_length=64)
    assumptions: list[Text] = Field(default_factory=list, max_length=64)
    definition_of_done: list[Text] = Field(default_factory=list, max_length=64)
    inputs: list[Artefact] = Field(default_factory=list, max_length=256)
    plan: Plan | None = None
    """Absent = the planner makes it."""
    gates: list[Name] = Field(default_factory=list, max_length=16)
    """Checks of the final artefacts (those that no step consumes)."""
    check_command: CheckCommand | None = None
    """Command of the gates that run one, for the final artefacts and for steps that have none of their own."""
    escalation: Escalation = Field(default_factory=Escalation)
    budget: Budget = Field(default_factory=Budget)


class Submit(Message):
    """Body of `task.submit`: the task as the client wrote it; the hub validates it to name every problem."""

    task: dict[str, Any]


class Extend(Message):
    """Body of `task.extend`: further steps for a running task; they may use its artefacts and wait for its steps."""

    task_id: str = Field(max_length=128)
    steps: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_STEPS)
    """Steps as in a plan; the hub validates them to name every problem."""


class Extended(Message):
    """The steps are part of the task and on disk."""

    task_id: str
    steps_total: int


class Accepted(Message):
    """The task is on disk and will be finished, whatever is killed from here on."""

    task_id: str
    duplicate: bool = False
    """True where this idempotency key was known: the task is the earlier one."""
