"""The graph inside a plan: who produces what, who waits for whom, and every reason why it could not run.

Pure functions over a TaskIR, used by the hub on submit, by the planner on its own and on models' plans, and by
the command-line tool before it sends anything. Which control dependencies are worth keeping is the planner's
business; here they all count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from protocol.messages.artefact import ArtefactKind
from protocol.messages.task import Plan, Step, TaskIR

MAX_SPAWNING_NAME: Final = 32
"""Letters of the id of a spawning step: `.`, the name of a sub-agent and the number of its assignment must fit in."""
MAX_MAPPED_NAME: Final = 48
"""Letters of the id and the output of a mapped step: `.item.1000` must fit behind it."""


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """One reason why a plan cannot run."""

    step: str | None
    field: str
    message: str

    def __str__(self) -> str:
        """`plan.steps[S3].inputs: …`, the way errors name it."""
        if self.step is not None:
            return f"plan.steps[{self.step}].{self.field}: {self.message}"
        return f"plan.steps: {self.message}" if self.field == "steps" else f"{self.field}: {self.message}"

    def place(self, plan: Plan | None) -> tuple[str | int, ...]:
        """Keys and list positions from the top of a TaskIR with this plan to the field."""
        steps = plan.steps if plan is not None else []
        position = next((index for index, step in enumerate(steps) if step.id == self.step), None)
        if position is not None:
            return ("plan", "steps", position, *self.field.split("."))
        return ("plan", "steps") if self.field in ("steps", "depends_on") else tuple(self.field.split("."))


def reads(step: Step) -> list[str]:
    """Artefacts whose content goes into a step: its inputs, and the list it is mapped over."""
    return step.inputs if step.map_over is None else [*step.inputs, step.map_over]


def producers(plan: Plan) -> dict[str, str]:
    """Artefact name -> id of the step that makes it; the first one where two claim it."""
    made: dict[str, str] = {}
    for step in plan.steps:
        for output in step.outputs:
            made.setdefault(output.name, step.id)
    return made


def needs(plan: Plan) -> Mapping[str, frozenset[str]]:
    """Step id -> ids of the steps it waits for, through data or control, itself never included.

    The answer for the newest plan is kept: whoever takes one up checks it, predicts it and adopts it in a row.
    """
    newest = _newest[0]
    if newest is not None and newest[0] is plan:
        return newest[1]
    made = producers(plan)
    waits_for = {
        step.id: frozenset([made[name] for name in reads(step) if name in made] + list(step.depends_on)) - {step.id}
        for step in plan.steps
    }
    _newest[0] = plan, waits_for
    return waits_for


_newest: Final[list[tuple[Plan, Mapping[str, frozenset[str]]] | None]] = [None]
"""Of `needs`: a plan is frozen, so that the same object has the same graph."""


def final_artefacts(plan: Plan) -> list[str]:
    """Outputs that no step consumes, in the order of the plan."""
    consumed = {name for step in plan.steps for name in reads(step)}
    return [output.name for step in plan.steps for output in step.outputs if output.name not in consumed]


def find_problems(task: TaskIR) -> list[PlanProblem]:
    """Every reason why this task cannot run; without a plan, only its inputs can be wrong."""
    found: list[PlanProblem] = []
    given = {artefact.name for artefact in task.inputs}
    if len(given) < len(task.inputs):
        names = [artefact.name for artefact in task.inputs]
        twice = sorted({name for name in names if names.count(name) > 1})
        found.append(PlanProblem(None, "inputs", f"input artefacts named twice: {', '.join(twice)}"))
    if task.plan is None:
        return found
    steps = task.plan.steps
    if len(steps) > task.budget.max_steps:
        over = steps[task.budget.max_steps].id
        message = f"{len(steps)} steps, but budget.max_steps is {task.budget.max_steps} (first step over it: {over})"
        return [*found, PlanProblem(None, "steps", message)]
    ids: set[str] = set()
    made: dict[str, str] = {}
    kinds = {artefact.name: artefact.kind for artefact in task.inputs}
    kinds.update({output.name: output.kind for step in steps for output in step.outputs})
    for step in steps:
        if step.id in ids:
            found.append(PlanProblem(step.id, "id", f"the id {step.id!r} is used by two steps"))
        ids.add(step.id)
        for output in step.outputs:
            if output.name in given:
                found.append(PlanProblem(step.id, "outputs", f"{output.name!r} is already an input of the task"))
            elif output.name in made:
                found.append(
                    PlanProblem(step.id, "outputs", f"{output.name!r} is already made by step {made[output.name]}")
                )
            made.setdefault(output.name, step.id)
    for step in steps:
        for name in reads(step):
            field = "map_over" if name == step.map_over and name not in step.inputs else "inputs"
            if name not in made and name not in given:
                found.append(PlanProblem(step.id, field, f"no step makes {name!r} and the task has no such input"))
            elif made.get(name) == step.id:
                found.append(PlanProblem(step.id, field, f"{name!r} is an output of this very step"))
        if step.map_over is not None:
            found.extend(_map_problems(step, kinds, ids))
        if step.spawns is not None:
            found.extend(_spawn_problems(step, ids))
        for other in step.depends_on:
            if other not in ids:
                found.append(PlanProblem(step.id, "depends_on", f"there is no step {other!r}"))
            elif other == step.id:
                found.append(PlanProblem(step.id, "depends_on", "a step cannot wait for itself"))
        if step.json_schema is not None and [output.kind.value for output in step.outputs] != ["json"]:
            found.append(PlanProblem(step.id, "json_schema", "needs exactly one output, of kind json"))
        if step.json_schema is not None and step.grammar is not None:
            found.append(PlanProblem(step.id, "grammar", "json_schema and grammar exclude each other"))
    if not found and (cycle := find_cycle(needs(task.plan))):
        path = " -> ".join([*cycle, cycle[0]])
        found.append(PlanProblem(cycle[0], "depends_on", f"the steps wait for each other: {path}"))
    return found


def _map_problems(step: Step, kinds: Mapping[str, ArtefactKind], ids: set[str]) -> list[PlanProblem]:
    found = []
    if kinds.get(step.map_over or "", ArtefactKind.JSON) is not ArtefactKind.JSON:
        found.append(PlanProblem(step.id, "map_over", f"{step.map_over!r} must be of kind json: it holds the list"))
    if len(step.outputs) != 1 or step.outputs[0].kind is ArtefactKind.CODE:
        found.append(PlanProblem(step.id, "outputs", "a mapped step has one output, of kind text or json"))
    if len(step.id) > MAX_MAPPED_NAME or any(len(output.name) > MAX_MAPPED_NAME for output in step.outputs):
        found.append(
            PlanProblem(step.id, "id", f"ids and outputs of mapped steps have {MAX_MAPPED_NAME} letters at most")
        )
    taken = sorted(other for other in ids if other.startswith(f"{step.id}."))
    if taken:
        found.append(PlanProblem(step.id, "id", f"its sub-steps are named {step.id}.1 and so on: rename {taken[0]!r}"))
    return found


def _spawn_problems(step: Step, ids: set[str]) -> list[PlanProblem]:
    found = [
        PlanProblem(step.id, field, f"a step that spawns sub-agents has no {field}")
        for field in ("map_over", "grammar")
        if getattr(step, field) is not None
    ]
    if len(step.outputs) != 1:
        found.append(PlanProblem(step.id, "outputs", "a step that spawns sub-agents has one output"))
    if len(step.id) > MAX_SPAWNING_NAME:
        found.append(PlanProblem(step.id, "id", f"the id of a spawning step has {MAX_SPAWNING_NAME} letters at most"))
    taken = sorted(other for other in ids if other.startswith(f"{step.id}."))
    if taken:
        found.append(PlanProblem(step.id, "id", f"its turns are named {step.id}.turn1 and so on: rename {taken[0]!r}"))
    return found


def find_cycle(waits_for: Mapping[str, frozenset[str]]) -> list[str]:
    """Ids along one cycle, in waiting order; empty where there is none. Iterative: plans may be thousands deep."""
    done: set[str] = set()
    for step, others in waits_for.items():
        if not done.issuperset(others):
            break
        done.add(step)
    else:
        return []  # written in an order in which they can run, as nearly every plan is
    done.clear()
    for start in waits_for:
        if start in done:
            continue
        path: list[str] = [start]
        on_path = {start}
        todo = [sorted(waits_for[start])]
        while path:
            if not todo[-1]:
                done.add(path[-1])
                on_path.discard(path.pop())
                todo.pop()
                continue
            step = todo[-1].pop()
            if step in on_path:
                return path[path.index(step) :]
            if step not in done and step in waits_for:
                path.append(step)
                on_path.add(step)
                todo.append(sorted(waits_for[step]))
    return []
