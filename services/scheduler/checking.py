"""What the gates service is asked: about an attempt of a step, or about the final artefacts of a task. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from protocol.codec import pack_body
from protocol.messages.artefact import Artefact
from protocol.messages.gate import GateRequest
from services.kit.registry import Registry
from services.scheduler.failures import Work
from services.scheduler.own_calls import Wanted
from services.scheduler.resources import gate_needs
from services.scheduler.tasks import Setbacks, StepRecord, TaskRecord

GATE: Final = "gate"


def step_checks(task: TaskRecord, step: StepRecord, registry: Registry) -> Wanted:
    """The gates of the newest attempt."""
    request = GateRequest(
        gates=step.spec.gates or [],
        artefacts=step.attempt.artefacts,
        context=[task.artefacts[name] for name in step.spec.inputs],
        json_schema=step.spec.json_schema,
        check_command=step.spec.check_command or task.ir.check_command,
        objective=task.ir.objective,
        criteria=task.ir.definition_of_done,
    )
    return _wanted(step_check_parts(step), request, registry)


def task_checks(task: TaskRecord, artefacts: Sequence[Artefact], registry: Registry) -> Wanted:
    """The gates of the task on its final artefacts."""
    request = GateRequest(
        gates=task.ir.gates,
        artefacts=list(artefacts),
        context=task.ir.inputs,
        check_command=task.ir.check_command,
        objective=task.ir.objective,
        criteria=task.ir.definition_of_done,
    )
    # Another version of the plan makes another result: the verdict on the earlier one says nothing about it.
    adopted = [one.version for one in task.versions if one.adopted_ms is not None]
    version = adopted[-1:] if adopted[-1:] > [1] else []
    return _wanted(("gates", *_again(task.setbacks, Work.CHECKS), *(f"v{one}" for one in version)), request, registry)


def step_check_parts(step: StepRecord) -> tuple[str | int, ...]:
    """What makes the key of the newest attempt's gate run, besides the task."""
    return "gates", step.spec.id, step.attempt.number, *_again(step.attempt.setbacks, Work.GATES)


def _again(setbacks: Setbacks, work: Work) -> tuple[int, ...]:
    """A run that could not judge is made again under a key of its own: for the same one gates say the same again.

    After the loss of a worker the key stays: the work may be under way, or done, at one that comes back.
    """
    times = setbacks.answered(work)
    return (times,) if times else ()


def _wanted(parts: tuple[str | int, ...], request: GateRequest, registry: Registry) -> Wanted:
    return Wanted("gate.request", GATE, parts, pack_body(request), gate_needs(registry, request.gates))
