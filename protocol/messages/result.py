"""What a client sees of a task: its events while it runs, its state at any time, its result.

The same `TaskView` answers `task.show` and ends `task.watch`, so that there is one shape to learn.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field

from protocol.messages.artefact import Artefact
from protocol.messages.base import Message, Millis
from protocol.messages.failure import Failure
from protocol.messages.gate import GateResult
from protocol.messages.memory import Episode, Lesson
from protocol.messages.plan import AddedEdge, PlanShape, PlanVersion, RemovedEdge, RoutingDecision


class _State(StrEnum):
    """A state and whether it is the last one; that is asked so often that it is an attribute and no property."""

    final: bool
    """True once nothing about it can change any more."""

    def __new__(cls, value: str, final: bool = False) -> Self:
        """A member: its value, and `True` beside it where it is final."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.final = final
        return member


class TaskState(_State):
    """Where a task is; the last three are final."""

    PLANNING = "planning"
    RUNNING = "running"
    CHECKING = "checking"
    SUCCEEDED = "succeeded", True
    FAILED = "failed", True
    CANCELLED = "cancelled", True


class StepState(_State):
    """Where a step is; the last four are final."""

    WAITING = "waiting"
    READY = "ready"
    INFERRING = "inferring"
    EXPANDED = "expanded"
    CHECKING = "checking"
    DONE = "done", True
    FAILED = "failed", True
    CANCELLED = "cancelled", True
    SKIPPED = "skipped", True


class Segment(Message):
    """A stretch of time of one attempt, or of the critical path."""

    step: str | None = None
    """Absent for planning and the final checks, and inside an attempt, where it is plain."""
    what: Literal["planning", "waiting", "queueing", "loading", "backoff", "inference", "gates", "retry", "checks"]
    """`planning`: from acceptance to the adopted plan. `queueing`: for a slot and for cores, or for a free gate
    service. `loading`: for a slot while no worker of the model was READY. `backoff`: the pause before a further
    attempt. `inference`, `gates`: an attempt that was, or may still be, good. `retry`: a run that came to nothing,
    failed or lost with its worker. `checks`: the gates of the task. `waiting`: for what none of these tells, such as a
    step that was added to the graph later."""
    start_ms: Millis
    end_ms: Millis


class Setback(Message):
    """Work that came to nothing without a word about the answer, and what followed: no attempt was used up."""

    at_ms: Millis
    work: str
    """`inference` or `gates` of an attempt; `plan`, `checks` or `memory` of the task."""
    category: str
    code: str
    message: str
    action: str
    """`rerun` or `backoff`: the same again; `lateral`: on another model; else what the failure table said."""
    rule: str
    """The rule that said so, with its line in failures.yaml."""
    delay_ms: Millis = 0


