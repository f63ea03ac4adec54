"""Tasks that only the journal has: folded a part at a time, once for all that wait; a key is known without a fold."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.codec import unpack_body
from protocol.header import Header, unpack_header
from protocol.memory_transport import MemoryDealer, MemoryRouter
from protocol.messages.result import CancelQuery, TaskQuery, TaskView
from protocol.messages.task import Accepted, Submit
from services.kit.config import Home, load_home
from services.scheduler import lookups
from services.scheduler.effects import Record
from services.scheduler.fact_rows import FACTS_AT_ONCE
from services.scheduler.facts import unpack_fact
from services.scheduler.journal import Journal
from services.scheduler.rendered import ATTEMPTS_AT_ONCE
from services.scheduler.views import view
from tests.unit.simulation import say, stack, task_of
from tests.unit.test_scheduler_app import Bench

STEPS = 300


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return load_home({"TIERLINE_HOME": str(tmp_path)}).make()


def large_ended_task(home: Home) -> TaskView:
    """On file, and settled, so that a new hub leaves it there."""
    world = stack(say("fine"), slots=8)
    specs: list[dict[str, object]] = [{"id": f"S{i}"} for i in range(STEPS)]
    task_id = world.submit(task_of(specs, idempotency_key="large", budget={"max_steps": STEPS}))
    world.finish(task_id)
    world.run(lambda: world.journal[-1][2] == "OutcomesSettled")
    journal = Journal(home.journal / "journal.sqlite")
    journal.append([Record(unpack_fact(kind, data), seq) for _, seq, kind, data in world.journal])
    journal.close()
    return view(world.recorded_tasks()[task_id])


def answers(client: MemoryDealer) -> list[tuple[Header, bytes]]:
    found = []
    while (frames := client.receive()) is not None:
        found.append((unpack_header(frames[0]), frames[1]))
    return [one for one in found if one[0].corr is not None and one[0].kind != "session.welcome"]


def test_others_are_served_while_a_large_task_is_read_for_several_clients_at_once(home: Home) -> None:
    large = large_ended_task(home)
    bench = Bench(home, MemoryRouter())
    bench.turn()
    said: list[str] = []
    bench.app._journal._db.set_trace_callback(said.append)
    clients = [bench.join(name, []) for name in ("ann", "ben")]
    for client in clients:
        bench.say(client, Header(kind="task.show", id="show"), TaskQuery(task_id=large.task_id))
    turns, told = 0, []
    while not told:
        assert turns < 1_000
        bench.ask("task.show", TaskQuery(task_id="nobody"))
        bench.turn()
        turns += 1
        told = answers(clients[0])
        assert [header.kind for header, _ in bench.heard].count("error") == turns, "others are, in every turn"
    assert turns > STEPS // ATTEMPTS_AT_ONCE, "while its view is made too"
    assert unpack_body(TaskView, told[0][1]) == large
    assert answers(clients[1])[0][1] == told[0][1]
    reads = [one for one in said if "SELECT seq, kind, data" in one and large.task_id in one]
    assert len(reads) == 1, "for both"
    bench.app.close()


def test_a_key_that_is_taken_by_a_large_task_is_known_without_reading_it(home: Home) -> None:
    large = large_ended_task(home)
    bench = Bench(home, MemoryRouter())
    said: list[str] = []
    bench.app._journal._db.set_trace_callback(said.append)
    task = task_of([{"id": "S1"}], idempotency_key="large").model_dump(mode="json", exclude_none=True)
    bench.ask("task.submit", Submit(task=task))
    assert bench.until("task.accepted", turns=2) == Accepted(task_id=large.task_id, duplicate=True)
    assert not [one for one in said if "SELECT seq, kind, data" in one]
    bench.app.close()


def test_one_client_may_wait_for_so_many_and_others_still_may(home: Home) -> None:
    large = large_ended_task(home)
    bench = Bench(home, MemoryRouter())
    bench.turn()
    other = bench.join("other", [])
    for _ in range(lookups.MOST_WAITING + 3):
        bench.ask("task.cancel", CancelQuery(task_id=large.task_id))
    bench.say(other, Header(kind="task.cancel", id="c"), CancelQuery(task_id=large.task_id))
    turns = 0
    while not any(header.kind == "task.cancelled" for header, _ in bench.heard):
        bench.turn()
        turns += 1
    assert turns >= large.last_seq // FACTS_AT_ONCE, "no more than so many facts are folded in a turn"
    kinds = [header.kind for header, _ in bench.heard if header.kind != "session.welcome"]
    assert kinds == ["refused"] * 3 + ["task.cancelled"] * lookups.MOST_WAITING
    assert [header.kind for header, _ in answers(other)] == ["task.cancelled"]
    bench.app.close()
