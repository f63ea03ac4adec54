"""Sub-agents on real processes around scripted model servers: a hundred with kills in the middle, limits, bad calls."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import CallError
from protocol.messages.result import TaskState, TaskView
from services.scheduler.fact_rows import every_fact
from tests.fakes.gguf_files import write_tiny_gguf
from tests.system.scripted_stack import ScriptedStack, scripted_stack
from tests.waiting import until

COUNT = 100


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedStack]:
    model = write_tiny_gguf(tmp_path_factory.mktemp("leader") / "long.gguf", context_tokens=32_768)
    leader = {"path": str(model), "tier": "B", "slots": 1, "context_tokens": 32_768}
    with scripted_stack(worker_slots=4, more={"specialist": leader}) as running:
        yield running


def create(name: str) -> dict[str, Any]:
    return {"tool": "create_subagent", "name": name, "system_prompt": f"You are {name}, you count."}


def assign(agent: str, prompt: str) -> dict[str, Any]:
    return {"tool": "assign_task", "agent": agent, "prompt": prompt}


def leading(action: str, **spawns: Any) -> dict[str, Any]:
    outputs = [{"name": "report"}]
    return {
        "id": "L",
        "actor": "architect",
        "action": action,
        "outputs": outputs,
        "max_tokens": 8_192,
        "spawns": spawns,
    }


def turns(action: str, first: Any, then: Any) -> list[dict[str, Any]]:
    """What the leading model says in its first turn, and in the next ones."""
    said = [
        {"match": "Your calls so far", "answers": [json.dumps(then)]},
        {"match": action, "answers": [json.dumps(first)]},
    ]
    return [rule | {"model": "specialist"} for rule in said]


def facts(stack: ScriptedStack, task: str) -> Counter[tuple[str, str | None]]:
    """Kind and step of every fact of a task -> how often."""
    path = stack.stack.home.journal / "journal.sqlite"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        return Counter((type(fact).__name__, fact.step) for fact in every_fact(database, task))


def wait_for_done(stack: ScriptedStack, task: str, count: int) -> None:
    """Until so many assignments are done."""

    def done() -> int:
        return sum(1 for kind, step in facts(stack, task) if kind == "StepDone" and ".turn" not in (step or ""))

    until(lambda: done() >= count, f"{count} assignments are done", within_s=200)


def result_of(stack: ScriptedStack, task: str) -> TaskView:
    end = time.monotonic() + 300
    while True:
        try:
            return stack.stack.client.result(task, timeout_s=200)
        except CallError:
            assert time.monotonic() < end


def test_a_hundred_sub_agents_count_once_each_although_hub_workers_leader_and_planner_are_killed(
    stack: ScriptedStack,
) -> None:
    names = [f"a{number}" for number in range(COUNT)]
    calls = [create(name) for name in names] + [assign(name, f"count crate {name} please") for name in names]
    stack.say(
        *turns("lead the fleet", {"calls": calls}, {"answer": "all crates are counted"}),
        {"match": "count crate", "answers": [{"text": "three crates", "delay_s": 0.12}]},
    )
    task = stack.stack.client.submit(
        {"objective": "count", "plan": {"steps": [leading("lead the fleet", roles=["worker"])]}}
    ).task_id
    wait_for_done(stack, task, 20)
    stack.stack.restart("scheduler")
    wait_for_done(stack, task, 40)
    stack.stack.restart("inference-worker")
    stack.stack.restart("inference-specialist")
    stack.stack.restart("planner")
    wait_for_done(stack, task, 60)
    stack.stack.restart("scheduler")
    result = result_of(stack, task)
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert [one.value for one in result.artefacts] == ["all crates are counted"]
    assert result.swarms is not None
    swarm = result.swarms[0]
    assert (len(swarm.agents), swarm.tool_calls, swarm.turns, swarm.refused) == (COUNT, 2 * COUNT, 2, [])
    assert {(agent.done, agent.failed, agent.result) for agent in swarm.agents} == {(1, 0, "three crates")}
    seen = facts(stack, task)
    done = {step: times for (kind, step), times in seen.items() if kind == "StepDone"}
    assert done == dict.fromkeys([f"L.{name}.1" for name in names] + ["L.turn1", "L.turn2", "L"], 1)
    assert [times for (kind, _), times in seen.items() if kind in ("TaskEnded", "StepJoined")] == [1, 1]
    joins = [line for line in stack.prompts_with("lead the fleet") if "Your calls so far" in line]
    assert joins
    assert all(line.count("done <result>three crates</result>") >= COUNT for line in joins)
    stack.stack.wait_ready()
    on_trial = {one.name: one.made_by for one in stack.stack.client.personas() if one.state == "trial"}
    assert on_trial["a0"] == "architect"


def test_bad_calls_and_calls_beyond_the_budget_are_answered_and_the_step_goes_on(stack: ScriptedStack) -> None:
    names = ["ann", "bob", "eve", "kim"]
    calls = [{"tool": "run_shell", "command": "touch /tmp/x"}, assign("zoe", "count barrel zoe")]
    calls += [create(name) for name in names] + [assign(name, f"count barrel {name}") for name in names]
    stack.say(
        *turns("lead the barrels", {"calls": calls}, {"answer": "three of four"}),
        {"match": "count barrel", "answers": ["two barrels"]},
    )
    result = stack.stack.client.run(
        {
            "objective": "count",
            "plan": {"steps": [leading("lead the barrels")]},
            "budget": {"max_subagents": 3},
        },
        timeout_s=200,
    )
    assert result.state is TaskState.SUCCEEDED, result.failure
    assert result.swarms is not None
    codes = ["tool.unknown", "agent.unknown", "budget.subagents", "agent.unknown"]
    assert [one.code for one in result.swarms[0].refused] == codes
    assert {agent.role for agent in result.swarms[0].agents} == {"worker"}, "the planner chooses the smallest that can"
    assert sorted(step.agent or "" for step in result.steps) == ["", "", "", "ann", "bob", "eve"]
    assert not stack.prompts_with("count barrel zoe\n")
    told = stack.prompts_with("Your calls so far")[-1]
    assert "run_shell : refused, tool.unknown" in told
    shown = stack.tierline("show", result.task_id)
    assert "sub-agents of L" in shown
    assert "3 sub-agents, 3 assignments (3 done, 0 failed)" in shown
    assert "budget.subagents" in shown
    explained = stack.tierline("explain", result.task_id)
    assert "ann: You are ann, you count." in explained
    watched = stack.tierline("watch", result.task_id)
    assert "swarm.turned L turn=1 agents=ann,bob,eve" in watched


def test_leader_and_sub_agents_share_a_single_slot(stack: ScriptedStack) -> None:
    calls = [create("one"), create("two"), assign("one", "count keg one"), assign("two", "count keg two")]
    stack.say(
        *turns("lead the kegs", {"calls": calls}, {"answer": "both counted"}),
        {"match": "count keg", "answers": ["one keg"]},
    )
    step = leading("lead the kegs", roles=["architect"])
    result = stack.stack.client.run({"objective": "count", "plan": {"steps": [step]}}, timeout_s=200)
    assert result.state is TaskState.SUCCEEDED, result.failure
    models = {attempt.model for one in result.steps for attempt in one.attempts}
    assert models == {"specialist"}


def test_run_with_swarm_lets_one_model_lead_and_a_dry_run_knows_such_a_step(
    stack: ScriptedStack, tmp_path: Path
) -> None:
    stack.say(
        *turns("lead the nets", {"calls": [create("ann"), assign("ann", "count net ann")]}, {"answer": "one net"}),
        {"match": "count net", "answers": ["a net"]},
    )
    result = json.loads(stack.tierline("run", "lead the nets", "--swarm", "--json"))
    assert result["state"] == "succeeded"
    assert [one["value"] for one in result["artefacts"]] == ["one net"]
    assert [agent["result"] for agent in result["swarms"][0]["agents"]] == ["a net"]
    file = tmp_path / "led.json"
    file.write_text(json.dumps({"objective": "nets", "plan": {"steps": [leading("lead the nets")]}}), "utf-8")
    planned = stack.tierline("plan", "--file", str(file))
    assert "L.turn1" in planned
    assert "routing decisions" in planned


def run_led(stack: ScriptedStack, objective: str) -> tuple[str, str]:
    """What `run --swarm` prints as its result and on the way there; fails if its exit status is not 0."""
    command = [sys.executable, "-m", "services.ctl", "run", objective, "--swarm", "--type", "doc"]
    done = subprocess.run(command, env=stack.stack.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_a_leader_that_never_ends_by_itself_is_brought_to_a_result_and_the_terminal_says_how(
    stack: ScriptedStack,
) -> None:
    same = json.dumps({"calls": [create("ann"), assign("ann", "count cask ann")]})
    stack.say(
        {"match": "lead the casks", "model": "specialist", "answers": [same]},
        {"match": "count cask", "answers": ["nine casks"]},
    )
    out, progress = run_led(stack, "lead the casks")
    assert "nine casks" in out
    assert "made to answer: turn 4 is the last one; turn 4 failed (turn.answer_wanted), so what its sub-agents" in out
    assert "(turn 4, 1 sub-agent, 3 assignments, 2 calls refused)" in progress
    assert "swarm.turned S1 turn=4" not in progress


def test_a_leader_that_repeats_itself_is_asked_for_the_answer_with_what_there_is(stack: ScriptedStack) -> None:
    first = json.dumps({"calls": [create("ann"), assign("ann", "count crock ann")]})
    loop = {"text": '{"tool": "create_subagent", "name": "ann", "system_prompt": "what to do"}, ', "repeat": 80}
    stack.say(
        {"match": "No further tool call is possible", "model": "specialist", "answers": ["five crocks in all"]},
        {"match": "Your calls so far", "model": "specialist", "answers": [loop]},
        {"match": "lead the crocks", "model": "specialist", "answers": [first]},
        {"match": "count crock", "answers": ["five crocks"]},
    )
    out, progress = run_led(stack, "lead the crocks")
    assert "five crocks in all" in out
    assert "its model was made to answer: turn 2 failed (decoding.repetition)" in out
    assert "must answer: turn 2 failed (decoding.repetition))" in progress
