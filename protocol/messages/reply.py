"""The two endings of a request that are not its final: `error` and `refused`."""

from __future__ import annotations

from pydantic import Field

from protocol.messages.base import Message, Millis
from protocol.messages.failure import Failure


class ErrorReply(Message):
    """Body of `error`: the request has ended with a typed failure."""

    failure: Failure


class Refused(Message):
    """Body of `refused`: nothing was accepted, the sender may try again."""

    reason: str = Field(max_length=1_000)
    retry_after_ms: Millis
