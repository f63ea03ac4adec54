"""Sub-agents that a planning model makes while a task runs: limits, refusals, one join, whatever dies in between."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferRequest
from protocol.messages.memory import MemoryRequest, RecordOutcomes
from protocol.messages.persona import PersonaListing, PersonaQuery
from protocol.messages.plan import RoutingDecision
from protocol.messages.result import CancelQuery, StepState, TaskState, TaskView
from services.scheduler import snapshot
from services.scheduler.audit import problems_of
from services.scheduler.simulation import tiers
from tests.unit.simulation import Answer, World, final_of, plan_as_given, stack, task_of

LEADER = {"id": "L", "actor": "architect", "action": "lead", "spawns": {"roles": ["worker", "coder"]}}
AFTER = {"id": "E", "inputs": ["L.out"], "action": "use it"}


def create(name: str, prompt: str | None = "you count", **more: Any) -> dict[str, Any]:
    said = {} if prompt is None else {"system_prompt": prompt}
    return {"tool": "create_subagent", "name": name} | said | more


def assign(agent: str, prompt: str = "count") -> dict[str, Any]:
    return {"tool": "assign_task", "agent": agent, "prompt": prompt}


class Script:
    """Answers of all models: the leader's turns as given, each assignment its own id; keeps what they were asked."""

    def __init__(self, *turns: Any, took_ms: int = 20) -> None:
        self.turns = turns
        self.took_ms = took_ms
        self.asked: dict[str, InferRequest] = {}
        self.runs: Counter[str] = Counter()

    def __call__(self, header: Header, body: bytes) -> Answer:
        step = header.step or ""
        self.asked[step] = unpack_body(InferRequest, body)
        self.runs[step] += 1
        if step.startswith("L.turn"):
            turn = self.turns[min(int(step.removeprefix("L.turn")), len(self.turns)) - 1]
            return self.took_ms, final_of(turn if isinstance(turn, str) else json.dumps(turn))
        return self.took_ms, self.answer(step)

    def answer(self, step: str) -> Any:
        return final_of(f"made by {step}")

    def prompt(self, step: str) -> str:
        return "\n".join(one.content for one in self.asked[step].messages)


def ran(script: Script, *, slots: int = 4, steps: list[dict[str, Any]] | None = None, **fields: Any) -> TaskView:
    world = stack(script, slots=slots)
    return finished(world, world.submit(task_of(steps or [LEADER, AFTER], **fields)))


def finished(world: World, task: str, limit_ms: int = 600_000) -> TaskView:
    result = world.finish(task, limit_ms)
    record = world.recorded_tasks()[task]
    assert list(problems_of(record)) == []
    kept = snapshot.unpack(snapshot.pack(record))
    assert kept is not None
    assert snapshot.plain(kept) == snapshot.plain(record)
    path = result.critical_path
    assert path is not None
    assert sum(one.end_ms - one.start_ms for one in path.path) == path.wall_ms
    return result


def pairs(count: int, per_agent: int = 1) -> list[dict[str, Any]]:
    names = [f"a{number}" for number in range(count)]
    return [create(name) for name in names] + [assign(name) for name in names for _ in range(per_agent)]


@pytest.mark.parametrize("slots", [1, 4, 32])
def test_a_hundred_sub_agents_join_once_even_with_one_slot(slots: int) -> None:
    script = Script({"calls": pairs(100)}, {"answer": "all counted"})
    result = ran(script, slots=slots)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert result.swarms is not None
    swarm = result.swarms[0]
    assert (swarm.turns, swarm.tool_calls, len(swarm.agents), swarm.refused) == (2, 200, 100, [])
    assert all(agent.done == 1 and agent.role == "worker" for agent in swarm.agents)
    assert swarm.agents[7].result == "made by L.a7.1"
    assert swarm.generated_tokens == 5 * 102
    assert script.runs["L.turn2"] == 1
    assert "all counted" in script.prompt("E")


def test_a_sub_agent_knows_its_own_prompt_only_and_the_parent_gets_results_only() -> None:
    calls = [
        create("ann", "you are Ann"),
        create("bob", "you are Bob"),
        create("kim", "you are Kim"),
        assign("ann", "first"),
        assign("bob", "second"),
    ]
    script = Script({"calls": calls}, {"calls": [assign("ann", "third")]}, {"answer": "fine"})
    result = ran(script, objective="the secret objective")
    assert result.state is TaskState.SUCCEEDED, result.failure
    ann = script.prompt("L.ann.1")
    assert "you are Ann" in ann
    assert "first" in ann
    assert not any(word in ann for word in ("Bob", "second", "secret objective", "lead"))
    turn = script.prompt("L.turn2")
    assert "ann: done <result>made by L.ann.1</result>" in turn
    assert "Sub-agents made: ann, bob, kim; without work so far: kim" in turn
    assert "you are Ann" not in turn
    again = script.asked["L.ann.2"].messages
    assert [one.role for one in again] == ["system", "user", "assistant", "user"]
    assert again[1].content == "first"
    assert again[2].content == "made by L.ann.1"


