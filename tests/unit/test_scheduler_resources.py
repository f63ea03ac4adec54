"""Tokens: nothing is held twice, nothing is lost, and whoever waits gets its turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.messages.infer import InferRequest
from protocol.messages.result import TaskState
from services.kit.config import CHECKOUT
from services.kit.registry import load_registry
from services.scheduler.resources import NOTHING, PATIENCE_MS, Needs, Tokens, gate_needs
from tests.unit.simulation import Answer, final_of, gates_pass, stack, task_of

KINDS = {
    "infer.a": Needs(cores=1, shared_by="infer.a"),
    "infer.b": Needs(cores=2, shared_by="infer.b", group="heavy"),
    "infer.c": Needs(cores=1, shared_by="infer.c", group="heavy"),
    "infer.e": Needs(cores=1, shared_by="infer.e", group="heavy"),  # beside infer.c the cores would be enough
    "gate": Needs(cores=2),
    "memory": NOTHING,
}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 400)), min_size=1, max_size=60))
def test_every_call_runs_whatever_the_others_do(arrivals: list[tuple[str, int]]) -> None:
    """A new call every 10 ms, each for a while; who waits tries again whenever anything ends, in order of arrival."""
    tokens = Tokens(cores=2)
    waiting: list[tuple[str, str, int]] = []
    running: dict[str, int] = {}
    done = 0
    now = 0
    pending = [(10 * index, f"k{index}", kind, took) for index, (kind, took) in enumerate(arrivals)]
    while pending or waiting or running:
        now += 10
        for key in [key for key, ends in running.items() if ends <= now]:
            del running[key]
            tokens.give_back(key)
            done += 1
        while pending and pending[0][0] <= now:
            _, key, kind, took = pending.pop(0)
            waiting.append((key, kind, took))
        heads: set[str] = set()
        for key, kind, took in list(waiting):
            if kind in heads:
                continue  # only the first call of a target tries
            if tokens.take(key, kind, KINDS[kind], now):
                waiting.remove((key, kind, took))
                running[key] = now + took
            else:
                heads.add(kind)
        tokens.check_invariants()
        assert now < 10 * len(arrivals) + 1_000 * len(arrivals) + 10_000, "somebody starves"
    assert done == len(arrivals)
    assert tokens.free_cores == 2


def test_a_run_takes_what_it_can_use_as_far_as_it_is_free_and_waits_for_no_more_than_it_needs() -> None:
    tokens = Tokens(cores=4)
    assert tokens.take("a", "infer.a", KINDS["infer.a"], 0)
    assert tokens.take("g", "gate", Needs(cores=1, more_cores=5), 0)
    assert (tokens.held("g"), tokens.free_cores) == (3, 0)
    assert tokens.give_back("a")
    assert tokens.take("h", "gate", Needs(cores=1, more_cores=5), 0)
    assert tokens.held("h") == 1
    tokens.check_invariants()


def test_a_call_made_during_another_one_may_use_its_cores_and_finds_no_door_closed() -> None:
    tokens = Tokens(cores=2)
    assert tokens.take("run", "gate", Needs(cores=1), 0)
    assert not tokens.take("b0", "infer.b", KINDS["infer.b"], 0)
    judge = Needs(cores=2, shared_by="infer.d")
    assert not tokens.take("d0", "infer.d", judge, PATIENCE_MS), "for a stranger the door is closed"
    assert tokens.take("d0", "infer.d", judge, PATIENCE_MS, parent="run")
    tokens.check_invariants()
    assert not tokens.take("b0", "infer.b", KINDS["infer.b"], PATIENCE_MS)
    assert tokens.give_back("d0")
    assert tokens.give_back("run")
    assert tokens.take("b0", "infer.b", KINDS["infer.b"], PATIENCE_MS)
    tokens.check_invariants()


def test_gates_need_the_widest_of_them_may_use_what_runs_beside_it_and_linters_need_nothing() -> None:
    registry = load_registry(CHECKOUT / "registry", Path("/nowhere"), check_files=False)
    registry = replace(registry, hardware=replace(registry.hardware, cores=8))
    assert gate_needs(registry, ["lint", "format", "schema"]) is NOTHING
    assert gate_needs(registry, ["lint", "unit"]) == Needs(cores=1)
    assert gate_needs(registry, ["lint", "unit", "typecheck", "unit", "nosuch"]) == Needs(cores=1, more_cores=1)
    assert gate_needs(registry, ["unit", "definition_of_done"]) == Needs(cores=1)
    one = replace(registry, hardware=replace(registry.hardware, cores=1))
    assert gate_needs(one, ["unit", "typecheck"]) == Needs(cores=1)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 400)), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 9), st.integers(50, 600)), max_size=12),
)
def test_models_that_load_among_calls_get_memory_and_a_core_together(
    arrivals: list[tuple[str, int]], loads: list[tuple[int, int, int]]
) -> None:
    """Calls as above; models come at their time, need 1 to 9 of 10 bytes, load and live for a while, and go."""
    tokens = Tokens(cores=2, memory_bytes=10)
    calls = [(10 * index, f"k{index}", kind, took) for index, (kind, took) in enumerate(arrivals)]
    models = [(at_ms, f"m{index}", need, took) for index, (at_ms, need, took) in enumerate(sorted(loads))]
    running: dict[str, int] = {}
    loading: dict[str, int] = {}
    living: dict[str, int] = {}
    now = 0
    while calls or models or running or loading or living:
        now += 10
        for key in [key for key, ends in running.items() if ends <= now]:
            del running[key]
            tokens.give_back(key)
        for model in [model for model, ends in loading.items() if ends <= now]:
            living[model] = loading.pop(model) + 100
            tokens.end_load(model)
        for model in [model for model, ends in living.items() if ends <= now]:
            del living[model]
            tokens.release_memory(model)
        heads: set[str] = set()
        for entry in [one for one in calls if one[0] <= now]:
            _, key, kind, took = entry
            if kind not in heads and tokens.take(key, kind, KINDS[kind], now):
                calls.remove(entry)
                running[key] = now + took
            else:
                heads.add(kind)
        for wish in [one for one in models if one[0] <= now][:1]:  # in order: nobody overtakes the first
            _, model, need, took = wish
            before = (tokens.free_bytes, tokens.free_cores)
            if tokens.begin_load(model, need, now):
                models.remove(wish)
                loading[model] = now + took
                assert (tokens.free_bytes, tokens.free_cores) == (before[0] - need, before[1] - 1)
            else:
                assert (tokens.free_bytes, tokens.free_cores) == before, "all or nothing"
        tokens.check_invariants()
        assert tokens.free_bytes >= 0
        assert now < 100_000, "somebody starves"
    assert (tokens.free_cores, tokens.free_bytes) == (2, 10)


def test_memory_that_is_measured_may_overdraw_and_whoever_waits_for_memory_shuts_no_door() -> None:
    tokens = Tokens(cores=2, memory_bytes=10)
    assert tokens.begin_load("a", 6, 0)
    assert not tokens.begin_load("b", 6, 0)
    assert tokens.end_load("a")
    assert tokens.take("c0", "infer.a", KINDS["infer.a"], PATIENCE_MS * 2), "b waits for memory, not for a core"
    tokens.book_memory("a", 13)
    tokens.check_invariants()
    assert tokens.free_bytes == -3
    tokens.release_memory("a")
    assert tokens.begin_load("b", 6, 5_000)
    assert tokens.held_by("b") == 6


def test_calls_of_one_model_share_one_holding() -> None:
    tokens = Tokens(cores=2)
    assert all(tokens.take(f"k{i}", "infer.a", KINDS["infer.a"], 0) for i in range(4))
    assert tokens.free_cores == 1
    assert [tokens.give_back(f"k{i}") for i in range(4)] == [False, False, False, True]
    assert tokens.free_cores == 2


def test_who_has_waited_long_enough_closes_the_door() -> None:
    tokens = Tokens(cores=2)
    assert tokens.take("a0", "infer.a", KINDS["infer.a"], 0)
    assert not tokens.take("g0", "gate", KINDS["gate"], 0)
    assert tokens.take("a1", "infer.a", KINDS["infer.a"], PATIENCE_MS - 1)
    assert not tokens.take("a2", "infer.a", KINDS["infer.a"], PATIENCE_MS)
    tokens.give_back("a0")
    assert tokens.give_back("a1")
    assert tokens.take("g0", "gate", KINDS["gate"], PATIENCE_MS + 10)
    assert not tokens.take("a2", "infer.a", KINDS["infer.a"], PATIENCE_MS + 20)


def test_who_found_the_door_closed_is_tried_as_soon_as_it_opens() -> None:
    """Not at the next tick: in between a free slot would lie idle."""
    tokens = Tokens(cores=2)
    assert tokens.take("a0", "infer.a", KINDS["infer.a"], 0)
    assert not tokens.take("g0", "gate", KINDS["gate"], 0)
    assert not tokens.take("a1", "infer.a", KINDS["infer.a"], PATIENCE_MS)
    assert tokens.let_in() == []
    tokens.give_back("a0")
    assert tokens.take("g0", "gate", KINDS["gate"], PATIENCE_MS + 10)
    assert tokens.let_in() == ["infer.a"]
    assert tokens.let_in() == []


def test_a_gate_run_holds_the_cores_that_it_is_told_to_use() -> None:
    world = stack()
    seen: list[tuple[int | None, int]] = []

    def answer(header: Header, body: bytes) -> Answer:
        assert world.hub is not None
        seen.append((header.cores, world.hub.broker.tokens.free_cores))
        return gates_pass(header, body)

    world.peers["gates"].answer = answer
    assert world.hub is not None
    world.hub.broker.tokens.cores = 4
    steps: list[dict[str, object]] = [
        {"id": "S1", "gates": ["lint"]},
        {"id": "S2", "gates": ["unit"], "inputs": ["S1.out"]},
    ]
    assert world.finish(world.submit(task_of(steps))).state is TaskState.SUCCEEDED
    assert seen == [(None, 4), (1, 3)]
    assert world.hub.broker.tokens.free_cores == 4


def test_models_that_keep_the_cores_busy_do_not_starve_a_third() -> None:
    running: dict[str, int] = {"front": 0, "worker": 0, "specialist": 0}
    together: list[set[str]] = []
    world = stack()

    def answer_of(model: str) -> object:
        def answer(header: Header, body: bytes) -> Answer:
            unpack_body(InferRequest, body)
            running[model] += 1
            together.append({name for name, count in running.items() if count})
            world.later(300, lambda: running.update({model: running[model] - 1}))
            return 300, final_of("fine")

        return answer

    for model in running:
        world.peers[f"inference-{model}"].answer = answer_of(model)  # type: ignore[assignment]
    assert world.hub is not None
    world.hub.broker.tokens.cores = 2
    steps: list[dict[str, object]] = [{"id": f"W{i}", "actor": "worker"} for i in range(40)]
    steps += [{"id": f"F{i}", "actor": "frontdoor"} for i in range(40)]
    busy = world.submit(task_of(steps))
    world.run_for(200)
    third = world.submit(task_of([{"id": "S", "actor": "coder"}]))
    result = world.finish(third, limit_ms=4_000)
    assert result.state is TaskState.SUCCEEDED
    assert max(len(names) for names in together) == 2, "three models of one thread each share two cores in turn"
    assert world.finish(busy).state is TaskState.SUCCEEDED
