"""One client that asks without end, for reports, for expensive answers or for watches, and what others have of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from protocol.header import Header, unpack_header
from protocol.memory_transport import MemoryDealer, MemoryRouter
from protocol.messages.result import ListQuery, TaskQuery, Watch
from protocol.messages.session import StatusRequest
from services.kit.config import Home, load_home
from services.scheduler import reports, watchers
from services.scheduler.events import ReadEvents
from services.scheduler.pages import Pages
from tests.unit.simulation import say, stack, task_of
from tests.unit.test_scheduler_app import Bench
from tests.unit.test_scheduler_showing import Asking


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return load_home({"TIERLINE_HOME": str(tmp_path)}).make()


def kinds(client: MemoryDealer) -> list[str]:
    found = []
    while (frames := client.receive()) is not None:
        found.append(unpack_header(frames[0]).kind)
    return found


def test_listings_and_reports_are_made_once_for_all_that_ask_and_one_in_a_turn(home: Home) -> None:
    bench = Bench(home, MemoryRouter())
    flood, other = bench.join("flood", []), bench.join("other", [])
    bench.turn()
    for client in (flood, other):
        kinds(client)
    said: list[str] = []
    bench.app._journal._db.set_trace_callback(said.append)
    for number in range(30):
        bench.say(flood, Header(kind="session.status", id=f"s{number}"), StatusRequest())
        bench.say(flood, Header(kind="task.list", id=f"l{number}"), ListQuery(limit=10 + number % 2))
    bench.say(other, Header(kind="session.status", id="s"), StatusRequest())
    bench.turn()
    assert kinds(other) == ["session.report"]
    assert kinds(flood) == ["session.report"] * 30, "the listings have their turns"
    bench.turn()
    bench.turn()
    assert kinds(flood) == ["task.listing"] * 30
    assert sum("FROM tallies" in one for one in said) == 1
    assert len({one for one in said if "FROM tasks WHERE state" in one}) == 2 * 6, "two listings, of six states each"
    bench.app.close()


def test_one_client_may_wait_for_so_many_reports(home: Home) -> None:
    bench = Bench(home, MemoryRouter())
    flood, other = bench.join("flood", []), bench.join("other", [])
    bench.turn()
    for client in (flood, other):
        kinds(client)
    for number in range(reports.MOST_AWAITED + 2):
        bench.say(flood, Header(kind="session.status", id=f"s{number}"), StatusRequest())
    bench.say(other, Header(kind="session.status", id="s"), StatusRequest())
    bench.turn()
    assert kinds(flood) == ["refused"] * 2 + ["session.report"] * reports.MOST_AWAITED
    assert kinds(other) == ["session.report"]
    bench.app.close()


class SlowRouter(MemoryRouter):
    """Each message takes as long as one that is hard to check."""

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        until_s = time.thread_time() + 0.01
        while time.thread_time() < until_s:
            pass
        return super().receive()


def test_a_flood_of_messages_that_take_long_does_not_keep_what_is_to_be_sent(home: Home) -> None:
    bench = Bench(home, SlowRouter())
    bench.turn()
    flood = bench.join("flood", [])
    for number in range(100):
        bench.say(flood, Header(kind="task.show", id=f"s{number}"), TaskQuery(task_id="nobody"))
    bench.turn()
    assert 1 <= kinds(flood).count("error") < 20, "some are answered before the others are even read"
    bench.app.close()


def test_an_event_is_encoded_once_for_all_that_follow_a_task() -> None:
    world = stack(say("fine"))
    asking = Asking(world, ("ann", "ben"))
    task_id = world.submit(task_of([{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]))
    assert world.hub is not None
    seq = world.hub.engine.live[task_id].seq
    for name in ("ann", "ben"):
        asking.ask("task.watch", Watch(task_id=task_id, after_seq=seq), name)
    asking.told.clear()
    asking.ask("task.cancel", TaskQuery(task_id=task_id))
    events = [body for _, kind, body in asking.told if kind == "task.event"]
    assert len(events) >= 2
    assert all(body is other for body, other in zip(events[::2], events[1::2], strict=True))


def test_one_client_leaves_watches_for_others_and_follows_a_task_only_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "MAX_WATCHES", 100)
    world = stack(say("fine"))
    asking = Asking(world, ("ann", "ben"))
    tasks = [world.submit(task_of([{"id": "S1"}])) for _ in range(2)]
    assert world.hub is not None
    for _ in range(watchers.MOST_OF_ONE_TASK + 2):
        asking.ask("task.watch", Watch(task_id=tasks[0], after_seq=world.hub.engine.live[tasks[0]].seq))
    assert asking.kinds() == ["refused"] * 2, "each event would be a message for every one of them"
    for _ in range(100):
        asking.ask("task.watch", Watch(task_id=tasks[1], quiet=True))
    assert asking.kinds().count("refused") == 2 + 100 - (50 - watchers.MOST_OF_ONE_TASK), "half of all are for others"
    asking.told.clear()
    asking.ask("task.watch", Watch(task_id=tasks[0], quiet=True), "ben")
    assert asking.told == []


def test_clients_that_came_late_take_turns_however_many_watches_one_has() -> None:
    pages = Pages()

    def read(client: str, number: int) -> ReadEvents:
        header = Header(kind="task.watch", id=f"{client}{number}")
        return ReadEvents(client.encode(), header, Watch(task_id="t"))

    for number in range(4):
        pages.ask(read("flood", number))
    pages.ask(read("ann", 0))
    pages.ask(read("ben", 0))
    told = []
    for _ in range(9):
        one = pages.next()
        told.append(one.header.id)
        if one.identity == b"ann":
            pages.ask(one)  # there is more to tell
    assert told == ["flood0", "ann0", "ben0", "flood1", "ann0", "flood2", "ann0", "flood3", "ann0"]
    pages.ask(read("flood", 9))
    assert len(pages) == 2
    pages.retain({(b"ann", "ann0")})
    assert pages.next().identity == b"ann"
    assert not pages
