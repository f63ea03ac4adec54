"""Inference calls: what a model service is asked, what it streams, what it returns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

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


class InferRequest(Message):
    """One generation on one slot."""

    role: str
    """For logs and figures; the model is chosen by the header's `dst`."""
    messages: list[ChatMessage] = Field(min_length=1, max_length=64)
    max_tokens: int = Field(ge=1)
    sampling: Sampling = Field(default_factory=Sampling)
    json_schema: dict[str, Any] | None = None
    """Constrain decoding to this JSON Schema; the service checks the answer against it again."""
    grammar: str | None = None
    """Constrain decoding to this GBNF grammar."""
    stream: bool = False
    """Send `infer.partial` while decoding."""


class InferPartial(Message):
    """A piece of the answer; pieces may be joined on the way, the final repeats the whole text."""

    text: str
    generated_tokens: int = Field(ge=0)
    """Tokens so far."""


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
