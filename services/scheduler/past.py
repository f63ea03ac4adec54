"""What can still be said about a task whose facts are gone or damaged.

Retention keeps the final view of an old task and later only its id; answering about them needs no state, so it
stands apart from the hub's machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.codec import unpack_body
from protocol.errors import BadFrame
from protocol.messages.base import Message
from protocol.messages.result import ArtefactQuery, ArtefactReply, Cancelled, TaskView


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The task was accepted once, so its key is taken; `code` and `message` say why nothing can be shown."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Known:
    """There is, or was, such a task; nothing more was asked."""


Past = TaskView | Unavailable


def answer_past(kind: str, body: bytes, past: Past) -> tuple[str, Message]:
    """Kind and body of the answer to a request about such a task. Raises BadFrame where there is nothing to give."""
    if isinstance(past, Unavailable):
        raise BadFrame(past.code, past.message)
    match kind:
        case "task.show":
            return "task.detail", past
        case "task.cancel":
            return "task.cancelled", Cancelled(task_id=past.task_id, state=past.state)
        case "task.artefact":
            name = unpack_body(ArtefactQuery, body).name
            for artefact in past.artefacts:
                if artefact.name == name:
                    return "task.content", ArtefactReply(artefact=artefact)
            have = ", ".join(artefact.name for artefact in past.artefacts[:50]) or "none"
            raise BadFrame(
                "artefact.unknown",
                f"task {past.task_id} is old: only its final artefacts are kept, and {name!r} is none; it has: {have}",
            )
        case _:
            return "task.result", past
