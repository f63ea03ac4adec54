"""What a plan will cost before anything is run: schedule, makespan, critical path, bottleneck, tokens, memory.

The schedule comes from the real hub machine in virtual time, with the durations that this stack has learned, a given
speed, or the prior (`learned.py`). Gates and retries are not in it, nor other tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.messages.task import Plan, TaskIR
from protocol.plan_graph import needs
from services.ctl.learned import KnownDurations
from services.kit.plan_shape import levels_of, longest_chain, width_of
from services.kit.registry import Registry
from services.kit.registry.memory import memory_needs
from services.scheduler.ranks import job_of
from services.scheduler.simulation.outcome import spans_of
from services.scheduler.simulation.run import Run, run_tasks, tiers_of
from services.scheduler.simulation.tiers import WRITTEN

_ALMOST: Final = 1.001
"""A makespan within this factor of the critical path is as good as equal: milliseconds are rounded."""


@dataclass(frozen=True, slots=True)
class StepForecast:
    """One step as it would run."""

    id: str
    role: str
    model: str
    level: int
    """Steps on the longest chain before it."""
    needs: tuple[str, ...]
    max_tokens: int
    expected_s: float
    gates: tuple[str, ...]
    persona: str | None
    critical: bool


@dataclass(frozen=True, slots=True)
class ModelForecast:
    """One model entry that the plan uses."""

    name: str
    slots: int
    steps: int
    file_bytes: int | None
    """Size of its file, which its process needs in memory at least; None where the file is not there."""
    busy_s: float
    """Seconds of its steps, spread over its slots."""
    residency: str
    need_bytes: int
    """Memory of the loaded model: declared or estimated."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One step in the predicted schedule; seconds since the plan is adopted."""

    step: str
    model: str
    ready_s: float
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """A whole plan."""

    steps: tuple[StepForecast, ...]
    schedule: tuple[Scheduled, ...]
    """By model entry, then by start."""
    makespan_s: float
    """When the last step of that schedule ends."""
    bottleneck: str
    """What keeps the makespan from being shorter, in words."""
    failure: str | None
    """Why the task would fail although no step does anything wrong, such as a timeout; None = it would not."""
    models: tuple[ModelForecast, ...]
    width: int
    """Most steps on one level: as many could run side by side."""
    levels: int
    critical: tuple[str, ...]
    critical_s: float
    work_s: float
    bound_s: float
    """No schedule is faster: the critical path, or the busiest model's steps over its slots."""
    tokens: int
    """If each step needs one attempt."""
    most_tokens: int
    """With every retry that the failure table allows, within the task's budget."""


def forecast(task: TaskIR, plan: Plan, registry: Registry, durations: KnownDurations) -> Forecast:
    """Forecast a plan without problems, whose roles the registry has; raises SimulationError where it cannot run."""
    waits_for = needs(plan)
    limit = {step.id: step.max_tokens or registry.roles[step.actor].max_tokens for step in plan.steps}
    known = durations.fresh()
    given = {artefact.name: len(artefact.text()) for artefact in task.inputs}
    cost = {
        step.id: known.expected_s(
            job_of(task, step, registry.roles[step.actor], sum(given.get(name, len(WRITTEN)) for name in step.inputs))
        )
        for step in plan.steps
    }
    level = levels_of(waits_for)
    path, critical_s = longest_chain(waits_for, cost)
    steps = tuple(
        StepForecast(
            id=step.id,
            role=step.actor,
            model=registry.model_of(step.actor).name,
            level=level[step.id],
            needs=tuple(sorted(waits_for[step.id])),
            max_tokens=limit[step.id],
            expected_s=cost[step.id],
            gates=tuple(step.gates or ()),
            persona=step.persona,
            critical=step.id in path,
        )
        for step in plan.steps
    )
    models = tuple(_model(name, steps, registry) for name in registry.models if any(s.model == name for s in steps))
    tokens = sum(limit.values())
    alone = task.model_copy(update={"idempotency_key": None, "plan": plan})
    run = run_tasks([alone], registry, tiers_of(registry), durations.fresh(), durations.fresh())
    schedule = _schedule(run)
    makespan_s = max((one.end_s for one in schedule), default=0.0)
    failed = run.tasks[0].failure
    return Forecast(
        steps=steps,
        schedule=schedule,
        makespan_s=makespan_s,
        bottleneck=_bottleneck(schedule, models, critical_s, makespan_s),
        failure=None if failed is None else f"{failed.code}: {failed.message}",
        models=models,
        width=width_of(plan),
        levels=max(level.values()) + 1,
        critical=tuple(path),
        critical_s=critical_s,
        work_s=sum(cost.values()),
        bound_s=max([critical_s, *(model.busy_s for model in models)]),
        tokens=tokens,
        most_tokens=min(task.budget.max_tokens, tokens * (1 + registry.failures.caps.retries_per_step)),
    )


def _schedule(run: Run) -> tuple[Scheduled, ...]:
    made = (
        Scheduled(span.step, span.model, span.queued_ms / 1000, span.started_ms / 1000, span.ended_ms / 1000)
        for span in spans_of(run.tasks[0])
    )
    return tuple(sorted(made, key=lambda one: (one.model, one.start_s, one.step)))


def _bottleneck(
    schedule: tuple[Scheduled, ...], models: tuple[ModelForecast, ...], critical_s: float, makespan_s: float
) -> str:
    """The chain, if it takes (almost) all the time; else the model whose slots are waited for longest."""
    if makespan_s <= critical_s * _ALMOST:
        return "the critical path: more slots would not help, shorter steps on it would"
    waits = {model.name: 0.0 for model in models}
    for one in schedule:
        waits[one.model] += one.start_s - one.ready_s
    name = max(waits, key=lambda model: waits[model])
    slots = next(model.slots for model in models if model.name == name)
    return f"{name}: its steps wait {waits[name]:.1f} s in all for one of {slots} slots, or for the cores it needs"


def _model(name: str, steps: tuple[StepForecast, ...], registry: Registry) -> ModelForecast:
    entry = registry.models[name]
    mine = [step for step in steps if step.model == name]
    size = entry.path.stat().st_size if entry.path is not None and entry.path.is_file() else None
    if size is None and entry.declared is not None:
        size = entry.declared.file_bytes
    return ModelForecast(
        name,
        entry.slots,
        len(mine),
        size,
        sum(step.expected_s for step in mine) / entry.slots,
        entry.residency,
        memory_needs(registry.models)[name],
    )
