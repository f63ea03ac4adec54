"""Memory calls: decisions, their outcomes, episodes, and what is remembered about a text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.messages.base import Message, Millis


class Episode(Message):
    """One finished task as it is remembered."""

    task_id: str = Field(max_length=128)
    task_type: str
    objective: str
    plan_source: str = ""
    steps: int = Field(default=0, ge=0)
    succeeded: bool
    failure_codes: list[str] = Field(default_factory=list, max_length=64)
    seconds: float = Field(ge=0)
    at_ms: Millis = 0
    similarity: float | None = None
    """Cosine to the query; only in answers."""
    q: float | None = None
    """Estimated probability of success of what was done then; only in answers."""


class DecisionRecord(Message):
    """A decision as taken: stored once per id, before or together with its outcome."""

    decision_id: str = Field(max_length=128)
    task_id: str = Field(max_length=128)
    step: str | None = None
    subject: str = Field(max_length=64)
    choice: str = Field(max_length=128)
    alternatives: list[str] = Field(default_factory=list, max_length=64)
    propensity: float = Field(gt=0, le=1)
    rule: str = ""
    task_type: str
    features: dict[str, float] = Field(default_factory=dict)
    registry_digest: str = ""
    """Digest of the registry in force."""
    cluster: str = Field(default="", max_length=128)
    """Name of the kind of work, where there is one; outcomes of one cluster speak for each other."""
    model: str = Field(default="", max_length=128)
    """Digest of the model entry behind the choice: outcomes of another model do not count for this one."""
    prompt: str = Field(default="", max_length=128)
    """Digest of the prompt behind the choice: outcomes under another prompt count less."""


class Cure(Message):
    """A failure that a step met, and what then let it succeed."""

    failure_code: str = Field(max_length=128)
    finding: str = Field(default="", max_length=200)
    """The first thing that was wrong, in the words of the check."""
    action: str = Field(max_length=32)
    """What followed the failure: `retry` or `escalate`."""
    role: str = Field(max_length=128)
    """Role whose attempt then succeeded."""


class Spread(Message):
    """How the steps of a finished task were spread: what the staged reward of its decomposition is made of.

    A level holds all steps with equally many steps on the longest chain before them; *beside others* is a step whose
    level has another one.
    """

    width: int = Field(ge=1)
    """Steps of the widest level; 1 = one after the other."""
    assigned: int = Field(ge=0)
    """Steps beside others, sub-steps and added ones included."""
    finished: int = Field(ge=0)
    """Those of them that got done."""
    useful: int = Field(ge=0)
    """Those of them whose result is neither empty nor word for word another one's."""

    @model_validator(mode="after")
    def _each_is_part_of_the_one_before(self) -> Spread:
        if not self.useful <= self.finished <= self.assigned:
            raise ValueError("expected useful <= finished <= assigned")
        return self


class Staged(Message):
    """The staged reward of one decomposition, as it was credited: `reward + weight · (parallel + finish)`."""

    stage: int = Field(ge=0)
    """Decompositions of this kind (type of task and cluster) that were credited before."""
    weight: float = Field(ge=0, le=1)
    """What both terms counted then; annealed from 0.1 to 0."""
    parallel: float = Field(ge=0, le=1)
    """1 - 1/width."""
    finish: float = Field(ge=0, le=1)
    """Finished per assigned step; 1 where none was assigned."""
    shaped: float = Field(ge=0, le=2)
    """The whole sum. It steers what is tried and is never reported as quality: that is `Outcome.reward`."""


class Outcome(Message):
    """What became of a decision; the first outcome per id counts, later ones are duplicates."""

    decision_id: str = Field(max_length=128)
    reward: float = Field(ge=0, le=1)
    """1 = succeeded, 0 = failed on quality. Infrastructure faults produce no outcome at all."""
    seconds: float = Field(ge=0)
    attempts: int = Field(ge=1)
    failure_code: str | None = None
    cures: list[Cure] = Field(default_factory=list, max_length=8)
    """Only where the step succeeded after failures, and only with the decision about its role."""
    spread: Spread | None = None
    """Only with a decision about the decomposition that had an alternative."""
    staged: Staged | None = None
    """Written by memory when it takes an outcome with `spread`. What a sender says is replaced, unless imported."""
    at_ms: Millis


