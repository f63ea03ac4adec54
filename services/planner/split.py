"""Should a request be split at all, and how: one step, independent parts, or stages.

A spurious split costs more than a missed one: every part pays for a prompt of its own, and the join may lose what the
parts knew of each other. So the order of the rules is an order of evidence. What somebody has written out is believed
first (inputs, a numbered list), then what grammar shows (the things a computation needs, a stage named before another,
parts of a sentence), last an opinion about what the answer will look like (`divide`); without any of it one step does
it. All that the evidence allows is offered, the rules' choice first, so that whoever knows better can choose another.

Only for prose (chat and doc): code, ingest and manage have shapes of their own in `rules`, which also builds the steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.messages.task import TaskIR, TaskType
from services.planner.divide import Judge, Opinion
from services.planner.lookups import find_lookups
from services.planner.parts import MAX_PARTS, Parts, find_parts

SPLIT_ROOM: Final = 3
"""Steps that a split needs: two and a join."""
OUTLINE_ROOM: Final = 6
"""Steps that an outline needs: outline, a map of at least three points, join."""
SURE: Final = 0.6
"""A trained opinion of at least this splits a request that nothing else splits."""
SURE_UNTRAINED: Final = 0.7
"""The rules' opinion splits documents only, and from here on."""
OFFERED: Final = 0.5
"""From here on an outline is among the alternatives."""
AGAINST: Final = 0.2
"""Below this the things that a sentence names are the subjects of one piece of writing."""

_STAGES: Final = re.compile(
    r"\b(research|investigate|gather|collect|find out|look into|read up on|study|brainstorm)\b([^.!?\n]{3,300}?)"
    r"(?:,?;? (?:and )?then |, and |; | and |\. (?:then|afterwards|finally),? )"
    r"(?:use \w+ to )?(write|draft|compose|prepare|produce|create|make|present|turn)\b",
    re.IGNORECASE,
)


class Shape(StrEnum):
    """The three kinds of answer."""

    DIRECT = "direct"
    INDEPENDENT = "independent"
    STAGED = "staged"


class How(StrEnum):
    """Which evidence asks for a shape; decides the template."""

    ONE_STEP = "one step"
    INPUTS = "inputs"
    LOOKUPS = "lookups"
    PARTS = "parts"
    RESEARCH = "research"
    OUTLINE = "outline"


@dataclass(frozen=True, slots=True)
class Option:
    """One way to go about a request."""

    shape: Shape
    how: How
    because: str
    items: tuple[str, ...] = ()
    """The parts in words of the request, where they are known before anything runs."""

    @property
    def width(self) -> int:
        """How many steps may run at the same time; 1 where that shows only at run time."""
        return max(1, len(self.items))


@dataclass(frozen=True, slots=True)
class Split:
    """The rules' choice, and what else the evidence allows."""

    options: tuple[Option, ...]
    """The choice first."""
    opinion: Opinion

    @property
    def choice(self) -> Option:
        """What the rules would do."""
        return self.options[0]


def split(task: TaskIR, room: int, judge: Judge) -> Split:
    """Decide about a prose task whose plan may have so many steps."""
    opinion = judge.judge(task.objective)
    direct = Option(Shape.DIRECT, How.ONE_STEP, "one thing is asked for")
    if room < SPLIT_ROOM:
        return Split((Option(Shape.DIRECT, How.ONE_STEP, "the budget allows no fan-out"),), opinion)
    options: list[Option] = []
    given = [artefact.name for artefact in task.inputs]
    found = find_parts(task.objective)
    if len(given) > 1 and not (found and any(name in item for item in found.items for name in given)):
        options.append(Option(Shape.INDEPENDENT, How.INPUTS, f"{len(given)} inputs", tuple(given)))
    elif found is not None and found.how == "list":
        options.append(_of_parts(found))
    lookups = find_lookups(task.objective) if not given else ()
    if lookups:
        why = f"the question needs a fact about each of {len(lookups)} things before anything can be computed"
        options.append(Option(Shape.INDEPENDENT, How.LOOKUPS, why, lookups))
    if not given and (stages := _STAGES.search(task.objective)):
        subject = find_parts(stages[0])
        items = subject.items if subject is not None else ()
        why = f"{stages[1].casefold()!r} comes before {stages[3].casefold()!r}"
        options.append(Option(Shape.STAGED, How.RESEARCH, why, items[:MAX_PARTS]))
    if found is not None and found.how != "list":
        subjects_only = found.how in ("names", "comparison") and opinion.probability < AGAINST
        if subjects_only and not options:
            why = f"the {len(found.items)} things it names are the subject of one answer ({_told(opinion)})"
            options.append(Option(Shape.DIRECT, How.ONE_STEP, why))
        options.append(_of_parts(found))
    wanted = opinion.probability >= (SURE if opinion.judge == "trained" else SURE_UNTRAINED)
    if room >= OUTLINE_ROOM and opinion.probability >= OFFERED and not given:
        outline = Option(Shape.STAGED, How.OUTLINE, f"its answer divides into points ({_told(opinion)})")
        chosen = wanted and (opinion.judge == "trained" or task.task_type is TaskType.DOC)
        options += [outline, direct] if chosen else [direct, outline]
    if not any(option.shape is Shape.DIRECT for option in options):
        options.append(direct)
    return Split(tuple(options), opinion)


def _of_parts(found: Parts) -> Option:
    return Option(
        Shape.INDEPENDENT, How.PARTS, f"the objective names {len(found.items)} things ({found.how})", found.items
    )


def _told(opinion: Opinion) -> str:
    return f"P {opinion.probability:.2f} by the {opinion.judge} judge: {', '.join(opinion.evidence)}"
