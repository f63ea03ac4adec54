"""Inference calls: what a model service is asked, what it streams, what it returns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from protocol.limits import MAX_GRAMMAR_CHARS
from protocol.messages.base import Message


class ChatMessage(Message):
    """One turn of the prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


class Sampling(Message):
    """Decoding parameters; absent ones keep llama.cpp's defaults."""

    temperature: float | None = Field(default=None, ge=0, le=5)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repeat_penalty: float | None = Field(default=None, gt=0)
    seed: int | None = Field(default=None, ge=0)


class AbortLimits(Message):
    """When an answer is stopped while it is decoded, with category EARLY_ABORT."""

    repetition: bool = True
    """Stop an answer that repeats itself."""
    repeated_chars: int = Field(default=400, ge=80, le=100_000)
    """Characters that a loop must cover to count as one; four times as many where the answer has the form of data."""
    runaway_tokens: int | None = Field(default=None, ge=1)
    """Tokens that no good answer needs, below `max_tokens`; absent = only `max_tokens` ends it."""
    entropy_nats: float | None = Field(default=None, gt=0, le=20)
    """Mean entropy per token over 64 tokens above which the model is lost; absent = not measured. Costs log
    probabilities of ten candidates for each token, so at most ln 11 = 2.4 is ever seen."""


class InferRequest(Message):
    """One generation on one slot."""

    role: str
    """For logs and figures; the model is chosen by the header's `dst`."""
    messages: list[ChatMessage] = Field(min_length=1, max_length=64)
    max_tokens: int = Field(ge=1)
    sampling: Sampling = Field(default_factory=Sampling)
    json_schema: dict[str, Any] | None = None
    """Constrain decoding to this JSON Schema; the service checks the answer against it again."""
    judged: bool = True
    """False = whoever asks judges the answer part by part: nothing is checked, and nothing repaired, against
    `json_schema`, which then only constrains decoding."""
    grammar: str | None = Field(default=None, max_length=MAX_GRAMMAR_CHARS)
    """Constrain decoding to this GBNF grammar; excludes `json_schema`."""
    json_output: bool = False
    """The answer is meant to be JSON, though not constrained to a schema. One that is not, or that breaks its schema,
    gets one repair with the tokens and the time that are left."""
    early_abort: AbortLimits | None = None
    """Stop an answer that is not worth its slot any more; absent = never."""
    stream: bool = False
    """Send `infer.partial` while decoding."""

    @model_validator(mode="after")
    def _one_constraint(self) -> InferRequest:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar exclude each other: give one of them")
        return self


class InferPartial(Message):
    """A piece of the answer; pieces may be joined on the way. The final has the whole text, a repaired one another."""

    text: str
    generated_tokens: int = Field(ge=0)
    """Tokens so far, at least: pieces that the engine has sent."""
    start_chars: int | None = Field(default=None, ge=0)
    """Characters of the answer before this piece, so that whoever reads along sees that one got lost; absent from
    services of before this was told."""


class InferFinal(Message):
    """The whole answer with its figures, as llama.cpp reports them."""

    text: str
    finish_reason: Literal["stop", "length"]
    model: str
    """Registry name of the model entry."""
    engine: str
    prompt_tokens: int = Field(ge=0)
    """Tokens of the prompt, cached ones included."""
    cached_tokens: int = Field(default=0, ge=0)
    generated_tokens: int = Field(ge=0)
    prompt_ms: float = Field(default=0, ge=0)
    generate_ms: float = Field(default=0, ge=0)
    first_token_ms: float = Field(default=0, ge=0)
    """From the start of the HTTP request to the first piece of text."""
    repaired: bool = False
    """The first answer was not what the schema asks for; this is the repair, and the figures hold both."""
    draft_tokens: int = Field(default=0, ge=0)
    """Tokens guessed ahead by a draft model or a lookup; 0 where the process did not speculate."""
    accepted_tokens: int = Field(default=0, ge=0)
    """Those among them that the model took over: each spared it a step."""
