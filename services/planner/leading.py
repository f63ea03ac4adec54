"""The plan for somebody who asks for a swarm: one step that leads sub-agents and answers for the whole task.

How many sub-agents there are, who they are and what they do is the leading model's choice while the task runs; the
bounds are those of the task's budget, and turns for the size of the task.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from protocol.messages.artefact import ArtefactKind
from protocol.messages.task import Output, Plan, Spawns, Step, TaskIR, TaskType
from services.planner.cast import Work, cast, crew
from services.planner.rules import result_name

_FEWEST_TURNS: Final = 4
"""To give work, to follow it up twice, to answer."""
_MOST_TURNS: Final = 32
_WORDS_PER_TURN: Final = 25


def turns_for(task: TaskIR) -> int:
    """Turns that the leading model may take: more for each input and for a long objective.

    A model that is any good needs two or three of them; one that is not takes all it gets, and somebody waits.
    """
    words = len(task.objective.split())
    return min(_MOST_TURNS, _FEWEST_TURNS + len(task.inputs) + words // _WORDS_PER_TURN)


def led(task: TaskIR, roles: Collection[str]) -> TaskIR:
    """The task with a plan of one spawning step that reads all inputs."""
    kind = ArtefactKind.CODE if task.task_type is TaskType.CODE else ArtefactKind.TEXT
    step = Step(
        id="S1",
        actor=cast(Work.BREAK_DOWN, roles).role,
        action=task.objective,
        inputs=[artefact.name for artefact in task.inputs],
        outputs=[Output(name=result_name(task), kind=kind)],
        spawns=Spawns(roles=crew(task.task_type, roles), max_turns=turns_for(task)),
    )
    return task.model_copy(update={"plan": Plan(steps=[step])})
