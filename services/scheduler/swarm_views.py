"""Sub-agents as clients see them: who made them, what they were given, what came of it, what it cost. Pure."""

from __future__ import annotations

from typing import Final

from protocol.messages.result import RefusedCall, StepState, SubAgentView, SwarmView
from services.scheduler.swarm_ending import how_it_ended
from services.scheduler.swarm_state import Agent, Swarm
from services.scheduler.tasks import StepRecord, TaskRecord

_SHOWN_CHARS: Final = 500
_KEPT_REFUSALS: Final = 50


def swarm_views(task: TaskRecord) -> list[SwarmView]:
    """Every swarm of a task, in the order in which they began."""
    tokens: dict[tuple[str, str | None], int] = {}
    for step in task.steps.values():
        if step.swarm is not None:
            key = (step.swarm, step.agent)
            tokens[key] = tokens.get(key, 0) + sum(attempt.generated_tokens for attempt in step.attempts)
    return [
        SwarmView(
            step=name,
            turns=swarm.turns,
            tool_calls=swarm.tool_calls,
            agents=[_agent(task, agent, tokens.get((name, agent.name), 0)) for agent in swarm.agents.values()],
            refused=_refused(swarm),
            generated_tokens=sum(count for (of, _), count in tokens.items() if of == name),
            ending=how_it_ended(task, task.steps[name]),
        )
        for name, swarm in task.swarms.items()
    ]


def _agent(task: TaskRecord, agent: Agent, tokens: int) -> SubAgentView:
    records: list[StepRecord] = [task.steps[name] for name in agent.steps]
    done = [one for one in records if one.state is StepState.DONE]
    last = task.artefacts[done[-1].spec.id].text() if done else ""
    return SubAgentView(
        name=agent.name,
        role=agent.role,
        system_prompt=agent.system_prompt[:_SHOWN_CHARS],
        persona=agent.persona,
        turn=agent.turn,
        steps=agent.steps,
        done=len(done),
        failed=sum(1 for one in records if one.state.final) - len(done),
        generated_tokens=tokens,
        result=last[:_SHOWN_CHARS],
    )


def _refused(swarm: Swarm) -> list[RefusedCall]:
    refused = [call for call in swarm.calls if call.code is not None][-_KEPT_REFUSALS:]
    return [
        RefusedCall(turn=call.turn, tool=call.tool, agent=call.agent, code=call.code or "", message=call.message)
        for call in refused
    ]
