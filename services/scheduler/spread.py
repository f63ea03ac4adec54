"""How the steps of a finished task were spread: what memory makes the staged reward of its decomposition from (pure).

Levels are those of `stages.py`: all steps with equally many steps on the longest chain before them. Counted is what
ran in the end, sub-steps of a map and steps that were added included. A mapped step itself is only the join of its
sub-steps and is no step of its own here.
"""

from __future__ import annotations

import hashlib

from protocol.messages.memory import Spread
from protocol.messages.result import StepState
from services.scheduler.stages import depths
from services.scheduler.tasks import StepRecord, TaskRecord


def spread_of(task: TaskRecord) -> Spread | None:
    """None for a task without steps."""
    levels: dict[int, list[StepRecord]] = {}
    for name, level in depths({name: step.needs for name, step in task.steps.items()}).items():
        step = task.steps[name]
        if step.spec.map_over is None:
            levels.setdefault(level, []).append(step)
    if not levels:
        return None
    assigned = [step for level in levels.values() if len(level) > 1 for step in level]
    finished = [step for step in assigned if step.state is StepState.DONE]
    results = {result for step in finished if (result := _result(task, step)) is not None}
    return Spread(
        width=max(map(len, levels.values())), assigned=len(assigned), finished=len(finished), useful=len(results)
    )


def _result(task: TaskRecord, step: StepRecord) -> bytes | None:
    """Digest of what a step has made, so that two that made the same are told; None where it made nothing."""
    made = [task.artefacts[output.name] for output in step.spec.outputs if output.name in task.artefacts]
    text = "\0".join(artefact.text().strip() for artefact in made)
    return hashlib.sha256(text.encode()).digest() if text.strip("\0") else None
