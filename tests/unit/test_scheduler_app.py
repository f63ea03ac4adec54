"""The hub's edge on the memory transport with a real journal: what is written before what is said, and kill -9 between.

Killed for real: the hub runs in a forked child, which sends itself SIGKILL before its n-th statement or message.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from protocol.codec import pack_body, unpack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.kinds import BODIES
from protocol.memory_transport import MemoryDealer, MemoryRouter
from protocol.messages.base import Message
from protocol.messages.plan import PlanFinal, PlanRequest
from protocol.messages.result import TaskEvent, TaskQuery, TaskView, Watch
from protocol.messages.session import Hello, PeerState, Pong, Reside
from protocol.messages.task import Accepted, Submit
from services.kit.clock import VirtualClock
from services.kit.config import Home, load_home
from services.kit.registry import Registry
from services.scheduler.app import HubApp
from services.scheduler.audit import audit_file, audit_task, task_ids
from services.scheduler.housekeeping import Intervals
from services.scheduler.journal import Journal
from tests.unit.journals import write_journal, write_long_task
from tests.unit.simulation import final_of, shipped_registry, task_of
from tests.waiting import until

STEPS: list[dict[str, object]] = [{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]


class Watched(MemoryRouter):
    """The memory transport, telling before each message what is about to be said."""

    def __init__(self, before_send: Callable[[Header, bytes], None]) -> None:
        super().__init__()
        self.before_send = before_send

    def send(self, identity: bytes, header: bytes, body: bytes) -> None:
        self.before_send(unpack_header(header), body)
        super().send(identity, header, body)


class Bench:
    """A hub with a planner, a worker and a client, all in this thread; one `turn` is one of each."""

    def __init__(
        self,
        home: Home,
        port: MemoryRouter,
        intervals: Intervals | None = None,
        registry: Registry | None = None,
        available_memory: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.port = port
        self.clock = VirtualClock(10_000_000)
        self.app = HubApp(
            home,
            registry or shipped_registry(),
            port,
            clock=self.clock,
            intervals=intervals,
            available_memory=available_memory,
        )
        self.sent = 0
        self.granted = 64
        self.heard: list[tuple[Header, Message]] = []
        self.resides: list[bool] = []
        self.client = self.join("client", [])
        self.planner = self.join("planner", ["planner"])
        self.worker = self.join("worker", ["infer.worker"])
        self.app.start()

    def join(self, service: str, capabilities: list[str]) -> MemoryDealer:
        peer = self.port.connect()
        hello = Hello(service=service, protocol_min=1, protocol_max=1, capabilities=capabilities, state=PeerState.READY)
        self.say(peer, Header(kind="session.hello", id="h", epoch=f"{service}-1", credit=64), hello)
        return peer

    def say(self, peer: MemoryDealer, header: Header, body: Message) -> None:
        peer.send(pack_header(header), pack_body(body))

    def ask(self, kind: str, body: Message) -> None:
        self.sent += 1
        self.say(self.client, Header(kind=kind, id=f"c{self.sent}"), body)

    def turn(self) -> None:
        self.clock.advance_ms(10)
        self.app.turn()
        for peer in (self.planner, self.worker):
            while (frames := peer.receive()) is not None:
                header = unpack_header(frames[0])
                answer: Message
                if header.kind == "session.ping":
                    answer = Pong(state=PeerState.READY, in_flight=0, loop_lag_ms=0, rss_bytes=0)
                elif header.kind == "plan.request":
                    task = unpack_body(PlanRequest, frames[1]).task
                    answer = PlanFinal(task=task, source="client", reason="as given")
                elif header.kind == "infer.request":
                    answer = final_of("fine")
                elif header.kind == "session.reside":
                    self.resides.append(unpack_body(Reside, frames[1]).loaded)
                    continue
                else:
                    continue
                kind = header.kind.replace("request", "final").replace("ping", "pong")
                self.granted += 1
                self.say(
                    peer,
                    Header(kind=kind, id=f"a{header.id}", corr=header.id, key=header.key, credit=self.granted),
                    answer,
                )
        while (frames := self.client.receive()) is not None:
            header = unpack_header(frames[0])
            self.heard.append((header, unpack_body(BODIES[header.kind], frames[1])))

    def until(self, kind: str, turns: int = 2_000) -> Message:
        for _ in range(turns):
            for header, body in self.heard:
                if header.kind == kind:
                    return body
            self.turn()
        raise AssertionError(f"no {kind}: {[header.kind for header, _ in self.heard[-20:]]}")


def submit(key: str) -> Submit:
    return Submit(task=task_of(STEPS, idempotency_key=key).model_dump(mode="json", exclude_none=True))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return load_home({"TIERLINE_HOME": str(tmp_path)}).make()


def test_a_machine_that_runs_short_of_memory_is_seen_and_an_idle_model_leaves(home: Home) -> None:
    shipped = shipped_registry()
    warm = shipped.models["worker"].model_copy(update={"residency": "warm", "memory_bytes": 1_000_000})
    registry = replace(shipped, models=MappingProxyType({**shipped.models, "worker": warm}))
    left = [64_000_000_000]
    bench = Bench(home, MemoryRouter(), registry=registry, available_memory=lambda: left[0])
    for passed_ms in range(0, 20_000, 250):
        if passed_ms == 10_000:
            assert bench.resides == []
            left[0] = 1_000_000
        bench.clock.advance_ms(250)
        bench.turn()
    assert bench.resides[:1] == [False]
    bench.app.close()


def facts_on_file(home: Home) -> list[tuple[str, str]]:
    """As another process sees them: committed ones only."""
    with sqlite3.connect(f"file:{home.journal}/journal.sqlite?mode=ro", uri=True) as database:
        rows = database.execute("SELECT task, kind FROM facts ORDER BY task, seq").fetchall()
    return [(task, name) for task, kinds in rows for name in kinds.split(" ")]


def test_a_promise_is_committed_and_synced_before_it_is_made(home: Home) -> None:
    said: list[str] = []
    promised: list[str] = []

    def before_send(header: Header, body: bytes) -> None:
        fact = {"task.accepted": "TaskAccepted", "task.result": "TaskEnded"}.get(header.kind)
        if fact is None:
            return
        promised.append(header.kind)
        assert fact in [kind for _, kind in facts_on_file(home)], "another process can read it already"
        commit = max(i for i, statement in enumerate(said) if fact in statement)
        sync = max(i for i, statement in enumerate(said[:commit]) if "synchronous" in statement)
        assert said[sync] == "PRAGMA synchronous = FULL", "its transaction was one that SQLite syncs to the disk"
        assert said[commit + 1 :].count("COMMIT") >= 1

    bench = Bench(home, Watched(before_send))
    bench.app._journal._db.set_trace_callback(said.append)
    bench.ask("task.submit", submit("one"))
    accepted = bench.until("task.accepted")
    assert isinstance(accepted, Accepted)
    bench.ask("task.watch", Watch(task_id=accepted.task_id, quiet=True))
    bench.until("task.result")
    assert promised == ["task.accepted", "task.result"]
    bench.app.close()


def test_a_batch_of_messages_is_one_transaction_and_only_promises_are_synced(home: Home) -> None:
    bench = Bench(home, MemoryRouter())
    bench.turn()
    journal = bench.app._journal
    for index in range(50):
        bench.ask("task.submit", submit(f"key-{index}"))
    bench.turn()
    assert sum(1 for _, kind in facts_on_file(home) if kind == "TaskAccepted") == 50
    assert journal.commits == journal.syncs == 1
    for _ in range(100):
        bench.turn()
    ended = sum(1 for _, kind in facts_on_file(home) if kind == "TaskEnded")
    assert ended == 50
    total = len(facts_on_file(home))
    assert journal.commits < total / 5, "many facts share a commit"
    assert journal.syncs < journal.commits
    bench.app.close()


@pytest.mark.parametrize("steps", range(1, 61))
def test_kill_9_before_any_statement_or_message_loses_nothing_that_was_promised(home: Home, steps: int) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_until_killed(home, steps, writer)
    os.close(writer)
    with os.fdopen(reader, encoding="ascii") as pipe:
        told = [line.split() for line in pipe.read().splitlines()]
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert steps > 45, "the child was through before it was to be killed"
        assert [kind for kind, _ in told] == ["TaskAccepted", "TaskEnded"]
    else:
        assert os.WTERMSIG(status) == signal.SIGKILL
    on_file = facts_on_file(home)
    for kind, task in told:
        assert (task, kind) in on_file, f"{kind} of {task} was said and is lost"
    bench = Bench(home, MemoryRouter())
    bench.ask("task.submit", submit("one"))
    accepted = bench.until("task.accepted")
    assert isinstance(accepted, Accepted)
    assert accepted.duplicate == any(kind == "TaskAccepted" for _, kind in on_file)
    bench.ask("task.watch", Watch(task_id=accepted.task_id))
    result = bench.until("task.result")
    assert isinstance(result, TaskView)
    assert result.state.value == "succeeded"
    kinds = [kind for task, kind in facts_on_file(home) if task == accepted.task_id]
    assert kinds.count("TaskEnded") == 1
    assert kinds.count("StepDone") == len(STEPS)
    bench.app.close()
    with sqlite3.connect(home.journal / "journal.sqlite") as database:
        found = [one for task in task_ids(database) for one in audit_task(database, task)]
        assert found + audit_file(database) == []


def _run_until_killed(home: Home, steps: int, writer: int) -> None:
    """In the child: one task, and SIGKILL before the n-th statement or message after the start."""
    left = [steps]

    def step(_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_send(header: Header, body: bytes) -> None:
        if bench is not None:
            step(header)
        if header.kind == "task.accepted":
            os.write(writer, f"TaskAccepted {unpack_body(Accepted, body).task_id}\n".encode())
        elif header.kind == "task.result":
            os.write(writer, f"TaskEnded {unpack_body(TaskView, body).task_id}\n".encode())

    bench: Bench | None = None
    try:
        bench = Bench(home, Watched(before_send))
        bench.app._journal._db.set_trace_callback(step)
        bench.ask("task.submit", submit("one"))
        accepted = bench.until("task.accepted")
        bench.ask("task.watch", Watch(task_id=getattr(accepted, "task_id", "")))
        bench.until("task.result")
    finally:
        os._exit(0)


def test_a_late_watcher_is_told_everything_in_pages_and_then_what_happens(home: Home) -> None:
    journal = Journal(home.journal / "journal.sqlite")
    task = write_long_task(journal, 1_500, snapshots=True)
    journal.close()
    bench = Bench(home, MemoryRouter())
    bench.ask("task.watch", Watch(task_id=task.id))
    result = bench.until("task.result")
    assert isinstance(result, TaskView)
    seqs = [body.seq for _, body in bench.heard if isinstance(body, TaskEvent) and body.event != "step.tokens"]
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) > 1_500
    assert len(seqs) <= result.last_seq
    bench.app.close()


def test_a_long_task_is_snapshotted_by_the_loop(home: Home) -> None:
    journal = Journal(home.journal / "journal.sqlite")
    task = write_long_task(journal, 6_000, snapshots=False)
    journal.close()
    bench = Bench(home, MemoryRouter())
    bench.ask("task.watch", Watch(task_id=task.id, quiet=True))
    bench.until("task.result")
    bench.app.close()
    with sqlite3.connect(home.journal / "journal.sqlite") as database:
        [(kept, seq)] = database.execute("SELECT task, seq FROM snapshots").fetchall()
        assert (kept, seq >= task.seq) == (task.id, True)
        assert audit_task(database, task.id) == []


def test_a_damaged_task_is_set_aside_and_the_hub_serves_the_others(home: Home) -> None:
    path = home.journal / "journal.sqlite"
    journal = Journal(path)
    task = write_long_task(journal, 100, snapshots=False)
    journal.close()
    with sqlite3.connect(path) as database:
        last, kind = database.execute("SELECT seq, kind FROM facts WHERE seq >= 50 ORDER BY seq").fetchone()
        database.execute("UPDATE facts SET data = x'c1' WHERE seq = ?", (last,))
    bench = Bench(home, MemoryRouter())
    bench.ask("task.submit", submit("another"))
    accepted = bench.until("task.accepted")
    bench.ask("task.watch", Watch(task_id=getattr(accepted, "task_id", "")))
    bench.until("task.result")
    bench.ask("task.show", TaskQuery(task_id=task.id))
    refusal = bench.until("error")
    assert "task.damaged" in str(refusal)
    assert f"fact {last - kind.count(' ')}" in str(refusal)
    bench.app.close()
    assert '"journal.damaged"' in (home.logs / "scheduler.jsonl").read_text()


def test_the_hub_starts_retention_and_says_what_it_did(home: Home) -> None:
    write_journal(home.journal / "journal.sqlite", 2)  # tasks of 1970, by the virtual clock
    bench = Bench(home, MemoryRouter(), Intervals(first_retention=0))
    log = home.logs / "scheduler.jsonl"

    def retained() -> bool:
        bench.turn()
        return "journal.retained" in log.read_text()

    until(retained, "old tasks are removed", look_every_s=0.01)
    line = next(line for line in log.read_text().splitlines() if "journal.retained" in line)
    assert json.loads(line)["removed"] == 2
    bench.app.close()
