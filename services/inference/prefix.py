"""Which slot a prompt goes to, and where the beginning of it comes from: pure, no engine, no clock, no file.

A slot of llama.cpp keeps what it last read, and no other slot can see it. Steps of one task begin alike, so without
this every slot reads the same beginning for itself. Here the first of a group *primes* its slot: it reads the shared
beginning alone, which is then saved; the others restore it instead of reading it. And where long contexts take turns in
a slot, what it holds is *kept* before it is overwritten: saved, to be restored when its context comes back. `slots`
carries that out.

Slots that decode at once are to be neighbours: llama.cpp computes the next tokens of slots in a row in one pass, and
one pass for each row where there are gaps, so that four slots with gaps between them decode like four single ones.

What a prompt begins with is known by hashes: its text is cut into blocks and each hash covers everything before it, so
equal hashes at one place mean equal beginnings, and a prompt of any length costs a few bytes a block. Where a hash
collides, llama.cpp compares tokens again: the price is time, never a wrong answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.messages.infer import ChatMessage

BLOCK_CHARS: Final = 128
"""Finer blocks would find that much more to share."""
BLOCK_TOKENS: Final = 32
"""Tokens of a block of prose, about."""
MIN_BLOCKS: Final = 6
"""A shared beginning shorter than this (some 200 tokens) is read again: two round trips would cost as much."""
KEPT_BLOCKS: Final = 64
"""A slot that holds so much (some 2,000 tokens) is not taken for its place: reading that again costs more than the
passes that a usual answer saves. It is also how much must be at stake for a context to be kept: nobody knows whether it
comes back, and the call that overwrites it waits while it is written. What is shorter is soon read again, and llama.cpp
holds some of it in memory."""

Blocks = tuple[int, ...]
"""Hash of every block of a prompt, each over all of the prompt up to its end; the last block may be a short one."""


def flat(messages: Sequence[ChatMessage]) -> str:
    """The prompt as one text, in the order in which a chat template writes it."""
    return "".join(f"{turn.role}\n{turn.content}\n\0" for turn in messages)


def blocks_of(text: str) -> Blocks:
    """Hashes of the blocks of a text, the rest at its end included: so a short prompt is known again, too."""
    digest, blocks = hashlib.blake2b(digest_size=8), []
    for begin in range(0, len(text), BLOCK_CHARS):
        digest.update(text[begin : begin + BLOCK_CHARS].encode("utf-8", "surrogatepass"))
        blocks.append(int.from_bytes(digest.copy().digest()))
    return tuple(blocks)


def shared(one: Blocks, other: Blocks) -> int:
    """Number of blocks with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # a block's hash covers all before it, so equality at one place is equality up to there
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[middle - 1] == other[middle - 1] else (low, middle - 1)
    return low


def beginning(messages: Sequence[ChatMessage], blocks: int) -> list[ChatMessage]:
    """The turns that make up the first blocks of a prompt, the last of them cut."""
    left, kept = blocks * BLOCK_CHARS, []
    for turn in messages:
        left -= len(turn.role) + 1
        if left <= 0:
            break
        kept.append(ChatMessage.model_construct(role=turn.role, content=turn.content[:left]))
        left -= len(turn.content) + 2
        if left <= 0:
            break
    return kept


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that wants a slot."""

    key: str
    blocks: Blocks


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a call runs and what happens first, in this order. The names are those of saved beginnings."""

    key: str
    slot: int
    cached_blocks: int
    """Blocks that need not be read for this call once `restore` is done."""
    keep: str | None = None
    """Save what the slot holds under this name: a long context that is nowhere else."""
    restore: str | None = None
    """Copy this saved beginning into the slot; it may still be in the making."""
    prime: str | None = None
    """Read the first `prime_blocks` blocks alone and save them under this name: others need them."""
    prime_blocks: int = 0


@dataclass(slots=True)
class _Slot:
    holds: Blocks = ()
    call: str | None = None
    used: int = 0


@dataclass(slots=True)
class _Saved:
    blocks: Blocks
    """A beginning holds exactly these; what was kept holds an answer after them."""
    bytes: int | None = None
    """None while it is in the making."""
    used: int = 0
    kept: bool = False

    def gives(self, blocks: Blocks) -> int:
        """Blocks of a prompt that need not be read with it. A beginning fits whole or not; what was kept is cut where
        the prompts part, if they have enough in common to be worth the whole file."""
        common = shared(blocks, self.blocks)
        return common if common >= (KEPT_BLOCKS if self.kept else len(self.blocks)) else 0