def test_turns_are_decoded_under_a_schema_and_judged_call_by_call() -> None:
    script = Script({"calls": [create("ann"), assign("ann")]}, {"answer": "fine"})
    ran(script)
    request = script.asked["L.turn1"]
    assert not request.judged
    assert request.json_schema is not None
    tools = request.json_schema["anyOf"][0]["properties"]["calls"]["items"]["anyOf"]
    assert [tool["properties"]["tool"]["const"] for tool in tools] == ["create_subagent", "assign_task"]
    assert tools[0]["properties"]["role"]["enum"] == ["worker", "coder"]
    assert script.asked["L.ann.1"].json_schema is None


BAD: dict[str, tuple[Any, str]] = {
    "another tool": ({"tool": "run_shell", "command": "rm -rf /"}, "tool.unknown"),
    "no tool": ({"name": "ann"}, "tool.unknown"),
    "no object": ("rm", "call.not_an_object"),
    "a further member": (assign("ann") | {"workspace": "/"}, "call.unknown_field"),
    "a number": ({"tool": "assign_task", "agent": "ann", "prompt": 7}, "call.field_type"),
    "a path as name": (create("../../etc"), "agent.name"),
    "a name that is too long": (create("a" * 25), "agent.name"),
    "a stranger": (assign("zoe"), "agent.unknown"),
    "nothing to do": (assign("ann", "  "), "task.prompt"),
    "no agent": ({"tool": "assign_task", "prompt": "x"}, "call.field_missing"),
    "the same name": (create("ann"), "agent.exists"),
    "a role beyond its own": (create("eve", role="architect"), "agent.role"),
    "a prompt that turns its text around": (create("eve", "be\u202e nice"), "agent.prompt"),
    "no system prompt": (create("eve", None), "agent.prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_answered_and_not_carried_out_and_the_others_are(name: str) -> None:
    call, code = BAD[name]
    script = Script({"calls": [create("ann"), call, assign("ann")]}, {"answer": "fine"})
    result = ran(script)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert result.swarms is not None
    assert [one.code for one in result.swarms[0].refused] == [code]
    assert [one.name for one in result.swarms[0].agents] == ["ann"]
    assert sorted(script.runs) == ["E", "L.ann.1", "L.turn1", "L.turn2"]
    assert f"refused, {code}: " in script.prompt("L.turn2")


@pytest.mark.parametrize(
    "said", ["no json", "[]", '{"calls": []}', '{"calls": [], "answer": "x"}', '{"answer": 7}', '{"calls": [{"tool":']
)
def test_a_turn_that_says_nothing_usable_is_tried_again_with_the_reason(said: str) -> None:
    class Stubborn(Script):
        def __call__(self, header: Header, body: bytes) -> Answer:
            first = header.step == "L.turn1" and header.attempt == 1
            took_ms, final = super().__call__(header, body)
            return took_ms, final_of(said) if first else final

    script = Stubborn({"answer": "fine"})
    result = ran(script)
    assert result.state is TaskState.SUCCEEDED, result.failure
    turn = next(step for step in result.steps if step.id == "L.turn1")
    assert turn.attempts[0].failure is not None
    assert turn.attempts[0].failure.category is Category.SCHEMA
    assert "<findings>" in script.prompt("L.turn1")


def test_of_a_turn_that_was_cut_off_the_complete_calls_are_taken() -> None:
    class Cut(Script):
        def __call__(self, header: Header, body: bytes) -> Answer:
            took_ms, final = super().__call__(header, body)
            if header.step == "L.turn1":
                text = json.dumps({"calls": [create("ann"), assign("ann"), create("bob")]})[:-12]
                final = final_of(text).model_copy(update={"finish_reason": "length"})
            return took_ms, final

    result = ran(Cut("", {"answer": "fine"}))
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert result.swarms is not None
    assert [one.name for one in result.swarms[0].agents] == ["ann"]


def test_a_persona_of_that_name_lends_its_prompt() -> None:
    world = stack()
    name, entry = next(iter(world.registry.personas.items()))
    script = Script({"calls": [create(name, None), assign(name)]}, {"answer": "fine"})
    result = ran(script)
    assert result.swarms is not None
    assert result.swarms[0].agents[0].persona == name
    assert entry.prompt.strip()[:40] in script.prompt(f"L.{name}.1")


LIMITS: dict[str, tuple[dict[str, Any], int, str]] = {
    "sub-agents": ({"max_subagents": 3}, 3, "budget.subagents"),
    "tool calls": ({"max_tool_calls": 13}, 3, "budget.tool_calls"),
    "steps": ({"max_steps": 8}, 4, "budget.steps"),
    "tokens": ({"max_tokens": 3_000}, 1, "budget.tokens"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_goes_beyond_a_limit_is_refused_and_the_parent_goes_on(name: str) -> None:
    budget, least, code = LIMITS[name]
    script = Script({"calls": pairs(10)}, {"answer": "as far as it went"})
    result = ran(script, budget=budget)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert result.swarms is not None
    swarm = result.swarms[0]
    assert code in {one.code for one in swarm.refused}
    assert least <= sum(agent.done for agent in swarm.agents) < 10
    assert f"refused, {code}: " in script.prompt("L.turn2")


def test_the_budget_as_shipped_holds_for_fifteen_hundred_calls_and_not_one_more() -> None:
    more = [[assign(f"a{number % 100}", f"count row {turn}") for number in range(250)] for turn in range(6)]
    turns = [{"calls": pairs(100)}, *({"calls": calls} for calls in more[:5]), {"calls": more[5][:51]}]
    turns.append({"answer": "fine"})
    result = ran(Script(*turns), slots=32, budget={"max_steps": 2_000, "max_tokens": 10_000_000})
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert result.swarms is not None
    swarm = result.swarms[0]
    assert (len(swarm.agents), sum(agent.done for agent in swarm.agents)) == (100, 1_400)
    assert [one.code for one in swarm.refused] == ["budget.tool_calls"]


def test_calls_beyond_the_bound_of_a_turn_are_counted_and_refused() -> None:
    script = Script({"calls": [create("ann"), assign("ann")] + [assign("x")] * 400}, {"answer": "fine"})
    result = ran(script)
    assert result.swarms is not None
    assert result.swarms[0].tool_calls == 402
    assert "146 further calls were refused" in script.prompt("L.turn2")


@pytest.mark.parametrize("category", [Category.POLICY, Category.LOGIC])
def test_a_sub_agent_that_fails_or_is_cancelled_is_told_to_the_parent_which_goes_on(category: Category) -> None:
    class Failing(Script):
        def answer(self, step: str) -> Any:
            if step != "L.a1.1":
                return super().answer(step)
            return Failure(code="refused", category=category, origin="x", message="not that")

    script = Failing({"calls": pairs(3)}, {"answer": "two of three"}, took_ms=2_000)
    world = stack(script)
    task = world.submit(task_of([LEADER, AFTER], escalation={"max_replans": 2}))
    world.run(lambda: "L.a2.1" in script.runs)
    world.client("task.cancel", CancelQuery(task_id=task, step="L.a2.1"))
    result = finished(world, task)
    assert result.state is TaskState.SUCCEEDED, result.failure
    states = {step.id: step.state for step in result.steps}
    assert (states["L.a1.1"], states["L.a2.1"]) == (StepState.FAILED, StepState.CANCELLED)
    assert "a1: failed, refused <result>not that</result>" in script.prompt("L.turn2")
    assert "a2: cancelled" in script.prompt("L.turn2")
    assert result.swarms is not None
    assert [agent.failed for agent in result.swarms[0].agents] == [0, 1, 1]
    assert not [fact for fact in world.facts(task) if type(fact).__name__ == "ReplanAsked"]


def test_cancelling_the_spawning_step_stops_its_turns_and_sub_agents() -> None:
    script = Script({"calls": pairs(8)}, {"answer": "never"}, took_ms=1_000)
    world = stack(script)
    task = world.submit(task_of([LEADER, {"id": "B"}]))
    world.run(lambda: "L.a3.1" in script.runs)
    world.client("task.cancel", CancelQuery(task_id=task, step="L"))
    result = finished(world, task)
    assert result.state is TaskState.SUCCEEDED
    assert {step.state for step in result.steps if step.id not in ("B", "L.turn1")} == {StepState.CANCELLED}
    assert "L.turn2" not in script.runs


@settings(max_examples=30, deadline=None)
@given(
    agents=st.integers(1, 12),
    per_agent=st.integers(1, 3),
    slots=st.integers(1, 3),
    deaths=st.lists(st.tuples(st.integers(1, 400), st.sampled_from(["hub", "worker", "specialist"])), max_size=4),
    limits=st.fixed_dictionaries(
        {},
        optional={
            "max_subagents": st.integers(0, 8),
            "max_tool_calls": st.integers(1, 30),
            "max_steps": st.integers(3, 30),
            "max_tokens": st.integers(2_000, 20_000),
        },
    ),
)
def test_whatever_dies_each_assignment_counts_once_and_no_limit_is_passed(
    agents: int, per_agent: int, slots: int, deaths: list[tuple[int, str]], limits: dict[str, int]
) -> None:
    turns = [{"calls": pairs(agents, per_agent)}, {"calls": [assign("a0", "again")]}, {"answer": "joined"}]
    script = Script(*turns, took_ms=60)
    world = stack(script, slots=slots)
    task = world.submit(task_of([LEADER, AFTER], budget=limits))
    for after_ms, who in deaths:
        world.run_for(after_ms)
        if who == "hub":
            world.kill_hub()
            world.run_for(30)
            world.boot_hub()
        else:
            model = "worker" if who == "worker" else "specialist"
            world.peers[f"inference-{model}"].kill()
            world.run_for(30)
            world.peers[f"inference-{model}"].start()
    result = finished(world, task)
    record = world.recorded_tasks()[task]
    done = Counter(fact.step for fact in world.facts(task) if type(fact).__name__ == "StepDone")
    assert set(done.values()) <= {1}
    swarm = record.swarms["L"]
    budget = record.ir.budget
    assert len(swarm.agents) <= budget.max_subagents
    assert len(record.steps) <= budget.max_steps
    accepted = [call for call in swarm.calls if call.code is None]
    assert len(accepted) <= budget.max_tool_calls
    assert record.generated_tokens <= budget.max_tokens
    if result.state is TaskState.SUCCEEDED:
        assert sum(1 for fact in world.facts(task) if type(fact).__name__ == "StepJoined") == 1
        assert {call.step for call in accepted if call.step} == {name for name in done if name and ".a" in name}
    else:
        assert result.failure is not None
        assert result.failure.code.startswith(("budget.", "turn.", "step.poisoned"))


def test_sub_agents_become_personas_that_are_rated_and_can_be_named_again() -> None:
    script = Script({"calls": [create("ann", "you are Ann"), assign("ann")]}, {"answer": "fine"})
    world = stack(script)
    told: list[RecordOutcomes] = []

    def memory(header: Header, body: bytes) -> Answer:
        ask = unpack_body(MemoryRequest, body).ask
        if isinstance(ask, RecordOutcomes):
            told.append(ask)
        return tiers.memory_takes(header, body)

    world.peers["memory"].answer = memory
    decision = {"ids": {"": "d"}, "subject": "decomposition", "choice": "client", "rule": "as given"}

    def planned(header: Header, body: bytes) -> Answer:
        took_ms, final = plan_as_given(header, body)
        one = RoutingDecision.model_validate(decision | {"propensity": 1, "task_type": "chat"})
        return took_ms, final.model_copy(update={"decisions": [one]})

    world.peers["planner"].answer = planned
    task = world.submit(task_of([LEADER, AFTER]))
    result = finished(world, task)
    assert result.swarms is not None
    assert result.swarms[0].agents[0].persona == "ann"
    world.run(lambda: bool(told))
    rated = [one for one in told[0].decisions if one.subject == "persona"]
    assert [(one.step, one.choice, one.cluster) for one in rated] == [("L.ann.1", "ann", "worker")]
    scored = {one.decision_id: one.reward for one in told[0].outcomes}
    assert scored[rated[0].decision_id] == 1.0
    later = Script({"calls": [create("ann", None), create("bob", "x"), assign("ann")]}, {"answer": "fine"})
    for model in world.registry.models:
        world.peers[f"inference-{model}"].answer = later
    again = finished(world, world.submit(task_of([LEADER])))
    assert again.swarms is not None
    assert [one.name for one in again.swarms[0].agents] == ["ann", "bob"]
    assert "you are Ann" in later.prompt("L.ann.1")


def test_a_swarm_leaves_places_on_trial_for_others() -> None:
    script = Script({"calls": pairs(100)}, {"answer": "fine"})
    world = stack(script)
    result = finished(world, world.submit(task_of([LEADER])))
    assert result.swarms is not None
    assert len({agent.persona for agent in result.swarms[0].agents}) == 100
    _, listing = world.client("persona.list", PersonaQuery())
    assert isinstance(listing, PersonaListing)
    on_trial = [one.name for one in listing.personas if one.state == "trial"]
    assert on_trial == [f"a{number}" for number in range(world.registry.trials.at_once // 4)]


def test_a_sub_agent_with_the_name_of_another_persona_is_kept_under_another_name() -> None:
    name = next(iter(stack().registry.personas))
    script = Script({"calls": [create(name, "someone else"), assign(name)]}, {"answer": "fine"})
    result = ran(script)
    assert result.swarms is not None
    agent = result.swarms[0].agents[0]
    assert agent.name == name
    assert agent.persona.startswith(f"{name[:20]}")
    assert agent.persona != name
    assert "someone else" in script.prompt(f"L.{name}.1")
