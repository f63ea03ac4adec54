"""The rest of a running plan, made anew by rule: what stays, what is done in place of what failed.

For every trigger a template that always gives a valid rest: what is finished or runs stays as it is and may be read;
of the open steps those stay whose inputs will still be made.

    failed        somebody works out why the step could not be done, then it is done again with that in hand and under
                  its old outputs, so that everything behind it stays. For the final checks: a repair of the result
    contradicted  a list where a step is mapped over something that is none, then the step as before; where a worker
                  has said that the plan cannot go on, one step that fulfils the objective from what there is
    late          one step in place of all that is open, as short as the time asks for

What happened is an artefact that steps read as material, never text in an action: models and tools wrote it. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.plan import Revision
from protocol.messages.task import Output, Plan, Step, TaskIR
from protocol.plan_graph import producers, reads
from services.kit.registry import RoleEntry
from services.planner.cast import Work, cast
from services.planner.naming import Names
from services.planner.rules import RulePlan, for_orientation, quoted, result_name

_MIN_TOKENS: Final = 32
_TIME_SHARE: Final = 0.6
"""Of the time that is left, so much may be spent on the step that replaces the rest."""
_MAX_READ: Final = 24
_LIST_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "minItems": 1,
    "maxItems": 32,
    "items": {"type": "string", "minLength": 1, "maxLength": 400},
}


@dataclass(frozen=True, slots=True)
class Rest:
    """A plan in the middle of its life, as its revision sees it."""

    task: TaskIR
    revision: Revision
    roles: Mapping[str, RoleEntry]

    @property
    def steps(self) -> dict[str, Step]:
        """The plan as it stands, by id."""
        return {} if self.task.plan is None else {step.id: step for step in self.task.plan.steps}

    @property
    def open(self) -> list[Step]:
        """Steps that may be dropped, in the order of the plan."""
        wanted = set(self.revision.open)
        return [step for name, step in self.steps.items() if name in wanted]

    @property
    def staying(self) -> list[Step]:
        """Steps that are finished or run, or are none of this revision's business."""
        gone = {*self.revision.open, self.revision.failed}
        return [step for name, step in self.steps.items() if name not in gone]

    @property
    def notes(self) -> list[str]:
        """The artefact that tells what happened, if there is one."""
        return [] if self.revision.notes is None else [self.revision.notes]

    def step_id(self, number: int) -> str:
        """Id of the n-th new step; no step of the plan has it."""
        prefix = f"V{self.revision.version}"
        while any(name.startswith(f"{prefix}S") for name in self.steps):
            prefix += "_"
        return f"{prefix}S{number}"

    def names(self) -> Names:
        """What is taken: inputs, finished artefacts, and what the steps that stay will make."""
        staying = [output for step in (*self.staying, *self.open) for output in step.outputs]
        taken = [*self.task.inputs, *(_bare(one) for one in self.revision.finished), *(_bare(one) for one in staying)]
        return Names(taken)

    def unread(self, kept: Sequence[Step] = ()) -> list[str]:
        """Artefacts that a step may read and that nobody among those who stay does, oldest first."""
        made = [output.name for step in (*self.staying, *kept) for output in step.outputs]
        there = [one.name for one in self.revision.finished]
        inputs = [artefact.name for artefact in self.task.inputs]
        read = {name for step in (*self.staying, *kept) for name in reads(step)}
        lost = set(self.notes) | {output.name for step in self.open for output in step.outputs}
        # Sub-steps of what is dropped may have left results and items; items are in the list they came from.
        names = [name for name in dict.fromkeys([*inputs, *there, *made]) if name not in read and name not in lost]
        return [name for name in names if ".item." not in name and not _is_note(name)]


def rest_by_rules(task: TaskIR, revision: Revision, roles: Mapping[str, RoleEntry]) -> RulePlan:
    """The rest of the plan: new steps, and those of the open ones that stay."""
    rest = Rest(task, revision, roles)
    failed = rest.steps.get(revision.failed or "")
    if revision.trigger == "late":
        return _shortened(rest)
    if failed is None:
        return _repaired_result(rest) if revision.failed is None else _from_what_there_is(rest, None)
    if revision.trigger == "failed":
        return _done_again(rest, failed)
    if failed.map_over is not None:
        return _with_a_list(rest, failed)
    return _from_what_there_is(rest, failed)