@dataclass(slots=True)
class PrefixCache:
    """What the slots of one engine hold and which beginnings are saved. Time is the count of placements."""

    slot_count: int
    copies: bool = True
    """False where saving and restoring does not work or does not pay: slots are then only chosen well."""
    most_kept_blocks: int = 0
    """A longer context is not kept; 0 where none is, and only beginnings are saved."""
    _slots: list[_Slot] = field(init=False)
    _saved: dict[str, _Saved] = field(default_factory=dict)
    _now: int = 0

    def __post_init__(self) -> None:
        """Begin with empty slots."""
        self._slots = [_Slot() for _ in range(self.slot_count)]

    @property
    def free(self) -> int:
        """Slots without a call."""
        return sum(1 for slot in self._slots if slot.call is None)

    @property
    def saved_bytes(self) -> Mapping[str, int | None]:
        """Saved beginnings with their size, least recently used first; None for one in the making."""
        return {name: saved.bytes for name, saved in sorted(self._saved.items(), key=lambda item: item[1].used)}

    def reads_much(self, blocks: Blocks) -> bool:
        """True if a call would have to read a long beginning: then it is worth a moment to see who else comes."""
        known = max((shared(blocks, slot.holds) for slot in self._slots if slot.call is None), default=0)
        known = max(known, self._best_saved(blocks)[1])
        return self.copies and len(blocks) - known >= MIN_BLOCKS

    def place(self, waiting: Sequence[Waiting]) -> list[Placement]:
        """Give every call a slot, in order of arrival; calls beyond the free slots are left out."""
        placements: list[Placement] = []
        todo = list(waiting)[: self.free]
        others = list(waiting)
        for call in todo:
            self._now += 1
            rest = [other.blocks for other in others if other.key != call.key]
            busy = [slot.holds for slot in self._slots if slot.call is not None]
            placements.append(self._place(call, self._worth_saving(call.blocks, [*rest, *busy])))
        return placements

    def saved(self, name: str, size_bytes: int) -> None:
        """A beginning is on disk."""
        if name in self._saved:
            self._saved[name].bytes = size_bytes

    def was_kept(self, name: str) -> bool:
        """True for a context, False for a beginning and for what is gone."""
        return name in self._saved and self._saved[name].kept

    def dropped(self, name: str) -> None:
        """A beginning could not be made, or its file is gone."""
        self._saved.pop(name, None)

    def ended(self, key: str, *, complete: bool) -> None:
        """A call has left its slot; of an incomplete one nobody knows how far it was read."""
        for slot in self._slots:
            if slot.call == key:
                slot.call = None
                slot.holds = slot.holds if complete else ()

    def emptied(self) -> None:
        """The engine is a new one: its slots hold nothing. Saved beginnings stay."""
        for slot in self._slots:
            slot.holds = ()

    def _place(self, call: Waiting, worth_saving: int) -> Placement:
        name, known = self._best_saved(call.blocks)
        copied = known if self.copies else 0
        free = (n for n, slot in enumerate(self._slots) if slot.call is None)
        number = max(free, key=lambda n: self._rank(call, n, copied))
        slot = self._slots[number]
        held = shared(call.blocks, slot.holds)
        restore = name if self.copies and known - held >= MIN_BLOCKS else None
        cached = known if restore else held
        if restore is not None:
            self._saved[restore].used = self._now
        lost, slot.holds = slot.holds, ()  # from here on it is to be found elsewhere or not at all
        keep = f"{lost[-1]:016x}" if len(lost) - held >= KEPT_BLOCKS and self._worth_keeping(lost) else None
        if keep is not None:
            self._saved[keep] = _Saved(lost, used=self._now, kept=True)
        slot.call, slot.holds, slot.used = call.key, call.blocks, self._now
        prime = None
        if self.copies and worth_saving > max(known, 0) and worth_saving - known >= MIN_BLOCKS:
            prime = f"{call.blocks[worth_saving - 1]:016x}"
            self._saved[prime] = _Saved(call.blocks[:worth_saving], used=self._now)
        return Placement(call.key, number, cached, keep, restore, prime, worth_saving if prime else 0)

    def _worth_keeping(self, lost: Blocks) -> bool:
        """Whether a context that a slot is to lose can be kept, and neither a file nor a free slot has most of it."""
        if not self.copies or len(lost) > self.most_kept_blocks:
            return False
        elsewhere = [shared(lost, slot.holds) for slot in self._slots if slot.call is None]
        return len(lost) - max(self._best_saved(lost)[1], *elsewhere) >= KEPT_BLOCKS

    def _rank(self, call: Waiting, number: int, copied: int) -> tuple[int, int, int, int]:
        """What only this slot spares; busy neighbours; what else it spares; then least recently used.

        `copied` blocks can be had in any slot. A little in common is no reason to overwrite a lot.
        """
        slot = self._slots[number]
        held = shared(call.blocks, slot.holds)
        rest = len(slot.holds) - held
        spared = held if held >= min(MIN_BLOCKS, rest) or rest < 2 * MIN_BLOCKS else 0
        only_here = spared if spared - copied >= MIN_BLOCKS else 0
        kept = len(slot.holds) >= KEPT_BLOCKS and not spared
        beside = 0 if kept else sum(1 for n in (number - 1, number + 1) if self._busy(n))
        return (only_here, beside, spared, -slot.used)

    def _busy(self, number: int) -> bool:
        return 0 <= number < self.slot_count and self._slots[number].call is not None

    def _best_saved(self, blocks: Blocks) -> tuple[str | None, int]:
        """The file that gives most of a prompt, and how many blocks; of equals the shortest, which is read soonest."""
        fitting = [(saved.gives(blocks), -len(saved.blocks), name) for name, saved in self._saved.items()]
        length, _, name = max(fitting, default=(0, 0, None))
        return (name, length) if length else (None, 0)

    def _worth_saving(self, blocks: Blocks, others: Sequence[Blocks]) -> int:
        """Length in blocks of the beginning that saves the others most in all; 0 where nobody shares enough."""
        common = sorted((shared(blocks, other) for other in others), reverse=True)
        gains = [(length * count, length) for count, length in enumerate(common, 1) if length >= MIN_BLOCKS]
        return max(gains, default=(0, 0))[1]
