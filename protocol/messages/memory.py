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
    """A decision as taken: stored once per id, before its outcome is known."""

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


class Outcome(Message):
    """What became of a decision; the first outcome per id counts, later ones are duplicates."""

    decision_id: str = Field(max_length=128)
    reward: float = Field(ge=0, le=1)
    """1 = succeeded, 0 = failed on quality. Infrastructure faults produce no outcome at all."""
    seconds: float = Field(ge=0)
    attempts: int = Field(ge=1)
    failure_code: str | None = None
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


class Option(Message):
    """One choice that could be taken."""

    choice: str = Field(min_length=1, max_length=128)
    model: str = Field(default="", max_length=128)
    """As in DecisionRecord."""
    prompt: str = Field(default="", max_length=128)
    """As in DecisionRecord."""
    cost: float = Field(default=0.0, ge=0, le=1)
    """Price of taking it, in units of reward; expected seconds are counted by memory itself."""


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


class MemoryRequest(Message):
    """Body of `memory.request`."""

    ask: Annotated[RecordDecisions | RecordOutcomes | Retrieve | Explain | Stats | Advise, Field(discriminator="op")]


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


class Explained(Message):
    """One decision with its outcome, if it has one yet."""

    decision: DecisionRecord
    outcome: Outcome | None = None
    values: list[Value] = Field(default_factory=list)
    """Values of the choice and of its alternatives, where any outcome was seen."""


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


class MemoryFinal(Message):
    """Answer to any `memory.request`; the fields that the operation asks for are set."""

    stored: int = 0
    """Rows that were new."""
    duplicates: int = 0
    """Rows that were known already and had no effect."""
    episodes: list[Episode] = Field(default_factory=list)
    explained: list[Explained] = Field(default_factory=list)
    advice: list[Advised] = Field(default_factory=list)
    """One per question, in their order."""
    stats: dict[str, int] = Field(default_factory=dict)
