"""Personas made at run time, in virtual time: whose they are, their names, when they are adopted or dropped."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import unpack_body
from protocol.errors import BadFrame
from protocol.header import Header, unpack_header
from protocol.messages.base import Message
from protocol.messages.infer import InferRequest
from protocol.messages.memory import Arms, ArmValue, DecisionRecord, MemoryFinal, MemoryRequest, RecordOutcomes
from protocol.messages.persona import (
    Persona,
    PersonaListing,
    PersonaMade,
    PersonaQuery,
    PersonasOnTrial,
    PersonaView,
)
from protocol.messages.plan import PlanFinal, PlanRequest, RoutingDecision
from protocol.messages.reply import ErrorReply
from protocol.messages.result import TaskState
from protocol.messages.task import Extend, Extended
from services.kit.expectation import expected
from services.kit.registry import Registry, TrialPolicy, persona_entry
from services.kit.registry.versions import prompt_digest
from services.scheduler import events as ev
from services.scheduler.persona_verdicts import standing_of, verdict
from services.scheduler.personas import KeepPersona, Personas
from services.scheduler.planning import plan_body
from tests.unit.simulation import Answer, World, plan_as_given, say, shipped_registry, stack, task_of


class _AsSent(Message):
    """`persona.make` as any client may send it."""

    persona: dict[str, Any]
    task_id: str | None = None
    rename: bool = False


PIRATE = Persona(name="pirate", description="At sea.", prompt="Speak like a pirate.", roles=["worker"])
SHIPPED = shipped_registry()
POLICY = TrialPolicy()


def make(world: World, persona: Persona | dict[str, Any], **fields: Any) -> PersonaMade | ErrorReply:
    shown = persona.model_dump(mode="json") if isinstance(persona, Persona) else persona
    _, answer = world.client("persona.make", _AsSent(persona=shown, **fields))
    assert isinstance(answer, PersonaMade | ErrorReply)
    return answer


def listed(world: World) -> dict[str, PersonaView]:
    _, answer = world.client("persona.list", PersonaQuery())
    assert isinstance(answer, PersonaListing)
    return {view.name: view for view in answer.personas}


def refused(answer: PersonaMade | ErrorReply) -> str:
    assert isinstance(answer, ErrorReply)
    return f"{answer.failure.code}: {answer.failure.message}"


def prompts_of(world: World) -> list[str]:
    """System prompts of every request that a worker of this world gets from now on."""
    seen: list[str] = []

    def answer(header: Header, body: bytes) -> Answer:
        seen.append(unpack_body(InferRequest, body).messages[0].content)
        return say("fine")(header, body)

    for name, peer in world.peers.items():
        if name.startswith("inference-"):
            peer.answer = answer
    return seen


def arm(choice: str, outcomes: int, rewards: float, prompt: str = "", **place: str) -> ArmValue:
    return ArmValue(
        **{"task_type": "chat", "cluster": "worker"} | place,
        choice=choice,
        prompt=prompt,
        outcomes=outcomes,
        mean_reward=rewards / outcomes if outcomes else 0.0,
        deviation=0.0,
        mean_seconds=1.0,
    )


def memory_with(arms: list[ArmValue], told: list[RecordOutcomes] | None = None) -> Any:
    def answer(header: Header, body: bytes) -> Answer:
        ask = unpack_body(MemoryRequest, body).ask
        if isinstance(ask, RecordOutcomes):
            if told is not None:
                told.append(ask)
            return 5, MemoryFinal(stored=max(1, len(ask.outcomes)))
        return 5, MemoryFinal(arms=arms if isinstance(ask, Arms) else [])

    return answer


def test_made_for_everybody_it_is_known_by_name_and_its_prompt_is_used() -> None:
    world = stack()
    assert make(world, PIRATE) == PersonaMade(name="pirate", state="trial")
    assert make(world, PIRATE) == PersonaMade(name="pirate", state="trial", duplicate=True)
    seen = prompts_of(world)
    world.finish(world.submit(task_of([{"id": "S1", "persona": "pirate"}])))
    assert seen == [f"{SHIPPED.roles['worker'].prompt}\n\nSpeak like a pirate."]
    assert listed(world)["pirate"].state == "trial"
    assert listed(world)["plain-writer"].state == "registered"


def test_a_running_task_has_its_own_at_once_and_keeps_it_over_a_restart_of_the_hub() -> None:
    world = stack(say("fine", took_ms=2_000))
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(100)
    made = make(world, PIRATE, task_id=task)
    assert made == PersonaMade(name="pirate", state="trial")
    seen = prompts_of(world)
    step = {"id": "S2", "actor": "worker", "action": "go on", "outputs": [{"name": "more"}], "persona": "pirate"}
    _, answer = world.client(
        "task.extend", Extend(task_id=task, steps=[step | {"ordered": True, "depends_on": ["S1"]}])
    )
    assert isinstance(answer, Extended)
    world.kill_hub()
    world.boot_hub()
    assert world.finish(task).state is TaskState.SUCCEEDED
    assert "Speak like a pirate." in seen[-1]
    assert listed(world)["pirate"].state == "trial"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "Pirate"}, "persona.name"),
        ({"name": "none"}, "means no persona"),
        ({"name": "x" * 33}, "persona.name"),
        ({"prompt": "x" * 4_001}, "persona.prompt"),
        ({"prompt": "Be kind.\x1b[31m"}, "U+001B at 8"),
        ({"prompt": "Be\u202ekind."}, "U+202E"),
        ({"prompt": " \n "}, "is empty"),
        ({"description": "two\nlines"}, "single line"),
        ({"roles": ["boss"]}, "the registry has no 'boss'"),
        ({"task_types": ["sea"]}, "persona.task_types"),
        ({"colour": "red"}, "persona.colour"),
    ],
)
def test_a_persona_that_is_not_one_is_refused_by_field(change: dict[str, Any], says: str) -> None:
    world = stack()
    assert says in refused(make(world, PIRATE.model_dump(mode="json") | change))
    assert "pirate" not in listed(world)


def test_a_name_with_another_prompt_is_refused_or_changed_as_asked() -> None:
    world = stack()
    other = PIRATE.model_copy(update={"prompt": "Speak like a parrot."})
    make(world, PIRATE)
    assert "persona.taken" in refused(make(world, other))
    assert "persona.taken" in refused(make(world, other.model_copy(update={"name": "skeptic"})))
    made = make(world, other, rename=True)
    assert isinstance(made, PersonaMade)
    assert made.name.startswith("pirate-")
    assert make(world, other, rename=True) == made.model_copy(update={"duplicate": True})
    assert "task.not_running" in refused(make(world, PIRATE, task_id="t-unknown"))


def test_a_plan_that_names_an_unknown_persona_is_refused_and_one_that_names_none_has_none() -> None:
    world = stack()
    with pytest.raises(Exception, match="persona: the registry has no 'pirate'"):
        world.submit(task_of([{"id": "S1", "persona": "pirate"}]))
    seen = prompts_of(world)
    world.finish(world.submit(task_of([{"id": "S1", "persona": "none"}])))
    assert seen == [SHIPPED.roles["worker"].prompt]


def test_the_persona_of_a_plan_is_that_of_steps_that_are_added_without_one() -> None:
    world = stack()
    task = task_of([{"id": "S1", "persona": "none"}])
    assert task.plan is not None
    task = task.model_copy(update={"plan": task.plan.model_copy(update={"persona": "skeptic"})})
    seen = prompts_of(world)
    ident = world.submit(task)
    step = {"id": "S2", "actor": "worker", "action": "go on", "outputs": [{"name": "more"}]}
    world.run_for(20)
    world.client("task.extend", Extend(task_id=ident, steps=[step]))
    world.finish(ident)
    assert [SHIPPED.personas["skeptic"].prompt in prompt for prompt in seen] == [False, True]


def test_what_comes_with_a_plan_is_the_tasks_own_under_a_free_name_and_no_outcome_is_booked_on_the_taken_one() -> None:
    world = stack()
    make(world, PIRATE.model_copy(update={"prompt": "Another pirate."}))

    def plans(header: Header, body: bytes) -> Answer:
        _, final = plan_as_given(header, body)
        assert isinstance(final, PlanFinal)
        assert final.task.plan is not None
        steps = [step.model_copy(update={"persona": "pirate"}) for step in final.task.plan.steps]
        task = final.task.model_copy(update={"plan": final.task.plan.model_copy(update={"steps": steps})})
        wrong = RoutingDecision(
            ids={"S1": "d"}, subject="persona", choice="pirate", propensity=1, rule="", task_type="chat"
        )
        return 5, final.model_copy(update={"task": task, "personas": [PIRATE], "decisions": [wrong]})

    world.peers["planner"].answer = plans
    seen = prompts_of(world)
    view = world.finish(world.submit(task_of([{"id": "S1"}])))
    assert view.state is TaskState.SUCCEEDED
    assert "Speak like a pirate." in seen[0]
    assert view.steps[0].persona is not None
    assert view.steps[0].persona.startswith("pirate-")
    assert view.plan is not None
    assert view.plan.decisions == []


def test_planners_are_told_what_is_on_trial_when_they_join_and_when_it_changes() -> None:
    world = stack()
    heard: list[list[Persona]] = []
    hand_over = world.to_peer

    def listen(identity: bytes, header: bytes, body: bytes) -> None:
        if unpack_header(header).kind == "persona.trials":
            heard.append(unpack_body(PersonasOnTrial, body).personas)
        hand_over(identity, header, body)

    world.to_peer = listen  # type: ignore[method-assign]  # the wire is what is looked at
    make(world, PIRATE)
    world.run_for(20)
    assert heard == [[PIRATE]]
    world.add("planner2", ("planner",), plan_as_given)
    world.run_for(50)
    assert heard == [[PIRATE], [PIRATE]]


def test_a_task_that_is_planned_anew_tells_the_planner_of_its_own_personas() -> None:
    world = stack(say("fine", took_ms=500))
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(50)
    make(world, PIRATE, task_id=task)
    assert world.hub is not None
    assert unpack_body(PlanRequest, plan_body(world.hub.engine.live[task])).personas == [PIRATE]


def test_a_persona_that_has_earned_it_is_adopted_and_one_that_has_not_is_dropped_but_not_from_its_task() -> None:
    world = stack()
    told: list[RecordOutcomes] = []
    digest = prompt_digest(PIRATE.prompt)
    arms = [arm("none", 40, 12), arm("pirate", 19, 19, digest)]
    world.peers["memory"].answer = memory_with(arms, told)
    make(world, PIRATE)
    world.finish(world.submit(task_of([{"id": "S1", "persona": "pirate"}])))
    world.run(lambda: listed(world)["pirate"].why == "19 of 20 outcomes so far")
    arms[1] = arm("pirate", 30, 28, digest)
    world.finish(world.submit(task_of([{"id": "S1", "persona": "pirate"}])))
    world.run(lambda: bool(world.adopting))
    assert world.adopting[0].persona == PIRATE
    assert world.adopting[0].note.startswith("better: 0.91 after 30 outcomes")
    assert "against none 0.31" in world.adopting[0].note
    world.feed(ev.PersonaWritten("pirate", "the disk is full", None, world.now))
    assert listed(world)["pirate"].why.startswith("has earned it, but the disk is full")
    world.feed(ev.PersonaWritten("pirate", None, None, world.now))
    assert listed(world)["pirate"].state == "adopted"
    assert "waits there for `tierline registry reload`" in listed(world)["pirate"].why
    world.kill_hub()
    world.boot_hub()
    assert listed(world)["pirate"].state == "adopted"
    world.finish(world.submit(task_of([{"id": "S1", "persona": "pirate"}])))

    bad = PIRATE.model_copy(update={"name": "parrot", "prompt": "Repeat everything."})
    make(world, bad)
    arms.append(arm("parrot", 30, 1, prompt_digest(bad.prompt)))
    world.finish(world.submit(task_of([{"id": "S1", "persona": "parrot"}])))
    world.run(lambda: listed(world)["parrot"].state == "dropped")
    assert listed(world)["parrot"].why.startswith("worse: 0.06 after 30 outcomes")
    with pytest.raises(Exception, match="the registry has no 'parrot'"):
        world.submit(task_of([{"id": "S1", "persona": "parrot"}]))


def test_steps_that_were_added_while_the_task_ran_are_credited_to_their_persona() -> None:
    world = stack(say("fine", took_ms=300))
    told: list[RecordOutcomes] = []
    world.peers["memory"].answer = memory_with([], told)

    def plans(header: Header, body: bytes) -> Answer:
        _, final = plan_as_given(header, body)
        assert isinstance(final, PlanFinal)
        whole = RoutingDecision(
            ids={"": "d"}, subject="decomposition", choice="client/1", propensity=1, rule="", task_type="chat"
        )
        return 5, final.model_copy(update={"decisions": [whole]})

    world.peers["planner"].answer = plans
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(100)
    make(world, PIRATE, task_id=task)
    step = {"id": "S2", "actor": "worker", "action": "go on", "outputs": [{"name": "more"}], "persona": "pirate"}
    world.client("task.extend", Extend(task_id=task, steps=[step]))
    world.finish(task)
    world.run(lambda: bool(told))
    _, taken = told[0].decisions
    assert isinstance(taken, DecisionRecord)
    assert (taken.subject, taken.choice, taken.cluster) == ("persona", "pirate", "worker")
    assert taken.prompt == prompt_digest(PIRATE.prompt)
    assert {one.decision_id for one in told[0].outcomes} == {"d", taken.decision_id}


def test_where_there_is_no_room_a_task_still_has_its_own_and_the_idlest_makes_way_when_it_has_had_its_time() -> None:
    policy = TrialPolicy(at_once=2, idle_s=10)
    personas = Personas(lambda: _with(policy))
    for number in range(2):
        personas.make(_named(f"p{number}"), made_by="c", at_ms=number * 1_000)
    with pytest.raises(BadFrame, match="2 personas are on trial"):
        personas.make(_named("p2"), made_by="c", at_ms=5_000)
    _, made = personas.make(_named("p2"), made_by="c", at_ms=5_000, task="T")
    assert (made.state, made.name) == ("dropped", "p2")
    assert made.why.startswith("only this task knows it")
    personas.used(["p0"], 6_000)
    _, made = personas.make(_named("p3"), made_by="c", at_ms=11_500)
    assert made.state == "trial"
    assert [one.name for one in personas.on_trial()] == ["p0", "p3"]


def test_a_reload_that_declares_a_trial_ends_it_and_one_that_loses_an_adopted_one_says_so() -> None:
    registry = SHIPPED
    personas = Personas(lambda: registry)
    personas.make(_named("calm"), made_by="c", at_ms=0)
    personas.make(_named("loud"), made_by="c", at_ms=0)
    declared = _named("calm").model_copy(update={"prompt": "calm and kind"})
    registry = _declaring(declared, _named("loud"))
    personas.on_registry(1, reloaded=True)
    assert (personas.trials["calm"].state, personas.trials["loud"].state) == ("dropped", "adopted")
    registry = SHIPPED
    personas.on_registry(2, reloaded=True)
    assert personas.trials["loud"].state == "dropped"
    assert "in the registry's files no more" in personas.trials["loud"].why


def test_outcomes_under_another_prompt_or_by_other_trials_do_not_count() -> None:
    digest = prompt_digest(PIRATE.prompt)
    arms = [arm("pirate", 50, 50, "another"), arm("parrot", 50, 50), arm("none", 50, 10)]
    assert standing_of(PIRATE, arms, {"none"}).own == expected(0, 0)
    standing = standing_of(PIRATE, [*arms, arm("pirate", 40, 20, digest, cluster="writer")], {"none"})
    assert (standing.own.outcomes, standing.alternative, standing.rival) == (40, 0.5, "")


@settings(max_examples=200, deadline=None)
@given(
    own=st.tuples(st.integers(0, 300), st.floats(0, 1)),
    rival=st.tuples(st.integers(0, 300), st.floats(0, 1)),
)
def test_nothing_is_decided_early_and_nobody_is_both_better_and_worse(
    own: tuple[int, float], rival: tuple[int, float]
) -> None:
    arms = [
        arm("pirate", own[0], own[0] * own[1], prompt_digest(PIRATE.prompt)),
        arm("none", rival[0], rival[0] * rival[1]),
    ]
    standing = standing_of(PIRATE, arms, {"none"})
    decided = verdict(standing, POLICY)
    low, high = standing.own.bounds(POLICY.deviations)
    if own[0] < POLICY.least_outcomes:
        assert decided.kind == "stay"
    elif decided.kind == "adopt":
        assert low > standing.alternative
    elif decided.kind == "drop":
        assert high < standing.alternative or own[0] >= POLICY.most_outcomes
    else:
        assert low <= standing.alternative <= high


def _named(name: str) -> Persona:
    return Persona(name=name, description="d", prompt=f"Be {name}.")


def _with(policy: TrialPolicy) -> Registry:
    return replace(SHIPPED, trials=policy)


def _declaring(*personas: Persona) -> Registry:
    more = {one.name: persona_entry(one) for one in personas}
    return replace(SHIPPED, personas=MappingProxyType({**SHIPPED.personas, **more}))


def test_where_the_operator_adopts_by_hand_a_trial_that_has_earned_it_says_so_and_stays() -> None:
    personas = Personas(lambda: _with(TrialPolicy(adopt=False)))
    personas.make(PIRATE, made_by="c", at_ms=0)
    personas.take()
    personas.judge([arm("none", 40, 4), arm("pirate", 40, 40, prompt_digest(PIRATE.prompt))], 5)
    assert personas.trials["pirate"].state == "trial"
    assert personas.trials["pirate"].why.startswith("has earned it, but `adopt` is off: better: 0.98")
    assert [type(effect).__name__ for effect in personas.take()] == ["KeepPersona"], "nothing is written into the files"


def test_rows_that_cannot_be_read_cost_no_other_persona() -> None:
    personas = Personas(lambda: SHIPPED)
    personas.make(PIRATE, made_by="c", at_ms=0)
    (kept,) = personas.take()
    assert isinstance(kept, KeepPersona)
    assert kept.data is not None
    again = Personas(lambda: SHIPPED)
    again.restore([b"\xff", kept.data, kept.data[:-3]])
    assert again.on_trial() == [PIRATE]


def test_with_no_place_for_any_trial_only_tasks_have_personas() -> None:
    personas = Personas(lambda: _with(TrialPolicy(at_once=0)))
    with pytest.raises(BadFrame, match="0 personas are on trial"):
        personas.make(PIRATE, made_by="c", at_ms=0)
    _, made = personas.make(PIRATE, made_by="c", at_ms=0, task="T")
    assert made.state == "dropped"
