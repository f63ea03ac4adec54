"""Personas that belong to a task: made for it, come with its plan, or taken up from those on trial. Pure.

What becomes of a persona beyond the task is `personas.py`; which one a step has is the plan's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from protocol.errors import BadFrame, CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.persona import Persona, PersonaMade
from protocol.messages.plan import PlanFinal, PlanPartial
from protocol.messages.task import Plan
from services.kit.registry import Registry
from services.scheduler import facts as f
from services.scheduler.personas import Personas
from services.scheduler.planning import PLANNER, steps_with_names, with_names
from services.scheduler.tasks import TaskRecord

MAX_OWN_PERSONAS: Final = 256
"""Of one task: each is in its facts and in memory for as long as it runs."""


class Casting:
    """Gives tasks personas of their own; `emit` takes the facts about that."""

    def __init__(self, personas: Personas, emit: Callable[[TaskRecord, f.Fact], None]) -> None:
        self._personas = personas
        self._emit = emit

    def make(
        self, persona: Persona, *, made_by: str, at_ms: int, task: TaskRecord | None = None, rename: bool = False
    ) -> PersonaMade:
        """Have a persona, for everybody or also for a task that is not final; steps name it as the answer says.

        Raises BadFrame, see `Personas.make`.
        """
        own = {} if task is None else task.personas
        if len(own) >= MAX_OWN_PERSONAS and persona.name not in own:
            raise BadFrame("persona.full", f"the task has {MAX_OWN_PERSONAS} personas of its own, more are not taken")
        named, made = self._personas.make(
            persona, made_by=made_by, at_ms=at_ms, task=None if task is None else task.id, own=own, rename=rename
        )
        if task is not None:
            self._give(task, [named], at_ms)
        return made

    def make_those_of(self, task: TaskRecord, final: PlanFinal, registry: Registry, at_ms: int) -> PlanFinal:
        """Make the personas that come with a plan; the plan with the names they got. Raises CallFailed (SCHEMA)."""
        final = with_names(final, self._make_all(task, final.personas, at_ms))
        if final.task.plan is not None:
            self.take_up_trials(task, final.task.plan, registry, at_ms)
        return final

    def make_those_begun(self, task: TaskRecord, partial: PlanPartial, registry: Registry, at_ms: int) -> PlanPartial:
        """The same for the steps of a plan in the making."""
        steps = steps_with_names(partial.steps, self._make_all(task, partial.personas, at_ms))
        self.take_up_trials(task, Plan(steps=steps), registry, at_ms)
        return partial.model_copy(update={"steps": steps})

    def _make_all(self, task: TaskRecord, personas: Iterable[Persona], at_ms: int) -> dict[str, str]:
        """The name that each has from now on, by the one it came with."""
        try:
            return {
                one.name: self.make(one, made_by=PLANNER, at_ms=at_ms, task=task, rename=True).name for one in personas
            }
        except BadFrame as err:
            failure = Failure(code="plan.invalid", category=Category.SCHEMA, origin=PLANNER, message=str(err)[:8_000])
            raise CallFailed(failure) from err

    def take_up_trials(self, task: TaskRecord, plan: Plan, registry: Registry, at_ms: int) -> None:
        """What these steps name and is on trial the task keeps, whatever becomes of the trial."""
        names = {plan.persona, *(step.persona for step in plan.steps)} - task.personas.keys()
        if names & registry.on_trial:
            self._give(task, [one for one in self._personas.on_trial() if one.name in names], at_ms)

    def _give(self, task: TaskRecord, personas: Iterable[Persona], at_ms: int) -> None:
        """They are the task's own from now on."""
        new = [one for one in personas if task.personas.get(one.name) != one]
        if new:
            values = [one.model_dump(mode="json") for one in new]
            self._emit(task, f.PersonasMade(task=task.id, at_ms=at_ms, personas=values))
            self._personas.used([one.name for one in new], at_ms)
