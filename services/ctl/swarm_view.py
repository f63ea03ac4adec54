"""Sub-agents of a task for people: who made them, what came of their work, and which calls were refused.

`show` prints the table, `explain` also each system prompt and every refusal that is kept.
"""

from __future__ import annotations

from typing import Final

from protocol.messages.result import SubAgentView, SwarmView, TaskView
from services.ctl.screen import Screen, one_line

_MAX_ROWS: Final = 40


def print_swarms(screen: Screen, view: TaskView, *, told: bool) -> None:
    """Nothing for a task whose steps made no sub-agents; `told` adds what they were told, and all refusals."""
    for swarm in view.swarms or ():
        screen.heading(f"sub-agents of {swarm.step}")
        done = sum(agent.done for agent in swarm.agents)
        failed = sum(agent.failed for agent in swarm.agents)
        given = sum(len(agent.steps) for agent in swarm.agents)
        screen.line(
            f"{len(swarm.agents)} sub-agents, {given} assignments ({done} done, {failed} failed), {swarm.turns} turns, "
            f"{swarm.tool_calls} tool calls, {swarm.generated_tokens} tokens"
        )
        if swarm.ending is not None:
            screen.line(f"its model was made to answer: {swarm.ending}")
        shown = _notable(swarm.agents)
        last = "persona" if told else "last result"
        screen.table(
            ("agent", "role", "made in", "work", "done", "failed", "tokens", last),
            [_row(swarm, agent, told=told) for agent in shown],
        )
        if len(shown) < len(swarm.agents):
            screen.line(f"{len(shown)} of {len(swarm.agents)} sub-agents, those with failures first; all: --json")
        refused = swarm.refused if told else swarm.refused[-5:]
        for call in refused:
            name = f" {call.agent}" if call.agent else ""
            screen.line(f"refused in turn {call.turn}: {call.tool or 'call'}{name}: {call.code}: {call.message}")


def _notable(agents: list[SubAgentView]) -> list[SubAgentView]:
    ordered = sorted(agents, key=lambda agent: agent.failed == 0) if len(agents) > _MAX_ROWS else agents
    return ordered[:_MAX_ROWS]


def _row(swarm: SwarmView, agent: SubAgentView, *, told: bool) -> tuple[str, ...]:
    return (
        agent.name,
        agent.role,
        f"{swarm.step}.turn{agent.turn}",
        str(len(agent.steps)),
        str(agent.done),
        str(agent.failed),
        str(agent.generated_tokens),
        one_line(f"{agent.persona}: {agent.system_prompt}" if told else agent.result, 60),
    )