class RecordDecisions(Message):
    """Store decisions; those already known are left as they are."""

    op: Literal["decide"] = "decide"
    decisions: list[DecisionRecord] = Field(max_length=6_000)
    text: str = Field(default="", max_length=65_536)
    """What the decisions were taken about; what is learned from their outcomes counts for texts like it."""


class RecordOutcomes(Message):
    """Score decisions, and store the episode when the task has ended."""

    op: Literal["outcome"] = "outcome"
    decisions: list[DecisionRecord] = Field(default_factory=list, max_length=6_000)
    """What is scored, stored before the outcomes; those already known are left as they are."""
    text: str = Field(default="", max_length=65_536)
    """What the decisions were taken about, see RecordDecisions."""
    outcomes: list[Outcome] = Field(default_factory=list, max_length=6_000)
    episode: Episode | None = None


class Retrieve(Message):
    """Which finished tasks resemble this text?"""

    op: Literal["retrieve"] = "retrieve"
    text: str
    task_type: str | None = None
    k: int = Field(default=3, ge=1, le=16)


class Explain(Message):
    """What is known about these decisions and about the choices they were taken from?"""

    op: Literal["explain"] = "explain"
    decision_ids: list[str] = Field(max_length=6_000)


class Stats(Message):
    """How large is the memory, and are its projections in step with the log?"""

    op: Literal["stats"] = "stats"


class Values(Message):
    """What are all choices about this subject worth?"""

    op: Literal["values"] = "values"
    subject: str = Field(max_length=64)


class Arms(Message):
    """What have the choices about this subject earned, place by place, since each last changed?"""

    op: Literal["arms"] = "arms"
    subject: str = Field(max_length=64)


class Row(Message):
    """One row of the log as it is exported: exactly one of the three."""

    seq: int = Field(default=0, ge=0)
    """Its number in the log that it comes from; only the order matters to the one that takes it in."""
    decision: DecisionRecord | None = None
    outcome: Outcome | None = None
    episode: Episode | None = None
    text: str = Field(default="", max_length=65_536)
    """What a decision was taken about, see RecordDecisions."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Row:
        if (self.decision is not None) + (self.outcome is not None) + (self.episode is not None) != 1:
            raise ValueError("a row holds exactly one of decision, outcome, episode")
        return self


class Export(Message):
    """Rows after a number, in order; ask again with the last one's number until none comes."""

    op: Literal["export"] = "export"
    after: int = Field(default=0, ge=0)
    limit: int = Field(default=500, ge=1, le=1_000)


class Import(Message):
    """Store exported rows in this order; those already known are left as they are. All of them or none."""

    op: Literal["import"] = "import"
    rows: list[Row] = Field(max_length=1_000)


class Verify(Message):
    """Do values, vectors and graph say what the log says?"""

    op: Literal["verify"] = "verify"


class Rebuild(Message):
    """Make values, vectors and graph anew from the log, while questions are still answered."""

    op: Literal["rebuild"] = "rebuild"


class Forget(Message):
    """Remove for good. What is given is removed together; at least one of the three."""

    op: Literal["forget"] = "forget"
    task_ids: list[str] = Field(default_factory=list, max_length=6_000)
    """Everything about these tasks."""
    before_ms: Millis | None = None
    """Everything about tasks whose last outcome or end is older than this."""
    choice: str | None = Field(default=None, max_length=128)
    """Every decision for this choice with its outcome, and its value; the tasks themselves stay."""
    subject: str | None = Field(default=None, max_length=64)
    """Limits `choice` to decisions about this."""

    @model_validator(mode="after")
    def _something(self) -> Forget:
        if not self.task_ids and self.before_ms is None and self.choice is None:
            raise ValueError("forget needs task_ids, before_ms or choice")
        if self.subject is not None and self.choice is None:
            raise ValueError("subject only limits choice, which is absent")
        return self


