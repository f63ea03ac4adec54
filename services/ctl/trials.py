"""The registry as a running stack knows it: with the personas on trial there. Without a stack, as the files say."""

from __future__ import annotations

import asyncio
from typing import Final

from protocol.client import AsyncClient
from protocol.errors import BusError
from protocol.messages.persona import Persona
from services.ctl.hub import CLIENT, listening
from services.kit.config import Home
from services.kit.registry import Registry, with_trials

_TIMEOUT_S: Final = 3.0
_FIELDS: Final = set(Persona.model_fields)


async def with_trials_of(client: AsyncClient, registry: Registry) -> Registry:
    """The registry with what this hub has on trial. Raises BusError."""
    views = await client.personas(timeout_s=_TIMEOUT_S)
    usable = [view for view in views if view.state in ("trial", "adopted")]
    return with_trials(registry, [Persona.model_validate(view.model_dump(include=_FIELDS)) for view in usable])


def with_live_trials(home: Home, registry: Registry) -> Registry:
    """The same of this home's hub; the registry as it is where none answers, since then nothing is on trial."""
    if not listening(home):
        return registry
    try:
        return asyncio.run(_asked(home, registry))
    except BusError:
        return registry


async def _asked(home: Home, registry: Registry) -> Registry:
    async with AsyncClient(home.hub_address, name=CLIENT) as client:
        return await with_trials_of(client, registry)
