"""Turns at reading prompts: order, what goes together, and that no turn is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.turns import MUCH_LONGER, TOGETHER_CHARS, ReadingTurns

LONG = TOGETHER_CHARS + 1
SHORT = TOGETHER_CHARS // 3


class Calls:
    """Calls that want to read, by name."""

    def __init__(self) -> None:
        self.turns = ReadingTurns()
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, chars: int) -> None:
        self.tasks[name] = asyncio.create_task(self.turns.take(name, chars))
        await asyncio.sleep(0)

    async def over(self, name: str) -> None:
        self.turns.over(name)
        await asyncio.sleep(0)

    async def cancel(self, name: str) -> None:
        """As a call does whose client has gone: its task ends, then its turn."""
        self.tasks[name].cancel()
        await asyncio.sleep(0)
        await self.over(name)

    def reading(self) -> str:
        """All that have had a turn."""
        return "".join(name for name, task in self.tasks.items() if task.done() and not task.cancelled())


async def test_long_prompts_are_read_one_after_the_other_in_order_of_arrival() -> None:
    calls = Calls()
    for name in "abc":
        await calls.come(name, LONG)
    assert calls.reading() == "a"
    await calls.over("a")
    assert calls.reading() == "ab"
    await calls.over("a")
    assert calls.reading() == "ab", "the end of a turn counts once"
    await calls.over("b")
    assert calls.reading() == "abc"


async def test_short_prompts_are_read_together() -> None:
    calls = Calls()
    for name in "abcde":
        await calls.come(name, SHORT)
    assert calls.reading() == "abc"
    await calls.over("b")
    assert calls.reading() == "abcd"


async def test_a_much_shorter_prompt_does_not_wait_for_a_long_one_and_never_holds_it_up() -> None:
    calls = Calls()
    await calls.come("a", 9 * LONG)
    await calls.come("b", 9 * LONG)
    await calls.come("c", LONG)
    assert calls.reading() == "ac", "b is as long as a, c is much shorter than both"
    await calls.come("d", LONG)
    assert calls.reading() == "ac", "d is as long as c"
    await calls.over("a")
    assert calls.reading() == "abc", "what came later does not hold b up"


@pytest.mark.parametrize("leaves", ["a", "b"])
async def test_who_leaves_while_reading_or_waiting_holds_nobody_up(leaves: str) -> None:
    calls = Calls()
    for name in "abc":
        await calls.come(name, LONG)
    await calls.cancel(leaves)
    await calls.over("ab".replace(leaves, ""))
    assert calls.reading().endswith("c")


async def test_a_call_that_leaves_in_the_moment_of_its_turn_gives_it_back() -> None:
    calls = Calls()
    for name in "abc":
        await calls.come(name, LONG)
    calls.turns.over("a")
    await calls.cancel("b")
    assert calls.reading() == "ac"


@given(
    st.lists(
        st.tuples(st.sampled_from(["come", "over", "cancel"]), st.integers(0, 9), st.integers(0, 2 * TOGETHER_CHARS)),
        max_size=40,
    )
)
def test_whatever_comes_and_goes_everybody_has_a_turn_in_the_end(script: list[tuple[str, int, int]]) -> None:
    async def scene() -> None:
        calls = Calls()
        came: dict[str, int] = {}
        gone: set[str] = set()

        async def leave(how: Callable[[str], object], number: int) -> None:
            open_ = [name for name in came if name not in gone]
            if open_:
                name = open_[number % len(open_)]
                gone.add(name)
                await how(name)  # type: ignore[misc]  # both ways are coroutines

        for what, number, chars in script:
            if what == "come":
                name = f"{len(came)}"
                came[name] = chars
                await calls.come(name, chars)
            else:
                await leave(calls.over if what == "over" else calls.cancel, number)
            inside = [name for name in came if calls.tasks[name].done() and name not in gone]
            for place, name in enumerate(inside):
                like = [came[other] for other in inside[:place] if came[other] < MUCH_LONGER * max(1, came[name])]
                assert not like or sum(like) + came[name] <= TOGETHER_CHARS
        while set(came) - gone:
            inside = [name for name in came if calls.tasks[name].done() and name not in gone]
            assert inside, "somebody always reads"
            for name in inside:
                gone.add(name)
                await calls.over(name)
        for task in calls.tasks.values():
            task.cancel()  # those whose turn was ended before they had it

    asyncio.run(scene())
