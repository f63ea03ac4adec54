"""What clients ask for, read and checked: the task of a submit, and which task any other request is about."""

from __future__ import annotations

from pydantic import ValidationError

from protocol.codec import describe, unpack_body
from protocol.errors import BadFrame
from protocol.messages.result import ArtefactQuery, CancelQuery, TaskQuery, Watch
from protocol.messages.task import Extend, Submit, TaskIR
from services.kit.plan_check import as_evidence, plan_problems
from services.kit.registry import Registry


def read_task(body: bytes, registry: Registry) -> TaskIR:
    """The task of a `task.submit`. Raises BadFrame naming the fields and steps that are wrong: ten to people, and to
    programs up to 20 as its evidence, see `plan_check.as_evidence`.
    """
    submit = unpack_body(Submit, body)
    try:
        ir = TaskIR.model_validate(submit.task)
    except ValidationError as err:
        raise BadFrame("task.invalid", f"the TaskIR is not valid: {describe(err)}") from err
    problems = plan_problems(ir, registry)
    if problems:
        shown = "; ".join(str(problem) for problem in problems[:10])
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise BadFrame("task.invalid", f"the plan cannot run: {shown}{more}", as_evidence(problems))
    return ir


def task_asked_for(kind: str, body: bytes) -> str:
    """Id of the task that a request is about. Raises BadFrame for a body that is not of its kind."""
    match kind:
        case "task.watch":
            return unpack_body(Watch, body).task_id
        case "task.artefact":
            return unpack_body(ArtefactQuery, body).task_id
        case "task.cancel":
            return unpack_body(CancelQuery, body).task_id
        case "task.extend":
            return unpack_body(Extend, body).task_id
        case _:
            return unpack_body(TaskQuery, body).task_id
