"""Gives every call its slot and carries out what `prefix` decides first: read a shared beginning once, copy it.

A call that would have to read a long prompt waits `GATHER_S` to see who else begins like it. One of them reads the
beginning alone (*priming*), the slot is saved to a file, and the others restore it. A long context that a call is to
overwrite is saved first, while that call waits. A copy that fails costs the reading of one prompt and nothing else; an
engine on which copies fail or help nothing is left alone until the next launch.

A call whose prompt is short, or known, never waits for others. Long prompts whose answers somebody watches are read in
turn (`turns`).

Files live below the run folder, private to the user, at most the `prefix_disk_bytes` of an entry, and never longer than
the service or the model file they were read with. How an answer is made is `generation`'s business.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.messages.infer import ChatMessage, InferFinal
from services.inference import prefix as p
from services.inference.llama_http import EngineError, EngineGone, LlamaServer
from services.inference.turns import ReadingTurns
from services.kit.logs import Log, LogEvent

PREFIX_SAVED = LogEvent("prefix.saved", "name slot tokens bytes took_ms", "debug")
PREFIX_KEPT = LogEvent("prefix.kept", "name slot bytes took_ms", "debug")
PREFIX_OFF = LogEvent("prefix.off", "reason", "warning")

GATHER_S: Final = 0.02
"""Calls that are handed out together arrive within a millisecond, unless a full machine stops somebody on their way.
Reading 200 tokens a second time takes many times longer than this."""
FIGURES: Final = ("prefixes_read", "prefixes_copied", "cached_tokens_total")
"""Totals of the service since it started."""
SPARE: Final = 2
"""Times as much as may be saved must be free at a start: the disk is not the engine's alone."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot that has been given to a call, with what that cost before its answer could begin."""

    server: LlamaServer
    """Answers made through it run in the slot."""
    waited_ms: float = 0.0
    read_tokens: int = 0
    """Tokens read for this call and others; the engine then counts them as cached."""
    read_ms: float = 0.0
    restored: bool = False
    kept: bool = False
    """What it would restore is a context that was kept, not a beginning."""

    def true_figures(self, final: InferFinal) -> InferFinal:
        """The final with what priming took counted as this call's."""
        return final.model_copy(
            update={
                "cached_tokens": max(0, final.cached_tokens - self.read_tokens),
                "prompt_ms": final.prompt_ms + self.read_ms,
                "first_token_ms": final.first_token_ms + self.waited_ms,
            }
        )


