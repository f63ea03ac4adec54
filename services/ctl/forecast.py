"""What a plan will cost before anything is run: levels, width, critical path, tokens, memory of the models.

Pure. An upper estimate: every step is taken to write as many tokens as it may, at one stated speed for every slot;
reading prompts, queueing for gates and retries are not in it. Learned durations are the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Final

from protocol.messages.task import Plan, TaskIR
from protocol.plan_graph import needs
from services.kit.registry import Registry

TOKENS_PER_S: Final = 30.0
"""Generated tokens per second and slot where --tokens-per-s says nothing: a 135M model on a shared core. A prior, not
a measurement; `tierline status` shows what this machine reaches."""


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


@dataclass(frozen=True, slots=True)
class Forecast:
    """A whole plan."""

    steps: tuple[StepForecast, ...]
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


def forecast(task: TaskIR, plan: Plan, registry: Registry, tokens_per_s: float) -> Forecast:
    """Forecast a plan without problems, whose roles the registry has."""
    waits_for = needs(plan)
    order = list(TopologicalSorter(waits_for).static_order())
    limit = {step.id: step.max_tokens or registry.roles[step.actor].max_tokens for step in plan.steps}
    cost = {step: tokens / tokens_per_s for step, tokens in limit.items()}
    level: dict[str, int] = {}
    finish: dict[str, float] = {}
    for step in order:
        level[step] = max((level[other] + 1 for other in waits_for[step]), default=0)
        finish[step] = cost[step] + max((finish[other] for other in waits_for[step]), default=0.0)
    path = _critical_path(waits_for, finish)
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
    critical_s, tokens = max(finish.values()), sum(limit.values())
    return Forecast(
        steps=steps,
        models=models,
        width=max(list(level.values()).count(number) for number in set(level.values())),
        levels=max(level.values()) + 1,
        critical=tuple(path),
        critical_s=critical_s,
        work_s=sum(cost.values()),
        bound_s=max([critical_s, *(model.busy_s for model in models)]),
        tokens=tokens,
        most_tokens=min(task.budget.max_tokens, tokens * (1 + registry.failures.caps.retries_per_step)),
    )


def _critical_path(waits_for: Mapping[str, frozenset[str]], finish: Mapping[str, float]) -> list[str]:
    """The chain that ends last, first step first; among equals the smaller id, so that every run says the same."""
    at: str | None = min(finish, key=lambda step: (-finish[step], step))
    path: list[str] = []
    while at is not None:
        path.append(at)
        at = min(waits_for[at], key=lambda step: (-finish[step], step), default=None)
    return path[::-1]


def _model(name: str, steps: tuple[StepForecast, ...], registry: Registry) -> ModelForecast:
    entry = registry.models[name]
    mine = [step for step in steps if step.model == name]
    size = entry.path.stat().st_size if entry.path is not None and entry.path.is_file() else None
    return ModelForecast(name, entry.slots, len(mine), size, sum(step.expected_s for step in mine) / entry.slots)
