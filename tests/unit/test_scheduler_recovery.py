"""What the hub does after a failure, in virtual time: what is run again, what is asked of whom, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from protocol.codec import unpack_body, unpack_map
from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.result import TaskState
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.durations import LearnedDurations
from services.scheduler.simulation import tiers
from services.scheduler.waiting import reasons
from tests.unit.simulation import Answer, World, final_of, plan_as_given, say, shipped_registry, stack, task_of

REGISTRY = shipped_registry()
ONE: list[dict[str, object]] = [{"id": "S1"}]
GATED: list[dict[str, object]] = [{"id": "S1", "gates": ["format"]}]


def failing(*categories: Category, then: str = "fine") -> Callable[[Header, bytes], Answer]:
    """Work that fails in these ways, one after the other, and then answers."""
    left: Iterator[Category] = iter(categories)

    def answer(header: Header, body: bytes) -> Answer:
        category = next(left, None)
        if category is None:
            return 100, final_of(then)
        return 100, Failure(code="test.failure", category=category, origin="test", message=f"as {category.value}")

    return answer


def gates(*verdicts: Category | None) -> Callable[[Header, bytes], Answer]:
    """Gates that say these things one after the other, then pass: a category is a verdict, or an error for RESOURCE."""
    left: Iterator[Category | None] = iter(verdicts)

    def answer(header: Header, body: bytes) -> Answer:
        category = next(left, None)
        if category is None:
            return 20, tiers.gates_pass(header, body)[1]
        verdict = Verdict.ERROR if category is Category.RESOURCE else Verdict.FAIL
        results = [
            GateResult(gate=name, verdict=verdict, category=category, message="as asked", started_ms=1, ended_ms=2)
            for name in unpack_body(GateRequest, body).gates
        ]
        return 20, GateFinal(results=results)

    return answer


def counting(answer: Callable[[Header, bytes], Answer], seen: list[str]) -> Callable[[Header, bytes], Answer]:
    def counted(header: Header, body: bytes) -> Answer:
        seen.append(header.kind)
        return answer(header, body)

    return counted


def world_with(
    *,
    registry: Registry = REGISTRY,
    infer: Callable[[Header, bytes], Answer] | None = None,
    gate: Callable[[Header, bytes], Answer] | None = None,
    plan: Callable[[Header, bytes], Answer] = plan_as_given,
    memory: Callable[[Header, bytes], Answer] = tiers.memory_takes,
    models: dict[str, Callable[[Header, bytes], Answer]] | None = None,
) -> World:
    made = World(registry)
    made.add("planner", ("planner",), plan)
    made.add("gates", ("gate",), gate or tiers_pass)
    made.add("memory", ("memory",), memory)
    for model in registry.models:
        made.add(f"inference-{model}", (f"infer.{model}",), (models or {}).get(model) or infer or say("fine"), 4)
    made.run_for(50)
    return made


def tiers_pass(header: Header, body: bytes) -> Answer:
    return 20, tiers.gates_pass(header, body)[1]


@pytest.mark.parametrize("category", [Category.RESOURCE, Category.PEER])
def test_gates_that_could_not_run_are_run_again_alone(category: Category) -> None:
    seen: list[str] = []
    world = world_with(
        infer=counting(say("fine"), seen),
        gate=failing(category, category) if category is Category.PEER else gates(category, category),
    )
    world.peers["gates"].answer = counting(world.peers["gates"].answer, seen)
    last = world.peers["gates"].answer
    calls = 0

    def twice_then_pass(header: Header, body: bytes) -> Answer:
        nonlocal calls
        calls += 1
        return last(header, body) if calls <= 2 else tiers_pass(header, body)

    world.peers["gates"].answer = twice_then_pass
    view = world.finish(world.submit(task_of(GATED)))
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert seen.count("infer.request") == 1
    assert calls == 3
    (attempt,) = view.steps[0].attempts
    assert [one.work for one in attempt.setbacks or []] == ["gates", "gates"]
    assert [one.category for one in attempt.setbacks or []] == [category.value] * 2


def test_a_lack_of_resources_pauses_the_same_attempt_and_tells_the_model_nothing() -> None:
    prompts: list[Any] = []
    inner = failing(Category.RESOURCE, Category.RESOURCE)

    def answer(header: Header, body: bytes) -> Answer:
        prompts.append(unpack_map(body))
        return inner(header, body)

    world = world_with(infer=answer)
    view = world.finish(world.submit(task_of(ONE)))
    assert view.state is TaskState.SUCCEEDED
    assert len(view.steps[0].attempts) == 1
    assert prompts[0] == prompts[1] == prompts[2], "a rerun asks the same"
    assert [one.delay_ms for one in view.steps[0].attempts[0].setbacks or []] == [1_000, 2_000]
    assert [one.what for one in view.steps[0].attempts[0].segments].count("backoff") == 2
    assert view.steps[0].losses == 0


def test_a_plan_is_asked_for_anew_and_its_failures_are_told() -> None:
    inner = failing(Category.SCHEMA, Category.RESOURCE, Category.PEER)
    tries = 0

    def plan(header: Header, body: bytes) -> Answer:
        nonlocal tries
        tries += 1
        return inner(header, body) if tries <= 3 else plan_as_given(header, body)

    world = world_with(plan=plan)
    view = world.finish(world.submit(task_of(ONE)))
    assert view.state is TaskState.SUCCEEDED, view.failure
    told = [(one.work, one.category, one.action) for one in view.setbacks or []]
    assert told == [("plan", "SCHEMA", "retry"), ("plan", "RESOURCE", "backoff"), ("plan", "PEER", "rerun")]


@pytest.mark.parametrize("category", [Category.LOGIC, Category.TIMEOUT, Category.POLICY])
def test_a_plan_that_cannot_be_made_ends_its_task_with_the_rule(category: Category) -> None:
    world = world_with(plan=failing(*[category] * 9))
    view = world.finish(world.submit(task_of(ONE)))
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert view.failure.category is category
    assert (view.setbacks or [])[-1].action == "fail"
    assert (view.setbacks or [])[-1].rule.startswith("failures.yaml:")


def test_a_plan_that_kills_three_planners_is_poisoned() -> None:
    world = world_with(plan=lambda header, body: (60_000, final_of("never")))
    task_id = world.submit(task_of(ONE))
    planner = world.peers["planner"]
    for _ in range(3):
        world.run(lambda: bool(planner.started) and len(planner.started) > planner.boots - 1, 20_000)
        planner.kill()
        planner.start()
    view = world.finish(task_id)
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert view.failure.code == "plan.poisoned"


def test_final_checks_that_could_not_run_are_run_again_and_a_verdict_is_final() -> None:
    world = world_with(gate=gates(Category.RESOURCE, Category.RESOURCE, Category.CODE))
    view = world.finish(world.submit(task_of(ONE, gates=["format"])))
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert view.failure.category is Category.CODE
    assert [one.action for one in view.setbacks or []] == ["backoff", "backoff", "fail"]


def test_outcomes_wait_for_memory_as_long_as_it_takes() -> None:
    seen: list[str] = []
    inner = counting(failing(*[Category.RESOURCE] * 8), seen)

    def memory(header: Header, body: bytes) -> Answer:
        return inner(header, body) if len(seen) < 8 else tiers.memory_takes(header, body)

    world = world_with(memory=memory)
    task_id = world.submit(task_of(ONE))
    world.finish(task_id)

    def settled() -> bool:
        return any(isinstance(fact, f.OutcomesSettled) and fact.stored for fact in world.facts(task_id))

    world.run(settled, 600_000)
    assert len(seen) == 8


def test_a_larger_budget_is_asked_for_only_where_the_registry_says_so() -> None:
    def asked(mode: str) -> list[int]:
        sizes: list[int] = []
        inner = failing(Category.CODE, Category.CODE, Category.CODE)

        def answer(header: Header, body: bytes) -> Answer:
            sizes.append(int(unpack_map(body)["max_tokens"]))
            return inner(header, body)

        caps = REGISTRY.failures.caps.model_copy(update={"think_harder": mode})
        world = world_with(registry=replace(REGISTRY, failures=replace(REGISTRY.failures, caps=caps)), infer=answer)
        view = world.finish(world.submit(task_of(ONE)))
        assert view.state is TaskState.SUCCEEDED
        assert [one.role for one in view.steps[0].attempts] == ["worker", "worker", "worker", "coder"]
        assert world.hub is not None
        arm = "harder" if mode == "always" else "plain"
        known = {name[2]: (tried, solved) for name, tried, solved, _ in world.hub.engine.effort.state()}
        assert known == {arm: (1, 0), "escalated": (1, 1)}, "what came of it is learned"
        return sizes

    plain, harder = asked("off"), asked("always")
    assert plain[0] == plain[1] == plain[2] == harder[0]
    assert harder[2] == 2 * harder[1]


def lateral_registry() -> Registry:
    """The shipped registry with a second model of tier C, which stands in for the worker's."""
    spare = REGISTRY.models["worker"].model_copy(update={"name": "spare"})
    worker = REGISTRY.roles["worker"].model_copy(update={"lateral": "spare"})
    return replace(
        REGISTRY,
        models=MappingProxyType({**REGISTRY.models, "spare": spare}),
        roles=MappingProxyType({**REGISTRY.roles, "worker": worker}),
    )


