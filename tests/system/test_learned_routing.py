"""Learned routing on real processes: model servers that are good at different work, and a stack that finds out.

Code is done well by the coder only, extraction by the worker only. The rules give code to the coder and extraction to
the extractor, so they are right in half of the tasks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from protocol.messages.memory import MemoryRequest, Stats
from protocol.messages.result import TaskView
from services.kit.config import CHECKOUT
from tests.system.scripted_stack import ScriptedStack, scripted_stack

STATS = MemoryRequest(ask=Stats())
TASKS = 60
LAST = 20
RIGHT = {"code": "coder", "ingest": "worker"}
FACTS = json.dumps({"facts": [{"name": "harbour", "value": "Kiel"}]})
BAD_FACTS = "I am sorry, I cannot find anything."
GOOD_CODE = "```python\ndef parse(text: str) -> int:\n    return int(text)\n```"
BAD_CODE = "```python\nimport os\nimport sys\n```"

CODER, ARCHITECT, EXTRACTOR, WORKER = (
    "You are a programmer",
    "You are a senior engineer",
    "You extract facts",
    "You do one small task",
)


@pytest.fixture(scope="module")
def stack() -> Iterator[ScriptedStack]:
    with scripted_stack() as scripted:
        scripted.say(
            {"match": "def parse", "model": "worker", "answers": [BAD_CODE]},
            {"match": CODER, "answers": [GOOD_CODE]},
            {"match": EXTRACTOR, "answers": [BAD_FACTS]},
            {"match": WORKER, "answers": [FACTS]},
            {"match": ARCHITECT, "answers": [BAD_FACTS]},
        )
        yield scripted


def run(stack: ScriptedStack, number: int) -> tuple[str, TaskView]:
    """Alternately a task of code and one of extraction; both come out as one step."""
    places = ("harbour", "station", "airport", "market", "library", "theatre", "museum")
    place = places[number % len(places)]
    task: dict[str, Any]
    if number % 2 == 0:
        objective = f"Write `def parse` that reads the numbers of the {place}"
        task = {"task_type": "code", "objective": objective, "budget": {"max_steps": 2}}
    else:
        text = [{"name": "report.md", "value": f"The {place} of Kiel has opened."}]
        task = {"task_type": "ingest", "objective": f"List the facts about the {place}", "inputs": text}
    return task["task_type"], stack.stack.client.run(task, timeout_s=300)


def role_of(view: TaskView) -> str:
    assert view.plan is not None
    return next(item.choice for item in view.plan.decisions if item.subject == "role")


def learned_by(seen: list[tuple[str, TaskView]]) -> bool:
    """The right roles in the last of these, but for one in seven."""
    return sum(role_of(view) == RIGHT[kind] for kind, view in seen[-LAST:]) / LAST > 0.85


def printed(stack: ScriptedStack, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "services.ctl", *words],
        cwd=CHECKOUT,
        env=stack.stack.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tierline(stack: ScriptedStack, *words: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(printed(stack, *words, "--json"))
    return answer


def test_after_some_sixty_tasks_the_right_roles_are_taken_and_explain_says_why(stack: ScriptedStack) -> None:
    stack.switch_learning(on=False)
    ruled = [run(stack, number) for number in range(8)]
    assert sum(role_of(view) == RIGHT[kind] for kind, view in ruled) == 4, "the rules are right in half of the tasks"
    assert all(item.advice is None for _, view in ruled for item in view.plan.decisions)  # type: ignore[union-attr]  # role_of saw the plan

    stack.switch_learning(on=True)
    seen = [run(stack, number) for number in range(TASKS)]
    while not learned_by(seen) and len(seen) < 2 * TASKS:  # who explores by chance now and then takes longer at times
        seen.append(run(stack, len(seen)))
    assert learned_by(seen), [role_of(view) for _, view in seen]

    learned = next(view for kind, view in reversed(seen) if kind == "ingest" and role_of(view) == "worker")
    explained = tierline(stack, "explain", learned.task_id)
    (advice,) = (
        item["advice"] for item in explained["plan"]["decisions"] if item["subject"] == "role" and item.get("advice")
    )
    assert (advice["rules_choice"], advice["learned_choice"], advice["won"]) == ("extractor", "worker", "learned")
    assert advice["confidence"] >= 0.6
    assert advice["evidence"] >= 5
    assert advice["why"].startswith("learned: worker ")
    arms = {arm["choice"]: arm for arm in advice["arms"]}
    assert arms["worker"]["expected_reward"] > arms["extractor"]["expected_reward"] + 0.2
    outcome = next(item for item in explained["memory"] if item["decision"]["subject"] == "role")
    assert outcome["outcome"]["reward"] == 1
    assert 0 < outcome["decision"]["propensity"] <= 1

    shown = printed(stack, "explain", learned.task_id)
    assert "rules and what was learned" in shown
    assert "better with confidence" in shown.replace("\n", " ")

    asked = ("explain", "--objective", "List the facts about the lighthouse", "--type", "ingest")
    before = stack.stack.client.memory(STATS).stats
    planned = tierline(stack, *asked)
    (role,) = (item for item in planned["plan"]["decisions"] if item["subject"] == "role")
    assert role["advice"]["learned_choice"] == "worker"
    after = stack.stack.client.memory(STATS).stats
    assert after["decisions"] == before["decisions"], "explaining an objective records nothing"
    assert after["routing_seq"] > 0

    stack.switch_learning(on=False)
    again = [run(stack, number) for number in range(4)]
    assert [role_of(view) for _, view in again] == ["coder", "extractor", "coder", "extractor"]
