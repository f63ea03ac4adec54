"""The swarm of `tierline bench planning --swarm`: sub-agents end to end, killed and resumed, against serial and stages.

Sub-agents answer on the demo model. For the runs that are compared the planning model is a scripted peer
(`scripted_leader`), since a model of 135 million parameters leads nobody; it hands out the same assignments at once,
in stages as wide as the worker has slots (the next one begins when all of the last are back), or one by one. Every
other assignment goes to a role with short answers. Not even the same story has the same length every time, so runs are
compared by their seconds per decoded token. The demo model leads a small swarm of its own under the grammar as well,
and what it made of it is counted.

In the run with kills the hub and the worker get kill -9 in the middle. Exactly once is read from the journal: each
assignment is done once, the spawning step is joined once, and the last turn was told of every result once.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import yaml

from protocol.errors import CallError
from protocol.messages.result import TaskState, TaskView
from services.ctl.bench.bare_stack import BareStack, bound
from services.ctl.bench.demo_models import demo_entry
from services.ctl.bench.overhead import BenchmarkFailedError
from services.ctl.bench.scripted_leader import BRIEF, THOROUGH, order
from services.scheduler.fact_rows import every_fact
from services.scheduler.facts import StepDone, StepJoined, SwarmTurned

SLOTS: Final = 8
_TOKENS: Final = {BRIEF: 12, THOROUGH: 72}
"""Longest answer, by role."""
_LED_TOKENS: Final = 40
"""Bound of one answer where the demo model leads."""
_ROUNDS: Final = 2
"""Of the runs that are compared, by turns; the faster one of each counts."""
_CONTEXT_TOKENS: Final = 1_536
_RUN_S: Final = 240.0
_KILLS: Final = {"scheduler": 0.3, "inference-worker": 0.6}
"""Who is killed when this share of the assignments is done."""


def measure_swarm(agents: int, baseline: int, engine: str, threads: int) -> dict[str, Any]:
    """Figures of the four scripted runs and of the one that the demo model leads.

    The run with kills has `agents`; those without, which are compared, `baseline` each. Raises BenchmarkFailedError if
    a run did not succeed, CommandError without the demo model.
    """
    demo = demo_entry(engine, threads=threads, load_deadline_s=120)
    models = {
        "front": {"tier": "A", **demo, "slots": 1, "context_tokens": 2048},
        "specialist": {"tier": "B", "engine": "noop", "slots": 1, "context_tokens": 65_536},
        "worker": {"tier": "C", **demo, "slots": SLOTS, "context_tokens": _CONTEXT_TOKENS},
    }
    with tempfile.TemporaryDirectory(prefix="tl-") as folder:
        stack = BareStack(Path(folder), models=models, core=("scheduler", "planner", "memory"))
        _add_roles(stack.registry / "roles.yaml")
        stack.argv["inference-specialist"] = bound("services.ctl.bench.scripted_leader", "specialist")
        with stack:
            _led(stack, SLOTS, SLOTS, "first")  # first use of everything
            killed = _led(stack, agents, agents, "killed", kills=_KILLS)
            stack.wait_ready()
            widths = {"once": baseline, "stages": SLOTS, "serial": 1}
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in widths}
            for number in range(_ROUNDS):
                for name, width in widths.items():
                    runs[name].append(_led(stack, baseline, width, f"{name}{'abcdef'[number]}"))
            at_once, stages, serial = (min(runs[name], key=_s_per_token) for name in widths)
            by_model = _led_by_model(stack)
    return {
        "agents": agents,
        "slots": SLOTS,
        "compared_agents": baseline,
        "killed_and_resumed": killed,
        "at_once": at_once,
        "stages": stages,
        "serial": serial,
        "tokens_differ_by": _difference(at_once, stages, serial),
        "faster_than_serial": round(_s_per_token(serial) / _s_per_token(at_once), 2),
        "faster_than_stages": round(_s_per_token(stages) / _s_per_token(at_once), 2),
        "killed_against_undisturbed": round(killed["s_per_assignment"] / at_once["s_per_assignment"], 2),
        "exactly_once": all(run["exactly_once"] for run in (killed, *runs["once"], *runs["stages"], *runs["serial"])),
        "led_by_demo_model": by_model,
    }


def _add_roles(path: Path) -> None:
    """Roles of the worker that differ in nothing but their length."""
    declared = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, tokens in _TOKENS.items():
        declared["roles"][name] = {
            "description": f"Writes {tokens} tokens.",
            "model": "worker",
            "prompt": "You tell stories.",
            "sampling": {"temperature": 0.0},
            "max_tokens": tokens,
            "timeout_s": 120,
            "early_abort": {"enabled": False},
        }
    path.write_text(yaml.safe_dump(declared, sort_keys=False), encoding="utf-8")


def _s_per_token(run: dict[str, Any]) -> float:
    wall_s, tokens = float(run["wall_s"]), int(run["tokens"])
    return wall_s / tokens


def _difference(*runs: dict[str, Any]) -> float:
    """Between the tokens that these runs decoded, as a share."""
    tokens = [int(run["tokens"]) for run in runs]
    return round((max(tokens) - min(tokens)) / max(tokens), 4)


def _led(
    stack: BareStack, agents: int, at_a_time: int, run: str, kills: dict[str, float] | None = None
) -> dict[str, Any]:
    step = {
        "id": "L",
        "actor": "architect",
        "action": order(agents, at_a_time, run),
        "outputs": [{"name": "joined"}],
        "gates": [],
        "max_tokens": 16_384,
        "spawns": {"roles": list(_TOKENS)},
    }
    began = time.perf_counter()
    task = stack.client.submit({"objective": "harbours", "plan": {"steps": [step]}}).task_id
    for victim, share in (kills or {}).items():
        _wait_for_done(stack, task, round(share * agents))
        stack.restart(victim)
    view = _result(stack, task)
    wall_s = time.perf_counter() - began
    if view.state is not TaskState.SUCCEEDED:
        raise BenchmarkFailedError(f"a swarm {view.state.value}: {view.failure}")
    done, joins = _done(stack, task)
    told = int(str(view.artefacts[0].value))
    spent = (view.swarms or [])[0]
    lost = sum(step.losses for step in view.steps)
    return {
        "wall_s": round(wall_s, 2),
        "s_per_assignment": round(wall_s / agents, 4),
        "turns": spent.turns,
        "tokens": spent.generated_tokens,
        "most_at_once": _most_at_once(view),
        "prompt_tokens_read": view.usage.prompt_tokens - view.usage.cached_tokens,
        "attempts_lost": lost,
        "exactly_once": len(done) == told == agents and set(done.values()) == {1} and joins == 1,
    }


def _led_by_model(stack: BareStack) -> dict[str, Any]:
    """A swarm that the demo model leads; whatever it calls, the step has to come to an end."""
    step = {
        "id": "L",
        "actor": "frontdoor",
        "action": "Make helpers, give each of them one question about harbours, then answer.",
        "outputs": [{"name": "report"}],
        "gates": [],
        "max_tokens": 256,
        "spawns": {"roles": ["worker"], "max_tokens": _LED_TOKENS},
    }
    budget = {"max_subagents": 3, "max_tool_calls": 8}
    view = stack.client.run({"objective": "harbours", "plan": {"steps": [step]}, "budget": budget}, timeout_s=_RUN_S)
    swarm = (view.swarms or [])[0]
    return {
        "state": view.state.value,
        "turns": swarm.turns,
        "tool_calls": swarm.tool_calls,
        "agents": len(swarm.agents),
        "assignments_done": sum(agent.done for agent in swarm.agents),
        "refused": dict(Counter(call.code for call in swarm.refused)),
        "turns_that_were_no_json": sum(
            1 for step in view.steps if ".turn" in step.id for one in step.attempts if one.failure is not None
        ),
        "tokens": swarm.generated_tokens,
    }


def _wait_for_done(stack: BareStack, task: str, count: int) -> None:
    end = time.monotonic() + _RUN_S
    while len(_done(stack, task)[0]) < count:
        if time.monotonic() > end:
            raise BenchmarkFailedError(f"{count} assignments were not done within {_RUN_S:g} s")
        time.sleep(0.02)


def _result(stack: BareStack, task: str) -> TaskView:
    """The result, across restarts of the hub."""
    end = time.monotonic() + _RUN_S
    while True:
        try:
            return stack.client.result(task, timeout_s=_RUN_S)
        except CallError:
            if time.monotonic() > end:
                raise


def _done(stack: BareStack, task: str) -> tuple[Counter[str], int]:
    """Assignments that are done, each with how often; and how often the spawning step was joined."""
    path = stack.home.journal / "journal.sqlite"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as journal:
        facts = list(every_fact(journal, task))
    done: Counter[str] = Counter()
    given: set[str] = set()
    joins = 0
    for fact in facts:
        match fact:
            case SwarmTurned():
                given |= {call["step"] for call in fact.calls if "step" in call}
            case StepJoined():
                joins += 1
            case StepDone():
                done[fact.step or ""] += 1
            case _:
                continue
    return Counter({step: times for step, times in done.items() if step in given}), joins


def _most_at_once(view: TaskView) -> int:
    """Most sub-agents that were decoding at the same moment."""
    spans = [
        (one.start_ms, one.end_ms)
        for step in view.steps
        if step.agent is not None
        for attempt in step.attempts
        for one in attempt.segments
        if one.what == "inference"
    ]
    changes = sorted((at, change) for begin, end in spans for at, change in ((begin, 1), (end, -1)))
    most = now = 0
    for _, change in changes:  # at the same moment ends come before begins
        now += change
        most = max(most, now)
    return most