class AttemptView(Message):
    """One try of a step."""

    number: int = Field(ge=1)
    role: str
    model: str
    key: str
    """Idempotency key of its inference call."""
    queued_ms: Millis
    started_ms: Millis | None = None
    """When the hub handed it to a worker; absent while it waits for a slot."""
    inferred_ms: Millis | None = None
    """When the answer was accepted."""
    ended_ms: Millis | None = None
    """When its gates were done too."""
    worker: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that its slot had, or was given, instead of reading them."""
    generated_tokens: int = 0
    first_token_ms: float = 0
    """From the start of the request to the engine until its first piece of text."""
    repaired: bool = False
    """The first answer was not the JSON it should be, and the model mended it; the figures hold both."""
    draft_tokens: int = 0
    """Tokens guessed ahead of the model; 0 where its process did not."""
    accepted_tokens: int = 0
    """Those among them that the model took over."""
    tokens_per_s: float = 0
    """Effective speed of decoding, guesses included; 0 where the engine gives no time."""
    gates: list[GateResult] = Field(default_factory=list)
    failure: Failure | None = None
    action: str | None = None
    """What the failure table said to do next: retry, escalate or fail, and by which rule."""
    arm: str | None = None
    """`plain` or `harder` (a larger budget) for the last attempt of a role before an escalation, `escalated` for the
    first one after it."""
    told: str | None = None
    """What its prompt said about earlier attempts, word for word; absent in a first one."""
    setbacks: list[Setback] | None = None
    """The newest runs of it that came to nothing; absent if there were none."""
    segments: list[Segment] = Field(default_factory=list)
    """Where its time went, from `queued_ms` on without gap or overlap; the stretch it is in is not among them."""


class StepView(Message):
    """A step with everything that happened to it."""

    id: str
    actor: str
    """The role it was planned for; the attempts say which role did it."""
    action: str
    state: StepState
    persona: str | None = None
    agent: str | None = None
    """The sub-agent that this step is an assignment of."""
    needs: list[str]
    """Steps that had to be finished first."""
    ready_ms: Millis | None = None
    ended_ms: Millis | None = None
    losses: int = 0
    """Workers that died while they had this step."""
    attempts: list[AttemptView]
    failure: Failure | None = None


class SubAgentView(Message):
    """A sub-agent that a step made while the task ran."""

    name: str
    role: str
    system_prompt: str
    """As the planning model wrote it, its first 500 characters."""
    persona: str
    """What its prompt is kept as: steps of this and of later tasks may name it. Another name than its own where that
    had another prompt already."""
    turn: int = Field(ge=1)
    """Turn of the spawning step in which it was made."""
    steps: list[str] = Field(default_factory=list)
    """Its assignments, in order: steps of the task, whose results went back to the spawning step and nowhere else."""
    done: int = Field(default=0, ge=0)
    failed: int = Field(default=0, ge=0)
    """Assignments that came to nothing; the spawning step was told why."""
    generated_tokens: int = Field(default=0, ge=0)
    result: str = ""
    """What it answered last, its first 500 characters."""


class RefusedCall(Message):
    """A tool call that was answered with an error instead of being carried out."""

    turn: int = Field(ge=1)
    tool: str
    agent: str
    code: str
    message: str


class SwarmView(Message):
    """What a spawning step did."""

    step: str
    turns: int = Field(ge=0)
    """Turns of its model so far; each is the step `<step>.turn<n>`."""
    tool_calls: int = Field(ge=0)
    """All of them, refused ones included."""
    agents: list[SubAgentView]
    refused: list[RefusedCall]
    """The newest 50."""
    generated_tokens: int = Field(default=0, ge=0)
    """By its turns and its sub-agents together."""
    ending: str | None = Field(default=None, max_length=1_000)
    """Why its model was made to answer, and what stands for an answer that it did not give; absent = neither."""


class PredictedPath(Message):
    """The longest chain of steps as expected when the plan was adopted, from the durations learned until then."""

    length_ms: Millis
    """Inference of its steps; queueing, gates and retries are not in it."""
    steps: list[str]
    """First step first."""


class CriticalPath(Message):
    """What determined the wall clock of a task; all durations in milliseconds."""

    wall_ms: Millis
    """From acceptance to the end."""
    work_ms: Millis
    """Planning, inference, gates, retries and final checks of all attempts together; nothing that is waiting."""
    parallelism: float
    """work / wall: 1 is serial, below 1 the task mostly waited."""
    path: list[Segment]
    """Covers the wall clock without gap or overlap, from acceptance to the end."""
    slack_ms: dict[str, int]
    """Per finished step: how much later it could have ended without delaying the task."""
    overlapping_steps: int
    """Steps whose inference overlapped in time with that of another step of this task."""
    predicted: PredictedPath | None = None
    """Absent where no plan was adopted."""
    critical_steps: int = Field(default=0, ge=0)
    """Kimi's CriticalSteps over the stages of the graph: sum over t of S_main(t) + max over i of S_sub,i(t), counted in
    attempts. A stage is the set of steps of equal depth; planning, the final checks and the only step of a stage are
    main, the steps of a wider stage are sub."""
    total_steps: int = Field(default=0, ge=0)
    """Planning, attempts that began, and final checks: what CriticalSteps would be if nothing ran side by side."""
    lower_bound_ms: Millis = 0
    """No schedule of these very attempts is shorter: planning and final checks, and between them the longest chain by
    measured durations, or the work of one model over its slots."""
    bound_by: str = ""
    """`chain`, or the model whose slots bound it; empty where nothing was planned."""


class PlanView(Message):
    """How the plan came about."""

    source: str
    reason: str
    removed_edges: list[RemovedEdge]
    decisions: list[RoutingDecision]
    similar: list[Episode]
    lessons: list[Lesson] = Field(default_factory=list)
    """What such tasks have failed with and what helped, as told in the prompts."""
    added_edges: list[AddedEdge] | None = None
    """Dependencies that the plan lacked; absent if there were none."""
    as_written: PlanShape | None = None
    """The plan before dependencies were dropped and added; absent in tasks of before this was kept."""
    as_run: PlanShape | None = None
    """The plan as it was adopted."""
    versions: list[PlanVersion] | None = None
    """Every version, oldest first; absent where the first one is the only one."""


class Usage(Message):
    """Totals over all attempts, failed ones included."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    attempts: int = 0