def rest_as_task(task: TaskIR, revision: Revision) -> TaskIR:
    """The rest as a task of its own, for a model to plan: what is finished is an input, what happened its context."""
    taken = {artefact.name for artefact in task.inputs}
    rest = Rest(task, revision, {})
    made = [one for one in revision.finished if one.name not in taken and one.name in rest.unread()]
    why = "" if revision.failure is None else f"An earlier plan did not work out: {revision.failure.message}"
    context = quoted("\n".join(part for part in (why, task.context) if part), 4_000)
    inputs = [*task.inputs, *(_bare(one) for one in made)][:256]
    return task.model_copy(update={"plan": None, "inputs": inputs, "context": context})


def renumbered(task: TaskIR, revision: Revision, plan: Plan) -> Plan:
    """A plan of the rest with ids and outputs that no step of the task has."""
    rest = Rest(task, revision, {})
    names = rest.names()
    instead: dict[str, str] = {}
    for step in plan.steps:
        for output in step.outputs:
            instead[output.name] = names.new(output.name, output.kind, output.content_type).name
    return Plan(
        steps=[
            step.model_copy(
                update={
                    "id": rest.step_id(number),
                    "inputs": [instead.get(name, name) for name in step.inputs],
                    "outputs": [one.model_copy(update={"name": instead[one.name]}) for one in step.outputs],
                }
            )
            for number, step in enumerate(plan.steps, 1)
        ]
    )


def whole(task: TaskIR, revision: Revision, plan: Plan) -> TaskIR:
    """The task with the plan as it will be: for looking for problems in it."""
    new = {step.id for step in plan.steps}
    steps = [*(step for step in Rest(task, revision, {}).staying if step.id not in new), *plan.steps]
    made = {output.name for step in steps for output in step.outputs} | {artefact.name for artefact in task.inputs}
    finished = [_bare(one) for one in revision.finished if one.name not in made]
    return task.model_copy(update={"plan": Plan(steps=steps), "inputs": [*task.inputs, *finished]})


def _done_again(rest: Rest, failed: Step) -> RulePlan:
    casting = cast(Work.REVIEW, rest.roles)
    approach = rest.names().new("approach")
    parts = [one.name for one in rest.revision.finished if _made_for(one.name, failed)]
    inputs = [*(name for name in reads(failed)), *parts]
    action = (
        "A step of a plan could not be done; the notes say what was wrong with every attempt. Work out why, and say in "
        f"a few sentences how to do it right. Do not do it.\nThe step: {quoted(failed.action)}"
    )
    why = Step(
        id=rest.step_id(1),
        actor=casting.role,
        action=action,
        inputs=[*inputs, *rest.notes],
        outputs=[approach],
        gates=[],
    )
    doing = "Follow the approach that is given.\n" if failed.map_over is None else _AT_ONCE
    again = failed.model_copy(
        update={
            "id": rest.step_id(2),
            "action": quoted(f"{doing}{failed.action}", 60_000),
            "inputs": list(dict.fromkeys([*inputs, approach.name])),
            "map_over": None,
            "depends_on": [],
            "ordered": False,
        }
    )
    because = f"{failed.id} could not be done, so somebody works out how before it is done again"
    return _as_rule_plan("failed", [why, again], rest.open, because, casting.note)


_AT_ONCE: Final = (
    "Do for every item of the list at once what is asked; some items are done already. Follow the approach given.\n"
)


def _repaired_result(rest: Rest) -> RulePlan:
    made = producers(rest.task.plan) if rest.task.plan is not None else {}
    finals = [name for name in rest.unread() if name in made]
    steps = rest.steps
    last = steps[made[finals[-1]]] if finals else None
    wish = last.outputs[0] if last is not None else Output(name=result_name(rest.task))
    casting = cast(Work.JOIN, rest.roles)
    step = Step(
        id=rest.step_id(1),
        actor=casting.role if last is None else last.actor,
        action="Put right in the result what the notes say is wrong with it, keep the rest, and return the whole."
        + for_orientation(rest.task),
        inputs=[*finals[-_MAX_READ:], *rest.notes],
        outputs=[rest.names().new(wish.name, wish.kind, wish.content_type)],
        gates=None if last is None else last.gates,
        json_schema=None if last is None or len(last.outputs) > 1 else last.json_schema,
    )
    return _as_rule_plan("failed", [step], rest.open, "the final checks failed, so the result is repaired", None)


