"""Weighted fair share between clients: what a queue hands out over a long backlog, and to whom."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.session import Hello
from services.scheduler.clients import client_reports
from services.scheduler.queues import BATCH_EVERY, Place, ReadyQueue
from tests.unit.simulation import say, shipped_registry, stack, task_of

WEIGHTS = st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 7.0]), min_size=2, max_size=6)


class Line:
    """A queue whose clients always have so many calls waiting."""

    def __init__(self) -> None:
        self.queue = ReadyQueue()
        self.served: Counter[str] = Counter()
        self.client_of: dict[str, str] = {}

    def ask(self, client: str, weight: float, *, interactive: bool = True, rank_s: float = 0.0) -> None:
        key = f"k{len(self.client_of)}"
        self.client_of[key] = client
        self.queue.push(key, Place(client, interactive, rank_s, None, weight))

    def serve(self) -> str:
        key = self.queue.first()
        assert key is not None
        self.queue.take()
        self.served[self.client_of[key]] += 1
        return self.client_of[key]


@given(weights=WEIGHTS, seed=st.integers(0, 2**32), depth=st.integers(1, 8))
def test_over_a_long_backlog_the_shares_are_those_of_the_weights(weights: list[float], seed: int, depth: int) -> None:
    """However the clients come, how deep their backlogs are, and what ranks their calls have."""
    draw = random.Random(seed)
    line = Line()
    clients = {f"c{number}": weight for number, weight in enumerate(weights)}
    for client in draw.sample(sorted(clients), len(clients)):
        for _ in range(draw.randint(1, depth)):
            line.ask(client, clients[client], rank_s=draw.random())
    rounds = 2_000
    for _ in range(rounds):
        served = line.serve()
        line.ask(served, clients[served], rank_s=draw.random())
    total = sum(weights)
    for client, weight in clients.items():
        # Never further from its share than about a call of each: the bound of fair queueing, not of chance.
        assert abs(line.served[client] - rounds * weight / total) <= len(weights) + weight / min(weights) + 1


@given(weights=WEIGHTS, seed=st.integers(0, 2**32))
def test_batch_work_progresses_beside_interactive_work_of_any_weight(weights: list[float], seed: int) -> None:
    draw = random.Random(seed)
    line = Line()
    for number, weight in enumerate(weights):
        for _ in range(200):
            line.ask(f"c{number}", weight, rank_s=draw.random())
    for _ in range(20):
        line.ask("batch", 0.1, interactive=False)
    for _ in range(20 * BATCH_EVERY):
        line.serve()
    assert line.served["batch"] == 20


@given(weight=st.sampled_from([0.1, 1.0, 7.0]), before=st.integers(1, 300))
def test_a_newcomer_waits_for_nobodys_past_and_is_owed_none(weight: float, before: int) -> None:
    line = Line()
    for _ in range(1_000):
        line.ask("old", 1.0)
    for _ in range(before):
        line.serve()
    for _ in range(1_000):
        line.ask("new", weight)
    line.served.clear()
    order = [line.serve() for _ in range(200)]
    assert "new" in order[: 2 + round(1 / weight)], "it does not starve"
    share = 200 * weight / (1 + weight)
    assert abs(line.served["new"] - share) <= 2 + weight, "and has no burst for the time in which it asked for nothing"


def test_who_asks_for_one_call_at_a_time_gets_no_more_than_its_share() -> None:
    """Its count outlives its turn: else it would be a newcomer, and first, every time."""
    line = Line()
    for _ in range(1_000):
        line.ask("deep", 4.0)
    line.ask("single", 1.0)
    for _ in range(500):
        if line.serve() == "single":
            line.ask("single", 1.0)
    assert abs(line.served["single"] - 100) <= 2


def test_clients_that_are_gone_are_forgotten() -> None:
    line = Line()
    for _ in range(2_000):
        line.ask("deep", 1.0)
    for number in range(900):
        line.ask(f"passer-by-{number}", 1.0)
        line.serve()
        line.serve()
    group = line.queue._interactive
    assert len(group.served) <= 2 * len(group.waiting) + 70


def test_equal_weights_take_turns() -> None:
    line = Line()
    for client in ("a", "b"):
        for _ in range(3):
            line.ask(client, 1.0)
    assert [line.serve() for _ in range(6)] == ["a", "b", "a", "b", "a", "b"]


def test_the_report_shows_weight_tasks_and_calls_of_each_client() -> None:
    registry = shipped_registry()
    world = stack(say("fine", took_ms=1_000), slots=1)
    assert world.hub is not None
    world.submit(task_of([{"id": "S1"}, {"id": "S2"}, {"id": "S3"}]))
    world.run_for(200)
    hello = Hello(service="idle-1", protocol_min=1, protocol_max=1, pid=1)
    world.hub.broker.on_hello(b"idle", hello, "idle-1", 0, world.now)
    rows = {row.client: row for row in client_reports(world.hub.broker, world.hub.engine.occupancy.active)}
    busy = rows["client-simulated"]
    assert (busy.tasks, busy.running, busy.waiting, busy.weight) == (1, 1, 2, registry.weight_of("client-simulated"))
    assert (rows["idle-1"].tasks, rows["idle-1"].running) == (0, 0)
    assert set(rows) == {"client-simulated", "idle-1"}
