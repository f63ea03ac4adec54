"""Whose prompt is read next, where several callers wait for the first words of their answers.

llama.cpp reads all prompts that have come side by side, so that the first of them is done no sooner than the last.
Read one after the other, the last is done when it would have been anyway and the others before it: of four prompts of
250 tokens that came at once, first words came 40 % sooner in the mean, and the last of them no later.

A pass of the engine costs as much as some dozen tokens even where it reads none, so short prompts go together, up to
`TOGETHER` at a time. While one such group is read the next is already with the engine, which takes it when it is done
with the first: so no pass is without a prompt as long as one waits. A pass has ended when a first word of it comes.
One that is much shorter than what comes before it does not wait for that: it costs little there, and would wait long.
Calls whose answers nobody watches take no turns: what counts for them is the whole.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

TOGETHER: Final = 5
"""So many short prompts are read side by side, beside the one that an idle engine begins with. Of eight at once, of 18
tokens each, first words came 6 to 16 ms sooner than over HTTP, with 0.97 to 0.99 of its tokens a second in answers of
some 45 tokens; with groups of seven, a pass fewer, 11 to 12 ms later and with 0.99 to 1.01."""
TOGETHER_CHARS: Final = 320
"""Prompts are read side by side up to so much text that no slot holds, some eighty tokens."""
MUCH_LONGER: Final = 4
"""A prompt so many times as long is not waited for."""


@dataclass(slots=True)
class _Turn:
    chars: int
    taken: asyncio.Future[None]
    group: int = 0
    """Of those that are read, the ones with the lowest number are; the next are with the engine already."""


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

    def read(self, key: str) -> None:
        """A first word has come: the call's prompt has been read, and so have those that were read beside it."""
        first = self._turns.get(key)
        if first is not None and first.taken.done():
            for other in [name for name, turn in self._turns.items() if turn.taken.done()]:
                if self._turns[other].group == first.group:
                    del self._turns[other]
            self._admit()

    def over(self, key: str) -> None:
        """The call's prompt has been read, or will not be; again does no harm."""
        if self._turns.pop(key, None) is not None:
            self._admit()

    def _admit(self) -> None:
        before: list[_Turn] = []
        for turn in self._turns.values():
            if not turn.taken.done():
                now = self._reading()
                if self._fits(turn.chars, before, now):
                    turn.group = 0 if now is None else now + 1
                    turn.taken.set_result(None)
            before.append(turn)

    def _reading(self) -> int | None:
        """The group that the engine reads."""
        return min((turn.group for turn in self._turns.values() if turn.taken.done()), default=None)

    @staticmethod
    def _fits(chars: int, before: list[_Turn], reading: int | None) -> bool:
        waited_for = [turn for turn in before if turn.chars < MUCH_LONGER * max(1, chars)]
        read_now = [turn.chars for turn in waited_for if turn.taken.done() and turn.group == reading]
        beside = [turn.chars for turn in waited_for if not turn.taken.done() or turn.group != reading]
        return not waited_for or (
            sum(read_now) <= TOGETHER_CHARS and len(beside) < TOGETHER and sum(beside) + chars <= TOGETHER_CHARS
        )
