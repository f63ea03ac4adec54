"""The engine that does nothing: it measures what the bus costs, so its own path is as short as it can be."""

from __future__ import annotations

from typing import Final

from protocol.codec import unpack_map
from protocol.messages.infer import InferFinal
from services.kit.service import Call, Handler

_MARK: Final = b"json_schema"


def noop_handler(model: str) -> Handler:
    """A synchronous handler that answers `ok`, or `{}` where a JSON Schema is asked for."""

    def final(text: str) -> InferFinal:
        return InferFinal(
            text=text, finish_reason="stop", model=model, engine="noop", prompt_tokens=0, generated_tokens=0
        )

    plain, empty_object = final("ok"), final("{}")

    def handle(call: Call) -> InferFinal:
        # The body is read only where the answer may depend on it: reading it would be half of the cost.
        if _MARK in call.body and unpack_map(call.body).get("json_schema") is not None:
            return empty_object
        return plain

    return handle
