"""Whose prompt is read next, where several callers wait for the first words of their answers.

llama.cpp reads all prompts that have come side by side, so that the first of them is done no sooner than the last.
Read one after the other, the last is done when it would have been anyway and the others before it: of four prompts of
250 tokens that came at once, first words came 40 % sooner in the mean, and the last of them no later.

A pass of the engine costs as much as some dozen tokens even where it reads none, so short prompts go together: in
groups of three, prompts of 15 tokens had their first words sooner as well, but all of them 5 % fewer tokens a second.
One that is much shorter than what comes before it does not wait for that: it costs little there, and would wait long.
Calls whose answers nobody watches take no turns: what counts for them is the whole.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

TOGETHER_CHARS: Final = 320
"""Prompts are read side by side up to so much text that no slot holds, some eighty tokens."""
MUCH_LONGER: Final = 4
"""A prompt so many times as long is not waited for."""


@dataclass(slots=True)
class _Turn:
    chars: int
    taken: asyncio.Future[None]


class ReadingTurns:
    """Turns at reading, in order of arrival. Keys are those of calls; made and used in one event loop."""

    def __init__(self) -> None:
        self._turns: dict[str, _Turn] = {}
        """Of those that read and of those that wait, the first to come first."""

    async def take(self, key: str, chars: int) -> None:
        """Return when the engine may read so much for this call. `over` must follow, also after a cancel."""
        turn = self._turns[key] = _Turn(chars, asyncio.get_running_loop().create_future())
        self._admit()
        await turn.taken

    def over(self, key: str) -> None:
        """The call's prompt has been read, or will not be; again does no harm."""
        if self._turns.pop(key, None) is not None:
            self._admit()

    def _admit(self) -> None:
        before: list[int] = []
        for turn in self._turns.values():
            if not turn.taken.done() and self._fits(turn.chars, before):
                turn.taken.set_result(None)
            before.append(turn.chars)

    @staticmethod
    def _fits(chars: int, before: list[int]) -> bool:
        waited_for = [other for other in before if other < MUCH_LONGER * max(1, chars)]
        return not waited_for or sum(waited_for) + chars <= TOGETHER_CHARS
