"""A plan while the model still writes it: which of its steps can start already. Pure.

The answer is read as it comes, character by character and each once. A step is taken when it is complete, valid, and
reads nothing but inputs and results of steps that were taken before it; the newest step is never taken, since the whole
plan may still change its last one (it joins what nobody reads). What is taken passes the same repair as a whole plan
and keeps its id and its outputs whatever comes later. What is not is left to the whole plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError

from protocol.messages.task import Step, TaskIR
from services.kit.registry import RoleEntry
from services.planner.cast import Work, cast
from services.planner.modelmade import MAX_ANSWER_CHARS, MAX_MODEL_STEPS, ModelStep, drafts_of, steps_of, wishes_of
from services.planner.repair import first_repaired

_OPENING: Final = "{["
_CLOSING: Final = "}]"
_STEP_DEPTH: Final = 3
"""Brackets open inside a step: of the plan, of its list, of the step."""


class StepReader:
    """Cuts complete steps out of `{"steps": [{…}, {…}` while it grows."""

    def __init__(self) -> None:
        self._step: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.begun = 0
        """Steps that have begun; more than are complete, while one is being written."""

    def feed(self, text: str) -> list[str]:
        """The JSON texts of the steps that this piece completes."""
        complete: list[str] = []
        for char in text:
            if self._depth >= _STEP_DEPTH:
                self._step.append(char)
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in _OPENING:
                self._depth += 1
                if self._depth == _STEP_DEPTH and char == "{":
                    self.begun += 1
                    self._step = [char]
            elif char in _CLOSING:
                self._depth -= 1
                if self._depth == _STEP_DEPTH - 1 and self._step:
                    complete.append("".join(self._step))
                    self._step = []
        return complete


@dataclass(frozen=True, slots=True)
class Able:
    """The first steps of a plan that can start, and what the model wants of the persona of some, by step id."""

    steps: list[Step] = field(default_factory=list)
    wishes: Mapping[str, Any] = field(default_factory=dict)


class StreamedPlan:
    """The steps of one answer that can start, in order; see the module."""

    def __init__(self, task: TaskIR, roles: Mapping[str, RoleEntry]) -> None:
        self._task = task
        self._roles = roles
        self._reader = StepReader()
        self._steps: list[ModelStep] = []
        self._chars = 0
        self._closed = False
        """Something came that no step can be read from: nothing more is taken."""

    def feed(self, text: str, start_chars: int | None) -> Able:
        """Take a piece that begins after so many characters; returns all that can start by now.

        After a gap nothing more is taken: what is missing might have been the end of a step.
        """
        if self._closed or start_chars != self._chars or self._chars + len(text) > MAX_ANSWER_CHARS:
            self._closed = True
        else:
            self._chars += len(text)
            self._take(self._reader.feed(text))
        complete = self._steps if self._reader.begun > len(self._steps) else self._steps[:-1]
        return able_to_start(complete, self._task, self._roles)

    def _take(self, texts: Sequence[str]) -> None:
        for text in texts:
            if self._closed or len(self._steps) == MAX_MODEL_STEPS:
                return
            try:
                self._steps.append(ModelStep.model_validate(json.loads(text)))
            except (ValueError, RecursionError, ValidationError):
                self._closed = True


def able_to_start(steps: Sequence[ModelStep], task: TaskIR, roles: Mapping[str, RoleEntry]) -> Able:
    """Those of the first steps of a plan that need nothing of what follows, as steps of the task."""
    wanted = wishes_of(steps, task)
    given = [artefact.name for artefact in task.inputs]
    drafts, waiting = first_repaired(drafts_of(steps, task), given, roles, worker=cast(Work.READ, roles).role)
    made = steps_of(drafts, None, task)
    able = {step.id: draft for step, draft in zip(made, drafts, strict=True) if draft.label not in waiting}
    wishes = {name: wanted[draft.label] for name, draft in able.items() if draft.label in wanted}
    return Able([step for step in made if step.id in able], wishes)