class Option(Message):
    """One choice that could be taken."""

    choice: str = Field(min_length=1, max_length=128)
    model: str = Field(default="", max_length=128)
    """As in DecisionRecord."""
    prompt: str = Field(default="", max_length=128)
    """As in DecisionRecord."""
    cost: float = Field(default=0.0, ge=0, le=1)
    """Price of taking it, in units of reward; expected seconds are counted by memory itself."""
    width: int | None = Field(default=None, ge=1)
    """Of a decomposition: steps that it lets run side by side. Where all options say it the staged reward counts."""


class Question(Message):
    """Something to be chosen, with what the rules would choose."""

    key: str = Field(max_length=128)
    """Comes back in the answer."""
    subject: str = Field(max_length=64)
    cluster: str = Field(default="", max_length=128)
    """As in DecisionRecord; where it is absent memory finds a cluster by the text."""
    rules_choice: str = Field(max_length=128)
    options: list[Option] = Field(min_length=2, max_length=64)

    @model_validator(mode="after")
    def _options_are_distinct_and_hold_the_rules_choice(self) -> Question:
        choices = [option.choice for option in self.options]
        if len(set(choices)) != len(choices):
            raise ValueError("options: a choice occurs twice")
        if self.rules_choice not in choices:
            raise ValueError(f"rules_choice: {self.rules_choice!r} is not among the options")
        return self


class Advise(Message):
    """What should be chosen? Records nothing."""

    op: Literal["advise"] = "advise"
    text: str = Field(max_length=65_536)
    task_type: str = Field(max_length=64)
    questions: list[Question] = Field(min_length=1, max_length=64)
    seed: int = Field(ge=0, lt=2**63)
    """Decides what is tried; the same seed and the same memory give the same answer."""
    retrieve: Retrieve | None = None
    """Answered with it, for who can wait only once. A text without any word finds nothing here and is no error."""


class MemoryRequest(Message):
    """Body of `memory.request`."""

    ask: Annotated[
        RecordDecisions
        | RecordOutcomes
        | Retrieve
        | Explain
        | Stats
        | Advise
        | Values
        | Arms
        | Export
        | Import
        | Verify
        | Rebuild
        | Forget,
        Field(discriminator="op"),
    ]


class Value(Message):
    """The learned value of one choice."""

    subject: str
    task_type: str
    choice: str
    q: float
    """Estimated probability of success, in [0, 1]."""
    count: int
    """Scored outcomes behind it."""
    mean_seconds: float


class ArmValue(Message):
    """What one choice has earned in one kind of work, under the model and prompt that it has now."""

    task_type: str
    cluster: str
    """Kind of work, as in DecisionRecord."""
    choice: str
    prompt: str = ""
    """As in DecisionRecord."""
    outcomes: int = Field(ge=0)
    mean_reward: float = Field(ge=0, le=1)
    deviation: float = Field(ge=0)
    """Standard deviation of the expected reward after so many outcomes, counting from a uniform prior."""
    mean_seconds: float = Field(ge=0)
    """Of the choice in all kinds of work of this task type."""


class Explained(Message):
    """One decision with its outcome, if it has one yet."""

    decision: DecisionRecord
    outcome: Outcome | None = None
    values: list[Value] = Field(default_factory=list)
    """Values of the choice and of its alternatives, where any outcome was seen."""


class Lesson(Message):
    """A failure of similar tasks and what cured it."""

    failure_code: str = Field(max_length=128)
    finding: str = Field(default="", max_length=200)
    action: str = Field(max_length=32)
    role: str = Field(max_length=128)
    times: int = Field(ge=1)
    """How often it has helped in this kind of task."""


class Difference(Message):
    """Something derived that is not what the log says."""

    part: Literal["log", "values", "vectors", "graph"]
    what: str


