"""Memory calls: decisions, their outcomes, episodes, and what is remembered about a text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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
    """Digest of the registry in force, so that values can decay when models or prompts change."""


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


class MemoryRequest(Message):
    """Body of `memory.request`."""

    ask: Annotated[RecordDecisions | RecordOutcomes | Retrieve | Explain | Stats, Field(discriminator="op")]


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


class MemoryFinal(Message):
    """Answer to any `memory.request`; the fields that the operation asks for are set."""

    stored: int = 0
    """Rows that were new."""
    duplicates: int = 0
    """Rows that were known already and had no effect."""
    episodes: list[Episode] = Field(default_factory=list)
    explained: list[Explained] = Field(default_factory=list)
    stats: dict[str, int] = Field(default_factory=dict)
