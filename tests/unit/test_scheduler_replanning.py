"""New versions of a plan: asked for by three triggers, bounded, and never at the cost of finished work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.codec import pack_body, unpack_body
from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.persona import Persona
from protocol.messages.plan import PlanFinal, PlanPartial, PlanRequest
from protocol.messages.result import CancelQuery, StepState, TaskState
from protocol.messages.task import Output, Plan, Step, TaskIR
from services.kit import session as s
from services.planner.machine import Finish, Planning, Refuse, Requested, Unanswered
from services.scheduler import facts as f
from services.scheduler.audit import problems_of
from services.scheduler.fold import fold
from services.scheduler.versions import replans_left
from tests.unit.simulation import Answer, World, final_of, gates_pass, stack, task_of

WRONG = Failure(code="x.wrong", category=Category.LOGIC, origin="test", message="wrong in itself")
Reply = Callable[[Header, bytes], Answer]


def planner(world: World, *, takes_ms: int = 5) -> Reply:
    """The planner's own machine, with memory and model away."""

    def answer(_header: Header, body: bytes) -> Answer:
        asked = unpack_body(PlanRequest, body)
        planning = Planning(world.registry)
        command = planning.handle(Requested(0, asked.task, None, asked.revision, tuple(asked.begun or ())))
        while not isinstance(command, Finish | Refuse):
            command = planning.handle(Unanswered(0, "away"))
        return takes_ms, command.final if isinstance(command, Finish) else command.failure

    return answer


def planned_stack(answer: Reply, *, slots: int = 4, takes_ms: int = 5) -> World:
    world = stack(answer, slots=slots)
    world.peers["planner"].answer = planner(world, takes_ms=takes_ms)
    return world


def wrong_at(*steps: str, took_ms: int = 20) -> Reply:
    """Every attempt of these steps is wrong in itself; all others answer with their own id."""

    def answer(header: Header, _body: bytes) -> Answer:
        return (took_ms, WRONG) if header.step in steps else (took_ms, final_of(f"by {header.step}"))

    return answer


def revisable(steps: list[dict[str, object]], **fields: object) -> TaskIR:
    return task_of(steps, **({"escalation": {"max_replans": 2}} | fields))


def of_type(world: World, task: str, kind: type[f.Fact]) -> list[f.Fact]:
    return [fact for fact in world.facts(task) if isinstance(fact, kind)]


CHAIN: list[dict[str, object]] = [
    {"id": "A"},
    {"id": "B", "inputs": ["A.out"]},
    {"id": "C", "inputs": ["B.out"]},
    {"id": "D"},
]


def test_a_step_that_nobody_can_do_is_planned_around_and_what_is_done_stays() -> None:
    world = planned_stack(wrong_at("B"))
    task = world.submit(revisable(CHAIN))
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    states = {step.id: step.state for step in view.steps}
    assert states["B"] is StepState.FAILED
    assert {name for name, state in states.items() if state is StepState.DONE} == {"A", "C", "D", "V2S1", "V2S2"}
    assert view.plan is not None
    assert view.plan.versions is not None
    first, second = view.plan.versions
    assert (first.version, first.trigger) == (1, "planned")
    assert (second.trigger, second.kept, second.dropped) == ("failed", ["A", "C", "D"], ["B"])
    assert second.added == ["V2S1", "V2S2"]
    assert second.adopted_ms is not None
    assert "failures.yaml" in second.rule
    assert {artefact.name for artefact in view.artefacts} == {"C.out", "D.out"}
    done = [fact.step for fact in of_type(world, task, f.StepDone)]
    assert len(done) == len(set(done)), "finished work is not done again"


def test_whoever_does_it_again_reads_what_was_wrong_as_material() -> None:
    prompts: dict[str, str] = {}

    def answer(header: Header, body: bytes) -> Answer:
        prompts[header.step or ""] = body.decode(errors="ignore")
        return wrong_at("B")(header, body)

    world = planned_stack(answer)
    world.finish(world.submit(revisable(CHAIN)))
    assert '<material name="V2.notes">' in prompts["V2S1"]
    assert "wrong in itself" in prompts["V2S1"]
    assert "by V2S1" in prompts["V2S2"], "the approach that was worked out"
    assert "by V2S2" in prompts["C"], "what comes after reads the new result under its old name"


