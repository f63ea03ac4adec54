"""`llm_batch`: many prompts for one role in one request, spread over the slots of its model by the hub."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from protocol.limits import MAX_ARTEFACT_CHARS, MAX_BATCH_PROMPTS, MAX_GRAMMAR_CHARS
from protocol.messages.base import Message, Millis, Name
from protocol.messages.failure import Failure

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_ARTEFACT_CHARS)]


class BatchRequest(Message):
    """Every prompt is answered by the role as one call of its own; the header's `deadline` bounds all of them."""

    role: Name
    """Role from the registry: it brings model, system prompt, sampling and limits."""
    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_BATCH_PROMPTS)
    max_tokens: int | None = Field(default=None, ge=1, le=131_072)
    """Bound on generated tokens of one answer; absent = the role's."""
    json_schema: dict[str, Any] | None = None
    """Every answer is JSON under this schema."""
    grammar: str | None = Field(default=None, max_length=MAX_GRAMMAR_CHARS)
    """GBNF grammar that constrains every answer; excludes `json_schema`."""
    concurrency: int | None = Field(default=None, ge=1, le=1_024)
    """Most calls of this batch at the same time; absent = the slots of the model."""

    @model_validator(mode="after")
    def _one_constraint(self) -> BatchRequest:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar exclude each other: give one of them")
        return self


class BatchPartial(Message):
    """How far a batch is; a later one takes the place of an earlier one."""

    done: int = Field(ge=0)
    """Prompts with an answer."""
    failed: int = Field(ge=0)
    running: int = Field(ge=0)
    """Calls at a worker now."""
    total: int = Field(ge=1)
    generated_tokens: int = Field(ge=0)
    """Of the answers so far."""


class BatchAnswer(Message):
    """What became of one prompt: `text`, or `failure`."""

    text: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    failure: Failure | None = None
    model: str | None = None
    """The model that wrote the text: the lateral one of the role where its own was not served."""
    prompt_tokens: int = Field(default=0, ge=0)
    cached_tokens: int = Field(default=0, ge=0)
    generated_tokens: int = Field(default=0, ge=0)
    first_token_ms: float = Field(default=0, ge=0)
    repaired: bool = False
    """See InferFinal."""
    started_ms: Millis | None = None
    """When a worker was given it, the last time; absent if none ever was."""
    ended_ms: Millis = 0
    losses: int = Field(default=0, ge=0)
    """Workers that were lost with it; it ran again."""


class BatchFinal(Message):
    """The answers in the order of the prompts, each with its own success or failure."""

    role: str
    model: str
    """That the last prompts went to."""
    answers: list[BatchAnswer]
    widest: int = Field(ge=0)
    """Most calls that were at workers at the same time."""
    wall_ms: Millis
    """From the arrival of the request to the last answer."""
