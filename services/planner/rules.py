"""Plans by rule: for every type of task a template that always gives a valid plan, however odd the task.

The model's plan is a bonus; this one is the promise. A template decides the shape (what runs side by side, what joins
it), `cast` who does the work, `parts` what an objective lists, `naming` what results are called. Gates, personas and
token shares are chosen later, in `choose`, the same way as for any other plan.

Shapes: for prose `split` decides between one step, parts or look-ups side by side with a join above them, research
before writing, and an outline whose points are written out at run time; for code a draft, a review and a revision, with
tests beside the draft where they are asked for, unless tests came along, since then tests judge and a review by a small
model adds noise; for ingest facts per input, checked where that is asked for, and a merge; for manage a breakdown,
workstreams beside each other, a summary. Everything fits `room`, the number of steps that the budget allows: a map that
is too wide takes several inputs a step, and a budget of one step gets one step. Contexts are small: the objective is
quoted in part where a step needs it for orientation only, and no join reads more than eight results, so that wide maps
get a tree of joins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Final, TypeVar

from protocol.limits import MAX_STEPS
from protocol.messages.artefact import ArtefactKind
from protocol.messages.task import Plan, Step, TaskIR, TaskType
from protocol.plan_graph import reads
from services.planner.cast import Work, cast
from services.planner.divide import Judge, RuleJudge
from services.planner.naming import Names, stem
from services.planner.parts import MAX_PARTS, find_parts
from services.planner.split import How, Option, split
from services.planner.tests_given import given_tests, module_under_test

MIN_STEP_TOKENS: Final = 64
"""A step that may write less than this is not worth having; bounds the steps by `budget.max_tokens`."""

_JOIN_FAN_IN: Final = 8
_NARROWER: Final = (2, 4)
"""Parts a step takes in the narrower plans that are offered beside the rules' one."""
_QUOTE_BYTES: Final = 1_500
_PYTHON: Final = "text/x-python"
_VIEWS: Final = (
    "the tasks that have to be done, in a useful order",
    "the risks: what can go wrong, and what to do about it",
    "the means: people, time and material that are needed",
)

_SIDES: Final = (
    "what it is, and the facts and figures that are known about it",
    "what speaks for it and what speaks against it, and who says so",
    "examples, and what follows from them",
)
_MAX_POINTS: Final = 8
_WANTS_CHECKS: Final = re.compile(r"\b(?:check|verif|validat|double-check|cross-check|proofread)\w*", re.IGNORECASE)
_WANTS_TESTS: Final = re.compile(
    r"\b(?:unit |with |and |including |its )tests?\b|\btest(?:s|ed)? (?:it|for)\b", re.IGNORECASE
)

#: Points of an answer that divides: few and short, since each becomes a step.
_OUTLINE_SCHEMA: Final[dict[str, Any]] = {
    "type": "array",
    "minItems": 3,
    "maxItems": _MAX_POINTS,
    "items": {"type": "string", "minLength": 4, "maxLength": 120},
}

#: What the facts of an ingested input look like. Small models give valid JSON only under a schema, and end only where
#: it is bounded: twelve facts of this size fit the tokens of the shipped extractor.
FACTS_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "facts": {
            "type": "array",
            "maxItems": 12,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 40},
                    "value": {"type": "string", "maxLength": 120},
                },
                "required": ["name", "value"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["facts"],
    "additionalProperties": False,
}

#: What the result of a task is called, by type; the last artefact of every plan of ours bears it.
RESULT_NAMES: Final[dict[TaskType, str]] = {
    TaskType.CHAT: "answer",
    TaskType.DOC: "document",
    TaskType.CODE: "solution",
    TaskType.INGEST: "facts",
    TaskType.MANAGE: "summary",
}

_SHIPPED_JUDGE: Final = RuleJudge()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RulePlan:
    """A valid plan and how it came about."""

    plan: Plan
    template: str
    """Type, shape and width, such as `doc.map-join/3`."""
    because: str
    """What in the task asked for this shape."""
    notes: tuple[str, ...]
    """Replaced roles."""
    parts: tuple[str, ...] = ()
    """What can be worked on at the same time, in words of the objective; empty where that shows only at run time."""