def test_a_plan_of_a_client_is_never_changed_unless_it_says_so() -> None:
    world = planned_stack(wrong_at("B"))
    task = world.submit(task_of(CHAIN))
    view = world.finish(task)
    assert view.state is TaskState.FAILED
    assert not of_type(world, task, f.ReplanAsked)


def test_after_so_many_versions_the_task_fails_with_the_last_reason() -> None:
    world = planned_stack(wrong_at("B", "V2S2", "V3S2", "V4S2"))
    task = world.submit(revisable(CHAIN))
    view = world.finish(task)
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert view.failure.code == "x.wrong"
    assert view.plan is not None
    assert [one.version for one in view.plan.versions or []] == [1, 2, 3]
    assert len(of_type(world, task, f.TaskEnded)) == 1


def test_two_steps_that_fail_at_once_are_planned_around_one_after_the_other() -> None:
    world = planned_stack(wrong_at("B", "D"), takes_ms=300)
    view = world.finish(world.submit(revisable(CHAIN)))
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert [one.trigger for one in view.plan.versions or []] == ["planned", "failed", "failed"]


def test_what_is_no_list_is_made_into_one() -> None:
    steps: list[dict[str, object]] = [
        {"id": "L", "outputs": [{"name": "items", "kind": "json"}]},
        {"id": "M", "map_over": "items", "outputs": [{"name": "parts", "kind": "json"}]},
        {"id": "J", "inputs": ["parts"]},
    ]

    def answer(header: Header, _body: bytes) -> Answer:
        told = {"L": '{"not": "a list"}', "V2S1": '["a", "b", "c"]'}
        return 10, final_of(told.get(header.step or "", '{"of": "it"}'))

    world = planned_stack(answer)
    task = world.submit(revisable(steps))
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert [one.trigger for one in view.plan.versions or []] == ["planned", "contradicted"]
    assert {"V2S2.1", "V2S2.2", "V2S2.3"} <= {step.id for step in view.steps}
    assert {step.id for step in view.steps if step.state is StepState.DONE} >= {"L", "J"}


def test_a_workers_word_that_the_plan_is_wrong_turns_the_rest_over() -> None:
    def answer(header: Header, _body: bytes) -> Answer:
        told = {"B": "CONTRADICTION: there is no such harbour"}
        return 10, final_of(told.get(header.step or "", f"by {header.step}"))

    world = planned_stack(answer)
    view = world.finish(world.submit(revisable(CHAIN)))
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert view.plan.versions is not None
    second = view.plan.versions[1]
    assert second.trigger == "contradicted"
    assert "no such harbour" in second.reason
    assert (second.kept, second.dropped) == (["A", "D"], ["B", "C"])
    # Only who has seen a result may say so, and only where something can be done about it.
    view = world.finish(world.submit(task_of(CHAIN)))
    assert view.state is TaskState.SUCCEEDED
    assert view.plan is not None
    assert view.plan.versions is None


def test_a_failed_final_check_has_the_result_repaired() -> None:
    asked: list[int] = []

    def gates(header: Header, body: bytes) -> Answer:
        if header.step is not None:
            return gates_pass(header, body)
        asked.append(1)
        names = unpack_body(GateRequest, body).gates
        verdict = Verdict.FAIL if len(asked) == 1 else Verdict.PASS
        results = [GateResult(gate=name, verdict=verdict, category="LOGIC", started_ms=0, ended_ms=0) for name in names]
        return 10, GateFinal(results=results)

    world = planned_stack(wrong_at())
    world.peers["gates"].answer = gates
    view = world.finish(world.submit(revisable(CHAIN, gates=["schema"])))
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [step.id for step in view.steps][-1] == "V2S1"
    assert len(asked) == 2


