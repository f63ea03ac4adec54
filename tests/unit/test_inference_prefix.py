"""Which slot a prompt goes to, and what is read once for several: invariants over any arrivals, and the cases."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.messages.infer import ChatMessage
from services.inference import prefix as p

LONG = p.MIN_BLOCKS + 4


def prompt(shared: str, own: str, blocks: int = LONG) -> p.Blocks:
    """A prompt whose first `blocks` blocks depend on `shared` only."""
    head = (shared * p.BLOCK_CHARS * blocks)[: p.BLOCK_CHARS * blocks]
    return p.blocks_of(head + own * p.BLOCK_CHARS * 2)


def waiting(*prompts: p.Blocks, first: int = 0) -> list[p.Waiting]:
    return [p.Waiting(f"c{number}", blocks) for number, blocks in enumerate(prompts, first)]


@given(st.text(max_size=2_000), st.text(max_size=600), st.text(max_size=600))
def test_blocks_are_equal_as_far_as_the_texts_are(same: str, one: str, other: str) -> None:
    common = 0
    for left, right in zip(same + one, same + other, strict=False):
        if left != right:
            break
        common += 1
    whole = common // p.BLOCK_CHARS
    rest = one == other and len(same + one) % p.BLOCK_CHARS > 0  # the short block at the end of equal texts
    assert p.shared(p.blocks_of(same + one), p.blocks_of(same + other)) == whole + rest


@given(st.lists(st.text(max_size=700), min_size=1, max_size=4), st.integers(0, 20))
def test_the_beginning_of_a_prompt_is_the_beginning_of_its_text(turns: list[str], blocks: int) -> None:
    messages = [ChatMessage(role="user" if n % 2 else "system", content=text) for n, text in enumerate(turns)]
    cut = p.beginning(messages, blocks)
    whole = p.flat(messages)
    assert whole.startswith(p.flat(cut)[:-2])
    assert len(p.flat(cut)) <= blocks * p.BLOCK_CHARS + 2
    if len(whole) >= blocks * p.BLOCK_CHARS > 0:
        assert len(p.flat(cut)) + 16 >= blocks * p.BLOCK_CHARS, "no more than the name of a role is lost"


def test_the_first_of_a_group_reads_for_all_and_the_others_copy() -> None:
    cache = p.PrefixCache(4)
    first, *others = cache.place(waiting(*(prompt("a", own) for own in "1234")))
    assert first.prime is not None
    assert first.prime_blocks == LONG
    assert [other.restore for other in others] == [first.prime] * 3
    assert [other.prime for other in others] == [None] * 3
    assert len({first.slot, *(other.slot for other in others)}) == 4


def test_a_prompt_that_nobody_shares_is_only_given_a_slot() -> None:
    cache = p.PrefixCache(2)
    (one,) = cache.place(waiting(prompt("a", "1")))
    (two,) = cache.place(waiting(prompt("b", "1"), first=1))
    assert (one.prime, one.restore, two.prime, two.restore) == (None, None, None, None)
    assert one.slot != two.slot


def test_a_follower_goes_to_the_slot_that_has_read_its_beginning() -> None:
    cache = p.PrefixCache(3)
    placed = {place.key: place for place in cache.place(waiting(prompt("a", "1"), prompt("b", "1"), prompt("c", "1")))}
    for key in placed:
        cache.ended(key, complete=True)
    (again,) = cache.place(waiting(prompt("b", "2"), first=9))
    assert again.slot == placed["c1"].slot
    assert again.cached_blocks == LONG
    assert again.restore is None


def test_a_second_call_that_shares_with_a_running_one_saves_for_those_to_come() -> None:
    cache = p.PrefixCache(4)
    cache.place(waiting(prompt("a", "1")))
    (second,) = cache.place(waiting(prompt("a", "2"), first=1))
    assert second.prime is not None
    cache.saved(second.prime, 1_000)
    (third,) = cache.place(waiting(prompt("a", "3"), first=2))
    assert third.restore == second.prime


def test_what_is_saved_is_found_by_the_slots_of_a_new_engine() -> None:
    cache = p.PrefixCache(2)
    first, _ = cache.place(waiting(prompt("a", "1"), prompt("a", "2")))
    assert first.prime is not None
    cache.saved(first.prime, 1_000)
    cache.ended("c0", complete=True)
    cache.ended("c1", complete=True)
    cache.emptied()
    (again,) = cache.place(waiting(prompt("a", "3"), first=2))
    assert again.restore == first.prime


def test_without_copies_slots_are_still_chosen_by_what_they_hold() -> None:
    cache = p.PrefixCache(2, copies=False)
    one, two = cache.place(waiting(prompt("a", "1"), prompt("a", "2")))
    assert (one.prime, two.restore) == (None, None)
    cache.ended("c0", complete=True)
    (again,) = cache.place(waiting(prompt("a", "3"), first=2))
    assert again.slot == one.slot
    assert not cache.reads_much(prompt("z", "1"))


def test_a_little_in_common_does_not_overwrite_a_lot() -> None:
    cache = p.PrefixCache(2)
    system = "s" * p.BLOCK_CHARS * 2
    one = p.blocks_of(system + "a" * p.BLOCK_CHARS * 20)
    other = p.blocks_of(system + "b" * p.BLOCK_CHARS * 20)
    (first,) = cache.place(waiting(one))
    cache.ended("c0", complete=True)
    (second,) = cache.place(waiting(other, first=1))
    assert second.slot != first.slot


def test_short_prompts_of_one_role_follow_one_another_in_its_slot() -> None:
    cache = p.PrefixCache(4)
    for turn in range(6):
        for number, role in enumerate("ab"):
            head = f"you are {role} " * p.BLOCK_CHARS
            text = head[: 3 * p.BLOCK_CHARS] + f"step {turn}" * p.BLOCK_CHARS
            (placed,) = cache.place(waiting(p.blocks_of(text[: 9 * p.BLOCK_CHARS]), first=2 * turn + number))
            cache.ended(placed.key, complete=True)
            assert placed.slot == number
            assert placed.cached_blocks == (3 if turn else 0)


def test_the_longest_beginning_is_not_always_the_one_worth_most() -> None:
    cache = p.PrefixCache(4)
    base = "x" * p.BLOCK_CHARS * LONG
    near = p.blocks_of(base + "n" * p.BLOCK_CHARS * 2)
    calls = [
        p.blocks_of(base + "n" * p.BLOCK_CHARS * 2 + "1" * 200),
        near,
        *(p.blocks_of(base + f"{n}" * 400) for n in "56"),
    ]
    first, *_ = cache.place(waiting(*calls))
    assert first.prime_blocks == LONG, "three share this much, one shares a little more"


def passes(slots: set[int]) -> int:
    """Rows of neighbours among these slots: llama.cpp computes one after the other."""
    return sum(1 for slot in slots if slot - 1 not in slots)


def test_calls_that_run_at_once_sit_side_by_side_whichever_slot_was_used_last() -> None:
    cache = p.PrefixCache(8)
    for turn in range(20):
        group = waiting(*(p.blocks_of(f"short {turn} {n}") for n in range(turn % 7 + 1)), first=100 * turn)
        taken = {placed.slot for placed in cache.place(group)}
        assert len(taken) == len(group)
        assert passes(taken) == 1
        for call in group:
            cache.ended(call.key, complete=True)


def test_a_gap_is_filled_first() -> None:
    cache = p.PrefixCache(4)
    placed = {place.slot: place.key for place in cache.place(waiting(*(p.blocks_of(f"{n}") for n in range(4))))}
    cache.ended(placed[0], complete=True)
    cache.ended(placed[2], complete=True)
    (one,) = cache.place(waiting(p.blocks_of("new"), first=9))
    assert one.slot == 2


def test_a_place_in_the_row_is_worth_no_long_prompt_and_no_beginning_that_is_only_there() -> None:
    cache = p.PrefixCache(4, copies=False)
    placed = {place.key: place.slot for place in cache.place(waiting(*(p.blocks_of(f"{n}") for n in range(4))))}
    assert placed == {"c0": 0, "c1": 1, "c2": 2, "c3": 3}
    for key in ("c1", "c2", "c3"):
        cache.ended(key, complete=True)
    long = p.blocks_of("l" * p.BLOCK_CHARS * p.KEPT_BLOCKS)
    (beside,) = cache.place(waiting(long, first=5))
    assert beside.slot == 1
    cache.ended("c5", complete=True)
    (other,) = cache.place(waiting(p.blocks_of("x"), first=6))
    assert other.slot == 2, "the place beside the running call holds a long prompt"
    cache.ended("c6", complete=True)
    (follower,) = cache.place(waiting(p.blocks_of("l" * p.BLOCK_CHARS * p.KEPT_BLOCKS + "more"), first=7))
    assert follower.slot == 1
    assert follower.cached_blocks == p.KEPT_BLOCKS


def test_what_can_be_copied_anywhere_is_copied_into_the_row() -> None:
    cache = p.PrefixCache(4)
    first, _ = cache.place(waiting(prompt("a", "1"), prompt("a", "2")))
    assert first.prime is not None
    cache.saved(first.prime, 1_000)
    cache.ended("c0", complete=True)
    cache.ended("c1", complete=True)
    (alone,) = cache.place(waiting(prompt("a", "3"), first=2))
    assert alone.restore is None, "with nobody beside it, it goes where the beginning is"
    cache.ended("c2", complete=True)
    (busy,) = cache.place(waiting(p.blocks_of("busy"), first=3))
    (beside,) = cache.place(waiting(prompt("a", "4"), first=4))
    assert passes({busy.slot, beside.slot}) == 1
    assert beside.cached_blocks == LONG


def alone(cache: p.PrefixCache, key: str, blocks: p.Blocks, *, complete: bool = True) -> p.Placement:
    """One call that comes, is answered and goes; what is to be kept is kept."""
    (placed,) = cache.place([p.Waiting(key, blocks)])
    if placed.keep is not None:
        cache.saved(placed.keep, 1_000)
    cache.ended(key, complete=complete)
    return placed


def test_long_contexts_that_alternate_in_one_slot_are_read_once_each() -> None:
    cache = p.PrefixCache(1, most_kept_blocks=1_000)
    contexts = {name: prompt(name, name, 300) for name in "ab"}
    visits = [alone(cache, f"c{n}", contexts["ab"[n % 2]]) for n in range(6)]
    assert [visit.cached_blocks for visit in visits] == [0, 0, 302, 302, 302, 302]
    first, second = visits[1].keep, visits[2].keep
    assert None not in (first, second)
    assert [visit.restore for visit in visits] == [None, None, first, second, first, second]
    assert [visit.keep for visit in visits] == [None, first, second, None, None, None], "each is saved once"


def test_a_long_context_that_comes_back_with_another_question_is_restored_as_far_as_it_is_the_same() -> None:
    cache = p.PrefixCache(1, most_kept_blocks=1_000)
    alone(cache, "c0", prompt("a", "1", 300))
    alone(cache, "c1", prompt("b", "1", 300))
    again = alone(cache, "c2", prompt("a", "2", 300))
    assert (again.restore is not None, again.cached_blocks) == (True, 300)
    follower = alone(cache, "c3", prompt("a", "3", 300))
    assert (follower.restore, follower.keep, follower.cached_blocks) == (None, None, 300), "it is in the slot"


def test_a_little_in_common_with_a_long_context_does_not_bring_all_of_it_back() -> None:
    cache = p.PrefixCache(1, most_kept_blocks=1_000)
    system = "s" * p.BLOCK_CHARS * (p.KEPT_BLOCKS - 1)
    alone(cache, "c0", p.blocks_of(system + "a" * p.BLOCK_CHARS * 200))
    alone(cache, "c1", prompt("b", "1", 300))
    other = alone(cache, "c2", p.blocks_of(system + "x" * p.BLOCK_CHARS * 200))
    assert (other.restore, other.cached_blocks) == (None, 0)


def test_what_is_short_or_was_not_read_to_its_end_is_not_kept() -> None:
    cache = p.PrefixCache(1, most_kept_blocks=1_000)
    alone(cache, "c0", prompt("a", "1", p.KEPT_BLOCKS - 3))
    assert alone(cache, "c1", prompt("b", "1", 300), complete=False).keep is None
    assert alone(cache, "c2", prompt("c", "1", 300)).keep is None
    cache.emptied()
    assert alone(cache, "c3", prompt("d", "1", 300)).keep is None, "the slots of a new engine are empty"
    assert alone(cache, "c4", prompt("e", "1", 300)).keep is not None


def test_what_is_saved_already_or_in_another_slot_is_not_kept_once_more() -> None:
    cache = p.PrefixCache(2, most_kept_blocks=1_000)
    first, _ = cache.place(waiting(prompt("a", "1", 300), prompt("a", "2", 300)))
    assert first.prime is not None
    cache.saved(first.prime, 1_000)
    cache.ended("c0", complete=True)
    cache.ended("c1", complete=True)
    assert [alone(cache, f"b{n}", prompt(f"{n}", "1", 10)).keep for n in range(2)] == [None, None]
    cache = p.PrefixCache(2, copies=False, most_kept_blocks=1_000)
    cache.place(waiting(prompt("a", "1", 300), prompt("a", "1", 300)))
    cache.ended("c0", complete=True)
    cache.ended("c1", complete=True)
    cache.copies = True
    assert alone(cache, "c2", prompt("b", "1", 10)).keep is None, "the other slot holds the same"
    assert alone(cache, "c3", prompt("c", "1", 10)).keep is not None


def test_nothing_is_kept_that_is_too_large_or_where_it_does_not_help() -> None:
    for cache in (
        p.PrefixCache(1, copies=False, most_kept_blocks=1_000),
        p.PrefixCache(1, most_kept_blocks=301),
        p.PrefixCache(1),
    ):
        alone(cache, "c0", prompt("a", "1", 300))
        assert alone(cache, "c1", prompt("b", "1", 300)).keep is None


class AnyArrivals(RuleBasedStateMachine):
    """Calls come and go in any order, files appear and vanish, engines are replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = p.PrefixCache(3, most_kept_blocks=1_000)
        self.slots: dict[str, int] = {}
        self.prompts: dict[str, p.Blocks] = {}
        self.held: list[p.Blocks] = [()] * 3
        """What each slot holds for certain."""
        self.files: dict[str, p.Blocks] = {}
        self.number = 0

    @rule(
        shared=st.lists(st.sampled_from("abc"), min_size=1, max_size=5),
        blocks=st.integers(0, 2 * LONG) | st.sampled_from([p.KEPT_BLOCKS, 2 * p.KEPT_BLOCKS]),
    )
    def arrive(self, shared: list[str], blocks: int) -> None:
        calls = waiting(*(prompt(name, str(n), blocks) for n, name in enumerate(shared)), first=self.number)
        self.number += len(calls)
        free = self.cache.free
        placed = self.cache.place(calls)
        assert [place.key for place in placed] == [call.key for call in calls[:free]], "in order, as many as fit"
        for place, call in zip(placed, calls, strict=False):
            assert place.slot not in self.slots.values(), "no slot is given twice"
            assert place.cached_blocks <= len(call.blocks)
            assert place.prime_blocks <= len(call.blocks)
            assert (place.prime is None) == (place.prime_blocks == 0)
            assert place.prime is None or place.prime_blocks > place.cached_blocks or place.restore is None
            for name in (place.prime, place.restore, place.keep):
                assert name is None or name in self.cache.saved_bytes
            held = self.held[place.slot]
            lost = len(held) - p.shared(held, call.blocks)
            self.held[place.slot] = ()
            if place.keep is not None:
                assert self.cache.copies
                assert lost >= p.KEPT_BLOCKS, "only what was read to its end, and is overwritten"
                assert place.keep not in self.files
                self.files[place.keep] = held
            elif lost >= p.KEPT_BLOCKS and self.cache.copies:
                elsewhere = [p.shared(held, other) for other in (*self.held, *self.files.values())]
                assert len(held) - max(elsewhere) < p.KEPT_BLOCKS, "what is lost is to be had elsewhere"
            if place.prime is not None:
                self.files[place.prime] = call.blocks[: place.prime_blocks]
            self.slots[place.key] = place.slot
            self.prompts[place.key] = call.blocks

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), complete=st.booleans())
    def end(self, data: st.DataObject, complete: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.slots)))
        self.held[self.slots.pop(key)] = self.prompts[key] if complete else ()
        self.cache.ended(key, complete=complete)

    @precondition(lambda self: self.cache.saved_bytes)
    @rule(data=st.data(), size=st.one_of(st.none(), st.integers(1, 1_000)))
    def file(self, data: st.DataObject, size: int | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.cache.saved_bytes)))
        if size is None:
            self.cache.dropped(name)
            del self.files[name]
        else:
            self.cache.saved(name, size)

    @rule(copies=st.booleans())
    def replace_engine(self, copies: bool) -> None:
        self.cache.emptied()
        self.held = [()] * 3
        self.prompts = dict.fromkeys(self.prompts, ())
        self.cache.copies = copies

    @invariant()
    def slots_and_files_are_accounted_for(self) -> None:
        assert self.cache.free == 3 - len(self.slots)
        assert self.files.keys() == self.cache.saved_bytes.keys()


TestAnyArrivals = AnyArrivals.TestCase
