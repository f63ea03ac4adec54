"""Steps that become other steps: one per item of a map, turns and sub-agents of a spawning step, and their join.

Pure. It says what a step becomes when it begins and when all that came of it is done; attempts, failures and the ends
of steps are the engine's, whose hands it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import CallFailed
from protocol.messages.failure import Failure
from protocol.messages.persona import Persona
from protocol.messages.result import StepState
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.casting import Casting
from services.scheduler.failures import Action
from services.scheduler.growth import items_of, join_of
from services.scheduler.ranks import Ranking
from services.scheduler.swarm import opened, parent_of, turned
from services.scheduler.swarm_ending import closed_by, stand_in
from services.scheduler.swarm_state import turn_id
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.toolcalls import Calls


@dataclass(frozen=True, slots=True)
class StepHands:
    """What the engine does for it."""

    emit: Callable[[TaskRecord, f.Fact], None]
    attempt: Callable[[TaskRecord, StepRecord, Action, int], None]
    """Begin an attempt of a step that a model does."""
    finish: Callable[[TaskRecord, StepRecord, int], None]
    fail: Callable[[TaskRecord, StepRecord, Failure, int], None]
    contradicted: Callable[[TaskRecord, StepRecord, Failure, int], bool]
    """A step cannot begin with what it was given; False where no new plan is made for that."""


@dataclass(frozen=True, slots=True)
class Unfolding:
    """See the module."""

    ranking: Ranking
    casting: Casting
    hands: StepHands

    def begin(self, task: TaskRecord, step: StepRecord, at_ms: int) -> None:
        """All inputs are there: start the step, one sub-step per item, or the first turn of one that spawns."""
        if task.state.final or (task.revising is not None and step.spec.id in task.revising.held):
            return
        if step.spec.spawns is not None:
            self._open_swarm(task, step, at_ms)
        elif step.spec.map_over is not None:
            self._map(task, step, at_ms)
        else:
            self.hands.attempt(task, step, Action("retry", "as planned", step.spec.actor), at_ms)

    def proceed(self, task: TaskRecord, step: StepRecord, at_ms: int) -> None:
        """Nothing is missing any more for a step that waits, or whose sub-steps do."""
        if step.state is StepState.WAITING:
            self.begin(task, step, at_ms)
        elif step.state is StepState.EXPANDED:
            self._join(task, step, at_ms)

    def take_turn(self, task: TaskRecord, step: StepRecord, calls: Calls, registry: Registry, at_ms: int) -> None:
        """A turn of a planning model: what it calls is carried out or refused, and recorded in one fact."""

        def make(persona: Persona) -> str:
            made = self.casting.make(persona, made_by=step.attempt.role, at_ms=at_ms, task=task, rename=True)
            return made.name

        self.hands.emit(task, turned(task, step, calls, registry, make, at_ms))
        self.ranking.forget(task.id)

    def lead_on(self, task: TaskRecord, turn: StepRecord, failure: Failure, at_ms: int) -> bool:
        """A turn fails for good, which is recorded after this: whether its spawning step goes on all the same, by a
        turn that may only answer or with a text that stands for the answer.
        """
        closing = closed_by(task, turn, failure, at_ms)
        if closing is None:
            return stand_in(task, parent_of(task, turn)) is not None
        self.hands.emit(task, closing)
        self.ranking.forget(task.id)
        return True

    def _map(self, task: TaskRecord, step: StepRecord, at_ms: int) -> None:
        try:
            items = items_of(task, step)
        except CallFailed as err:
            if not self.hands.contradicted(task, step, err.failure, at_ms):
                self.hands.fail(task, step, err.failure, at_ms)
            return
        values = [item.model_dump(mode="json", exclude_none=True) for item in items]
        self.hands.emit(task, f.StepExpanded(task=task.id, at_ms=at_ms, step=step.spec.id, items=values))
        self.ranking.forget(task.id)
        for number in range(1, len(items) + 1):
            self.begin(task, task.steps[f"{step.spec.id}.{number}"], at_ms)
        if not items:
            self._join(task, step, at_ms)

    def _open_swarm(self, task: TaskRecord, step: StepRecord, at_ms: int) -> None:
        try:
            self.hands.emit(task, opened(task, step, at_ms))
        except CallFailed as err:
            self.hands.fail(task, step, err.failure, at_ms)
            return
        self.ranking.forget(task.id)
        self.begin(task, task.steps[turn_id(step.spec.id, 1)], at_ms)

    def _join(self, task: TaskRecord, step: StepRecord, at_ms: int) -> None:
        """The last sub-step of a mapped step is done, or a spawning step has answered: so is the step, once."""
        if task.revising is not None and step.spec.id in task.revising.held:
            return
        try:
            made = join_of(task, step, sum(1 for other in step.needs if other.startswith(f"{step.spec.id}.")))
        except CallFailed as err:
            self.hands.fail(task, step, err.failure, at_ms)
            return
        value = made.model_dump(mode="json", exclude_none=True)
        self.hands.emit(task, f.StepJoined(task=task.id, at_ms=at_ms, step=step.spec.id, artefact=value))
        self.hands.finish(task, step, at_ms)
