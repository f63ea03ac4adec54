"""Who waits for whom before the engine begins to read: calls that come together are read together."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from protocol.messages.infer import ChatMessage
from services.inference import slots
from services.inference.llama_http import LlamaServer
from services.inference.slots import Seat, SlotDesk
from services.kit.clock import SteadyClock
from services.kit.logs import Log

SHORT = [ChatMessage(role="user", content="a question")]


class Desk:
    """A desk of four slots whose calls are asked for by number; nothing of it needs an engine."""

    def __init__(self, folder: Path) -> None:
        self.desk = SlotDesk(folder / "prefixes", 4, Log(folder, "desk", SteadyClock()))
        self.desk.engine_started("a model", copies=False)
        self.server = LlamaServer(1, "key")
        self.seats: dict[str, asyncio.Task[Seat]] = {}

    async def come(self, key: str) -> None:
        self.seats[key] = asyncio.create_task(self.desk.enter(key, SHORT, self.server))
        for _ in range(5):  # whoever need not wait is seated in a few turns of the loop
            await asyncio.sleep(0)

    def seated(self) -> set[str]:
        return {key for key, task in self.seats.items() if task.done()}

    async def leaves(self, key: str) -> None:
        self.desk.leave(key, await self.seats.pop(key), None, complete=True)

    async def all_leave(self) -> None:
        for key in list(self.seats):
            await self.leaves(key)


async def closed(desk: Desk) -> None:
    await desk.all_leave()
    await desk.server.close()


def test_calls_are_seated_together_that_came_together_the_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "GATHER_S", 1.0)

    async def scene() -> None:
        desk = Desk(tmp_path)
        for key in ("a", "b", "c"):
            await desk.come(key)
        assert desk.seated() == {"a", "b", "c"}, "nothing was known of company"
        await desk.all_leave()
        await asyncio.sleep(1.1)
        await desk.come("d")
        await desk.come("e")
        assert not desk.seated()
        await desk.come("f")
        assert desk.seated() == {"d", "e", "f"}
        await desk.come("g")
        assert desk.seated() == {"d", "e", "f", "g"}, "one that comes later waits for nobody"
        await closed(desk)

    asyncio.run(scene())


def test_company_that_stays_away_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GATHER_S", 0.5)

    async def scene() -> None:
        desk = Desk(tmp_path)
        for key in ("a", "b"):
            await desk.come(key)
        await desk.all_leave()
        await asyncio.sleep(0.6)
        await desk.come("c")
        assert not desk.seated()
        await asyncio.wait_for(desk.seats["c"], 30)
        await closed(desk)

    asyncio.run(scene())


def test_nobody_waits_for_more_than_there_are_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GATHER_S", 1.0)

    async def scene() -> None:
        desk = Desk(tmp_path)
        for key in "abcdxy":
            await desk.come(key)
        for key in "abcd":
            await desk.leaves(key)
        await desk.all_leave()
        await asyncio.sleep(1.1)
        for key in "efgh":
            await desk.come(key)
        assert desk.seated() == set("efgh"), "six came the last time"
        await closed(desk)

    asyncio.run(scene())