def room(task: TaskIR) -> int:
    """How many steps the budget of a task allows, at least one."""
    return max(1, min(task.budget.max_steps, MAX_STEPS, task.budget.max_tokens // MIN_STEP_TOKENS))


def result_name(task: TaskIR) -> str:
    """What the result of a task is called; for code with tests the module that these import."""
    if task.task_type is TaskType.CODE and (module := module_under_test(task.inputs)) is not None:
        return module
    return RESULT_NAMES[task.task_type]


def quoted(text: str, max_bytes: int = _QUOTE_BYTES) -> str:
    """The beginning of a text, at most so many bytes of UTF-8: bytes bound the tokens of any script."""
    data = text.encode()
    return text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore") + " …"


def for_orientation(task: TaskIR) -> str:
    """The closing lines of the action of a step that does only a part."""
    return f"\n\nThe whole objective, for orientation only:\n{quoted(task.objective)}"


def plan_by_rules(task: TaskIR, roles: Collection[str], judge: Judge = _SHIPPED_JUDGE) -> RulePlan:
    """Plan a task whose input names are distinct. Any `task.plan` is ignored."""
    return plans_by_rules(task, roles, judge)[0]


def plans_by_rules(task: TaskIR, roles: Collection[str], judge: Judge = _SHIPPED_JUDGE) -> list[RulePlan]:
    """The rules' plan, then the other valid ones that the evidence allows, of distinct templates: also narrower ones,
    in which a step takes two or four parts, and always one step, since whether to split at all is a choice too.
    """
    plans: dict[str, RulePlan] = {}
    offered: list[tuple[Callable[[_Draft], tuple[str, str]], tuple[str, ...]]] = []

    def offer(build: Callable[[_Draft], tuple[str, str]], parts: tuple[str, ...] = (), each: int = 1) -> None:
        draft = _Draft(task, roles, each)
        shape, because = build(draft)
        if each == 1:
            offered.append((build, parts))
        elif not draft.narrowed:
            return
        else:
            name, _, width = shape.partition("/")
            shape, because = f"{name}-by{each}/{width}", f"{because}, {each} a step"
        template, plan = f"{task.task_type.value}.{shape}", Plan(steps=draft.steps)
        if each > 1 and any(other.plan == plan for other in plans.values()):
            return  # the budget has made them equal
        plans.setdefault(template, RulePlan(plan, template, because, tuple(dict.fromkeys(draft.notes)), parts))

    match task.task_type:
        case TaskType.CODE:
            offer(_code)
        case TaskType.INGEST:
            offer(_ingest)
        case TaskType.MANAGE:
            offer(_manage)
        case TaskType.CHAT | TaskType.DOC:
            for option in split(task, room(task), judge).options:
                offer(partial(_prose, option=option), option.items)
    for each in _NARROWER:
        for build, parts in tuple(offered):
            offer(build, parts, each)
    offer(_single)
    return list(plans.values())


def finishing_step(task: TaskIR, roles: Collection[str], begun: Sequence[Step]) -> Step:
    """One step that makes the result of the task from what these steps make, where the plan they are of broke off."""
    draft = _Draft(task, roles)
    for step in begun:
        draft.steps.append(step)
        for output in step.outputs:
            draft.names.new(output.name, output.kind, output.content_type)
    read = {name for step in begun for name in reads(step)}
    made = [output.name for step in begun for output in step.outputs if output.name not in read]
    inputs = [*made, *(name for name in draft.given if name not in read)]
    code = task.task_type is TaskType.CODE
    action = f"Join the inputs into one result that fulfils this objective; do what is still missing.\n{task.objective}"
    kind = ArtefactKind.CODE if code else ArtefactKind.TEXT
    draft.add(Work.IMPLEMENT if code else Work.JOIN, _bounded(action), inputs, result_name(task), kind)
    taken = {step.id for step in begun}
    number = next(number for number in range(1, len(begun) + 2) if f"S{len(begun) + number}" not in taken)
    return draft.steps[-1].model_copy(update={"id": f"S{len(begun) + number}"})


@dataclass(slots=True)
class _Draft:
    """Steps under construction."""

    task: TaskIR
    roles: Collection[str]
    each: int = 1
    """Parts or inputs that a step of a map takes, where there are enough of them."""
    narrowed: bool = False
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: Names = field(init=False)

    def __post_init__(self) -> None:
        self.names = Names(self.task.inputs)

    @property
    def given(self) -> list[str]:
        return [artefact.name for artefact in self.task.inputs]

    @property
    def room(self) -> int:
        return room(self.task)

    def width_for(self, count: int, taken: int = 0) -> int:
        """Steps of a map over so many things, with `taken` steps before it; at least two, within the budget."""
        if self.each > 1 and count >= 2 * self.each:
            self.narrowed = True
            count = -(-count // self.each)
        return _map_width(count, self.room - taken)

    def add(
        self,
        work: Work,
        action: str,
        inputs: Sequence[str],
        wish: str,
        kind: ArtefactKind = ArtefactKind.TEXT,
        json_schema: dict[str, Any] | None = None,
        map_over: str | None = None,
    ) -> str:
        """Append a step with one output; returns the name of that output."""
        casting = cast(work, self.roles)
        if casting.note is not None:
            self.notes.append(casting.note)
        output = self.names.new(wish, kind, _PYTHON if kind is ArtefactKind.CODE else None)
        self.steps.append(
            Step(
                id=f"S{len(self.steps) + 1}",
                actor=casting.role,
                action=action,
                inputs=list(inputs),
                outputs=[output],
                json_schema=json_schema,
                map_over=map_over,
            )
        )
        return output.name


def _single(draft: _Draft) -> tuple[str, str]:
    """One step that does everything."""
    task, given = draft.task, draft.given
    match task.task_type:
        case TaskType.CODE:
            draft.add(Work.IMPLEMENT, task.objective, given, result_name(task), ArtefactKind.CODE)
        case TaskType.INGEST:
            draft.add(Work.EXTRACT, task.objective, given, result_name(task), ArtefactKind.JSON, FACTS_SCHEMA)
        case TaskType.MANAGE:
            draft.add(Work.BREAK_DOWN, task.objective, given, result_name(task))
        case TaskType.CHAT | TaskType.DOC:
            work = Work.ANSWER if task.task_type is TaskType.CHAT else Work.JOIN
            draft.add(work, task.objective, given, result_name(task))
    return "single/1", "one step does it"


def _prose(draft: _Draft, option: Option) -> tuple[str, str]:
    """The steps of one way to go about it; see `split`."""
    match option.how:
        case How.ONE_STEP:
            shape, _ = _single(draft)
        case How.INPUTS:
            shape, _ = _map_inputs(draft, Work.READ, None)
        case How.LOOKUPS:
            shape = _lookups(draft, option)
        case How.PARTS:
            shape = _fan(draft, option)
        case How.RESEARCH:
            shape = _research(draft, option)
        case How.OUTLINE:
            shape = _outline(draft)
    return shape, option.because


def _fan(draft: _Draft, option: Option) -> str:
    """One step per thing that is asked for, and a join."""
    task, given = draft.task, draft.given
    items = _matched_to_inputs(option.items, given)
    groups = _grouped(items, draft.width_for(min(len(items), MAX_PARTS)))
    made, read = [], set[str]()
    for number, group in enumerate(groups, 1):
        asked = "\n".join(f"- {item}" for item, _ in group)
        own = list(dict.fromkeys(name for _, inputs in group for name in inputs)) or given
        read.update(own)
        made.append(draft.add(Work.READ, f"Do only this part:\n{asked}{for_orientation(task)}", own, f"part_{number}"))
    unnamed = [name for name in given if name not in read]
    _join(draft, made, Work.JOIN, f"parts of {len(option.items)}", unnamed)
    return f"fan-join/{len(made)}"


def _lookups(draft: _Draft, option: Option) -> str:
    """One step per thing whose facts are needed, and a step that computes."""
    task = draft.task
    made = []
    for group in _grouped(option.items, _map_width(len(option.items), draft.room)):
        action = (
            f"Look up only what the question needs to know about: {'; '.join(group)}. Give the value with its unit, as "
            f"it is before any change that the question supposes. Compute nothing.{for_orientation(task)}"
        )
        made.append(draft.add(Work.READ, action, [], f"fact_{group[0]}"))
    _join(draft, made, Work.JOIN, "the facts that were looked up; compute from them, step by step")
    return f"lookup-compute/{len(made)}"


def _research(draft: _Draft, option: Option) -> str:
    """Sides of a subject beside each other, then one who writes from all the notes."""
    task = draft.task
    items = option.items or _SIDES
    made = []
    for number, group in enumerate(_grouped(items, _map_width(len(items), draft.room)), 1):
        asked = "\n".join(f"- {item}" for item in group)
        action = f"Research this side only, and note what whoever writes needs:\n{asked}{for_orientation(task)}"
        made.append(draft.add(Work.READ, action, [], f"notes_{number}"))
    _join(draft, made, Work.JOIN, "notes of the research; write from them")
    return f"research-write/{len(made)}"


def _outline(draft: _Draft) -> str:
    """The points first, each point at the same time, then the whole: how many there are shows at run time."""
    task = draft.task
    points = min(_MAX_POINTS, draft.room - 3)
    schema = _OUTLINE_SCHEMA | {"maxItems": points}
    action = (
        f"List the points that a good answer consists of, 3 to {points}, each in a few words. The points do not need "
        f"each other's text.\n{task.objective}"
    )
    outline = draft.add(Work.BREAK_DOWN, _bounded(action), [], "outline", ArtefactKind.JSON, schema)
    action = f"Write out only the point that you are given, in two to five sentences.{for_orientation(task)}"
    written = draft.add(Work.READ, action, [], "points", map_over=outline)
    _join(draft, [written], Work.JOIN, "the points, in their order")
    return f"outline-map-join/{points}"


def _map_inputs(draft: _Draft, work: Work, json_schema: dict[str, Any] | None) -> tuple[str, str]:
    """One step per input, or per group of inputs where the budget allows fewer, and a join."""
    task, given = draft.task, draft.given
    kind = ArtefactKind.TEXT if json_schema is None else ArtefactKind.JSON
    what = "Note what matters for the objective" if json_schema is None else "Extract the facts the objective asks for"
    if draft.room < 3 or len(given) < 2:
        _single(draft)
        return "single/1", f"{len(given)} inputs" if len(given) < 2 else "the budget allows no fan-out"
    made = []
    for group in _grouped(given, draft.width_for(len(given))):
        which = "this input" if len(group) == 1 else f"these {len(group)} inputs"
        action = f"{what}, from {which} only. Name the input: {', '.join(group)}.{for_orientation(task)}"
        made.append(draft.add(work, action, group, f"notes_{stem(group[0])}", kind, json_schema))
    _join(
        draft, made, Work.JOIN if json_schema is None else work, f"notes on {len(given)} inputs", (), kind, json_schema
    )
    return f"map-join/{len(made)}", f"{len(given)} inputs"


def _code(draft: _Draft) -> tuple[str, str]:
    task, given = draft.task, draft.given
    tests = [artefact.name for artefact in given_tests(task.inputs)]
    found = find_parts(task.objective, explicit_only=True)
    items = list(found.items) if found is not None else []
    if items and draft.room >= 3:
        material = [name for name in given if name not in tests]
        made = []
        for number, group in enumerate(_grouped(items, min(len(items), MAX_PARTS, draft.room - 1)), 1):
            asked = "\n".join(f"- {item}" for item in group)
            action = f"Write the code for this part only:\n{asked}{for_orientation(task)}"
            made.append(draft.add(Work.IMPLEMENT, action, material, f"part_{number}", ArtefactKind.CODE))
        action = f"Join the parts into one complete module. Keep what works, resolve what clashes.\n{task.objective}"
        draft.add(Work.IMPLEMENT, _bounded(action), [*made, *tests], result_name(task), ArtefactKind.CODE)
        return f"parts-join/{len(made)}", f"the objective names {len(items)} parts"
    if tests or draft.room < 3:
        _single(draft)
        return "single/1", "the tests judge the code" if tests else "the budget allows no review"
    code = draft.add(Work.IMPLEMENT, task.objective, given, "draft", ArtefactKind.CODE)
    action = (
        f"Review the code. Name each mistake, and each thing that was asked for and is missing.{for_orientation(task)}"
    )
    wants_tests = draft.room >= 4 and _WANTS_TESTS.search(_wishes(task))
    written: list[str] = []
    if wants_tests:
        # They are written from the objective alone, so that they wait for nothing and repeat no mistake of the draft.
        ask = f"Write pytest tests for what the objective asks for, without the code itself.{for_orientation(task)}"
        written = [draft.add(Work.IMPLEMENT, ask, given, "draft_tests", ArtefactKind.CODE)]
    review = draft.add(Work.REVIEW, action, [code, *written], "review")
    action = "Repair every mistake that the review names, where it is right, and return the complete code"
    action += ", followed by the tests." if written else "."
    inputs = [code, *written, review]
    draft.add(Work.IMPLEMENT, action + for_orientation(task), inputs, result_name(task), ArtefactKind.CODE)
    if written:
        return "implement-test-review/2", "tests are asked for, so they are written beside the code"
    return "draft-review-revise/1", "no tests judge the code, so a review does"


def _ingest(draft: _Draft) -> tuple[str, str]:
    given = draft.given
    if not given or not _WANTS_CHECKS.search(_wishes(draft.task)):
        return _map_inputs(draft, Work.EXTRACT, FACTS_SCHEMA)
    width = len(given)
    while width > 1 and 2 * width + _joins(width) > draft.room:
        width -= 1
    if 2 * width + 1 > draft.room:
        return _map_inputs(draft, Work.EXTRACT, FACTS_SCHEMA)
    made = []
    for group in _grouped(given, width):
        which = f"Name the input: {', '.join(group)}.{for_orientation(draft.task)}"
        action = f"Extract the facts the objective asks for, from the given input only. {which}"
        facts = draft.add(Work.EXTRACT, action, group, f"facts_{stem(group[0])}", ArtefactKind.JSON, FACTS_SCHEMA)
        action = f"Check each fact against the input: repair what differs, drop what is not there, add nothing. {which}"
        wish = f"checked_{stem(group[0])}"
        made.append(draft.add(Work.EXTRACT, action, [*group, facts], wish, ArtefactKind.JSON, FACTS_SCHEMA))
    _join(draft, made, Work.EXTRACT, f"checked facts of {len(given)} inputs", (), ArtefactKind.JSON, FACTS_SCHEMA)
    return f"extract-check-merge/{width}", f"{len(given)} inputs, and checks are asked for"


def _wishes(task: TaskIR) -> str:
    """Everything in which a task may say what it wants."""
    return "\n".join([task.objective, *task.constraints, *task.definition_of_done])


def _manage(draft: _Draft) -> tuple[str, str]:
    task, given = draft.task, draft.given
    if draft.room < 4:
        _single(draft)
        return "single/1", "the budget allows no workstreams"
    found = find_parts(task.objective)
    items = list(found.items) if found is not None else list(_VIEWS)
    action = f"Break this down into workstreams that do not wait for each other:\n{task.objective}"
    breakdown = draft.add(Work.BREAK_DOWN, _bounded(action), given, "breakdown")
    made = []
    for number, group in enumerate(_grouped(items, draft.width_for(min(len(items), MAX_PARTS), taken=1)), 1):
        asked = "\n".join(f"- {item}" for item in group)
        action = f"Work out this workstream only:\n{asked}{for_orientation(task)}"
        made.append(draft.add(Work.READ, action, [breakdown], f"workstream_{number}"))
    _join(draft, made, Work.JOIN, f"{len(items)} workstreams")
    because = (
        "tasks, risks and means" if found is None else f"the objective names {len(items)} workstreams ({found.how})"
    )
    return f"breakdown-join/{len(made)}", because


def _join(
    draft: _Draft,
    made: list[str],
    work: Work,
    what: str,
    also: Sequence[str] = (),
    kind: ArtefactKind = ArtefactKind.TEXT,
    json_schema: dict[str, Any] | None = None,
) -> None:
    """Join results into the result of the task, in a tree where there are more than one join should read.

    `also` names inputs of the task that only the last join reads.
    """
    while len(made) > _JOIN_FAN_IN:
        action = f"Join these into one, without losing a fact: {what}.{for_orientation(draft.task)}"
        groups = _grouped(made, -(-len(made) // _JOIN_FAN_IN))
        made = [draft.add(work, action, group, "joined", kind, json_schema) for group in groups]
    action = f"Join the inputs ({what}) into one result that fulfils this objective:\n{draft.task.objective}"
    draft.add(work, _bounded(action), [*made, *also], result_name(draft.task), kind, json_schema)


def _joins(width: int) -> int:
    """How many joins a map of this width needs: see `_join`."""
    count = 1
    while width > _JOIN_FAN_IN:
        width = -(-width // _JOIN_FAN_IN)
        count += width
    return count


def _map_width(wished: int, room: int) -> int:
    """The widest map, of at least two, that fits the room together with its joins; the room is at least three."""
    width = min(wished, room - 1)
    while width > 2 and width + _joins(width) > room:
        width -= 1
    return width


def _grouped(items: Sequence[T], groups: int) -> list[list[T]]:
    """Split into so many runs of nearly equal length, in order; none is empty while groups <= len(items)."""
    base, extra = divmod(len(items), groups)
    cuts = [number * base + min(number, extra) for number in range(groups + 1)]
    return [list(items[start:end]) for start, end in pairwise(cuts)]


def _matched_to_inputs(items: Sequence[str], given: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each part with the inputs that it names; none where it names none and thus may need them all."""
    return [(item, [name for name in given if name in item]) for item in items]


def _bounded(action: str) -> str:
    return quoted(action, 60_000)
