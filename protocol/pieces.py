"""What was answered to one request and is not read yet: pieces of a running text wait joined, so a slow reader of many
small ones has one larger piece to read, and never more than the text itself waits for it. Events and endings stay as
they came and in their order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace

from protocol.client_session import Deliver
from protocol.kinds import STEP_TOKENS
from protocol.messages.base import Message
from protocol.messages.batch import BatchPartial
from protocol.messages.infer import InferPartial
from protocol.messages.result import TaskEvent


class Pieces:
    """For one reader. `put` never blocks."""

    def __init__(self) -> None:
        self._waiting: deque[Deliver] = deque()
        self._there = asyncio.Event()

    def __len__(self) -> int:
        """Pieces that wait."""
        return len(self._waiting)

    def put(self, piece: Deliver) -> None:
        """Add a piece, or join it with one that waits."""
        self._there.set()
        for index in range(len(self._waiting) - 1, -1, -1):
            earlier = self._waiting[index]
            if not _joinable(earlier.body):
                break  # nothing may overtake it
            joined = _joined(earlier.body, piece.body)
            if joined is not None:
                self._waiting[index] = replace(earlier, body=joined)
                return
        self._waiting.append(piece)

    async def get(self) -> Deliver:
        """The next piece; waits for it."""
        await self._there.wait()
        piece = self._waiting.popleft()
        if not self._waiting:
            self._there.clear()
        return piece


def _joinable(body: Message) -> bool:
    tokens = isinstance(body, TaskEvent) and body.event == STEP_TOKENS
    return tokens or isinstance(body, InferPartial | BatchPartial)


def _joined(earlier: Message, later: Message) -> Message | None:
    """Both as one; None where they are not parts of the same text."""
    match earlier, later:
        case InferPartial(), InferPartial():
            return later.model_copy(update={"text": earlier.text + later.text, "start_chars": earlier.start_chars})
        case BatchPartial(), BatchPartial():
            return later
        case TaskEvent(event=event), TaskEvent() if event == later.event == STEP_TOKENS:
            if (earlier.step, earlier.attempt) != (later.step, later.attempt):
                return None
            text = f"{earlier.fields.get('text', '')}{later.fields.get('text', '')}"
            return later.model_copy(update={"fields": {**later.fields, "text": text}})
    return None
