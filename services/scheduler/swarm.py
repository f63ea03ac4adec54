"""Which tool calls of a planning model are carried out, and the fact that says so. Pure.

A step that `spawns` is taken in turns. A turn is a step of its own that answers with tool calls or with the result;
between two turns the spawning step holds no slot, so a swarm runs on a single one. `create_subagent` makes a name with
a system prompt, `assign_task` a sub-step with a context of its own; the next turn waits for all that the last one
assigned, and is told what came of it. The answer of a turn without calls is the result of the spawning step.

Limits hold when something is added, over all swarms of the task: sub-agents, tool calls (refused ones as well), steps,
and tokens, of which every open turn and assignment counts as many as it may write. What is refused becomes an error
that the model is told, so the step goes on. How turns come to an end is in `swarm_ending.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from pydantic import ValidationError

from protocol.codec import describe
from protocol.errors import BadFrame, CallFailed
from protocol.messages.artefact import ArtefactKind
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal
from protocol.messages.persona import Persona
from protocol.messages.task import Budget
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.swarm_ending import is_plain, must_answer, tool_calls_made
from services.scheduler.swarm_state import Agent
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.toolcalls import (
    ASSIGN,
    CREATE,
    Answered,
    Assign,
    BadCall,
    Calls,
    Create,
    begun_answer,
    is_calling,
    read_turn,
    turn_failure,
)

_SHOWN_NAMES: Final = 20
_SHOWN_CHARS: Final = 150


class Turn(msgspec.Struct, frozen=True):
    """What the answer of an attempt is: text to cut outputs from, or calls."""

    text: str
    calls: Calls | None = None


def said_in(task: TaskRecord, step: StepRecord, final: InferFinal) -> Turn:
    """What a model has answered in this step. Raises CallFailed (SCHEMA) for a turn that cannot be used."""
    if not step.is_turn:
        return Turn(final.text)
    cut_off = final.finish_reason == "length"
    try:
        read = read_turn(final.text, step.spec, cut_off=cut_off)
    except CallFailed:
        text = _plain_text(task, step, final.text, cut_off=cut_off)
        if text is None:
            raise
        return Turn(text)
    if isinstance(read, Answered):
        return Turn(read.text)
    last = must_answer(task, parent_of(task, step))
    if last is not None:
        raise turn_failure("turn.answer_wanted", f"no further call is carried out, {last}: give the answer now")
    return Turn("", read)


def _plain_text(task: TaskRecord, step: StepRecord, text: str, *, cut_off: bool) -> str | None:
    """The answer in what cannot be read as a turn: all of it where no object was asked for, and of an object that
    reached the limit the words that are there, as of any other step; None where there is none.
    """
    plain = is_plain(task, step)
    begun = begun_answer(text) if plain or (cut_off and step.spec.outputs[0].kind is ArtefactKind.TEXT) else None
    return text if begun is None and plain and not is_calling(text) else begun


def parent_of(task: TaskRecord, step: StepRecord) -> StepRecord:
    """The spawning step of a turn or of an assignment."""
    return task.steps[step.swarm or ""]


def roles_of(parent: StepRecord) -> list[str]:
    """Roles that the sub-agents of a spawning step may have, the one they have by themselves first."""
    given = parent.spec.spawns.roles if parent.spec.spawns is not None else []
    return given or [parent.spec.actor]


def calls_left(task: TaskRecord, parent: StepRecord) -> int:
    """Tool calls that may still be made; 0 = the model must answer."""
    return 0 if must_answer(task, parent) is not None else task.ir.budget.max_tool_calls - tool_calls_made(task)


def agents_left(task: TaskRecord) -> int:
    """Sub-agents that may still be made."""
    return max(0, task.ir.budget.max_subagents - sum(len(swarm.agents) for swarm in task.swarms.values()))


def opened(task: TaskRecord, step: StepRecord, at_ms: int) -> f.SwarmTurned:
    """The first turn of a spawning step. Raises CallFailed (POLICY) where the budget has no step left for it."""
    if len(task.steps) >= task.ir.budget.max_steps:
        message = f"budget.max_steps {task.ir.budget.max_steps} leaves no step for a turn of {step.spec.id}"
        raise CallFailed(Failure(code="budget.steps", category=Category.POLICY, origin="scheduler", message=message))
    return f.SwarmTurned(task=task.id, at_ms=at_ms, step=step.spec.id, turn=0, calls=[])


def turned(
    task: TaskRecord, turn: StepRecord, calls: Calls, registry: Registry, make: Callable[[Persona], str], at_ms: int
) -> f.SwarmTurned:
    """A turn with calls: each one carried out or refused, in their order.

    `make` has a persona for a sub-agent and returns the name it has from then on.
    """
    parent = parent_of(task, turn)
    judge = _Judge.of(task, parent, registry, make)
    made = [judge.judged(call) for call in calls.asked]
    number = task.swarms[parent.spec.id].turns
    return f.SwarmTurned(task=task.id, at_ms=at_ms, step=parent.spec.id, turn=number, calls=made, unread=calls.unread)


@dataclass(slots=True)
class _Judge:
    """The limits as they are while the calls of one turn are gone through."""

    task: TaskRecord
    parent: StepRecord
    registry: Registry
    make: Callable[[Persona], str]
    agents: dict[str, tuple[str, int]]
    """Name -> role, and assignments so far."""
    budget: Budget
    calls: int
    made: int
    """Sub-agents of all swarms of the task."""
    steps: int
    """Steps, with the next turn that is sure to come."""
    tokens: int
    """Generated, and what every open turn or assignment may still write."""
    limit: int | None = None
    roles: Sequence[str] = field(default_factory=list)

    @classmethod
    def of(cls, task: TaskRecord, parent: StepRecord, registry: Registry, make: Callable[[Persona], str]) -> _Judge:
        swarm = task.swarms[parent.spec.id]
        spawns = parent.spec.spawns
        open_steps = [one for one in task.steps.values() if one.swarm is not None and not one.state.final]
        turn_tokens = _may_write(registry, parent.spec.max_tokens, parent.spec.actor)
        promised = turn_tokens + sum(
            _may_write(registry, one.spec.max_tokens, one.role) for one in open_steps if one.agent is not None
        )
        return cls(
            task=task,
            parent=parent,
            registry=registry,
            make=make,
            agents={name: (agent.role, len(agent.steps)) for name, agent in swarm.agents.items()},
            budget=task.ir.budget,
            calls=tool_calls_made(task),
            made=sum(len(one.agents) for one in task.swarms.values()),
            steps=len(task.steps) + 1,
            tokens=task.generated_tokens + promised,
            limit=None if spawns is None else spawns.max_tokens,
            roles=roles_of(parent),
        )

    def judged(self, call: Create | Assign | BadCall) -> dict[str, Any]:
        """The call as the fact holds it."""
        self.calls += 1
        if self.calls > self.budget.max_tool_calls:
            tool = call.tool if isinstance(call, BadCall) else CREATE if isinstance(call, Create) else ASSIGN
            why = f"budget.max_tool_calls {self.budget.max_tool_calls} is spent: answer with what you have"
            return _refused(tool, call.agent, "budget.tool_calls", why)
        match call:
            case BadCall():
                return _refused(call.tool, call.agent, call.code, call.message)
            case Create():
                return self._create(call)
            case Assign():
                return self._assign(call)

    def _create(self, call: Create) -> dict[str, Any]:
        role = call.role or self.roles[0]
        if call.agent in self.agents:
            return _refused(CREATE, call.agent, "agent.exists", f"there is a sub-agent {call.agent!r} already: use it")
        if self.made >= self.budget.max_subagents:
            why = f"budget.max_subagents {self.budget.max_subagents} is reached: give the work to those there are"
            return _refused(CREATE, call.agent, "budget.subagents", why)
        if role not in self.roles:
            why = f"a sub-agent cannot be {role[:40]!r}; it can be {', '.join(self.roles)}"
            return _refused(CREATE, call.agent, "agent.role", why)
        try:
            wanted = self._persona(call, role)
            name = self.make(wanted)
        except ValidationError as err:
            return _refused(CREATE, call.agent, "agent.prompt", describe(err)[:_SHOWN_CHARS])
        except BadFrame as err:
            return _refused(CREATE, call.agent, "agent.prompt", str(err)[:_SHOWN_CHARS])
        self.made += 1
        self.agents[call.agent] = (role, 0)
        told = {"tool": CREATE, "agent": call.agent, "role": role}
        return told | {"system_prompt": wanted.prompt, "persona": name}

    def _persona(self, call: Create, role: str) -> Persona:
        """What the sub-agent is told it is, as a persona. Raises ValidationError or BadFrame for what cannot be one."""
        if call.system_prompt is not None:
            work = "".join(char if char.isprintable() else " " for char in self.task.ir.objective[:_SHOWN_CHARS])
            return Persona(
                name=call.agent,
                description=f"Made by {self.parent.spec.actor} for work like: {work}"[:200],
                prompt=call.system_prompt,
                roles=[role],
                task_types=[self.task.ir.task_type],
            )
        if call.agent in self.task.personas:
            return self.task.personas[call.agent]
        known = self.registry.personas.get(call.agent)
        if known is None:
            why = f"system_prompt is missing, and there is no persona {call.agent!r} to take it from"
            raise BadFrame("agent.prompt", why)
        return Persona(name=call.agent, description=known.description, prompt=known.prompt)

    def _assign(self, call: Assign) -> dict[str, Any]:
        known = self.agents.get(call.agent)
        if known is None:
            names = ", ".join(list(self.agents)[:_SHOWN_NAMES]) or "none yet"
            why = f"there is no sub-agent {call.agent!r}; there are: {names}"
            return _refused(ASSIGN, call.agent, "agent.unknown", why)
        role, given = known
        tokens = _may_write(self.registry, self.limit, role)
        if self.steps >= self.budget.max_steps:
            why = f"budget.max_steps {self.budget.max_steps} is reached: answer with what you have"
            return _refused(ASSIGN, call.agent, "budget.steps", why)
        if self.tokens + tokens > self.budget.max_tokens:
            why = f"budget.max_tokens {self.budget.max_tokens} leaves no room for {tokens} tokens more"
            return _refused(ASSIGN, call.agent, "budget.tokens", why)
        self.steps += 1
        self.tokens += tokens
        self.agents[call.agent] = (role, given + 1)
        step = f"{self.parent.spec.id}.{call.agent}.{given + 1}"
        return {"tool": ASSIGN, "agent": call.agent, "step": step, "prompt": call.prompt}


def agent_of(task: TaskRecord, step: StepRecord) -> Agent:
    """The sub-agent of an assignment."""
    return task.swarms[step.swarm or ""].agents[step.agent or ""]


def _may_write(registry: Registry, limit: int | None, role: str) -> int:
    return limit or registry.roles[role].max_tokens


def _refused(tool: str, agent: str, code: str, message: str) -> dict[str, Any]:
    return {"tool": tool, "agent": agent, "code": code, "message": message}
