"""`python -m services.ctl.bench.scripted_leader MODEL`: a planning model that leads a swarm exactly as it is told.

Benchmark equipment, put by a benchmark in the place of an inference process; a true peer of the hub. The action of the
step it leads says how: `lead 100 sub-agents, 8 at a time, run a`. Each turn makes and assigns that many, until all have
been given work, then it answers with the number of results it was told of. It keeps nothing: which turn it is follows
from the step's id, so a turn that is asked again is answered the same. The name of the run is in every prompt: no run
finds the prompts of another one in the model's cache.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any, Final

from protocol.messages.infer import InferFinal, InferRequest
from services.kit.config import load_home
from services.kit.registry import load_registry
from services.kit.service import Call, Service

_ORDER: Final = re.compile(r"lead (\d+) sub-agents, (\d+) at a time, run ([a-z]+)")
_TURN: Final = re.compile(r"\.turn(\d+)\Z")
BRIEF: Final = "brief"
THOROUGH: Final = "thorough"
"""Roles of the sub-agents by turns: with few tokens and with many."""
_TOPICS: Final = ("a crane", "a lighthouse", "a tug", "an anchor", "a pier", "a dry dock", "a pilot", "a buoy")


def order(agents: int, at_a_time: int, run: str) -> str:
    """What the action of the leading step says; `run` is a name in small letters."""
    return f"lead {agents} sub-agents, {at_a_time} at a time, run {run}"


def calls_of(first: int, last: int, run: str) -> list[dict[str, Any]]:
    """Tool calls that make the sub-agents from `first` to before `last`, and give each its one assignment."""
    names = [f"{run}-{number}" for number in range(first, last)]
    made = [
        {
            "tool": "create_subagent",
            "name": name,
            "system_prompt": f"You are {name} on harbours.",
            "role": (BRIEF, THOROUGH)[n % 2],
        }
        for n, name in enumerate(names, first)
    ]
    given = [
        {"tool": "assign_task", "agent": name, "prompt": f"Write a very long story about {_TOPICS[n % len(_TOPICS)]}."}
        for n, name in enumerate(names, first)
    ]
    return made + given


def _said(call: Call) -> str:
    prompt = "\n".join(message.content for message in call.read(InferRequest).messages)
    found, turn = _ORDER.search(prompt), _TURN.search(call.header.step or "")
    if found is None or turn is None:
        return json.dumps({"answer": "0"})
    agents, width = int(found[1]), int(found[2])
    first = (int(turn[1]) - 1) * width
    if first >= agents:
        return json.dumps({"answer": str(prompt.count(": done <result>"))})
    return json.dumps({"calls": calls_of(first, min(agents, first + width), found[3])})


def _service(model: str) -> Service:
    home = load_home()
    slots = load_registry(home.registry, home.models, check_files=False).models[model].slots
    service = Service(home, f"inference-{model}", (f"infer.{model}",), slots=slots)

    async def lead(call: Call) -> InferFinal:
        return InferFinal(
            text=_said(call), finish_reason="stop", model=model, engine="scripted", prompt_tokens=0, generated_tokens=0
        )

    service.answer("infer.request", lead)
    return service


if __name__ == "__main__":
    sys.exit(asyncio.run(_service(sys.argv[1]).run()))
