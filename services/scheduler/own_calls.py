"""The hub's own calls: what a step or a task asks of the services, with key, class, rank, tokens and bounds."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages.task import Priority
from services.kit.identity import work_key
from services.kit.registry import Registry
from services.scheduler.calls import Call
from services.scheduler.ranks import Ranking
from services.scheduler.resources import NOTHING, Needs, inference_needs
from services.scheduler.tasks import StepRecord, TaskRecord


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a service other than inference. `parts` and the task make the key."""

    kind: str
    target: str
    parts: tuple[str | int, ...]
    body: bytes | None
    """None = composed when it starts."""
    needs: Needs = NOTHING
    timeout_ms: int = 600_000


def inference_call(
    task: TaskRecord, step: StepRecord, registry: Registry, ranking: Ranking, at_ms: int, hold_until_ms: int
) -> Call:
    """The newest attempt of a step; its body is composed when it starts."""
    attempt = step.attempt
    timeout_s = step.spec.timeout_s or registry.roles[attempt.role].timeout_s
    if attempt.arm == "harder":
        timeout_s *= registry.failures.caps.think_harder_factor
    target = f"infer.{attempt.model}"
    return Call(
        key=attempt.key,
        kind="infer.request",
        target=target,
        queued_ms=at_ms,
        interactive=task.ir.priority is Priority.INTERACTIVE,
        client=task.client,
        rank_s=ranking.rank_s(task, step, at_ms),
        needs=inference_needs(registry, target),
        outer_ms=task.deadline_ms,
        timeout_ms=int(timeout_s * 1000),
        task=task.id,
        step=step.spec.id,
        attempt=attempt.number,
        retry_lost=True,
        hold_until_ms=hold_until_ms,
    )


def service_call(
    task: TaskRecord, step: StepRecord | None, wanted: Wanted, rank_s: float, at_ms: int, hold_until_ms: int
) -> Call:
    """A plan, a gate run, or what memory is told; about one step or about the whole task."""
    return Call(
        key=work_key(task.id, *wanted.parts),
        kind=wanted.kind,
        target=wanted.target,
        queued_ms=at_ms,
        interactive=task.ir.priority is Priority.INTERACTIVE,
        client=task.client,
        rank_s=rank_s,
        needs=wanted.needs,
        body=wanted.body,
        outer_ms=None if task.state.final else task.deadline_ms,
        timeout_ms=wanted.timeout_ms,
        task=task.id,
        step=None if step is None else step.spec.id,
        attempt=None if step is None else step.attempt.number,
        retry_lost=True,
        hold_until_ms=hold_until_ms,
    )
