"""Personas that were made at run time, laid over the registry as if they stood in its files.

Whoever holds such a registry needs to know nothing more: a step may name them, prompts are composed with them, advice
is asked about them. Only rules never choose one by themselves (`by_rule`). Which ones there are the hub decides
(`services/scheduler/personas.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import MappingProxyType

from protocol.messages.persona import Persona
from services.kit.registry.entries import PersonaEntry, PersonaFit
from services.kit.registry.registry import Registry


def persona_entry(persona: Persona) -> PersonaEntry:
    """As it would stand in personas.yaml: good where it was wanted, which says nothing of all the rest."""
    return PersonaEntry(
        name=persona.name,
        description=persona.description,
        prompt=persona.prompt,
        fits=PersonaFit(roles=tuple(persona.roles), task_types=tuple(persona.task_types)),
        by_rule=False,
    )


def free_name(persona: Persona, prompt_of: Callable[[str], str | None]) -> Persona | None:
    """The persona under a name that no other prompt has, its own if that is so; None if all names like it are taken.

    `prompt_of` gives the prompt that a name has already. The same name and prompt get the same name again.
    """
    digest = hashlib.sha256(persona.prompt.encode()).hexdigest()
    parts = (digest[start : start + 4] for start in range(0, len(digest), 4))
    for name in (persona.name, *(f"{persona.name[:27]}-{part}" for part in parts)):
        if prompt_of(name) in (None, persona.prompt):
            return persona.model_copy(update={"name": name})
    return None


def with_trials(registry: Registry, personas: Iterable[Persona]) -> Registry:
    """The registry with these on trial, instead of those that were; what the files declare is never covered."""
    declared = {name: entry for name, entry in registry.personas.items() if name not in registry.on_trial}
    tried = {one.name: persona_entry(one) for one in personas if one.name not in declared}
    if not tried and not registry.on_trial:
        return registry
    return replace(registry, personas=MappingProxyType({**declared, **tried}), on_trial=frozenset(tried))


def with_own(registry: Registry, personas: Iterable[Persona]) -> Registry:
    """The registry as one task sees it: its own personas cover others of their name, and are on trial."""
    own = {one.name: persona_entry(one) for one in personas}
    if not own:
        return registry
    personas_too = MappingProxyType({**registry.personas, **own})
    return replace(registry, personas=personas_too, on_trial=registry.on_trial | own.keys())
