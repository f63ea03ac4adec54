"""The inference request of one attempt, or of one prompt of a batch: limits, prompt, what constrains decoding.

Composed when the call starts, not when it is queued: a thousand waiting steps hold no prompts in memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from protocol.messages.artefact import ArtefactKind
from protocol.messages.batch import BatchRequest
from protocol.messages.infer import ChatMessage, InferRequest, Sampling
from services.kit.identity import work_key
from services.kit.registry import PersonaEntry, Registry, RoleEntry, persona_entry
from services.scheduler.answers import schema_of_parts
from services.scheduler.feedback import room_for, told
from services.scheduler.prompting import CHARS_PER_TOKEN, compose
from services.scheduler.swarm_prompts import agent_messages, schema_of_turn, turn_spec
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.versions import may_contradict


def infer_request(task: TaskRecord, step: StepRecord, registry: Registry, *, stream: bool) -> dict[str, Any]:
    """What the newest attempt of `step` asks of its model. Its seed follows from its key: a rerun asks the same.

    The body of an `infer.request` as the map that goes on the wire: every part was checked where it came in, and this
    is made for each step while its worker waits. As a pydantic message it took three times as long.
    """
    attempt = step.attempt
    role = registry.roles[attempt.role]
    parts = _fixed_parts(registry, attempt.role)
    model = registry.models[attempt.model]
    harder = attempt.arm == "harder"
    max_tokens = _max_tokens(
        step, role, model.context_tokens, registry.failures.caps.think_harder_factor if harder else 1
    )
    left = max(1, task.ir.budget.max_tokens - task.generated_tokens)
    schema = step.spec.json_schema
    if step.is_turn:
        schema = schema_of_turn(task, step, max_tokens)
    elif schema is None and len(step.spec.outputs) > 1:
        schema = schema_of_parts(step.spec.outputs)
    if schema is None and attempt.constrained and step.spec.outputs[0].kind is ArtefactKind.JSON:
        schema = {"type": "object"}
    body = {
        "role": attempt.role,
        "messages": _messages(task, step, registry, role, max_tokens),
        "max_tokens": min(max_tokens, left),
        "sampling": _seeded(parts.sampling, attempt.key),
        "json_output": not step.is_turn
        and len(step.spec.outputs) == 1
        and step.spec.outputs[0].kind is ArtefactKind.JSON,
        "judged": not step.is_turn,  # a turn is judged call by call, in `toolcalls.py`
        "stream": stream,
    }
    if schema is not None:
        body["json_schema"] = schema
    if step.spec.grammar is not None:
        body["grammar"] = step.spec.grammar
    if parts.early_abort is not None:
        body["early_abort"] = parts.early_abort
    return body


def _messages(
    task: TaskRecord, step: StepRecord, registry: Registry, role: RoleEntry, max_tokens: int
) -> list[dict[str, str]]:
    """The prompt of the newest attempt: of a sub-agent's assignment, of a turn of a planning model, or of any step."""
    attempt = step.attempt
    context_tokens = registry.models[attempt.model].context_tokens
    rejected = told(step.attempts[:-1], attempt.role, attempt.told_chars)
    harder = attempt.arm == "harder"
    if step.agent is not None:
        return agent_messages(
            task, step, role, told=rejected, harder=harder, context_tokens=context_tokens, max_tokens=max_tokens
        )
    spec = step.spec
    if step.is_turn:
        spec = turn_spec(task, step, registry, room_chars=int((context_tokens - max_tokens) * CHARS_PER_TOKEN))
    return compose(
        role=role,
        persona=_persona(task, step, registry),
        task=task.ir,
        lessons=task.plan.lessons if task.plan is not None else (),
        step=spec,
        inputs=[task.artefacts[name] for name in spec.inputs],
        told=rejected,
        failed={one.failure.code for one in step.attempts[:-1] if one.failure is not None},
        harder=harder,
        may_contradict=may_contradict(task, step, registry),
        context_tokens=context_tokens,
        max_tokens=max_tokens,
    )


def told_chars(step: StepRecord, role: str, model: str, registry: Registry) -> int:
    """Room in the prompt of a further attempt for what is said about the earlier ones."""
    context_tokens = registry.models[model].context_tokens
    return room_for(context_tokens, _max_tokens(step, registry.roles[role], context_tokens, 1), CHARS_PER_TOKEN)


def _persona(task: TaskRecord, step: StepRecord, registry: Registry) -> PersonaEntry | None:
    """The task's own before the registry's."""
    name = step.spec.persona
    if name is None:
        return None
    own = task.personas.get(name)
    return registry.personas.get(name) if own is None else persona_entry(own)


def _max_tokens(step: StepRecord, role: RoleEntry, context_tokens: int, factor: float) -> int:
    """Longest answer: what the step or the role says, so many times over; never more than half a context that was not
    asked for, and always less than the context."""
    asked = step.spec.max_tokens or role.max_tokens
    more = asked if factor == 1 else max(asked, min(int(asked * factor), context_tokens // 2))
    return min(more, max(1, context_tokens - 64))


def batch_item_request(batch: BatchRequest, prompt: str, key: str, registry: Registry) -> InferRequest:
    """What one prompt of a batch asks of the role's model; `key` is its call's, and gives the seed."""
    role = registry.roles[batch.role]
    longest = max(1, registry.models[role.model].context_tokens - 64)
    return InferRequest(
        role=batch.role,
        messages=[ChatMessage(role="system", content=role.prompt), ChatMessage(role="user", content=prompt)],
        max_tokens=min(batch.max_tokens or role.max_tokens, longest),
        sampling=Sampling(**_seeded(_fixed_parts(registry, batch.role).sampling, key)),
        json_schema=batch.json_schema,
        grammar=batch.grammar,
        early_abort=role.early_abort.limits(),
    )


class _FixedParts(NamedTuple):
    """What every request for a role says alike, as it goes on the wire; not to be changed."""

    sampling: dict[str, Any]
    early_abort: dict[str, Any] | None


@lru_cache(maxsize=256)
def _fixed_parts(registry: Registry, name: str) -> _FixedParts:
    """Made once: a registry has few roles, and they never change."""
    role = registry.roles[name]
    limits = role.early_abort.limits()
    return _FixedParts(
        role.sampling.model_dump(exclude_none=True), None if limits is None else limits.model_dump(exclude_none=True)
    )


def _seeded(sampling: dict[str, Any], key: str) -> dict[str, Any]:
    """A role's sampling; where it fixes no seed, one that follows from the key: a rerun asks the same."""
    return sampling if "seed" in sampling else sampling | {"seed": int(work_key(key, "seed")[:7], 16)}