class ArmView(Message):
    """What is known of one option at this text."""

    choice: str
    expected_reward: float = Field(ge=0, le=1)
    deviation: float = Field(ge=0)
    """Standard deviation of that expectation."""
    value: float
    """Expected reward less cost and slowness: what is compared."""
    chance: float = Field(ge=0, le=1)
    """Probability with which it was going to be taken."""
    outcomes: float = Field(ge=0)
    """Outcomes behind it, less what was forgotten."""
    similar_outcomes: int = Field(ge=0)
    """Those of the same cluster."""
    seconds: float = Field(ge=0)
    """How long it takes on average; 0 where nothing is known."""
    width: int | None = None
    """As asked."""
    staged: float = Field(default=0.0, ge=0, le=1)
    """What the terms of the staged reward add to its value at this stage, see Staged."""


class Advised(Message):
    """What to choose, and why."""

    key: str = Field(max_length=128)
    subject: str
    rules_choice: str
    learned_choice: str
    """The option of highest value."""
    choice: str
    """The one to take."""
    won: Literal["rules", "learned", "exploration"]
    propensity: float = Field(gt=0, le=1)
    """Probability with which `choice` was taken."""
    confidence: float = Field(ge=0, le=1)
    """Probability that the learned choice is better than the rules', or than the next best where they agree."""
    evidence: float = Field(ge=0)
    """Outcomes behind the learned choice."""
    cluster: str = ""
    arms: list[ArmView] = Field(default_factory=list, max_length=64)
    why: str = Field(max_length=2_000)


class WidthReport(Message):
    """What became of the last decisions whether to split: too few splits, or too many?

    Whether width pays is judged per kind of task (type and cluster), by quality and seconds of all its outcomes on
    both sides; where one side has too few of them, by what the rules would have chosen.
    """

    tasks: int = Field(ge=0)
    """Decisions with an outcome that were looked at: the last ones, at most 100."""
    quality: float = Field(ge=0, le=1)
    """Their mean raw reward."""
    shaped: float = Field(ge=0, le=2)
    """Their mean staged reward, for comparison."""
    stage: int = Field(ge=0)
    """Decompositions credited so far, of the kind (type of task and cluster) that is furthest."""
    weight: float = Field(ge=0, le=1)
    """What the two terms count now for the kind that was credited last."""
    split: int = Field(ge=0)
    """Tasks with steps beside each other."""
    serial: int = Field(ge=0)
    """Tasks without."""
    width_pays: int = Field(ge=0)
    """Tasks of a kind where splitting pays."""
    serial_though_width_pays: int = Field(ge=0)
    """Of `width_pays` those that ran one step after the other."""
    split_in_vain: int = Field(ge=0)
    """Of `split` those with fewer than two useful results, or of a kind where splitting does not pay."""
    serial_collapse: float = Field(ge=0, le=1)
    """serial_though_width_pays / width_pays; 0 where there was none."""
    spurious_parallelism: float = Field(ge=0, le=1)
    """split_in_vain / split; 0 where there was none."""


class MemoryFinal(Message):
    """Answer to any `memory.request`; the fields that the operation asks for are set."""

    stored: int = 0
    """Rows that were new."""
    duplicates: int = 0
    """Rows that were known already and had no effect."""
    episodes: list[Episode] = Field(default_factory=list)
    lessons: list[Lesson] = Field(default_factory=list, max_length=16)
    """What similar tasks have failed with and what helped, most helpful first; only with `retrieve`."""
    explained: list[Explained] = Field(default_factory=list)
    values: list[Value] = Field(default_factory=list)
    arms: list[ArmValue] = Field(default_factory=list)
    """By task type, kind of work and choice."""
    rows: list[Row] = Field(default_factory=list)
    differences: list[Difference] = Field(default_factory=list)
    forgotten: int = 0
    """Rows removed from the log."""
    advice: list[Advised] = Field(default_factory=list)
    """One per question, in their order."""
    stats: dict[str, int] = Field(default_factory=dict)
    width: WidthReport | None = None
    """Only with `stats`."""
