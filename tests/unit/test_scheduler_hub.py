"""The hub in virtual time: graphs, failures, losses, restarts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import pack_body, unpack_body, unpack_map
from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.infer import InferRequest
from protocol.messages.memory import MemoryFinal, MemoryRequest, RecordOutcomes
from protocol.messages.plan import PlanFinal, RoutingDecision
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.result import CancelQuery, StepState, TaskState
from protocol.messages.task import Submit
from services.scheduler import occupancy
from tests.unit.simulation import Answer, World, final_of, plan_as_given, say, stack, task_of


def chain(count: int) -> list[dict[str, object]]:
    return [{"id": f"S{i}", "inputs": [f"S{i - 1}.out"] if i else []} for i in range(count)]


def fan(count: int) -> list[dict[str, object]]:
    mappers: list[dict[str, object]] = [{"id": f"M{i}"} for i in range(count)]
    return [*mappers, {"id": "J", "inputs": [f"M{i}.out" for i in range(count)]}]


def fail(category: Category, code: str = "test.failure") -> Failure:
    return Failure(code=code, category=category, origin="test", message="as asked")


def test_a_step_starts_when_its_own_inputs_are_ready_not_when_a_level_is_done() -> None:
    def answer(header: Header, body: bytes) -> Answer:
        return (4_000 if header.step == "LONG" else 1_000), final_of("fine")

    world = stack(answer, slots=8)
    steps: list[dict[str, object]] = [{"id": "LONG"}, *chain(4)]
    result = world.finish(world.submit(task_of(steps)))
    assert result.state is TaskState.SUCCEEDED
    assert result.ended_ms is not None
    assert result.ended_ms - result.created_ms < 4_200, "the chain ran beside the long step"
    assert result.critical_path is not None
    assert result.critical_path.overlapping_steps == 5


def test_what_a_model_is_asked_is_a_message_with_nothing_that_is_left_out_or_unknown() -> None:
    seen: dict[str, bytes] = {}

    def answer(header: Header, body: bytes) -> Answer:
        seen[header.step or ""] = body
        return 10, final_of('{"a": "x", "b": "y"}')

    world = stack(answer)
    steps: list[dict[str, object]] = [
        {"id": "PLAIN"},
        {"id": "SCHEMA", "json_schema": {"type": "object"}, "outputs": [{"name": "j", "kind": "json"}]},
        {"id": "GRAMMAR", "grammar": "root ::= [a-z]+", "max_tokens": 7},
        {"id": "PARTS", "outputs": [{"name": "a"}, {"name": "b"}]},
    ]
    assert world.finish(world.submit(task_of(steps))).state is TaskState.SUCCEEDED
    assert seen.keys() == {"PLAIN", "SCHEMA", "GRAMMAR", "PARTS"}
    for body in seen.values():
        assert unpack_map(body) == unpack_map(pack_body(unpack_body(InferRequest, body)))
    assert unpack_body(InferRequest, seen["PARTS"]).json_schema is not None
    assert unpack_body(InferRequest, seen["GRAMMAR"]).max_tokens == 7


def test_content_of_an_input_reaches_the_prompt_of_the_step_that_names_it() -> None:
    seen: dict[str, str] = {}

    def answer(header: Header, body: bytes) -> Answer:
        seen[header.step or ""] = unpack_body(InferRequest, body).messages[-1].content
        return 10, final_of(f"made by {header.step}")

    world = stack(answer)
    world.finish(world.submit(task_of(fan(3))))
    assert all(f"made by M{i}" in seen["J"] for i in range(3))
    assert "made by" not in seen["M0"]


def test_no_more_calls_run_at_once_than_slots_were_granted() -> None:
    running = {"now": 0, "most": 0}
    world = stack(slots=2)

    def answer(header: Header, body: bytes) -> Answer:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        world.later(100, lambda: running.update(now=running["now"] - 1))
        return 100, final_of("fine")

    for peer in world.peers.values():
        if peer.service.startswith("inference-"):
            peer.answer = answer
    result = world.finish(world.submit(task_of(fan(9))))
    assert result.state is TaskState.SUCCEEDED
    assert running["most"] == 2


@pytest.mark.parametrize(
    ("category", "roles", "state"),
    [
        (Category.FORMAT, ["worker"] * 4, TaskState.FAILED),
        (Category.SCHEMA, ["worker", "worker", "worker", "coder"], TaskState.FAILED),
        (Category.CODE, ["worker", "worker", "worker", "coder"], TaskState.FAILED),
        (Category.LOGIC, ["worker", "worker", "coder", "coder"], TaskState.FAILED),
        (Category.TIMEOUT, ["worker", "coder", "architect"], TaskState.FAILED),
        (Category.EARLY_ABORT, ["worker", "coder", "architect"], TaskState.FAILED),
        (Category.POLICY, ["worker"], TaskState.FAILED),
    ],
)
def test_each_kind_of_failure_goes_its_own_way(category: Category, roles: list[str], state: TaskState) -> None:
    world = stack(lambda header, body: (10, fail(category)))
    result = world.finish(world.submit(task_of([{"id": "S1"}])))
    assert [attempt.role for attempt in result.steps[0].attempts] == roles
    assert result.state is state
    assert result.failure is not None
    assert result.failure.category is category
    assert all(attempt.action for attempt in result.steps[0].attempts), "every attempt says what was decided, and why"


def test_a_failing_gate_sends_the_step_back_with_its_findings() -> None:
    world = stack()
    asked: list[str] = []

    def gates(header: Header, body: bytes) -> Answer:
        request = unpack_body(GateRequest, body)
        bad = "good" not in request.artefacts[0].text()
        verdict = Verdict.FAIL if bad else Verdict.PASS
        finding = {"gate": "lint", "category": "CODE", "message": "undefined name x", "line": 3, "rule": "F821"}
        result = GateResult.model_validate(
            {"gate": "lint", "verdict": verdict, "category": "CODE", "started_ms": 0, "ended_ms": 1}
            | ({"findings": [finding]} if bad else {})
        )
        return 10, GateFinal(results=[result])

    def answer(header: Header, body: bytes) -> Answer:
        prompt = unpack_body(InferRequest, body).messages[-1].content
        asked.append(prompt)
        return 10, final_of("good" if "undefined name x" in prompt else "bad")

    world.peers["gates"].answer = gates
    for model in world.registry.models:
        world.peers[f"inference-{model}"].answer = answer
    result = world.finish(world.submit(task_of([{"id": "S1", "gates": ["lint"]}])))
    assert result.state is TaskState.SUCCEEDED
    assert len(asked) == 2
    assert "F821" in asked[1]
    assert result.artefacts[0].value == "good"


def test_a_gate_that_gives_no_verdict_is_not_a_pass() -> None:
    world = stack()
    world.peers["gates"].answer = lambda header, body: (1, GateFinal(results=[]))
    result = world.finish(world.submit(task_of([{"id": "S1", "gates": ["lint"]}])), limit_ms=200_000)
    assert result.state is TaskState.FAILED


def test_a_killed_worker_costs_no_attempt_and_its_step_runs_again() -> None:
    world = stack(say("fine", took_ms=5_000))
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(1_000)
    worker = world.peers["inference-worker"]
    worker.kill()
    world.run_for(500)
    worker.start()
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED
    assert len(result.steps[0].attempts) == 1
    assert result.steps[0].losses == 1
    assert len(worker.started) == 2


def test_a_step_that_kills_three_workers_is_poisoned() -> None:
    world = stack(say("fine", took_ms=5_000))
    task = world.submit(task_of([{"id": "S1"}]))
    worker = world.peers["inference-worker"]
    for _ in range(3):
        world.run(lambda: bool(worker.session.in_flight), 30_000)
        worker.kill()
        world.run_for(3_000)
        worker.start()
    result = world.finish(task)
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.code == "step.poisoned"
    assert len(worker.started) == 3


def test_a_frozen_worker_brings_its_work_back_and_nothing_is_computed_twice() -> None:
    world = stack(say("fine", took_ms=20_000))
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(1_000)
    worker = world.peers["inference-worker"]
    worker.frozen = True
    world.run_for(15_000)
    assert b"inference-worker" not in [peer.service.encode() for peer in world.hub.broker.peers.values()]  # type: ignore[union-attr]
    worker.thaw()
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED
    assert len(worker.started) == 1
    assert result.steps[0].losses == 0
    assert sum(1 for _, _, kind, _ in world.journal if kind == "StepDone") == 1


@pytest.mark.parametrize("down_ms", [10, 900, 3_000, 8_000])
def test_a_restarted_hub_reattaches_running_work(down_ms: int) -> None:
    world = stack(say("fine", took_ms=5_000))
    task = world.submit(task_of(fan(3)))
    world.run_for(1_000)
    world.kill_hub()
    world.run_for(down_ms)
    world.boot_hub()
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED
    started = world.peers["inference-worker"].started
    assert len(started) == len(set(started)) == 4, "each step was generated once"


@pytest.mark.parametrize("trouble", ["hub", "connection"])
def test_work_that_came_back_and_never_ends_has_a_deadline_too(trouble: str) -> None:
    world = stack(say("fine", took_ms=5_000))
    worker = world.peers["inference-worker"]
    task = world.submit(task_of([{"id": "S1", "timeout_s": 60}]))
    world.run_for(1_000)
    worker._working.clear()  # it hangs: it answers pings, says that it works, and its work never ends
    for _ in range(3):
        if trouble == "hub":
            world.kill_hub()
            world.boot_hub()
        else:
            worker.disconnect()
        world.run_for(5_000)
        assert world.hub is not None
        assert world.hub.broker.counters["reattached"] >= 1
    world.run_for(50_000 if trouble == "connection" else 70_000)  # a new hub does not know when the work began
    assert world.view(task).steps[0].attempts[0].failure is not None


def test_a_result_that_arrives_while_the_hub_is_down_is_asked_for_again() -> None:
    world = stack(say("fine", took_ms=1_000))
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(500)
    world.kill_hub()
    world.run_for(2_000)
    world.boot_hub()
    result = world.finish(task)
    assert result.state is TaskState.SUCCEEDED
    assert len(world.peers["inference-worker"].started) == 1


def test_cancel_stops_running_work_and_keeps_what_was_finished() -> None:
    world = stack(say("fine", took_ms=1_000))
    task = world.submit(task_of(chain(3)))
    world.run_for(1_500)
    header, _ = world.client("task.cancel", CancelQuery(task_id=task, reason="changed my mind"))
    assert header.kind == "task.cancelled"
    result = world.finish(task)
    assert result.state is TaskState.CANCELLED
    assert [step.state for step in result.steps] == [StepState.DONE, StepState.CANCELLED, StepState.CANCELLED]
    again, _ = world.client("task.cancel", CancelQuery(task_id=task))
    assert again.kind == "task.cancelled"


def test_the_same_idempotency_key_is_one_task_even_after_a_restart() -> None:
    world = stack()
    ir = task_of([{"id": "S1"}], idempotency_key="once")
    first = world.submit(ir)
    assert world.submit(ir) == first
    world.finish(first)
    world.kill_hub()
    world.boot_hub()
    assert world.submit(ir) == first
    assert sum(1 for _, _, kind, _ in world.journal if kind == "TaskAccepted") == 1


def test_a_submit_beyond_the_bound_is_refused_with_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "MAX_ACTIVE_TASKS", 6)  # one client alone gets half
    world = stack(say("fine", took_ms=60_000))
    for _ in range(3):
        world.submit(task_of([{"id": "S1"}]))
    header, body = world.client("task.submit", Submit(task=task_of([{"id": "S1"}]).model_dump(mode="json")))
    assert header.kind == "refused"
    assert isinstance(body, Refused)
    assert body.retry_after_ms >= 100


def test_a_refused_submit_is_told_the_pace_at_which_tasks_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "MAX_ACTIVE_TASKS", 6)
    world = stack(say("fine", took_ms=2_500), slots=1)
    for task in [world.submit(task_of([{"id": "S1"}])) for _ in range(3)]:
        world.finish(task)
    for _ in range(3):
        world.submit(task_of([{"id": "S1"}]))
    _, body = world.client("task.submit", Submit(task=task_of([{"id": "S1"}]).model_dump(mode="json")))
    assert isinstance(body, Refused)
    assert 2_500 <= body.retry_after_ms <= 2_600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actor": "nobody"}, ["plan.steps[S1].actor", "nobody"]),
        ({"inputs": ["nothing"]}, ["plan.steps[S1].inputs", "nothing"]),
        ({"depends_on": ["S9"]}, ["plan.steps[S1].depends_on", "S9"]),
        ({"gates": ["magic"]}, ["plan.steps[S1].gates", "magic"]),
        ({"persona": "napoleon"}, ["plan.steps[S1].persona", "napoleon"]),
        ({"timeout_s": -1}, ["timeout_s"]),
        ({"colour": "red"}, ["colour"]),
    ],
)
def test_a_task_that_cannot_run_is_refused_naming_step_and_field(change: dict[str, object], words: list[str]) -> None:
    world = stack()
    value = task_of([{"id": "S1"}]).model_dump(mode="json", exclude_none=True)
    value["plan"]["steps"][0].update(change)
    header, body = world.client("task.submit", Submit(task=value))
    assert header.kind == "error"
    assert isinstance(body, ErrorReply)
    assert body.failure.category is Category.POLICY
    assert all(word in body.failure.message for word in words), body.failure.message


def test_the_token_budget_stops_further_attempts() -> None:
    world = stack()
    result = world.finish(world.submit(task_of(chain(5), budget={"max_tokens": 12})))
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.code == "budget.tokens"
    assert [step.state for step in result.steps][:3] == [StepState.DONE] * 3


def test_a_task_past_its_deadline_fails_with_timeout() -> None:
    world = stack(say("fine", took_ms=30_000))
    result = world.finish(world.submit(task_of([{"id": "S1"}], deadline_s=2)))
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.code == "task.deadline"
    assert result.ended_ms is not None
    assert result.ended_ms - result.created_ms < 2_500


def test_a_worker_that_ignores_its_deadline_is_overruled() -> None:
    world = stack(say("fine", took_ms=50_000))
    result = world.finish(world.submit(task_of([{"id": "S1", "timeout_s": 1}])))
    assert [attempt.role for attempt in result.steps[0].attempts] == ["worker", "coder", "architect"]
    assert result.failure is not None
    assert result.failure.category is Category.TIMEOUT


def test_batch_work_is_overtaken_but_not_starved() -> None:
    world = World()
    order: list[str] = []

    def answer(header: Header, body: bytes) -> Answer:
        order.append(header.prio or "")
        return 1_000, final_of("fine")

    world.add("planner", ("planner",), plan_as_given)
    world.add("inference-worker", ("infer.worker",), answer, slots=1)
    world.run_for(50)
    batch = world.submit(task_of([{"id": "S1"}], priority="batch", idempotency_key="b"))
    for index in range(60):
        world.submit(task_of([{"id": "S1"}], idempotency_key=f"i{index}"))
    world.run_for(20_000)
    assert "batch" not in order[1:10]
    world.finish(batch, limit_ms=60_000)


def test_a_lying_worker_is_treated_as_a_lost_one_and_cannot_end_a_step() -> None:
    world = stack()
    worker = world.peers["inference-worker"]
    worker.answer = lambda header, body: (10, GateFinal(results=[]))  # the wrong body under infer.final
    result = world.finish(world.submit(task_of([{"id": "S1"}])))
    assert result.state is TaskState.FAILED
    assert result.failure is not None
    assert result.failure.category is Category.PEER


faults = st.lists(
    st.tuples(
        st.integers(100, 6_000),
        st.sampled_from(["kill worker", "kill planner", "kill gates", "kill memory", "kill hub", "freeze worker"]),
    ),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(
    edges=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=8),
    outcomes=st.lists(st.sampled_from(["ok", "ok", "ok", "FORMAT", "TIMEOUT", "PEER", "RESOURCE"]), max_size=10),
    troubles=faults,
)
def test_every_task_ends_once_and_no_step_starts_before_its_inputs(
    edges: list[list[int]], outcomes: list[str], troubles: list[tuple[int, str]]
) -> None:
    script = iter(outcomes)

    def answer(header: Header, body: bytes) -> Answer:
        outcome = next(script, "ok")
        return 700, final_of("fine") if outcome == "ok" else fail(Category(outcome))

    world = stack(answer)
    steps: list[dict[str, object]] = [
        {"id": f"S{i}", "inputs": sorted({f"S{j}.out" for j in needs if j < i}), "gates": ["lint"] if i % 2 else []}
        for i, needs in enumerate(edges)
    ]
    task = world.submit(task_of(steps))
    for at_ms, trouble in troubles:
        world.run_for(at_ms)
        what, _, whom = trouble.partition(" ")
        if whom == "hub":
            world.kill_hub()
            world.run_for(300)
            world.boot_hub()
            continue
        peer = world.peers[{"worker": "inference-worker"}.get(whom, whom)]
        if what == "kill":
            peer.kill()
            world.run_for(300)
            peer.start()
        else:
            peer.frozen = True
            world.run_for(12_000)
            peer.thaw()
    result = world.finish(task, limit_ms=900_000)
    ends = [kind for name, _, kind, _ in world.journal if name == task and kind == "TaskEnded"]
    assert len(ends) == 1
    done: set[str] = set()
    needs = {step.id: set(step.needs) for step in result.steps}
    for fact in world.facts(task):
        name = type(fact).__name__
        if name == "StepDone":
            assert fact.step not in done, "a step's effect is applied once"
            done.add(fact.step or "")
        if name == "AttemptStarted":
            assert needs[fact.step or ""] <= done, "a step starts after its inputs"
    if result.state is TaskState.SUCCEEDED:
        assert done == set(needs)
    for peer in world.hub.broker.peers.values():  # type: ignore[union-attr]
        assert not [key for key in peer.calls if key in {a.key for step in result.steps for a in step.attempts}]


def test_an_objective_that_memory_cannot_embed_loses_its_episode_but_not_its_outcomes() -> None:
    asked: list[bool] = []
    decision = {"ids": {"S1": "d1"}, "subject": "role", "choice": "worker", "propensity": 1}
    told = RoutingDecision.model_validate(decision | {"rule": "test", "task_type": "chat"})

    def planner(header: Header, body: bytes) -> Answer:
        took, final = plan_as_given(header, body)
        assert isinstance(final, PlanFinal)
        return took, final.model_copy(update={"decisions": [told]})

    def memory(header: Header, body: bytes) -> Answer:
        ask = unpack_body(MemoryRequest, body).ask
        assert isinstance(ask, RecordOutcomes)
        asked.append(ask.episode is not None)
        if ask.episode is not None:
            return 1, fail(Category.POLICY, "memory.unembeddable")
        return 1, MemoryFinal(stored=len(ask.outcomes))

    world = stack()
    world.peers["memory"].answer = memory
    world.peers["planner"].answer = planner
    task = world.submit(task_of([{"id": "S1"}], objective="???"))
    world.run(lambda: any(kind == "OutcomesSettled" for _, _, kind, _ in world.journal))
    settled = world.facts(task)[-1]
    assert asked == [True, False]
    assert getattr(settled, "stored", None) == 1


def test_a_fault_of_processes_teaches_nothing() -> None:
    world = stack(lambda header, body: (10, fail(Category.RESOURCE)))
    told: list[bytes] = []

    def memory(header: Header, body: bytes) -> Answer:
        told.append(body)
        return 1, MemoryFinal()

    world.peers["memory"].answer = memory
    result = world.finish(world.submit(task_of([{"id": "S1"}])), limit_ms=300_000)
    world.run_for(5_000)
    assert result.state is TaskState.FAILED
    assert told == []


def many_results() -> dict[str, object]:
    return task_of([{"id": f"S{n}"} for n in range(65)], gates=["lint"]).model_dump(mode="json", exclude_none=True)


def many_inputs() -> dict[str, object]:
    steps: list[dict[str, object]] = [{"id": f"S{n}"} for n in range(257)]
    steps.append({"id": "J", "inputs": [f"S{n}.out" for n in range(257)], "gates": ["lint"]})
    return task_of(steps).model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize(
    ("task", "words"),
    [(many_results(), ["gates", "at most 64", "65"]), (many_inputs(), ["plan.steps[J].inputs", "256", "257"])],
    ids=["results", "inputs"],
)
def test_what_no_gate_request_could_hold_is_refused_on_submit(task: dict[str, object], words: list[str]) -> None:
    world = stack()
    header, body = world.client("task.submit", Submit(task=task))
    assert header.kind == "error"
    assert isinstance(body, ErrorReply)
    assert all(word in body.failure.message for word in words), body.failure.message
