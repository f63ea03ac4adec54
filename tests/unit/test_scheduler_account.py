"""The hub's account of memory where entries change, models take what nobody expected, and calls outlive their entry."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.messages.infer import ChatMessage, InferFinal, InferRequest
from protocol.messages.result import TaskState
from protocol.messages.session import PeerState
from services.ctl.status import size_notes
from services.kit.registry import Registry
from services.kit.registry.acceleration import Declared
from services.kit.session import DrainAsked, StateChanged
from services.scheduler import events as ev
from services.scheduler.place import MIN_RESIDENCE_MS, MIN_TURN_MS, Demand, State
from services.scheduler.residency import Residency
from services.scheduler.resources import Needs, Tokens
from tests.unit.simulation import say, task_of
from tests.unit.test_scheduler_batches import Asker
from tests.unit.test_scheduler_reload import edited, reload
from tests.unit.test_scheduler_residency import GB, LOAD_MS, Stack, registry_of, stack, warm

FILE = Declared(
    architecture="llama",
    parameters_b=1,
    file_bytes=1 * GB,
    context_tokens=65_536,
    vocabulary_tokens=32_000,
    kv_bytes_per_token=100_000,
)
"""1 GB and 0.1 GB for 1,000 tokens of context."""


def changed(base: Registry, **models: dict[str, Any]) -> Registry:
    """The registry with other fields for some models."""
    return edited(base, models={name: base.models[name].model_copy(update=fields) for name, fields in models.items()})


def restart(world: Stack, model: str) -> None:
    """The process begins anew with its changed entry, as one does that is supervised."""
    world.peers[f"inference-{model}"].kill()
    world.run_for(200)
    world.peers[f"inference-{model}"].start()
    world.run_for(200)


def test_what_a_changed_entry_takes_is_not_what_was_measured_of_the_one_before() -> None:
    small = {"residency": "warm", "declared": FILE, "context_tokens": 1_024, "slots": 1}
    registry = registry_of(budget=8 * GB, specialist=small)
    world = stack(registry)
    world.peers["inference-specialist"].model_bytes = 1_300_000_000
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    world.run_for(1_500)
    assert world.place("specialist").need_bytes == 1_300_000_000
    reload(world, changed(registry, specialist={"context_tokens": 50_000}))
    assert 6 * GB < world.place("specialist").need_bytes < 7 * GB
    assert world.place("specialist").held_bytes == 1_300_000_000, "by the process that runs still"
    world.run_for(1_500)
    assert world.place("specialist").need_bytes > 6 * GB, "what the old process measures says nothing of the new one"
    world.peers["inference-specialist"].model_bytes = 0
    restart(world, "specialist")
    assert world.place("specialist").held_bytes == 0
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    assert world.place("specialist").held_bytes > 6 * GB


def test_a_model_that_was_measured_too_large_loads_once_its_entry_is_smaller() -> None:
    registry = registry_of(budget=10 * GB, specialist=warm(4 * GB))
    world = stack(registry)
    world.peers["inference-specialist"].model_bytes = 10 * GB
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    world.run_for(1_500)
    smaller = changed(registry, specialist={"memory_bytes": 2 * GB}, worker={"memory_bytes": 6 * GB})
    reload(world, smaller)
    assert world.place("specialist").held_bytes == 10 * GB
    restart(world, "specialist")
    world.peers["inference-specialist"].model_bytes = 0
    result = world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])), limit_ms=20_000)
    assert result.state is TaskState.SUCCEEDED
    assert world.place("specialist").held_bytes == 2 * GB


def test_a_changed_hot_model_holds_what_its_old_process_has_until_the_new_one_is_there() -> None:
    registry = registry_of(worker={"memory_bytes": 6 * GB}, specialist=warm(2 * GB))
    world = stack(registry)
    assert world.place("worker").held_bytes == 6 * GB
    reload(world, changed(registry, worker={"memory_bytes": 1 * GB}))
    assert world.place("worker").held_bytes == 6 * GB
    restart(world, "worker")
    assert world.place("worker").held_bytes == 1 * GB


def test_a_reload_that_leaves_an_entry_as_it_was_keeps_what_was_measured_and_how_long_loading_took() -> None:
    registry = registry_of(specialist=warm(4 * GB))
    world = stack(registry, say("fine"))
    world.peers["inference-specialist"].model_bytes = 5 * GB
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    world.run_for(1_500)
    assert world.hub is not None
    place = world.hub.loading.residency.places["specialist"]
    load_ms = place.load_ms
    reload(world, changed(registry, worker={"memory_bytes": 1 * GB}))
    place = world.hub.loading.residency.places["specialist"]
    assert (place.measured_bytes, place.load_ms) == (5 * GB, load_ms)


def ask_for(asker: Asker, model: str) -> str:
    request = InferRequest(role="test", messages=[ChatMessage(role="user", content="Hi")], max_tokens=4)
    return asker.infer(model, request, "K1")


def test_a_removed_model_holds_its_memory_until_the_call_of_a_program_has_ended_and_its_process_is_gone() -> None:
    fits_all = registry_of(budget=8 * GB, worker=warm(6 * GB), specialist=warm(6 * GB))
    world = stack(fits_all, say("fine", 20_000))
    asker = Asker(world)
    running = ask_for(asker, "worker")
    world.run_for(3_000)
    front = {name: one.model_copy(update={"model": "front"}) for name, one in fits_all.roles.items()}
    coder = {"coder": fits_all.roles["coder"]}
    reload(world, edited(fits_all, models={"worker": None}, roles=front | coder))
    assert world.place("worker").held_bytes == 6 * GB
    task = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    world.run_for(5_000)
    (why,) = world.show(task).waiting
    assert "worker 5.6 GiB (1 calls run)" in why
    world.run(lambda: bool(asker.said(running)), 20_000)
    assert isinstance(asker.said(running)[-1], InferFinal)
    assert world.most_in_memory == 6 * GB
    world.peers["inference-worker"].kill()
    assert world.finish(task, limit_ms=60_000).state is TaskState.SUCCEEDED
    assert world.hub is not None
    assert "worker" not in {one.model for one in world.hub.loading.reports(world.now)}


def test_a_removed_model_whose_process_stays_without_work_gives_its_memory_back_after_a_minute() -> None:
    registry = registry_of(worker={"memory_bytes": 6 * GB})
    world = stack(registry)
    assert world.hub is not None
    front = {name: one.model_copy(update={"model": "front"}) for name, one in registry.roles.items()}
    reload(world, edited(registry, models={"worker": None}, roles=front))
    world.run_for(55_000)
    assert world.hub.broker.tokens.held_bytes == 6 * GB
    world.run_for(10_000)
    assert world.hub.broker.tokens.held_bytes == 0


def test_a_removed_model_that_comes_back_keeps_what_it_holds() -> None:
    registry = registry_of(worker=warm(6 * GB))
    world = stack(registry, say("fine", 5_000))
    asker = Asker(world)
    running = ask_for(asker, "worker")
    world.run_for(2_000)
    front = {name: one.model_copy(update={"model": "front"}) for name, one in registry.roles.items()}
    reload(world, edited(registry, models={"worker": None}, roles=front))
    world.run_for(10_000)
    assert asker.said(running)
    reload(world, registry)
    world.run_for(100_000)
    assert (world.place("worker").state, world.place("worker").held_bytes) == ("loaded", 6 * GB)


def keep_busy(world: Stack, *roles: str) -> list[str]:
    """Work for minutes on the models of these roles; returns the tasks."""
    tasks = [world.submit(task_of([{"id": f"S{i}", "actor": role} for i in range(40)])) for role in roles]
    world.run_for(5_000)
    return tasks


def free_bytes(world: Stack) -> int:
    assert world.hub is not None
    return world.hub.broker.tokens.free_bytes


@pytest.mark.parametrize("measured", [False, True])
def test_busy_models_make_way_where_the_hot_ones_take_more_than_was_thought(measured: bool) -> None:
    """By a reload that adds one, or by a measurement."""
    hot = {"memory_bytes": 1_000 if measured else 0}
    registry = registry_of(budget=8 * GB + 1_000, worker=warm(4 * GB), specialist=warm(4 * GB), front=hot)
    world = stack(registry, say("fine", 1_500))
    tasks = keep_busy(world, "worker", "coder")
    assert world.most_held >= 8 * GB
    if measured:
        world.peers["inference-front"].model_bytes = 4 * GB
    else:
        reload(world, changed(registry, front={"memory_bytes": 4 * GB}))
    world.run_for(2_000)
    assert free_bytes(world) < -3 * GB
    began = len(world.peers["inference-worker"].started) + len(world.peers["inference-specialist"].started)
    world.run_for(13_000)
    assert free_bytes(world) >= 0, "after a turn one of them has run dry"
    assert len(world.peers["inference-worker"].started) + len(world.peers["inference-specialist"].started) > began
    assert [world.finish(task, limit_ms=600_000).state for task in tasks] == [TaskState.SUCCEEDED] * 2


def test_the_only_model_beside_those_that_stay_works_on_where_unloading_it_would_change_nothing() -> None:
    registry = registry_of(budget=8 * GB, specialist=warm(4 * GB), front={"memory_bytes": 1_000})
    world = stack(registry, say("fine", 1_500))
    (task,) = keep_busy(world, "coder")
    world.peers["inference-front"].model_bytes = 5 * GB
    world.finish(task, limit_ms=600_000)
    assert world.peers["inference-specialist"].loads == 1


def test_a_model_that_cannot_have_its_room_keeps_nobody_else_from_loading_and_the_reason_is_said() -> None:
    registry = registry_of(budget=8 * GB, specialist=warm(4 * GB), worker=warm(2 * GB))
    world = stack(registry)
    world.peers["inference-specialist"].model_bytes = 10 * GB
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    world.run_for(1_500)
    world.ask("model.unload", "specialist")
    world.run_for(500)
    world.feed(ev.MemorySeen(9 * GB, world.now))
    large = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    world.run_for(500)
    small = world.submit(task_of([{"id": "W"}]))
    assert world.finish(small, limit_ms=10_000).state is TaskState.SUCCEEDED
    (why,) = world.show(large).waiting
    assert "specialist was measured to need 9.3 GiB, more than the budget of 7.5 GiB holds" in why
    assert world.place("specialist").waiting == why[why.index("waits for memory") :]
    world.feed(ev.MemorySeen(12 * GB, world.now))
    world.ask("model.unload", "worker")
    assert world.finish(large, limit_ms=10_000).state is TaskState.SUCCEEDED, "alone, where the machine has the memory"


def test_a_model_that_was_measured_too_large_is_named_before_anybody_waits_for_it() -> None:
    world = stack(registry_of(budget=8 * GB, specialist=warm(4 * GB)))
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    assert world.place("specialist").too_large is None
    world.peers["inference-specialist"].model_bytes = 10 * GB
    world.run_for(1_500)
    assert world.place("specialist").waiting is None
    assert world.hub is not None
    (note,) = size_notes(world.hub.status({}, world.now))
    assert note.startswith("specialist was measured to need 9.3 GiB, more than the budget of 7.5 GiB holds")


def overgrown(**guests: dict[str, Any]) -> Stack:
    """A stack with 3 GB for its guests: the hot model was measured to take the rest."""
    world = stack(registry_of(budget=8 * GB, front={"memory_bytes": 1_000}, **guests), say("fine", 1_500))
    world.peers["inference-front"].model_bytes = 5 * GB
    world.run_for(1_500)
    return world


def coder_waits_ms(world: Stack) -> int:
    """How long one step of the coder takes, from now."""
    task, began = world.submit(task_of([{"id": "S", "actor": "coder"}])), world.now
    assert world.finish(task, limit_ms=600_000).state is TaskState.SUCCEEDED
    return world.now - began


def test_idle_models_make_way_for_one_that_is_too_large() -> None:
    world = overgrown(specialist=warm(4 * GB), worker=warm(2 * GB))
    world.finish(world.submit(task_of([{"id": "W"}])))
    assert coder_waits_ms(world) <= MIN_RESIDENCE_MS + LOAD_MS + 2_000


@pytest.mark.parametrize("size", [2 * GB, 4 * GB], ids=["fits", "too large itself"])
def test_a_busy_model_makes_way_after_its_turn_for_one_that_is_too_large_and_comes_back(size: int) -> None:
    world = overgrown(specialist=warm(4 * GB), worker=warm(size))
    (busy,) = keep_busy(world, "worker")
    assert coder_waits_ms(world) <= MIN_TURN_MS + LOAD_MS + 4_000
    assert world.finish(busy, limit_ms=60_000).state is TaskState.SUCCEEDED
    assert [world.peers[f"inference-{one}"].loads for one in ("worker", "specialist")] == [2, 1]


def test_a_model_that_fits_has_its_turn_after_a_busy_one_that_is_too_large() -> None:
    world = overgrown(specialist=warm(2 * GB), worker=warm(4 * GB))
    keep_busy(world, "worker")
    assert free_bytes(world) < 0
    assert coder_waits_ms(world) <= MIN_TURN_MS + LOAD_MS + 4_000


def test_nobody_makes_way_for_long_where_the_machine_has_no_memory_for_the_one_that_is_too_large() -> None:
    """With the other one gone there would be room, by the account; the machine sees none of it."""
    world = overgrown(specialist=warm(4 * GB), worker=warm(2 * GB))
    world.feed(ev.MemorySeen(3 * GB, world.now))
    world.submit(task_of([{"id": "S", "actor": "coder"}]))
    (busy,) = keep_busy(world, "worker")
    world.run_for(10_000)
    assert world.peers["inference-specialist"].loads == 0
    assert world.finish(busy, limit_ms=60_000).state is TaskState.SUCCEEDED
    assert world.peers["inference-worker"].loads <= 2


def test_a_model_that_is_too_large_stays_for_its_residence_while_nobody_else_needs_memory() -> None:
    """Else each step of a chain would load it anew."""
    world = overgrown(specialist=warm(4 * GB))
    for _ in range(3):
        world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
        world.run_for(MIN_RESIDENCE_MS // 2)
    assert world.peers["inference-specialist"].loads == 1
    world.run_for(MIN_RESIDENCE_MS)
    assert world.place("specialist").held_bytes == 0


def test_a_model_that_cannot_have_its_room_closes_no_door_to_the_core_that_another_one_loads_with() -> None:
    residency = Residency(Tokens(1))
    residency.declare(registry_of(cores=1, budget=8 * GB, specialist=warm(4 * GB), worker=warm(2 * GB)))
    for model in ("specialist", "worker"):
        residency.heard(model, State.PARKED, 0, 0, settled=True)
    residency.places["specialist"].measured_bytes, residency.places["worker"].pause_ms = 10 * GB, 5_000
    residency.tokens.take("call", "infer.front", Needs(cores=1), 0)
    waiting = {"worker": Demand(waiting=True)}
    residency.decide(waiting, 100)
    waiting["specialist"] = Demand(waiting=True)
    residency.decide(waiting, 200)
    assert residency.tokens.blocked() == ["load.specialist"], "it is alone and waits for the core"
    residency.decide(waiting, 6_000)
    residency.tokens.give_back("call")
    assert [order.model for order in residency.decide(waiting, 6_100)] == ["worker"]


def change_mode(world: Stack, model: str, took_ms: int) -> None:
    """Its service holds calls back and loads the model anew, without being told to."""
    peer = world.peers[f"inference-{model}"]
    peer.feed(StateChanged(PeerState.LOADING))
    world.run_for(took_ms)
    peer.feed(StateChanged(PeerState.READY))


def test_a_change_of_mode_is_no_loading_and_begins_no_residence() -> None:
    world = stack(registry_of(specialist=warm(4 * GB)))
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    assert world.hub is not None
    place = world.hub.loading.residency.places["specialist"]
    before = (place.load_ms, place.loaded_ms)
    assert before[0] < 2 * LOAD_MS
    world.run_for(1_000)
    change_mode(world, "specialist", 60_000)
    world.run_for(1_500)
    assert place.state is State.LOADED
    assert (place.load_ms, place.loaded_ms) == before


def test_a_model_that_often_changes_its_mode_makes_way_after_its_turn() -> None:
    world = stack(registry_of(specialist=warm(6 * GB), worker=warm(6 * GB)), say("fine", 500))
    many = [*keep_busy(world, "worker"), *keep_busy(world, "worker")]

    def change() -> None:
        if world.peers["inference-worker"].session.state is PeerState.READY:
            world.peers["inference-worker"].feed(StateChanged(PeerState.LOADING))
            world.later(300, lambda: world.peers["inference-worker"].feed(StateChanged(PeerState.READY)))
        world.later(4_000, change)

    change()
    world.run_for(1_000)
    other = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    assert world.finish(other, limit_ms=8_000).state is TaskState.SUCCEEDED
    assert [world.finish(task, limit_ms=300_000).state for task in many] == [TaskState.SUCCEEDED] * 2


def test_a_parked_model_whose_process_leaves_is_not_taken_to_be_in_memory() -> None:
    world = stack(registry_of(specialist=warm(6 * GB), worker=warm(6 * GB)))
    world.finish(world.submit(task_of([{"id": "W"}])))
    world.peers["inference-specialist"].feed(DrainAsked("its entry has changed"))
    world.run_for(4_500)
    assert world.place("specialist").held_bytes == 0
    assert world.place("worker").state == "loaded"


def test_a_hot_model_whose_file_came_after_the_hub_had_started_is_in_the_account_once_it_is_measured() -> None:
    world = stack(registry_of(worker=warm(4 * GB)))
    assert world.place("front").held_bytes == 0
    world.peers["inference-front"].model_bytes = 3 * GB
    world.run_for(1_500)
    assert world.place("front").held_bytes == 3 * GB


def test_a_hot_model_that_has_no_room_beside_the_hot_ones_before_it_takes_none_from_others() -> None:
    registry = registry_of(
        budget=8 * GB, front={"memory_bytes": 5 * GB}, specialist={"memory_bytes": 4 * GB}, worker=warm(2 * GB)
    )
    assert list(registry.served)[:2] == ["front", "specialist"]
    world = stack(registry)
    refused = world.peers["inference-specialist"]
    refused.feed(StateChanged(PeerState.DEGRADED))
    world.run_for(1_500)
    assert (world.place("front").held_bytes, world.place("specialist").held_bytes) == (5 * GB, 0)
    assert world.finish(world.submit(task_of([{"id": "S", "actor": "worker"}]))).state is TaskState.SUCCEEDED
    reload(world, changed(registry, front={"memory_bytes": 1 * GB}))
    world.run_for(1_500)
    assert world.place("specialist").held_bytes == 4 * GB, "it will be started now"


def test_what_a_service_knows_of_its_files_counts_before_the_hubs_estimate_until_it_is_measured() -> None:
    registry = registry_of(budget=8 * GB, specialist={"residency": "warm", "declared": FILE, "slots": 1})
    world = stack(changed(registry, specialist={"context_tokens": 65_536}))
    service = world.peers["inference-specialist"]
    service.needs_bytes, world.peers["inference-front"].needs_bytes = 3 * GB, 2 * GB
    world.run_for(1_500)
    assert world.place("specialist").need_bytes == 3 * GB
    assert world.place("front").held_bytes == 2 * GB
    world.finish(world.submit(task_of([{"id": "S", "actor": "coder"}])))
    assert world.place("specialist").held_bytes == 3 * GB
    service.model_bytes = 2 * GB
    world.run_for(1_500)
    assert world.place("specialist").held_bytes == 2 * GB


def test_what_a_service_says_that_has_not_taken_up_the_changed_entry_is_not_of_it() -> None:
    registry = registry_of(budget=8 * GB, specialist=warm(1 * GB))
    world = stack(registry)
    service = world.peers["inference-specialist"]
    service.registry, service.needs_bytes = registry.digest, 1 * GB
    world.run_for(1_500)
    reload(world, changed(registry, specialist={"memory_bytes": 6 * GB}))
    world.run_for(3_000)
    assert world.place("specialist").need_bytes == 6 * GB