def test_a_deadline_that_would_be_missed_has_the_rest_shortened() -> None:
    def answer(header: Header, _body: bytes) -> Answer:
        return (900 if (header.step or "").startswith("V") else 4_000), final_of(f"by {header.step}")

    steps: list[dict[str, object]] = [{"id": "S1"}]
    steps += [{"id": f"S{n}", "inputs": [f"S{n - 1}.out"]} for n in range(2, 9)]
    world = planned_stack(answer)
    for _ in range(4):  # what a step takes is learned first
        world.finish(world.submit(task_of(steps)))
    task = world.submit(revisable(steps, deadline_s=14))
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert view.plan.versions is not None
    second = view.plan.versions[1]
    assert second.trigger == "late"
    assert second.kept == [name for name in second.kept if name.startswith("S")] != []
    assert second.dropped
    assert [artefact.name for artefact in view.artefacts] == ["S8.out"]
    # Without leave the same task runs into its deadline.
    view = world.finish(world.submit(task_of(steps, deadline_s=14)))
    assert view.failure is not None
    assert view.failure.code == "task.deadline"


def chain_of(count: int, **last: object) -> list[dict[str, object]]:
    steps: list[dict[str, object]] = [{"id": "S1"}]
    steps += [{"id": f"S{n}", "inputs": [f"S{n - 1}.out"]} for n in range(2, count + 1)]
    steps[-1] |= last
    return steps


@pytest.mark.parametrize("last", [{}, {"actor": "writer"}])
def test_a_deadline_that_is_plainly_missed_shows_before_much_was_seen(last: dict[str, object]) -> None:
    def answer(header: Header, _body: bytes) -> Answer:
        return (2_000 if (header.step or "").startswith("V") else 20_000), final_of(f"by {header.step}")

    world = planned_stack(answer)
    task = world.submit(revisable(chain_of(12, **last), deadline_s=70))  # 240 s of work, and nothing of it known
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert [one.trigger for one in view.plan.versions or []] == ["planned", "late"]
    asked = next(fact for fact in of_type(world, task, f.ReplanAsked))
    assert sum(fact.at_ms < asked.at_ms for fact in of_type(world, task, f.StepDone)) < 4


def test_one_slow_step_is_no_sign_that_a_deadline_will_be_missed() -> None:
    def answer(header: Header, _body: bytes) -> Answer:
        return (6_000 if header.step == "S1" else 1_000), final_of(f"by {header.step}")

    world = planned_stack(answer)
    task = world.submit(revisable(chain_of(12), deadline_s=30))
    assert world.finish(task).state is TaskState.SUCCEEDED
    assert not of_type(world, task, f.ReplanAsked)


def test_a_task_unlike_those_before_is_late_by_its_own_pace_while_there_is_time() -> None:
    def answer(header: Header, _body: bytes) -> Answer:
        return (600 if (header.step or "").startswith("S") else 30), final_of(f"by {header.step}")

    world = planned_stack(answer)
    for _ in range(6):  # steps of that role have taken a twentieth so far
        world.finish(world.submit(task_of([{"id": "Q1"}, {"id": "Q2"}, {"id": "Q3"}, {"id": "Q4"}])))
    steps: list[dict[str, object]] = [{"id": "S1"}]
    steps += [{"id": f"S{n}", "inputs": [f"S{n - 1}.out"]} for n in range(2, 25)]
    task = world.submit(revisable(steps, deadline_s=8))
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    (asked,) = of_type(world, task, f.ReplanAsked)
    assert asked.at_ms - view.created_ms < 5_000, "twice the time is missing, and a third of it is left"


def test_a_task_that_is_in_time_is_left_alone() -> None:
    world = planned_stack(wrong_at(took_ms=100))
    task = world.submit(revisable(CHAIN, deadline_s=100))
    assert world.finish(task).state is TaskState.SUCCEEDED
    assert not of_type(world, task, f.ReplanAsked)


def test_without_a_planner_that_can_the_task_ends_as_it_would_have() -> None:
    world = planned_stack(wrong_at("B"))
    original = world.peers["planner"].answer

    def answer(header: Header, body: bytes) -> Answer:
        if unpack_body(PlanRequest, body).revision is None:
            return original(header, body)
        refusal = Failure(code="plan.invalid", category=Category.POLICY, origin="planner", message="cannot")
        return 5, refusal

    world.peers["planner"].answer = answer
    task = world.submit(revisable(CHAIN))
    view = world.finish(task)
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert view.failure.code == "x.wrong"
    assert view.plan is not None
    assert view.plan.versions is not None
    assert view.plan.versions[1].abandoned is not None