def test_steps_of_a_model_without_a_worker_go_sideways_and_later_ones_come_back() -> None:
    world = world_with(registry=lateral_registry())
    worker = world.peers["inference-worker"]
    worker.kill()
    world.run_for(2_000)
    view = world.finish(world.submit(task_of(ONE)))
    (attempt,) = view.steps[0].attempts
    assert (attempt.role, attempt.model, attempt.failure) == ("worker", "spare", None)
    assert view.steps[0].losses == 0
    assert world.hub is not None
    world.hub.engine.ranking.learn()
    durations = world.hub.engine.ranking.durations
    assert isinstance(durations, LearnedDurations)
    assert durations.observations() == {}, "what another model took says nothing about the role"
    worker.start()
    world.run_for(1_000)
    again = world.finish(world.submit(task_of(ONE)))
    assert again.steps[0].attempts[0].model == "worker"


def test_two_models_that_take_turns_dying_cannot_make_a_step_wander_for_ever() -> None:
    world = world_with(registry=lateral_registry(), infer=lambda header, body: (10**7, final_of("never")))
    task_id = world.submit(task_of(ONE, deadline_s=120))
    own, spare = world.peers["inference-worker"], world.peers["inference-spare"]
    spare.kill()
    for _ in range(8):
        own.kill()
        spare.start()
        world.run_for(7_000)
        spare.kill()
        own.start()
        world.run_for(7_000)
    moves = [fact for fact in world.facts(task_id) if isinstance(fact, f.AttemptMoved)]
    assert 0 < len(moves) <= 2
    view = world.finish(task_id)
    assert view.state is TaskState.FAILED
    assert len(view.steps[0].attempts) == 1, "going sideways is no attempt and no escalation"