def _with_a_list(rest: Rest, failed: Step) -> RulePlan:
    casting = cast(Work.EXTRACT, rest.roles)
    source = failed.map_over or ""
    listed = rest.names().new(f"{source}_list", ArtefactKind.JSON)
    step = Step(
        id=rest.step_id(1),
        actor=casting.role,
        action=f"Make a JSON list of the parts of {source}, each a short text of its own. Add nothing.",
        inputs=[source],
        outputs=[listed],
        json_schema=_LIST_SCHEMA,
        gates=[],
    )
    again = failed.model_copy(
        update={"id": rest.step_id(2), "map_over": listed.name, "depends_on": [], "ordered": False}
    )
    because = f"{failed.id} needs a list and {source} holds none, so one is made of it"
    return _as_rule_plan("contradicted", [step, again], rest.open, because, casting.note)


def _from_what_there_is(rest: Rest, failed: Step | None) -> RulePlan:
    casting = cast(Work.JOIN, rest.roles)
    gone = {output.name for step in rest.open for output in step.outputs}
    own = [name for name in (reads(failed) if failed is not None else ()) if name not in gone]
    action = (
        "The plan turned out to be wrong; the notes say how. Fulfil the objective as well as the material allows, and "
        f"say plainly what cannot be said from it.\n{rest.task.objective}"
    )
    step = Step(
        id=rest.step_id(1),
        actor=casting.role,
        action=quoted(action, 60_000),
        inputs=list(dict.fromkeys([*own, *rest.unread()]))[:_MAX_READ] + rest.notes,
        outputs=[_result(rest)],
    )
    return _as_rule_plan("contradicted", [step], [], "the rest is done from what there is", casting.note)


def _shortened(rest: Rest) -> RulePlan:
    casting = cast(Work.JOIN, rest.roles)
    budget_s = (rest.revision.left_s or 0.0) * _TIME_SHARE
    role = min(
        dict.fromkeys([casting.role, cast(Work.READ, rest.roles).role]),
        key=lambda name: max(0.0, rest.revision.step_s.get(name, 0.0) - budget_s),
    )
    step_s = rest.revision.step_s.get(role, 0.0)
    share = 1.0 if step_s <= budget_s else budget_s / step_s
    result = _result(rest)
    made = [step for step in rest.open if any(output.name == result.name for output in step.outputs)]
    action = (
        "Time is short. Fulfil the objective now, briefly, from the material that is there, and say plainly what is "
        f"missing.\n{rest.task.objective}"
    )
    step = Step(
        id=rest.step_id(1),
        actor=role,
        action=quoted(action, 60_000),
        inputs=rest.unread()[:_MAX_READ],
        outputs=[result],
        json_schema=made[0].json_schema if made and len(made[0].outputs) == 1 else None,
        gates=made[0].gates if made else None,
        max_tokens=None if share >= 1.0 else max(_MIN_TOKENS, int(rest.roles[role].max_tokens * share)),
    )
    because = f"{len(rest.open)} open steps would end too late, one does what can be done"
    return _as_rule_plan("late", [step], [], because, casting.note)


def _result(rest: Rest) -> Output:
    """What the step in place of the rest makes: the result that the open steps would have made, if it was one."""
    read = {name for step in rest.open for name in reads(step)}
    finals = [output for step in rest.open for output in step.outputs if output.name not in read]
    if len(finals) == 1:
        return finals[0]
    failed = rest.steps.get(rest.revision.failed or "")
    if failed is not None and not rest.open and len(failed.outputs) == 1:
        return failed.outputs[0]
    return rest.names().new(result_name(rest.task))


def _as_rule_plan(shape: str, new: list[Step], kept: list[Step], because: str, note: str | None) -> RulePlan:
    notes = () if note is None else (note,)
    return RulePlan(Plan(steps=[*new, *kept]), f"replan.{shape}/{len(new)}", because, notes)


def _bare(output: Output) -> Artefact:
    """An artefact that the planner knows by name only."""
    value = None if output.kind is ArtefactKind.JSON else ""
    return Artefact(name=output.name, kind=output.kind, value=value, content_type=output.content_type)


def _made_for(name: str, mapped: Step) -> bool:
    """Whether an artefact is the result of a sub-step of a mapped step."""
    return mapped.map_over is not None and any(name.startswith(f"{output.name}.") for output in mapped.outputs)


def _is_note(name: str) -> bool:
    return name.startswith("V") and name.endswith(".notes")