class SlotDesk:
    """The slots of one engine. `folder` is the one the engine saves to, at most `disk_bytes`."""

    def __init__(self, folder: Path, slots: int, log: Log, disk_bytes: int) -> None:
        self._folder = folder
        self._disk_bytes = disk_bytes
        self._log = log
        self._book = p.PrefixCache(slots, copies=False)
        self._arrived: list[tuple[p.Waiting, asyncio.Future[p.Placement | None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._making: dict[str, asyncio.Future[None]] = {}
        self._makers: dict[str, str] = {}
        """What is being made -> the call that makes it."""
        self._turns = ReadingTurns()
        self._reading: Counter[str] = Counter()
        self._stamp: object = None
        self._totals = Counter(dict.fromkeys(FIGURES, 0))

    def engine_started(self, stamp: object, *, copies: bool, token_bytes: int) -> bool:
        """A new child: its slots are empty. Files read with another model or engine, as `stamp` tells, are removed.

        `token_bytes`: what one token takes in a slot. Returns whether slots are copied: they may be, and the disk has
        room.
        """
        self._book.emptied()
        self._book.most_kept_blocks = self._disk_bytes // max(1, token_bytes * p.BLOCK_TOKENS)
        if stamp != self._stamp:
            self.clear()
        self._stamp = stamp
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            wanted = SPARE * self._disk_bytes
            roomy = shutil.disk_usage(self._folder).free >= wanted
            why = None if roomy else f"{self._folder} has less than {wanted} bytes of room; see prefix_disk_bytes"
        except OSError as err:
            why = f"{self._folder} cannot be used: {err.strerror}"
        if copies and why is not None:
            self._log.write(PREFIX_OFF, reason=why)
        self._book.copies = copies and why is None
        return self._book.copies

    def clear(self) -> None:
        """Forget and remove every saved beginning."""
        for name in list(self._book.saved_bytes):
            self._book.dropped(name)
        shutil.rmtree(self._folder, ignore_errors=True)  # what cannot be removed is overwritten or found next time

    def figures(self) -> dict[str, int]:
        """Totals since the service started, and the bytes on disk."""
        return {**self._totals, "prefixes_bytes": sum(size or 0 for size in self._book.saved_bytes.values())}

    async def enter(
        self, key: str, messages: Sequence[ChatMessage], server: LlamaServer, *, watched: bool = False
    ) -> Seat:
        """Take a slot, with as much of the prompt in it as can be had; `leave` gives it back, also after a cancel.

        Where somebody watches the answer, the rest is read when it is its turn, and `begun` must end that.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        text = p.flat(messages)
        placement = await self._placed(p.Waiting(key, p.blocks_of(text)))
        if placement is None:
            return Seat(server)
        seated = server.on_slot(placement.slot)
        kept = placement.restore is not None and self._book.was_kept(placement.restore)
        with self._reads(placement.restore):
            if placement.keep is not None:
                await self._keep(server, placement.slot, placement.keep)
            restored = placement.restore is not None and await self._restore(server, placement.restore, placement.slot)
        tokens, read_ms = 0, 0.0
        if placement.prime is not None:
            shared = p.beginning(messages, placement.prime_blocks)
            tokens, read_ms = await self._prime(seated, placement, shared)
        if watched:
            await self._turns.take(key, max(0, len(text) - p.BLOCK_CHARS * placement.cached_blocks))
        return Seat(seated, (loop.time() - began_s) * 1000, tokens, read_ms, restored, kept)

    def begun(self, key: str) -> None:
        """The first piece of the answer has come, so the prompt is read."""
        self._turns.read(key)

    def leave(self, key: str, seat: Seat | None, final: InferFinal | None, *, complete: bool) -> None:
        """The call has ended and its slot is free. `complete`: the engine has read all of its prompt; `final`: its
        answer as the engine counted, None where it came to nothing.
        """
        self._arrived = [(waiting, future) for waiting, future in self._arrived if waiting.key != key]
        for name in [name for name, maker in self._makers.items() if maker == key]:  # cancelled before it began
            self._made(name, 0)
        self._turns.over(key)
        self._book.ended(key, complete=complete)
        if final is None or seat is None:
            return
        self._totals["cached_tokens_total"] += max(0, final.cached_tokens - seat.read_tokens)
        if seat.restored and final.cached_tokens == 0:
            if seat.kept:
                self._keep_no_more("the engine read again what had been kept; no more is kept")
            else:
                self._off("the engine read again what was copied into its slot")

    async def _placed(self, waiting: p.Waiting) -> p.Placement | None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[p.Placement | None] = loop.create_future()
        self._arrived.append((waiting, future))
        more_may_come = self._book.free > len(self._arrived)
        if more_may_come and self._book.reads_much(waiting.blocks):
            self._timer = self._timer or loop.call_later(GATHER_S, self._place)
        else:
            self._place()
        return await future

    def _place(self) -> None:
        """Place everybody who has arrived."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        arrived, self._arrived = self._arrived, []
        placements = {placed.key: placed for placed in self._book.place([waiting for waiting, _ in arrived])}
        for placed in placements.values():
            for name in (placed.keep, placed.prime):
                if name is not None:
                    self._makers[name] = placed.key
                    self._making[name] = asyncio.get_running_loop().create_future()
        for waiting, future in arrived:
            if not future.done():
                future.set_result(placements.get(waiting.key))

    @contextmanager
    def _reads(self, name: str | None) -> Iterator[None]:
        """Meanwhile this file is not removed to make room."""
        if name is None:
            yield
            return
        self._reading[name] += 1
        try:
            yield
        finally:
            self._reading[name] -= 1

    async def _keep(self, server: LlamaServer, slot: int, name: str) -> None:
        """Save what the slot holds, if there is room: a disk that fills up would be slow, and fail in the end."""
        loop = asyncio.get_running_loop()
        began_s, size = loop.time(), 0
        try:
            if self._book.copies and shutil.disk_usage(self._folder).free >= self._disk_bytes:
                size = await server.save_slot(slot, name)
                took_ms = round((loop.time() - began_s) * 1000, 1)
                self._log.write(PREFIX_KEPT, name=name, slot=slot, bytes=size, took_ms=took_ms)
        except EngineError as err:
            self._copy_failed(err)
        except OSError as err:
            self._keep_no_more(f"{self._folder} cannot be used: {err.strerror}")
        finally:
            self._made(name, size)
        self._evict()

    async def _restore(self, server: LlamaServer, name: str, slot: int) -> bool:
        try:
            if name in self._making:
                await asyncio.wait([self._making[name]])
            if self._book.saved_bytes.get(name) is None or not self._book.copies:
                return False
            await server.restore_slot(slot, name)
        except EngineError as err:
            self._book.dropped(name)
            self._copy_failed(err)
            return False
        self._totals["prefixes_copied"] += 1
        return True

    async def _prime(
        self, seated: LlamaServer, placement: p.Placement, messages: Sequence[ChatMessage]
    ) -> tuple[int, float]:
        """Tokens that were read and the milliseconds of it."""
        loop = asyncio.get_running_loop()
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        name, size = placement.prime or "", 0
        try:
            try:
                tokens, read_ms = await seated.read({"messages": turns, "cache_prompt": True})
            except EngineError:
                return 0, 0.0  # the call itself follows and says what is wrong
            began_s = loop.time()
            try:
                size = await seated.save_slot(placement.slot, name)
            except EngineError as err:
                self._copy_failed(err)
                return tokens, read_ms
            took_ms = round((loop.time() - began_s) * 1000, 1)
            self._log.write(PREFIX_SAVED, name=name, slot=placement.slot, tokens=tokens, bytes=size, took_ms=took_ms)
            self._totals["prefixes_read"] += 1
        finally:
            self._made(name, size)
        self._evict()
        return tokens, read_ms

    def _made(self, name: str, size_bytes: int) -> None:
        """It is on disk, or will not be (0): whoever waits for it goes on."""
        del self._makers[name]
        if size_bytes:
            self._book.saved(name, size_bytes)
        else:
            self._book.dropped(name)
        self._making.pop(name).set_result(None)
        if not size_bytes:
            with suppress(OSError):  # half of it may be there; what cannot be removed is overwritten or cleared
                (self._folder / name).unlink()

    def _evict(self) -> None:
        """Remove what was not used for longest until the rest is within the bound."""
        sizes = {name: size for name, size in self._book.saved_bytes.items() if size is not None}
        total = sum(sizes.values())
        for name, size in sizes.items():
            if total <= self._disk_bytes:
                return
            if not self._reading[name]:
                self._book.dropped(name)
                (self._folder / name).unlink(missing_ok=True)
                total -= size

    def _copy_failed(self, err: EngineError) -> None:
        if not isinstance(err, EngineGone):  # a child that died is replaced, and the calls end with that
            self._off(str(err))

    def _keep_no_more(self, reason: str) -> None:
        """Beginnings are still copied: they are never cut, as a context is that comes back with another question."""
        if self._book.most_kept_blocks:
            self._book.most_kept_blocks = 0
            self._log.write(PREFIX_OFF, reason=reason)

    def _off(self, reason: str) -> None:
        if self._book.copies:
            self._book.copies = False
            self._log.write(PREFIX_OFF, reason=reason)
