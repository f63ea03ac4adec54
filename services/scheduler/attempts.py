"""The facts about one attempt of a step: that it waits, what it answered, how it failed. Pure.

Decides nothing: `engine.py` says when, `failures.py` what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.messages.artefact import Artefact
from protocol.messages.failure import Failure
from protocol.messages.infer import InferFinal
from services.kit.identity import work_key
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.failures import Action
from services.scheduler.requests import told_chars
from services.scheduler.tasks import StepRecord, TaskRecord


def queued(task: TaskRecord, step: StepRecord, registry: Registry, action: Action, at_ms: int) -> f.AttemptQueued:
    """The next attempt of a step, as the failure table or the plan asks for it. Its key follows from its inputs."""
    number = len(step.attempts) + 1
    inputs = [(name, task.artefacts[name].text()) for name in step.spec.inputs]
    model = registry.roles[action.role].model
    return f.AttemptQueued(
        task=task.id,
        at_ms=at_ms,
        step=step.spec.id,
        number=number,
        role=action.role,
        model=model,
        key=work_key(task.id, step.spec.id, number, action.role, step.spec.action, inputs),
        constrained=action.constrained,
        arm=action.arm,
        told_chars=told_chars(step, action.role, model, registry) if step.attempts else None,
    )


def answered(
    task: TaskRecord, step: StepRecord, final: InferFinal, made: Sequence[Artefact], at_ms: int
) -> f.AttemptAnswered:
    """The newest attempt has its answer."""
    return f.AttemptAnswered(
        task=task.id,
        at_ms=at_ms,
        step=step.spec.id,
        number=step.attempt.number,
        artefacts=[f.Dumped(artefact) for artefact in made],
        prompt_tokens=final.prompt_tokens,
        cached_tokens=final.cached_tokens,
        generated_tokens=final.generated_tokens,
        first_token_ms=final.first_token_ms,
        repaired=final.repaired or None,
        draft_tokens=final.draft_tokens,
        accepted_tokens=final.accepted_tokens,
        generate_ms=final.generate_ms,
    )


def failed(
    task: TaskRecord, step: StepRecord, failure: Failure, action: Action, at_ms: int, generated_tokens: int
) -> f.AttemptFailed:
    """The newest attempt has failed, and what follows."""
    return f.AttemptFailed(
        task=task.id,
        at_ms=at_ms,
        step=step.spec.id,
        number=step.attempt.number,
        failure=failure.model_dump(mode="json", exclude_none=True),
        action=action.kind,
        rule=action.rule,
        generated_tokens=generated_tokens,
    )


def moved(task: TaskRecord, step: StepRecord, model: str, reason: str, at_ms: int) -> f.AttemptMoved:
    """The newest attempt waits for another model from now on."""
    number = step.attempt.number
    return f.AttemptMoved(task=task.id, at_ms=at_ms, step=step.spec.id, number=number, model=model, reason=reason[:500])