@pytest.mark.parametrize("bad", ["nothing new", "unknown input"])
def test_a_version_that_cannot_run_is_not_adopted(bad: str) -> None:
    world = planned_stack(wrong_at("B"))
    original = world.peers["planner"].answer

    def answer(header: Header, body: bytes) -> Answer:
        asked = unpack_body(PlanRequest, body)
        took, final = original(header, body)
        if asked.revision is None or not isinstance(final, PlanFinal) or final.task.plan is None:
            return took, final
        new, *rest = final.task.plan.steps
        changed = {
            "nothing new": rest[1:],
            "unknown input": [new.model_copy(update={"inputs": ["nowhere"]}), *rest],
        }[bad]
        plan = final.task.plan.model_copy(update={"steps": changed})
        return took, final.model_copy(update={"task": final.task.model_copy(update={"plan": plan})})

    world.peers["planner"].answer = answer
    view = world.finish(world.submit(revisable(CHAIN)))
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert view.failure.code == "x.wrong"


def step_of(name: str, *reads: str) -> Step:
    inputs = [f"{other}.out" for other in reads]
    return Step(id=name, actor="worker", action=name, inputs=inputs, outputs=[Output(name=f"{name}.out")], gates=[])


@pytest.mark.parametrize("killed", [(), ("hub",), ("planner",), ("hub", "planner")])
def test_a_plan_begins_before_it_is_whole_and_kill_9_changes_nothing(killed: tuple[str, ...]) -> None:
    world = planned_stack(wrong_at(took_ms=30))
    whole = [step_of("S1"), step_of("S2", "S1"), step_of("S3", "S2")]
    asked_with: list[list[str]] = []

    def plan(_header: Header, body: bytes) -> Answer:
        request = unpack_body(PlanRequest, body)
        asked_with.append([one.id for one in request.begun or []])
        assert request.task.plan is None
        task = request.task.model_copy(update={"plan": Plan(steps=whole)})
        return 2_000, PlanFinal(task=task, source="model", reason="whole")

    planner_ = world.peers["planner"]
    planner_.answer = plan
    task = world.submit(TaskIR(objective="begin early"))
    world.run_for(20)
    for count in (1, 2, 2):  # they tell all steps so far, so one twice does no harm
        told = pack_body(PlanPartial(steps=whole[:count]))
        planner_.feed(s.PartialMade(world.now, planner_.started[-1], "plan.partial", told))
        world.run_for(100)
    record = world.recorded_tasks()[task]
    assert record.plan_open
    assert [step.state for step in record.steps.values()] == [StepState.DONE, StepState.DONE]
    assert record.state is TaskState.RUNNING, "what is done does not end a task whose plan is not whole"
    if "planner" in killed:
        planner_.kill()
    if "hub" in killed:
        world.kill_hub()
    world.run_for(100)
    if "planner" in killed:
        planner_.start()
    if "hub" in killed:
        world.boot_hub()
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [step.id for step in view.steps] == ["S1", "S2", "S3"]
    assert len({fact.step for fact in of_type(world, task, f.StepDone)}) == len(of_type(world, task, f.StepDone)) == 3
    assert len(of_type(world, task, f.TaskPlanned)) == 1
    assert asked_with[0] == []
    if "planner" in killed:
        assert asked_with[-1] == ["S1", "S2"], "who comes after hears what has begun"
    assert not list(problems_of(world.recorded_tasks()[task]))


def streamed(world: World, whole: list[Step], takes_ms: int = 2_000) -> None:
    """The planner takes so long for a plan of these steps; the rest of a plan its own machine makes."""
    original = world.peers["planner"].answer

    def plan(header: Header, body: bytes) -> Answer:
        request = unpack_body(PlanRequest, body)
        if request.revision is not None:
            return original(header, body)
        task = request.task.model_copy(update={"plan": Plan(steps=whole)})
        return takes_ms, PlanFinal(task=task, source="model", reason="whole")

    world.peers["planner"].answer = plan


