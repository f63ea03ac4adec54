"""Every reason why a plan cannot run here: those of the graph, and those of this registry.

The hub asks on submit and before it adopts a plan, the planner before it hands one out, the command-line tool before it
sends one. The graph itself is checked by `protocol.plan_graph`. Schemas of answers are looked at by `schema_problems`,
for which the hub has no time.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from protocol.messages.gate import MAX_CHECKED, MAX_CONTEXT
from protocol.messages.persona import NO_PERSONA
from protocol.messages.task import TaskIR
from protocol.plan_graph import PlanProblem, final_artefacts, find_problems, reads
from services.kit.json_schema import BadSchema, check_schema
from services.kit.registry import Registry

MAX_CONTROL_EDGES: Final = 20_000
"""Edges of `depends_on` in one plan: each one that is dropped is reported, and a report must fit into a message."""

_MAX_ROWS: Final = 20
_ROW: Final = TypeAdapter(PlanProblem)


def plan_problems(task: TaskIR, registry: Registry) -> list[PlanProblem]:
    """Return the problems of a task and of its plan, if it has one, each with step and field; empty = it can run."""
    steps = task.plan.steps if task.plan is not None else []
    edges = sum(len(step.depends_on) for step in steps)
    if edges > MAX_CONTROL_EDGES:
        return [PlanProblem(None, "depends_on", f"{edges} control dependencies, at most {MAX_CONTROL_EDGES} are taken")]
    found = find_problems(task)
    for step in steps:
        if step.actor not in registry.roles:
            found += _unknown(step.id, "actor", [step.actor], registry.roles)
        if step.gates:
            found += _unknown(step.id, "gates", step.gates, registry.gates)
        if step.persona is not None:
            found += _unknown(step.id, "persona", _named(step.persona), registry.personas)
        if step.spawns is not None:
            found += _unknown(step.id, "spawns.roles", step.spawns.roles, registry.roles)
    if task.plan is not None:
        found += _unknown(None, "plan.persona", _named(task.plan.persona), registry.personas)
    found += _unknown(None, "gates", task.gates, registry.gates)
    found += _without_command(task, registry)
    found += _beyond_gates(task)
    return found


def schema_problems(task: TaskIR, most_chars: int | None = None) -> list[PlanProblem]:
    """Steps whose `json_schema` is none. Takes time in proportion to their size, so the hub does not ask.

    `most_chars` bounds that: of schemas that are different from each other, what is beyond is left to whoever uses it.
    """
    left = most_chars
    said: dict[str, str | None] = {}
    found = []
    for step in task.plan.steps if task.plan is not None else ():
        if step.json_schema is None:
            continue
        text = json.dumps(step.json_schema)
        if text not in said:
            if left is not None:
                left -= len(text)
                if left < 0:
                    break
            said[text] = _why_no_schema(step.json_schema)
        if (why := said[text]) is not None:
            found.append(PlanProblem(step.id, "json_schema", f"not a JSON Schema: {why}"))
    return found


def _why_no_schema(schema: dict[str, Any]) -> str | None:
    try:
        check_schema(schema)
    except BadSchema as err:
        return str(err)
    return None


def as_evidence(problems: Sequence[PlanProblem]) -> dict[str, Any]:
    """Problems as evidence of a failure: the first 20, each as `{step, field, message}`, and how many there are."""
    rows = [{**asdict(problem), "message": problem.message[:400]} for problem in problems[:_MAX_ROWS]]
    return {"problems": rows, "problem_count": len(problems)}


def more_than(told: Sequence[object], evidence: Mapping[str, Any]) -> int:
    """How many problems there are beyond these, by the evidence of a failure."""
    count = evidence.get("problem_count")
    return max(0, count - len(told)) if isinstance(count, int) else 0


def problems_in(evidence: Mapping[str, Any]) -> list[PlanProblem]:
    """What `as_evidence` has put into a failure; empty where there is none, or it is of another form."""
    try:
        return [_ROW.validate_python(row) for row in evidence.get("problems", ())]
    except (ValidationError, TypeError):
        return []


def _without_command(task: TaskIR, registry: Registry) -> Iterator[PlanProblem]:
    """A gate that runs the task's own command needs one."""
    if task.check_command is not None:
        return
    for step in [None, *(task.plan.steps if task.plan is not None else ())]:
        names = task.gates if step is None else step.gates or []
        wanting = [name for name in names if name in registry.gates and registry.gates[name].target == "command"]
        if wanting and (step is None or step.check_command is None):
            message = f"{wanting[0]} runs a command of the task's own: give it as check_command, a list of arguments"
            yield PlanProblem(None if step is None else step.id, "check_command", message)


def _beyond_gates(task: TaskIR) -> Iterator[PlanProblem]:
    """Gates are asked in one message: what would not fit into it is refused before anything runs."""
    for step in task.plan.steps if task.plan is not None else ():
        if step.gates and len(reads(step)) > MAX_CONTEXT:
            message = f"a step with gates reads at most {MAX_CONTEXT} artefacts, this one {len(reads(step))}"
            yield PlanProblem(step.id, "inputs", f"{message}: join them in several steps, or drop its gates")
    final = len(final_artefacts(task.plan)) if task.gates and task.plan is not None else 0
    if final > MAX_CHECKED:
        message = f"the final checks take at most {MAX_CHECKED} results, the plan has {final}"
        yield PlanProblem(None, "gates", f"{message}: join them in a step, or check them where they are made")


def _named(persona: str | None) -> list[str]:
    return [] if persona in (None, NO_PERSONA) else [persona]


def _unknown(step: str | None, field: str, names: list[str], known: Mapping[str, object]) -> list[PlanProblem]:
    return [PlanProblem(step, field, _hint(name, known)) for name in names if name not in known]


def _hint(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
    return f"the registry has no {name!r}; {hint[:300]}"
