"""Personas that a planning model makes for steps of its plan: what of its words may become one (pure).

A model may give a step a name and a manner of work. Both are hostile text: they must pass as a persona like any
client's (`protocol/messages/persona.py`), and what does not pass is left out with a note, since a step does without.
What is made belongs to the task; whether it is of use to others, outcomes decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from protocol.codec import describe
from protocol.messages.persona import Persona
from protocol.messages.task import Plan, TaskIR
from services.kit.registry import PersonaEntry, free_name

MAX_MADE: Final = 2
"""Of one plan: a model that makes one for each step has not understood what it is for."""
_LEAST_WORDS: Final = 3
_OBJECTIVE_CHARS: Final = 120


@dataclass(frozen=True, slots=True)
class Made:
    """A plan whose steps name what was made for them."""

    plan: Plan
    personas: tuple[Persona, ...]
    notes: tuple[str, ...]


def with_personas(
    plan: Plan,
    wishes: Mapping[str, Any],
    task: TaskIR,
    known: Mapping[str, PersonaEntry],
    begun: Sequence[Persona] = (),
) -> Made:
    """`wishes` is what the model wrote, by step id; `known` are the personas there are, whose names are not taken;
    `begun` are those that it has made for earlier steps of the same plan.
    """
    made = {one.name: one for one in begun}
    notes: list[str] = []
    steps = []
    for step in plan.steps:
        wish = wishes.get(step.id)
        if wish is None:
            steps.append(step)
            continue
        try:
            persona = _persona(wish, step.actor, task, known, list(made.values()))
        except ValueError as err:
            notes.append(f"the persona of {step.id} was left out: {err}")
            steps.append(step)
            continue
        before = made.get(persona.name)
        roles = sorted({step.actor, *(before.roles if before is not None else ())})
        made[persona.name] = persona.model_copy(update={"roles": roles})
        steps.append(step.model_copy(update={"persona": persona.name}))
    return Made(plan.model_copy(update={"steps": steps}), tuple(made.values()), tuple(notes))


def _persona(wish: Any, role: str, task: TaskIR, known: Mapping[str, PersonaEntry], made: Sequence[Persona]) -> Persona:
    """Raises ValueError for what is none."""
    said, manner = (wish.get("name"), wish.get("manner")) if isinstance(wish, dict) else (None, None)
    if not isinstance(said, str) or not isinstance(manner, str) or len(manner.split()) < _LEAST_WORDS:
        raise ValueError("it has no name, or its manner says nothing")
    name = re.sub(r"[^a-z0-9]+", "-", said[:200].lower()).strip("-")[:32].lstrip("0123456789-")
    work = " ".join("".join(char if char.isprintable() else " " for char in task.objective[:_OBJECTIVE_CHARS]).split())
    try:
        persona = Persona(
            name=name,
            description=f"Made with a plan for work like: {work}",
            prompt=manner,
            roles=[role],
            task_types=[task.task_type],
        )
    except ValidationError as err:
        raise ValueError(describe(err)[:200]) from err
    prompts = {one.name: one.prompt for one in made} | {entry.name: entry.prompt for entry in known.values()}
    named = free_name(persona, prompts.get)
    if named is None:
        raise ValueError(f"{name} and all names like it are taken")
    if len(made) >= MAX_MADE and named.name not in {one.name for one in made}:
        raise ValueError(f"a plan makes at most {MAX_MADE}")
    return named
