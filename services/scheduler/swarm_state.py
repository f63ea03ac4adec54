"""What a spawning step has done so far: its sub-agents, its tool calls and what became of each. Part of the fold.

Plain values that facts are folded into (`fold.py`); which calls are carried out is decided in `swarm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Agent:
    """A sub-agent."""

    name: str
    role: str
    system_prompt: str
    turn: int
    """Turn of the spawning step in which it was made."""
    persona: str
    """The persona that its prompt is kept as: another name where its own had another prompt already."""
    steps: list[str] = field(default_factory=list)
    """Its assignments, in order."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, carried out or refused; prompts are with the agent and the step that came of it."""

    turn: int
    tool: str
    agent: str
    step: str | None = None
    """The assignment that came of it."""
    code: str | None = None
    """Why it was refused, `message` in words; None = it was carried out."""
    message: str = ""


@dataclass(slots=True)
class Swarm:
    """The sub-agents of one spawning step."""

    turns: int = 0
    """Turns that were opened; the newest is the step `<step>.turn<turns>`."""
    agents: dict[str, Agent] = field(default_factory=dict)
    calls: list[ToolCall] = field(default_factory=list)
    unread: int = 0
    """Calls beyond the bound of a turn, which were not looked at."""
    fruitless: int = 0
    """Turns in a row that gave no new work: see `fold._is_new`."""
    closed: str = ""
    """Why no further turn may call tools, after one that failed for good."""

    @property
    def tool_calls(self) -> int:
        """All calls so far, refused ones included."""
        return len(self.calls) + self.unread


def turn_id(step: str, number: int) -> str:
    """The step that is turn `number` of a spawning step."""
    return f"{step}.turn{number}"
