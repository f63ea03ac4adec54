"""The inference request of one attempt: which limits apply, what constrains decoding, which prompt.

Composed when the call starts, not when it is queued: a thousand waiting steps hold no prompts in memory.
"""

from __future__ import annotations

from protocol.messages.artefact import ArtefactKind
from protocol.messages.infer import InferRequest, Sampling
from services.kit.identity import work_key
from services.kit.registry import Registry
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
    sampling = role.sampling.model_dump(exclude_none=True)
    sampling.setdefault("seed", int(work_key(attempt.key, "seed")[:7], 16))
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
        sampling=Sampling(**sampling),
        json_schema=schema,
        grammar=step.spec.grammar,
        stream=stream,
    )
