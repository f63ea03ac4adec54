"""What is said to requests that share a key while its work has not ended. Pure.

The work is done once, and the newest request under its key gets the answer: whoever lost its connection or its patience
asks again and finds what is under way. The request before it ends with `superseded`. What asks for something else is
`taken`: it would get an answer to a question that it has not asked. Both are POLICY: asked once more under the same
key, two that wait at the same time would only displace each other for ever.

A request is told by its peer and its id, so that one that is repeated after a lost connection displaces nobody. Whose
key it is, and whether it is known, is the business of `broker.py` and `batches.py`.
"""

from __future__ import annotations

from protocol.errors import BadFrame
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from services.scheduler.calls import Call


def superseded(key: str) -> ErrorReply:
    """The ending of a request whose place a newer one has taken."""
    message = (
        f"a newer request under the key {key!r} has taken the place of this one and gets the answer: "
        "wait for that, or ask under a key of your own"
    )
    failure = Failure(code="call.superseded", category=Category.POLICY, origin="scheduler", message=message[:8_000])
    return ErrorReply(failure=failure)


def taken(key: str) -> BadFrame:
    """Why a request cannot join the work that is under way under its key."""
    message = f"the key {key!r} belongs to another request that has not ended: ask under another key, or when it has"
    return BadFrame("call.key_taken", message)


def check_joins(known: Call, call: Call) -> None:
    """Raise BadFrame if a call of another peer cannot take the place of the one that has its key."""
    if known.requester is None:
        raise BadFrame("call.key", "this key belongs to a call of the hub itself")
    if (known.kind, known.target, known.body) != (call.kind, call.target, call.body):
        raise taken(call.key)


def withdraws(corr: str | None, request: str | None) -> bool:
    """Whether a cancel that names `corr` is about this request; one without stands for whatever has its key."""
    return corr is None or corr == request
