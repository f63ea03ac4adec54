"""Turns at reading prompts: order, what goes together, and that no turn is lost."""

from __future__ import annotations

import asyncio
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.turns import MUCH_LONGER, TOGETHER, TOGETHER_CHARS, ReadingTurns

LONG = TOGETHER_CHARS + 1
SHORT = TOGETHER_CHARS // 3
TINY = TOGETHER_CHARS // 20


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

    async def read(self, name: str) -> None:
        """A first word of this call's answer has come."""
        self.turns.read(name)
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


async def test_short_prompts_are_read_in_groups_and_the_next_group_is_ready_while_one_is_read() -> None:
    calls = Calls()
    names = string.ascii_letters[: 2 + 2 * TOGETHER]
    for name in names:
        await calls.come(name, TINY)
    group, next_group = 1 + TOGETHER, 1 + 2 * TOGETHER
    assert calls.reading() == names[:group], "the first is read, and the engine has those for the next pass"
    await calls.read(names[0])
    assert calls.reading() == names[:next_group]
    await calls.read(names[group - 1])
    assert calls.reading() == names
    for name in names[1 : group - 1]:
        await calls.read(name)
    for name in string.digits[:TOGETHER]:
        await calls.come(name, TINY)
    assert calls.reading() == names + string.digits[: TOGETHER - 1], (
        "words of a group that is read say nothing of the next"
    )


async def test_a_group_is_no_longer_than_what_is_read_side_by_side() -> None:
    calls = Calls()
    for name in "abcde":
        await calls.come(name, SHORT)
    assert calls.reading() == "abcd"
    await calls.read("a")
    assert calls.reading() == "abcde"


async def test_who_leaves_its_group_makes_room_in_it_and_does_not_end_it() -> None:
    calls = Calls()
    names = string.ascii_letters[: 4 + TOGETHER]
    for name in names:
        await calls.come(name, TINY)
    await calls.over("c")
    assert calls.reading() == names[: 2 + TOGETHER], "one place of the group has become free"
    await calls.over("a")
    assert calls.reading() == names, "nobody of the first group is left, so the next one is read"


async def test_a_short_one_that_went_past_a_long_one_does_not_end_its_reading() -> None:
    calls = Calls()
    await calls.come("a", 9 * LONG)
    await calls.come("b", 9 * LONG)
    await calls.come("c", TINY)
    assert calls.reading() == "ac"
    await calls.read("c")
    assert calls.reading() == "ac"
    await calls.read("a")
    assert calls.reading() == "abc"


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


async def test_two_groups_that_the_engine_read_in_one_pass_hold_nobody_up() -> None:
    calls = Calls()
    for name in string.ascii_letters[: 3 + TOGETHER]:
        await calls.come(name, TINY)
    await calls.read("b")
    await calls.read("a")
    await calls.come("z", TINY)
    assert calls.reading() == string.ascii_letters[: 3 + TOGETHER] + "z"


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


class Passes:
    """What the engine does with those it is given: an idle one begins with the first, a pass is of all that waited."""

    def __init__(self) -> None:
        self.read_now: list[str] = []
        self.read_next: list[str] = []

    def given(self, names: list[str]) -> None:
        """All that have had a turn and are not read yet, in order of arrival."""
        self.read_now = [name for name in self.read_now if name in names]
        waited = [name for name in self.read_next if name in names]
        if not self.read_now:
            self.read_now = waited or names[:1]
        self.read_next = [name for name in names if name not in self.read_now]

    def read(self) -> list[str]:
        """Who is read when a pass ends."""
        done, self.read_now, self.read_next = self.read_now, self.read_next, []
        return done


@settings(max_examples=800, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["come", "come", "read", "over", "cancel"]),
            st.integers(0, 9),
            st.one_of(st.integers(0, TINY), st.integers(0, 2 * TOGETHER_CHARS)),
        ),
        max_size=60,
    )
)
def test_whatever_comes_and_goes_groups_are_small_and_everybody_has_a_turn(script: list[tuple[str, int, int]]) -> None:
    async def scene() -> None:
        calls, passes = Calls(), Passes()
        came: dict[str, int] = {}
        gone: set[str] = set()

        def look() -> None:
            passes.given([name for name in came if calls.tasks[name].done() and name not in gone])
            for place, name in enumerate(passes.read_next):
                chars = came[name]
                before = [
                    other for other in came if int(other) < int(name) and came[other] < MUCH_LONGER * max(1, chars)
                ]
                beside = [came[other] for other in passes.read_next[:place] if other in before]
                ahead = [came[other] for other in passes.read_now if other in before]
                assert len(beside) < TOGETHER
                assert not ahead + beside or sum(beside) + chars <= TOGETHER_CHARS
                assert sum(ahead) <= TOGETHER_CHARS

        async def pass_ends(number: int) -> None:
            done = passes.read()
            gone.update(done)
            if done:
                await calls.read(done[number % len(done)])
            look()

        for what, number, chars in script:
            open_ = [name for name in came if name not in gone]
            if what == "come":
                name = f"{len(came)}"
                came[name] = chars
                await calls.come(name, chars)
            elif what == "read":
                await pass_ends(number)
            elif open_:
                name = open_[number % len(open_)]
                gone.add(name)
                look()  # the engine goes on with what it has; that the call is over is said once its slot is free
                await (calls.over if what == "over" else calls.cancel)(name)
            look()
        while set(came) - gone:
            assert passes.read_now, "somebody always reads"
            await pass_ends(0)
        for task in calls.tasks.values():
            task.cancel()  # those whose turn was ended before they had it

    asyncio.run(scene())
