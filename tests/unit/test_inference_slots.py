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

    async def all_leave(self) -> None:
        for key, task in self.seats.items():
            self.desk.leave(key, await task, None, complete=True)
        self.seats.clear()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """So long that no test comes to its end: what goes on does so for another reason."""
    monkeypatch.setattr(slots, "GATHER_S", 30.0)


async def closed(desk: Desk) -> None:
    await desk.all_leave()
    await desk.server.close()


@pytest.mark.usefixtures("patient")
def test_a_call_waits_for_as_many_as_came_together_the_last_time(tmp_path: Path) -> None:
    async def scene() -> None:
        desk = Desk(tmp_path)
        for key in ("a", "b", "c"):
            await desk.come(key)
        assert desk.seated() == {"a", "b", "c"}, "nothing was known of company"
        await desk.all_leave()
        desk.desk._began_s -= 60
        await desk.come("d")
        await desk.come("e")
        assert not desk.seated()
        await desk.come("f")
        assert desk.seated() == {"d", "e", "f"}
        await desk.come("g")
        assert desk.seated() == {"d", "e", "f", "g"}, "one that comes later waits for nobody"
        await closed(desk)

    asyncio.run(scene())


@pytest.mark.usefixtures("patient")
def test_one_that_comes_alone_again_and_again_never_waits(tmp_path: Path) -> None:
    async def scene() -> None:
        desk = Desk(tmp_path)
        for key in ("a", "b", "c"):
            await desk.come(key)
            assert desk.seated() == {key}
            await desk.all_leave()
            desk.desk._began_s -= 60
        await closed(desk)

    asyncio.run(scene())


def test_company_that_stays_away_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GATHER_S", 0.05)

    async def scene() -> None:
        desk = Desk(tmp_path)
        await desk.come("a")
        await desk.come("b")
        await desk.all_leave()
        desk.desk._began_s -= 60
        await desk.come("c")
        assert not desk.seated()
        await asyncio.wait_for(desk.seats["c"], 30)
        await desk.all_leave()
        desk.desk._began_s -= 60
        await desk.come("d")
        assert desk.seated() == {"d"}
        await closed(desk)

    asyncio.run(scene())


@pytest.mark.usefixtures("patient")
def test_nobody_waits_for_more_than_there_are_slots(tmp_path: Path) -> None:
    async def scene() -> None:
        desk = Desk(tmp_path)
        for key in "abcd":
            await desk.come(key)
        await desk.all_leave()
        desk.desk._came, desk.desk._began_s = 9, desk.desk._began_s - 60
        for key in "efgh":
            await desk.come(key)
        assert desk.seated() == set("efgh")
        await closed(desk)

    asyncio.run(scene())
