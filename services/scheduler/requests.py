"""The inference request of one attempt: which limits apply, what constrains decoding, which prompt.

Composed when the call starts, not when it is queued: a thousand waiting steps hold no prompts in memory.
"""

from __future__ import annotations

from typing import Any

from protocol.messages.artefact import ArtefactKind
from services.kit.identity import work_key
from services.kit.registry import Registry
from services.scheduler.answers import schema_of_parts
from services.scheduler.prompting import compose
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.verdicts import earlier_findings


def infer_request(task: TaskRecord, step: StepRecord, registry: Registry, *, stream: bool) -> dict[str, Any]:
    """What the newest attempt of `step` asks of its model. Its seed follows from its key: a rerun asks the same.

    The body of an `infer.request` as the map that goes on the wire: every part was checked where it came in, and this
    is made for each step while its worker waits. As a pydantic message it took three times as long.
    """
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
    if "seed" not in sampling:
        sampling["seed"] = int(work_key(attempt.key, "seed")[:7], 16)
    body = {
        "role": attempt.role,
        "messages": compose(
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
        "max_tokens": min(max_tokens, left),
        "sampling": sampling,
        "stream": stream,
    }
    if schema is not None:
        body["json_schema"] = schema
    if step.spec.grammar is not None:
        body["grammar"] = step.spec.grammar
    return body
