"""Digests of what stands behind a choice, so that outcomes of another model or prompt do not count for this one."""

from __future__ import annotations

import json

from services.kit.identity import work_key
from services.kit.registry.registry import Registry


def versions(subject: str, choice: str, registry: Registry) -> tuple[str, str]:
    """Digests of the model and of the prompt behind a choice; empty where there is none."""
    if subject == "role" and choice in registry.roles:
        role, model = registry.roles[choice], registry.model_of(choice)
        return (
            _digest(model.model_dump(mode="json", include={"engine", "path", "experts", "speculation"})),
            _digest(role.model_dump(mode="json", include={"prompt", "sampling"})),
        )
    if subject == "persona" and choice in registry.personas:
        return "", prompt_digest(registry.personas[choice].prompt)
    return "", ""


def prompt_digest(prompt: str) -> str:
    """The digest that outcomes of a persona with this prompt are stored under."""
    return _digest(prompt)


def _digest(content: object) -> str:
    return work_key(json.dumps(content, sort_keys=True))[:16]
