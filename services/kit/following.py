"""Keeps a service's registry up to date: told by the hub, read from disk in a thread, taken up whole or not at all.

What a new registry means for the service it knows itself (`take`). Until it has one in its hands, and where the files
have errors, it goes on with the old one and its pongs say so; the hub tells it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from services.kit.config import Home
from services.kit.logs import Log, LogEvent
from services.kit.registry import Registry, RegistryError, load_registry

REGISTRY_TAKEN: Final = LogEvent("registry.taken", "digest previous")
REGISTRY_REFUSED: Final = LogEvent("registry.refused", "wanted problems reason", "error")


class RegistryFollower:
    """One service's registry.

    `take(registry, needed)` is called in the service's loop with each new one, and again while the hub asks for it; it
    returns False to stay with the old one for now.
    """

    def __init__(self, home: Home, log: Log, registry: Registry, take: Callable[[Registry, bool], bool]) -> None:
        self._home = home
        self._log = log
        self._take = take
        self.digest = registry.digest
        """Of the registry the service works with."""
        self._wanted: tuple[str, bool] | None = None
        self._reading: asyncio.Task[None] | None = None

    def told(self, digest: str, *, needed: bool) -> None:
        """The hub works with this registry. Starts reading it unless it is the one we have."""
        if digest == self.digest:
            return
        self._wanted = (digest, needed)
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read())

    def let_go(self) -> None:
        """The service leaves: it works with none any more, and wants to hear even of the one it had."""
        self.digest = ""

    async def _read(self) -> None:
        try:
            while self._wanted is not None:
                (digest, needed), self._wanted = self._wanted, None
                await self._read_one(digest, needed=needed)
        finally:
            self._reading = None

    async def _read_one(self, digest: str, *, needed: bool) -> None:
        try:
            # In a thread: pings are answered meanwhile. Model files are the business of those who load them.
            registry = await asyncio.to_thread(load_registry, self._home.registry, self._home.models, check_files=False)
        except RegistryError as err:
            self._log.write(REGISTRY_REFUSED, wanted=digest, problems=len(err.problems), reason=str(err.problems[0]))
            return
        if registry.digest == self.digest or not self._take(registry, needed):
            return
        previous, self.digest = self.digest, registry.digest
        self._log.write(REGISTRY_TAKEN, digest=registry.digest, previous=previous)
