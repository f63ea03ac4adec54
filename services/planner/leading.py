"""The plan for somebody who asks for a swarm: one step that leads sub-agents and answers for the whole task.

How many sub-agents there are, who they are and what they do is the leading model's choice while the task runs; the
bounds are those of the task's budget.
"""

from __future__ import annotations

from collections.abc import Collection

from protocol.messages.artefact import ArtefactKind
from protocol.messages.task import Output, Plan, Spawns, Step, TaskIR, TaskType
from services.planner.cast import Work, cast, crew
from services.planner.rules import result_name


def led(task: TaskIR, roles: Collection[str]) -> TaskIR:
    """The task with a plan of one spawning step that reads all inputs."""
    kind = ArtefactKind.CODE if task.task_type is TaskType.CODE else ArtefactKind.TEXT
    step = Step(
        id="S1",
        actor=cast(Work.BREAK_DOWN, roles).role,
        action=task.objective,
        inputs=[artefact.name for artefact in task.inputs],
        outputs=[Output(name=result_name(task), kind=kind)],
        spawns=Spawns(roles=crew(task.task_type, roles)),
    )
    return task.model_copy(update={"plan": Plan(steps=[step])})
