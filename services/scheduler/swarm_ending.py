"""When the turns of a planning model come to an end, and what stands for an answer that it does not give. Pure.

A model may call tools again and again without ever answering, repeat itself until decoding is stopped, or give its
answer a form that cannot be read. Whoever waits wants a result. So turns are bounded; the last one may only answer, is
told why and, unless it is JSON, asked for the result itself; a turn that fails for good makes the next one the last.
Where that one fails too, the text there is stands for the answer: what it had begun to write, else what its sub-agents
brought. No text stands for code or JSON, nor where gates would have checked the answer: then the step fails.
"""

from __future__ import annotations

from typing import Final

from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.failure import Failure
from services.scheduler import facts as f
from services.scheduler.swarm_state import Swarm, turn_id
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.toolcalls import begun_answer, is_calling

MOST_TURNS: Final = 32
"""Turns of a step that does not say how many; enough for all tool calls of a budget as shipped, 64 in a turn."""
MOST_FRUITLESS: Final = 3


def most_turns(parent: StepRecord) -> int:
    """Turns that a spawning step may have, the one that answers included."""
    return (parent.spec.spawns.max_turns if parent.spec.spawns is not None else None) or MOST_TURNS


def tool_calls_made(task: TaskRecord) -> int:
    """Tool calls of all swarms of a task."""
    return sum(swarm.tool_calls for swarm in task.swarms.values())


def must_answer(task: TaskRecord, parent: StepRecord) -> str | None:
    """Why the newest turn of a spawning step may only answer; None while it may call tools."""
    swarm, budget = task.swarms.get(parent.spec.id, Swarm()), task.ir.budget
    if swarm.closed:
        return swarm.closed
    if swarm.fruitless >= MOST_FRUITLESS:
        return f"{swarm.fruitless} turns in a row gave no new work"
    if swarm.turns >= most_turns(parent):
        return f"turn {swarm.turns} is the last one"
    if len(task.steps) + 1 > budget.max_steps:
        return f"budget.max_steps {budget.max_steps} leaves no step for a further turn"
    if tool_calls_made(task) >= budget.max_tool_calls:
        return f"budget.max_tool_calls {budget.max_tool_calls} is spent"
    return None


def is_plain(task: TaskRecord, turn: StepRecord) -> bool:
    """Whether a turn is asked for the text or code itself, as any other step is: one that may only answer needs no
    object around it, and small models write better without.
    """
    parent = task.steps[turn.swarm or ""]
    return turn.spec.outputs[0].kind is not ArtefactKind.JSON and must_answer(task, parent) is not None


def closed_by(task: TaskRecord, turn: StepRecord, failure: Failure, at_ms: int) -> f.SwarmTurned | None:
    """A turn has failed for good: the next one, which may only answer; None where none can help.

    That is so if this one was the last already, or had answered and its gates were not content.
    """
    parent = task.steps[turn.swarm or ""]
    answered = bool(turn.attempts and turn.attempt.artefacts)
    if answered or must_answer(task, parent) is not None:
        return None
    number = task.swarms[parent.spec.id].turns
    why = f"turn {number} failed ({failure.code})"
    return f.SwarmTurned(task=task.id, at_ms=at_ms, step=parent.spec.id, turn=number, calls=[], closing=why)


def stand_in(task: TaskRecord, parent: StepRecord) -> Artefact | None:
    """What stands for the answer of a spawning step whose last turn has failed; None where there is nothing to take."""
    output = parent.spec.outputs[0]
    if output.kind is not ArtefactKind.TEXT or parent.spec.gates:
        return None
    text = _begun(task, parent) or _brought(task, parent)
    if not text:
        return None
    return Artefact(name=output.name, kind=output.kind, value=text, content_type=output.content_type)


def how_it_ended(task: TaskRecord, parent: StepRecord) -> str | None:
    """Why its model was made to answer, and what stands for an answer that it did not give; None = neither."""
    why = must_answer(task, parent)
    swarm = task.swarms[parent.spec.id]
    last = task.steps[turn_id(parent.spec.id, swarm.turns)]
    if last.failure is None or not parent.joined:
        return why
    source = "what it had begun to write" if _begun(task, parent) else "what its sub-agents brought"
    gone = f"turn {swarm.turns} failed ({last.failure.code}), so {source} stands for its answer"
    return gone if why is None else f"{why}; {gone}"


def _begun(task: TaskRecord, parent: StepRecord) -> str:
    """What the last turn had written of an answer before it was stopped, without what it then repeated."""
    last = task.steps[turn_id(parent.spec.id, task.swarms[parent.spec.id].turns)]
    failure = last.attempts[-1].failure if last.attempts else None
    if failure is None:
        return ""
    text, loop = failure.evidence.get("answer"), failure.evidence.get("first_char")
    if not isinstance(text, str) or is_calling(text):
        return ""
    if isinstance(loop, int):  # the passage that it repeats is said once
        text = text[: loop + len(str(failure.evidence.get("repeated", "")))]
    return (begun_answer(text) or text).strip()


def _brought(task: TaskRecord, parent: StepRecord) -> str:
    """What the sub-agents brought, in the order of their assignments, the same words once."""
    given = [call.step for call in task.swarms[parent.spec.id].calls if call.step is not None]
    texts = dict.fromkeys(task.artefacts[step].text().strip() for step in given if step in task.artefacts)
    return "\n\n".join(text for text in texts if text)[:MAX_ARTEFACT_CHARS]
