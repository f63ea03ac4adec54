"""Carries out what `versions.py` decides: asks the planner for a new rest, adopts it, or goes on without.

While a new version is in the making, what it may drop does not begin; everything else goes on. Exactly one thing
follows each request: the version is adopted, or it is abandoned and the task goes on as it was, or ends with what
asked for it. Pure, like the engine whose hands it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protocol.messages.failure import Failure
from protocol.messages.plan import PlanFinal, ReplanTrigger
from protocol.messages.result import StepState, TaskState
from services.kit.identity import work_key
from services.scheduler import facts as f
from services.scheduler.checking import step_check_parts
from services.scheduler.failures import History, Work, react
from services.scheduler.lateness import lateness
from services.scheduler.own_calls import Wanted
from services.scheduler.ranks import Ranking
from services.scheduler.setbacks import is_retry
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.versions import (
    adopted_version,
    asked,
    asked_since_late,
    failed_in_plan,
    replan_wanted,
    replans_left,
    trigger_of,
)

_LOOK_MS: Final = 1_000
"""A task with a deadline is looked at once in so many ms, and one ms more for each open step: keeps the cost flat."""
_LOOK_PER_S: Final = 50
"""More often where there is little time: once in so many ms for each second of its deadline."""


@dataclass(frozen=True, slots=True)
class Hands:
    """What the engine does for it."""

    emit: Callable[[TaskRecord, f.Fact], None]
    ask: Callable[[TaskRecord, Wanted, int, int], None]
    """Queue a call about the task; not before the second time."""
    drop: Callable[[str], None]
    """Cancel the call with this key."""
    proceed: Callable[[TaskRecord, StepRecord, int], None]
    """Begin a step whose needs are done, or join a mapped one."""
    finish: Callable[[TaskRecord, int], None]
    """All steps are done."""
    fail: Callable[[TaskRecord, Failure, str, int], None]
    """End the task."""


@dataclass(slots=True)
class Replanning:
    """See the module."""

    ranking: Ranking
    hands: Hands
    _looked_ms: dict[str, int] = field(default_factory=dict)
    """Task -> when it is worth looking again whether it will be late."""

    def history(self, task: TaskRecord) -> History:
        """What was before a failure that belongs to no attempt."""
        return History(replans_left=replans_left(task, self.ranking.registry))

    def begin(
        self, task: TaskRecord, trigger: ReplanTrigger, step: str | None, failure: Failure, rule: str, at_ms: int
    ) -> None:
        """Have the rest planned anew. Where that is being done already, or the plan is still being written, this
        failure's turn comes afterwards (`go_on`).
        """
        if task.revising is not None or task.plan_open:
            return
        self.hands.emit(task, asked(task, trigger, step, failure, rule, at_ms))
        self.ask(task, at_ms)

    def result_contradicts(self, task: TaskRecord, step: StepRecord, failure: Failure, at_ms: int) -> bool:
        """A step cannot begin with what it was given; False where the table has no new plan for that."""
        action = react(self.ranking.registry, Work.RESULT, failure, step.spec.actor, self.history(task))
        if action.kind != "replan":
            return False
        self.hands.emit(task, _failed(task, step, failure, at_ms))
        self.begin(task, trigger_of(failure), step.spec.id, failure, action.rule, at_ms)
        return True

    def look(self, task: TaskRecord, at_ms: int) -> None:
        """Ask for a new rest if the deadline would be missed."""
        deadline_s = task.ir.deadline_s
        if deadline_s is None or task.state is not TaskState.RUNNING or at_ms < self._looked_ms.get(task.id, 0):
            return
        self._looked_ms[task.id] = at_ms + min(_LOOK_MS, int(deadline_s * _LOOK_PER_S)) + task.unfinished
        late = lateness(task, self.ranking, at_ms) if replans_left(task, self.ranking.registry) > 0 else None
        if late is not None:
            self.hands.emit(task, asked_since_late(task, late, self.ranking.registry, at_ms))
            self.ask(task, at_ms)

    def ask(self, task: TaskRecord, at_ms: int, hold_until_ms: int = 0) -> None:
        """Ask the planner; after a failed attempt anew, after a restart of the hub the same again."""
        retries = sum(1 for one in task.setbacks.newest if is_retry(one.work, one.action, Work.REPLAN))
        self.hands.ask(task, replan_wanted(task, retries, at_ms), at_ms, hold_until_ms)

    def on_planned(self, task: TaskRecord, final: PlanFinal, at_ms: int) -> None:
        """The planner has answered. Raises CallFailed for a plan that is not adopted."""
        fact = adopted_version(task, final, self.ranking.registry, self.ranking, at_ms)
        for name in fact.dropped:
            step = task.steps[name]
            if not step.state.final and step.attempts:
                self.hands.drop(step.attempt.key)
                self.hands.drop(work_key(task.id, *step_check_parts(step)))
        self.hands.emit(task, fact)
        self.ranking.forget(task.id)
        self.go_on(task, at_ms)

    def abandon(self, task: TaskRecord, failure: Failure, at_ms: int) -> None:
        """There will be no new version: the task ends with what asked for it, or goes on as it was."""
        revising = task.revising
        if revising is None:
            return
        fact = f.ReplanAbandoned(
            task=task.id, at_ms=at_ms, version=revising.version, reason=f"{failure.code}: {failure.message}"[:1_000]
        )
        self.hands.emit(task, fact)
        if revising.failure is not None:
            where = "the final checks" if revising.step is None else f"step {revising.step}"
            self._end(task, revising.failure, where, at_ms)
        else:
            self.go_on(task, at_ms)

    def forget(self, task_id: str) -> None:
        """The task has ended."""
        self._looked_ms.pop(task_id, None)

    def go_on(self, task: TaskRecord, at_ms: int) -> None:
        """The plan is whole, or there is another one, or none will come: begin what can, plan around whatever has
        failed meanwhile, or end with it.
        """
        name = failed_in_plan(task)
        if name is not None:
            failure = task.steps[name].failure
            if failure is None:
                raise ValueError(f"step {name} of {task.id} has failed without a failure")
            action = react(self.ranking.registry, Work.RESULT, failure, task.steps[name].role, self.history(task))
            if action.kind == "replan":
                self.begin(task, trigger_of(failure), name, failure, action.rule, at_ms)
            else:
                self._end(task, failure, f"step {name}", at_ms)
                return
        for step in list(task.steps.values()):
            if task.state is not TaskState.RUNNING:
                return
            if not step.waiting_for and step.state in (StepState.WAITING, StepState.EXPANDED):
                self.hands.proceed(task, step, at_ms)
        if task.unfinished == 0 and task.state is TaskState.RUNNING and task.revising is None:
            self.hands.finish(task, at_ms)

    def _end(self, task: TaskRecord, failure: Failure, where: str, at_ms: int) -> None:
        told = failure.model_copy(update={"message": f"{where}: {failure.message}"[:8_000]})
        self.hands.fail(task, told, f"{where} failed", at_ms)


def _failed(task: TaskRecord, step: StepRecord, failure: Failure, at_ms: int) -> f.StepFailed:
    value = failure.model_dump(mode="json", exclude_none=True)
    return f.StepFailed(task=task.id, at_ms=at_ms, step=step.spec.id, failure=value)