def test_a_model_that_fails_call_after_call_is_left_alone_and_its_steps_go_sideways() -> None:
    broken = failing(*[Category.PEER] * 500)
    world = world_with(registry=lateral_registry(), models={"worker": broken})
    ids = [world.submit(task_of(ONE)) for _ in range(12)]
    views = [world.finish(task_id) for task_id in ids]
    assert [view.state for view in views].count(TaskState.SUCCEEDED) >= 9
    assert len(world.peers["inference-worker"].started) <= 24, (
        "it was left alone: with nothing but the table it is asked 36 times"
    )
    assert any(view.steps[0].attempts[0].model == "spare" for view in views)


def test_with_one_backend_calls_wait_for_the_probe_and_are_served_when_it_is_well() -> None:
    state = {"broken": True}

    def answer(header: Header, body: bytes) -> Answer:
        if state["broken"]:
            return 100, Failure(code="engine.died", category=Category.PEER, origin="test", message="dead")
        return 100, final_of("fine")

    world = stack(answer)
    for _ in range(3):
        world.submit(task_of(ONE))
        world.run_for(1_200)
    assert world.hub is not None
    assert "circuit open" in (world.hub.status({}, world.now).circuits or {})["infer.worker"]
    task_id = world.submit(task_of(ONE))
    world.run_for(300)
    assert (
        "circuit open" in reasons(world.hub.broker, world.hub.loading, world.hub.engine.live[task_id], 0, world.now)[0]
    )
    state["broken"] = False
    view = world.finish(task_id)
    assert view.state is TaskState.SUCCEEDED
    assert view.steps[0].losses == 0
    assert world.hub.status({}, world.now).circuits is None