class TaskView(Message):
    """A task as it stands; the result, once `state` is final."""

    task_id: str
    state: TaskState
    objective: str
    task_type: str
    priority: str
    created_ms: Millis
    ended_ms: Millis | None = None
    last_seq: int
    """Number of the newest event of this task."""
    plan: PlanView | None = None
    steps: list[StepView] = Field(default_factory=list)
    artefacts: list[Artefact] = Field(default_factory=list)
    """What the task was asked for: outputs that no step consumes. `task.artefact` fetches any other by name."""
    gates: list[GateResult] = Field(default_factory=list)
    """Checks of the final artefacts."""
    setbacks: list[Setback] | None = None
    """The same of the plan, the final checks and what memory is told; absent if there were none."""
    waiting: list[str] = Field(default_factory=list)
    """Why steps that could run do not, for people; empty when nothing waits."""
    failure: Failure | None = None
    swarms: list[SwarmView] | None = None
    """Sub-agents by the step that made them; absent where none spawns."""
    usage: Usage = Field(default_factory=Usage)
    critical_path: CriticalPath | None = None


class TaskEvent(Message):
    """One thing that happened to a task, in order; journalled before it is sent, tokens excepted."""

    task_id: str
    seq: int
    """Rising per task; `step.tokens` repeats the last one, since it is not journalled."""
    at_ms: Millis
    event: str
    step: str | None = None
    attempt: int | None = None
    fields: dict[str, Any] = Field(default_factory=dict)


class TaskQuery(Message):
    """Body of `task.show`."""

    task_id: str = Field(max_length=128)


class CancelQuery(Message):
    """Body of `task.cancel`: the whole task, or one step with everything that needs it."""

    task_id: str = Field(max_length=128)
    step: str | None = Field(default=None, max_length=128)
    reason: str = Field(default="", max_length=1_000)
    """Why; goes into the journal."""


class Watch(Message):
    """Body of `task.watch`: events after `after_seq`, then `task.result`."""

    task_id: str = Field(max_length=128)
    after_seq: int = Field(default=0, ge=0)
    quiet: bool = False
    """Only the result, no events: for whoever just waits."""


class ArtefactQuery(Message):
    """Body of `task.artefact`."""

    task_id: str = Field(max_length=128)
    name: str = Field(max_length=128)


class ArtefactReply(Message):
    """One artefact of a task."""

    artefact: Artefact


class Cancelled(Message):
    """The task's state after the cancellation; a finished task stays what it was."""

    task_id: str
    state: TaskState


class ListQuery(Message):
    """Body of `task.list`."""

    limit: int = Field(default=50, ge=1, le=1_000)
    states: list[TaskState] = Field(default_factory=list)


class TaskSummary(Message):
    """One line of a listing."""

    task_id: str
    state: TaskState
    task_type: str
    objective: str
    created_ms: Millis
    ended_ms: Millis | None = None
    steps_done: int
    steps_total: int


class Listing(Message):
    """Newest first."""

    tasks: list[TaskSummary]
