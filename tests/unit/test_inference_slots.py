"""Who waits before the engine begins to read: long prompts, for a moment, to see who else begins like them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protocol.messages.infer import ChatMessage
from services.inference import slots
from services.inference.llama_http import LlamaServer
from services.inference.prefix import BLOCK_CHARS, BLOCK_TOKENS, MIN_BLOCKS
from services.inference.slots import Seat, SlotDesk
from services.kit.clock import SteadyClock
from services.kit.logs import Log

LONG_CHARS = 2 * MIN_BLOCKS * BLOCK_CHARS


class Desk:
    """A desk of four slots whose calls are asked for by key; nothing of it needs an engine."""

    def __init__(self, folder: Path) -> None:
        self.desk = SlotDesk(folder / "prefixes", 4, Log(folder, "desk", SteadyClock()), disk_bytes=1024**3)
        assert self.desk.engine_started("a model", copies=True, token_bytes=1)
        self.server = LlamaServer(1, "key")
        self.seats: dict[str, asyncio.Task[Seat]] = {}

    async def come(self, key: str, *, chars: int) -> None:
        """A call with a prompt of its own."""
        messages = [ChatMessage(role="user", content=key * chars)]
        self.seats[key] = asyncio.create_task(self.desk.enter(key, messages, self.server))
        for _ in range(5):  # whoever need not wait is seated in a few turns of the loop
            await asyncio.sleep(0)

    def seated(self) -> set[str]:
        return {key for key, task in self.seats.items() if task.done()}

    async def all_leave(self) -> None:
        for key in list(self.seats):
            self.desk.leave(key, await self.seats.pop(key), None, complete=True)

    async def closed(self) -> None:
        await self.all_leave()
        await self.server.close()


def test_how_long_a_context_is_kept_follows_from_the_disk_that_its_entry_may_take(tmp_path: Path) -> None:
    """A token of a large model takes 256 KB."""
    longest = {}
    for disk_bytes in (1024**3, 4 * 1024**3):
        desk = SlotDesk(tmp_path / "prefixes", 4, Log(tmp_path, "desk", SteadyClock()), disk_bytes)
        desk.engine_started("a model", copies=True, token_bytes=256 * 1024)
        longest[disk_bytes] = desk._book.most_kept_blocks * BLOCK_TOKENS
    assert longest == {1024**3: 4_096, 4 * 1024**3: 16_384}


def test_a_short_prompt_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GATHER_S", 60.0)

    async def scene() -> None:
        desk = Desk(tmp_path)
        for _ in range(2):
            for count, key in enumerate("abc", 1):
                await desk.come(key, chars=20)
                assert len(desk.seated()) == count
            await desk.all_leave()
        await desk.closed()

    asyncio.run(scene())


def test_a_long_prompt_waits_a_moment_and_then_goes_with_all_that_have_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "GATHER_S", 0.5)

    async def scene() -> None:
        desk = Desk(tmp_path)
        await desk.come("a", chars=LONG_CHARS)
        await desk.come("b", chars=LONG_CHARS)
        assert not desk.seated()
        await asyncio.wait_for(asyncio.gather(*desk.seats.values()), 30)
        await desk.all_leave()
        await desk.come("b", chars=LONG_CHARS)
        assert desk.seated() == {"b"}, "a slot holds all of it"
        await desk.closed()

    asyncio.run(scene())


def test_nobody_waits_when_every_slot_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GATHER_S", 60.0)

    async def scene() -> None:
        desk = Desk(tmp_path)
        for key in "abc":
            await desk.come(key, chars=LONG_CHARS)
            assert not desk.seated()
        await desk.come("d", chars=LONG_CHARS)
        assert desk.seated() == set("abcd")
        await desk.closed()

    asyncio.run(scene())
