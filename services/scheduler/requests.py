"""The inference request of one attempt, or of one prompt of a batch: limits, prompt, what constrains decoding.

Composed when the call starts, not when it is queued: a thousand waiting steps hold no prompts in memory.
"""

from __future__ import annotations

from functools import cache

from protocol.messages.artefact import ArtefactKind
from protocol.messages.batch import BatchRequest
from protocol.messages.infer import AbortLimits, ChatMessage, InferRequest, Sampling
from services.kit.identity import work_key
from services.kit.registry import Registry, RoleEntry
from services.scheduler.answers import schema_of_parts
from services.scheduler.prompting import compose
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.verdicts import earlier_findings


def infer_request(task: TaskRecord, step: StepRecord, registry: Registry, *, stream: bool) -> InferRequest:
    """What the newest attempt of `step` asks of its model. Its seed follows from its key: a rerun asks the same."""
    attempt = step.attempt
    role = registry.roles[attempt.role]
    model = registry.models[attempt.model]
    max_tokens = min(step.spec.max_tokens or role.max_tokens, max(1, model.context_tokens - 64))
    left = max(1, task.ir.budget.max_tokens - task.generated_tokens)
    schema = step.spec.json_schema
    if schema is None and len(step.spec.outputs) > 1:
        schema = schema_of_parts(step.spec.outputs)
    if schema is None and attempt.constrained and step.spec.outputs[0].kind is ArtefactKind.JSON:
        schema = {"type": "object"}
    return InferRequest(
        role=attempt.role,
        messages=compose(
            role=role,
            persona=registry.personas.get(step.spec.persona or ""),
            task=task.ir,
            step=step.spec,
            inputs=[task.artefacts[name] for name in step.spec.inputs],
            findings=earlier_findings(step),
            attempt=attempt.number,
            context_tokens=model.context_tokens,
            max_tokens=max_tokens,
        ),
        max_tokens=min(max_tokens, left),
        sampling=_seeded(role, attempt.key),
        json_schema=schema,
        grammar=step.spec.grammar,
        json_output=len(step.spec.outputs) == 1 and step.spec.outputs[0].kind is ArtefactKind.JSON,
        early_abort=_early_abort(role),
        stream=stream,
    )


def batch_item_request(batch: BatchRequest, prompt: str, key: str, registry: Registry) -> InferRequest:
    """What one prompt of a batch asks of the role's model; `key` is its call's, and gives the seed."""
    role = registry.roles[batch.role]
    longest = max(1, registry.models[role.model].context_tokens - 64)
    return InferRequest(
        role=batch.role,
        messages=[ChatMessage(role="system", content=role.prompt), ChatMessage(role="user", content=prompt)],
        max_tokens=min(batch.max_tokens or role.max_tokens, longest),
        sampling=_seeded(role, key),
        json_schema=batch.json_schema,
        grammar=batch.grammar,
        early_abort=_early_abort(role),
    )


def _seeded(role: RoleEntry, key: str) -> Sampling:
    """The role's sampling; where it fixes no seed, one that follows from the key: a rerun asks the same."""
    sampling = role.sampling.model_dump(exclude_none=True)
    sampling.setdefault("seed", int(work_key(key, "seed")[:7], 16))
    return Sampling(**sampling)


@cache
def _early_abort(role: RoleEntry) -> AbortLimits | None:
    """The role's limits, made once: a registry has few roles, and they never change."""
    return role.early_abort.limits()
