"""Asks the planner for a task's plan and takes up what it answers, piece by piece or as a whole.

What is asked and which facts adopt the answer is `planning.py`; a plan made anew while its task runs is
`replanning.py`'s. Pure, like the engine whose hands it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.codec import unpack_body
from protocol.errors import CallFailed
from protocol.messages.failure import Failure
from protocol.messages.plan import PlanFinal, PlanPartial
from protocol.messages.result import StepState, TaskState
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.casting import Casting
from services.scheduler.failures import Work
from services.scheduler.growth import reach_of
from services.scheduler.own_calls import Wanted
from services.scheduler.planning import adopted, grown, plan_body, plan_wanted
from services.scheduler.ranks import Ranking
from services.scheduler.replanning import Replanning
from services.scheduler.setbacks import is_retry
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.versions import replan_body


@dataclass(frozen=True, slots=True)
class PlanHands:
    """What the engine does for it."""

    emit: Callable[[TaskRecord, f.Fact], None]
    ask: Callable[[TaskRecord, Wanted, int, int], None]
    """Queue a call about the task; not before the second time."""
    begin: Callable[[TaskRecord, StepRecord, int], None]
    """All inputs of the step are there."""
    failed: Callable[[TaskRecord, Work, Failure, int], None]
    """The planner has none that can run."""


@dataclass(frozen=True, slots=True)
class Plans:
    """See the module. `registry` gives the one in force."""

    registry: Callable[[], Registry]
    ranking: Ranking
    casting: Casting
    replanning: Replanning
    hands: PlanHands

    def ask(self, task: TaskRecord, at_ms: int, hold_until_ms: int = 0) -> None:
        """Have the task planned, or the plan completed that somebody began to tell."""
        retries = sum(1 for one in task.setbacks.newest if is_retry(one.work, one.action, Work.PLAN))
        self.hands.ask(task, plan_wanted(retries), at_ms, hold_until_ms)

    def body(self, task: TaskRecord, at_ms: int) -> bytes:
        """What the planner is asked, when the call starts."""
        return plan_body(task) if task.revising is None else replan_body(task, self.ranking, at_ms)

    def on_answer(self, task: TaskRecord, body: bytes, failure: Failure | None, at_ms: int) -> None:
        """The planner has answered, or could not. Raises BadFrame for an answer that cannot be read."""
        if task.revising is None and task.state is not TaskState.PLANNING and not task.plan_open:
            return  # nobody waits for it any more
        work = planning_of(task)
        registry = self.registry()
        if failure is None:
            try:
                final = self.casting.make_those_of(task, unpack_body(PlanFinal, body), registry, at_ms)
                if work is Work.REPLAN:
                    self.replanning.on_planned(task, final, at_ms)
                    return
                self.hands.emit(task, adopted(task, final, registry, self.ranking, at_ms))
                self.ranking.forget(task.id)
            except CallFailed as err:
                failure = err.failure
        if failure is not None:
            self.hands.failed(task, work, failure, at_ms)
            return
        self._drop_without(task, at_ms)
        self.replanning.go_on(task, at_ms)

    def on_partial(self, task: TaskRecord, partial: PlanPartial, at_ms: int) -> None:
        """The first steps of a plan in the making can start; what cannot run is left to the whole plan."""
        if task.revising is not None or not (task.state is TaskState.PLANNING or task.plan_open):
            return
        if all(step.id in task.steps for step in partial.steps):
            return  # told before
        registry = self.registry()
        try:
            partial = self.casting.make_those_begun(task, partial, registry, at_ms)
        except CallFailed:
            return  # its personas cannot be; the whole plan is refused for it as well, and says so
        fact = grown(task, partial, registry, at_ms)
        if fact is not None:
            self.hands.emit(task, fact)
            self.ranking.forget(task.id)
            self._drop_without(task, at_ms)
            for step in list(task.steps.values()):
                if not step.waiting_for and step.state is StepState.WAITING:
                    self.hands.begin(task, step, at_ms)

    def _drop_without(self, task: TaskRecord, at_ms: int) -> None:
        """Steps that were planned after somebody cancelled what they need are cancelled with it."""
        for gone in [step.spec.id for step in task.steps.values() if step.state is StepState.CANCELLED]:
            for name in reach_of(task, gone):
                if not task.steps[name].state.final:
                    why = f"needs {gone}, which was cancelled"
                    fact = f.StepDropped(task=task.id, at_ms=at_ms, step=name, state="cancelled", reason=why)
                    self.hands.emit(task, fact)


def planning_of(task: TaskRecord) -> Work:
    """What the planner is at, for a task that waits for it."""
    return Work.PLAN if task.revising is None else Work.REPLAN


def will_grow(task: TaskRecord) -> bool:
    """Whether steps are still to come: the plan is being written, or written anew."""
    return task.plan_open or task.revising is not None
