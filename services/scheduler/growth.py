"""How a graph grows while it runs: mapped steps, and steps that are added. Pure checks and values, no state.

A step with `map_over` becomes one sub-step per item of the list, and is itself the join: it is done, once, when all of
them are. Budgets are enforced here, before anything is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import ValidationError

from protocol.codec import describe
from protocol.errors import BadFrame, CallFailed
from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.failure import Category, Failure
from protocol.messages.result import StepState, TaskState
from protocol.messages.task import Plan, Step
from services.kit.plan_check import plan_problems
from services.kit.registry import Registry, with_own
from services.scheduler.swarm_ending import stand_in
from services.scheduler.tasks import StepRecord, TaskRecord

MAX_ITEMS: Final = 1_000
"""Sub-steps of one mapped step."""
NOT_A_LIST: Final = "map.not_a_list"


def items_of(task: TaskRecord, step: StepRecord) -> list[Artefact]:
    """The input artefact of every sub-step. Raises CallFailed for what is no list (LOGIC: the plan is wrong about it)
    or too long a one (POLICY).
    """
    source = step.spec.map_over or ""
    value = task.artefacts[source].value
    if not isinstance(value, list):
        kind = type(value).__name__
        message = f"{source!r} holds a {kind}; step {step.spec.id} is mapped over a list"
        raise CallFailed(Failure(code=NOT_A_LIST, category=Category.LOGIC, origin="scheduler", message=message))
    room = min(MAX_ITEMS, task.ir.budget.max_steps - len(task.steps))
    if len(value) > room:
        why = f"{source!r} has {len(value)} items, and step {step.spec.id} may have {room} sub-steps"
        raise _refuse("budget.steps", f"{why} (budget.max_steps {task.ir.budget.max_steps}, at most {MAX_ITEMS})")
    return [_item(f"{step.spec.id}.item.{number}", item) for number, item in enumerate(value, 1)]


def join_of(task: TaskRecord, step: StepRecord, count: int) -> Artefact:
    """What the sub-steps made together, in the order of the items. Raises CallFailed (POLICY) if it is too large.

    Of a spawning step: what its last turn has answered, or what stands for that.
    """
    output = step.spec.outputs[0]
    if step.spec.spawns is not None:
        answer = task.artefacts.get(output.name) or stand_in(task, step)
        if answer is None:
            raise _refuse("turn.no_answer", f"the turns of step {step.spec.id} have brought no answer")
        return answer
    made = [task.artefacts[f"{output.name}.{number}"] for number in range(1, count + 1)]
    if output.kind is ArtefactKind.JSON:
        value: Any = [artefact.value for artefact in made]
    else:
        value = "\n\n".join(artefact.text() for artefact in made)
    if sum(len(artefact.text()) for artefact in made) > MAX_ARTEFACT_CHARS // 2:
        raise _refuse("map.too_large", f"the joined {output.name!r} of step {step.spec.id} is larger than an artefact")
    return Artefact(name=output.name, kind=output.kind, value=value, content_type=output.content_type)


def reach_of(task: TaskRecord, step_id: str) -> list[str]:
    """A step and every unfinished step that cannot be without it: what needs it, and the sub-steps it is mapped to.

    Whoever gave a sub-agent its assignment can be without it: it is told that there will be no result.
    """
    if task.steps[step_id].agent is not None:
        return [step_id]
    todo, reached = [step_id], {step_id}
    while todo:
        record = task.steps[todo.pop()]
        below = [other for other in record.needs if other.startswith(f"{record.spec.id}.")]
        for other in (*task.dependents[record.spec.id], *below):
            if other not in reached and not task.steps[other].state.final:
                reached.add(other)
                todo.append(other)
    return sorted(reached)


def checked_extension(task: TaskRecord, steps: Sequence[dict[str, Any]], registry: Registry) -> list[Step]:
    """Steps that may be added to this running task. Raises BadFrame naming step and field of every problem."""
    if task.state is not TaskState.RUNNING or task.ir.plan is None:
        raise BadFrame("task.not_running", f"task {task.id} is {task.state.value}: steps can be added while it runs")
    try:
        added = [_as_planned(Step.model_validate(step), task.ir.plan) for step in steps]
    except ValidationError as err:
        raise BadFrame("task.invalid", f"the steps are not valid: {describe(err)}") from err
    room = task.ir.budget.max_steps - len(task.steps)
    if len(added) > room:
        raise BadFrame("budget.steps", f"{len(added)} steps, but budget.max_steps leaves room for {room}")
    taken = [step.id for step in added if step.id in task.steps]
    if taken:
        raise BadFrame("task.invalid", f"plan.steps[{taken[0]}].id: the task has such a step already")
    plan = task.ir.plan.model_copy(update={"steps": [*task.ir.plan.steps, *added]})
    grown, known = task.ir.model_copy(update={"plan": plan}), with_own(registry, task.personas.values())
    problems = [str(problem) for problem in plan_problems(grown, known)]
    lost = {StepState.FAILED, StepState.CANCELLED, StepState.SKIPPED}
    gone = {name for name, record in task.steps.items() if record.state in lost}
    made = {output.name: step.id for step in task.ir.plan.steps for output in step.outputs}
    for step in added:
        needed = {made.get(name) for name in step.inputs} | set(step.depends_on)
        problems += [f"plan.steps[{step.id}]: step {other} was dropped" for other in sorted(gone & needed)]
    if problems:
        raise BadFrame("task.invalid", f"the steps cannot run: {'; '.join(problems[:10])}")
    return added


def _as_planned(step: Step, plan: Plan) -> Step:
    """What a plan says for all its steps counts for an added one too."""
    return step if step.persona is not None else step.model_copy(update={"persona": plan.persona})


def _item(name: str, value: Any) -> Artefact:
    kind = ArtefactKind.TEXT if isinstance(value, str) else ArtefactKind.JSON
    return Artefact(name=name, kind=kind, value=value)


def _refuse(code: str, message: str) -> CallFailed:
    return CallFailed(Failure(code=code, category=Category.POLICY, origin="scheduler", message=message))