def tell(world: World, steps: list[Step], personas: Sequence[Persona] = ()) -> None:
    """Steps of the plan that is being made can start."""
    planner_ = world.peers["planner"]
    told = pack_body(PlanPartial(steps=steps, personas=list(personas)))
    planner_.feed(s.PartialMade(world.now, planner_.started[-1], "plan.partial", told))


@pytest.mark.parametrize("kill", [False, True])
def test_a_step_that_is_wrong_in_itself_waits_for_the_end_of_a_plan_that_is_still_written(kill: bool) -> None:
    world = planned_stack(wrong_at("S1", took_ms=20))
    whole = [step_of("S1"), step_of("S2", "S1"), step_of("S3"), step_of("S4", "S2", "S3")]
    streamed(world, whole)
    task = world.submit(TaskIR(objective="begin early"))
    world.run_for(20)
    tell(world, whole[:1])
    world.run_for(600)
    record = world.recorded_tasks()[task]
    assert (record.state, record.plan_open) == (TaskState.RUNNING, True)
    assert record.steps["S1"].state is StepState.FAILED
    assert not of_type(world, task, f.ReplanAsked)
    tell(world, whole[:3])
    world.run_for(200)
    record = world.recorded_tasks()[task]
    states = {name: step.state for name, step in record.steps.items()}
    assert states == {"S1": StepState.FAILED, "S2": StepState.WAITING, "S3": StepState.DONE}, "nothing runs without it"
    if kill:
        world.kill_hub()
        world.run_for(100)
        world.boot_hub()
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert [one.trigger for one in view.plan.versions or []] == ["planned", "failed"]
    done = {step.id for step in view.steps if step.state is StepState.DONE}
    assert done == {"S2", "S3", "S4", "V2S1", "V2S2"}
    assert not list(problems_of(world.recorded_tasks()[task]))


def test_a_word_against_a_plan_that_is_still_written_is_listened_to_when_it_is_whole() -> None:
    def answer(header: Header, _body: bytes) -> Answer:
        return 20, final_of("CONTRADICTION: no harbour" if header.step == "S2" else f"by {header.step}")

    world = planned_stack(answer)
    whole = [step_of("S1"), step_of("S2", "S1"), step_of("S3", "S2")]
    streamed(world, whole)
    task = world.submit(TaskIR(objective="begin early"))
    world.run_for(20)
    tell(world, whole[:2])
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    assert [one.trigger for one in view.plan.versions or []] == ["planned", "contradicted"]
    assert [one.value for one in view.artefacts] == ["by V2S1"]


def test_what_a_plan_builds_on_a_step_that_was_cancelled_meanwhile_is_cancelled_too() -> None:
    world = planned_stack(wrong_at(took_ms=500))
    whole = [step_of("S1"), step_of("S2", "S1"), step_of("S3")]
    streamed(world, whole)
    task = world.submit(TaskIR(objective="begin early"))
    world.run_for(20)
    tell(world, whole[:1])
    world.run_for(50)
    world.client("task.cancel", CancelQuery(task_id=task, step="S1"))
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert {step.id: step.state for step in view.steps} == {
        "S1": StepState.CANCELLED,
        "S2": StepState.CANCELLED,
        "S3": StepState.DONE,
    }


def test_personas_come_with_the_steps_that_begin_early_under_names_of_their_own() -> None:
    prompts: dict[str, str] = {}

    def answer(header: Header, body: bytes) -> Answer:
        prompts[header.step or ""] = body.decode(errors="ignore")
        return 20, final_of(f"by {header.step}")

    world = planned_stack(answer)
    taken = next(iter(world.registry.personas))
    made = [Persona(name=name, description="x", prompt=f"Attend to {name}.") for name in ("tides", taken)]
    whole = [step_of("S1"), step_of("S2"), step_of("S3", "S1", "S2")]
    whole = [step.model_copy(update={"persona": one.name}) for step, one in zip(whole, [*made, made[0]], strict=True)]
    streamed(world, whole)
    task = world.submit(TaskIR(objective="begin early"))
    world.run_for(20)
    tell(world, whole[:1], made[:1])
    tell(world, whole[:2], made)
    view = world.finish(task)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert "Attend to tides." in prompts["S1"]
    assert f"Attend to {taken}." in prompts["S2"]
    record = world.recorded_tasks()[task]
    personas = [record.steps[name].spec.persona for name in ("S1", "S2", "S3")]
    assert personas[0] == personas[2] == "tides"
    assert personas[1] not in (None, taken), "the name was taken by another prompt"


