"""When the hub's loop waits awake: the rule, and the loop that follows it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from protocol.header import Header
from protocol.memory_transport import MemoryRouter
from protocol.messages.result import TaskQuery
from services.kit.config import load_home
from services.scheduler.vigil import MOMENT_S, Vigil
from tests.unit.test_scheduler_app import Bench


def test_it_stays_awake_after_a_short_wait_and_no_longer_than_one() -> None:
    vigil = Vigil()
    assert vigil.awake_s == 0, "at first nobody is there"
    vigil.waited(MOMENT_S / 2)
    assert vigil.awake_s == MOMENT_S
    vigil.waited(MOMENT_S)
    assert vigil.awake_s == 0


class Reluctant(MemoryRouter):
    """Gives a message only when it was asked some times for it, or waited for; counts both."""

    def __init__(self) -> None:
        super().__init__()
        self.withheld = self.asked = self.waits = 0

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        self.asked += 1
        if self.withheld:
            self.withheld -= 1
            return None
        return super().receive()

    def wait(self, timeout_ms: int) -> bool:
        self.waits += 1
        self.withheld = 0
        return super().wait(timeout_ms)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(load_home({"TIERLINE_HOME": str(tmp_path)}).make(), Reluctant())
    for _ in range(4):
        bench.turn()
    return bench


def counted(bench: Bench, withheld: int) -> tuple[int, int]:
    """How often one turn asks for the first message and sleeps, where it comes when it was asked for so often."""
    port = bench.port
    assert isinstance(port, Reluctant)
    bench.say(bench.client, Header(kind="task.show", id=f"q{port.asked}"), TaskQuery(task_id="nobody"))
    port.asked = port.waits = 0
    port.withheld = withheld
    bench.app.turn()
    return port.asked, port.waits


def test_the_loop_asks_again_while_messages_follow_each_other(bench: Bench) -> None:
    waits, end_s = 1, time.monotonic() + 20
    while waits and time.monotonic() < end_s:  # a moment is short: it may pass while another process has the core
        counted(bench, 0)
        asked, waits = counted(bench, 5)
    assert waits == 0
    assert asked >= 6


def test_the_loop_sleeps_at_once_after_a_wait_that_was_long(bench: Bench) -> None:
    counted(bench, 10**9)  # nothing comes for a moment: it goes to sleep, and is woken
    asked, waits = counted(bench, 10**9)
    assert waits == 1
    assert asked <= 3, "once, then asleep; once more for the message, and whether there are others"