@st.composite
def graphs(draw: st.DrawFn) -> list[dict[str, object]]:
    count = draw(st.integers(2, 10))
    chained = draw(st.booleans())
    steps: list[dict[str, object]] = []
    for number in range(count):
        before = draw(st.lists(st.integers(0, number - 1), max_size=3, unique=True)) if number else []
        if chained and number and number - 1 not in before:
            before.append(number - 1)
        steps.append({"id": f"S{number}", "inputs": [f"S{other}.out" for other in before]})
    return steps


@given(
    steps=graphs(),
    wrong=st.sets(st.integers(0, 7), max_size=3),
    again=st.sets(st.sampled_from(["V2S1", "V2S2", "V3S2"])),
    contradicts=st.sets(st.integers(1, 7), max_size=2),
    deadline_s=st.none() | st.sampled_from([0.7, 0.9, 1.2, 2.0]),
    kills=st.lists(st.tuples(st.integers(5, 400), st.sampled_from(["hub", "planner", "both"])), max_size=4),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_nothing_finished_is_lost_and_there_is_one_end(
    steps: list[dict[str, object]],
    wrong: set[int],
    again: set[str],
    contradicts: set[int],
    deadline_s: float | None,
    kills: list[tuple[int, str]],
) -> None:
    failing = {f"S{number}" for number in wrong} | again
    turning = {f"S{number}" for number in contradicts}

    def answer(header: Header, _body: bytes) -> Answer:
        name = header.step or ""
        if name in failing:
            return 30, WRONG
        took_ms = 60 if name.startswith("V") else 180
        return took_ms, final_of("CONTRADICTION: no" if name in turning else f"by {name}")

    world = planned_stack(answer, slots=2, takes_ms=60)
    world.finish(world.submit(task_of([{"id": f"T{number}"} for number in range(64)])))  # what a step takes is known
    fields = {} if deadline_s is None else {"deadline_s": deadline_s}
    task = world.submit(revisable(steps, **fields))
    for after_ms, who in kills:
        world.run_for(after_ms)
        if who in ("planner", "both"):
            world.peers["planner"].kill()
        if who in ("hub", "both"):
            world.kill_hub()
        world.run_for(50)
        if who in ("planner", "both"):
            world.peers["planner"].start()
        if who in ("hub", "both"):
            world.boot_hub()
    world.run(lambda: bool(of_type(world, task, f.TaskEnded)), 200_000)
    facts = world.facts(task)
    record = fold(facts)
    assert not list(problems_of(record))
    assert len(of_type(world, task, f.TaskEnded)) == 1
    assert len(of_type(world, task, f.ReplanAsked)) <= 2
    assert replans_left(record, world.registry) >= 0
    assert record.revising is None or record.state.final
    done: set[str] = set()
    for fact in facts:
        if isinstance(fact, f.StepDone):
            assert fact.step not in done, "done twice"
            done.add(fact.step or "")
        if isinstance(fact, f.TaskReplanned):
            assert not done & set(fact.dropped), "finished work was dropped"
            assert not {one["id"] for one in fact.added} & done
    assert all(record.steps[name].state is StepState.DONE for name in done)
    assert all(output.name in record.artefacts for name in done for output in record.steps[name].spec.outputs)
    if record.state is TaskState.SUCCEEDED:
        ids = {step.id for step in record.ir.plan.steps} if record.ir.plan is not None else set()
        assert all(record.steps[name].state is StepState.DONE for name in ids)
    assert pack_body(world.view(task))
