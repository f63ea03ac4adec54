"""Reads the registry for a running hub: in a thread, so that steps go on, and one reading at a time.

Every registry that is taken up is kept as a copy in the home, where a restarted hub finds what tasks of an earlier one
still use. Whether and how it is taken up the machine decides.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

from services.kit.config import Home
from services.kit.registry import Registry, RegistryError, keep_copy, past_registries
from services.scheduler.adoption import NotWritten, adopt
from services.scheduler.events import PersonaWritten, ReadRegistry, RegistryChanged, RegistryRefused
from services.scheduler.personas import AdoptPersona

MAX_WAITING: Final = 16
"""Readings that may wait; each takes some ten milliseconds for an ordinary registry."""


class RegistryReader:
    """`read` asks, `outcomes` gives what has been read since; both for the hub's loop only."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._asked: deque[ReadRegistry] = deque()
        self._refused: deque[ReadRegistry] = deque()
        self._reading: ReadRegistry | None = None
        self._done: queue.SimpleQueue[Registry | RegistryError | OSError] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[tuple[str, str | None, Registry | None]] = queue.SimpleQueue()

    def read(self, asked: ReadRegistry) -> None:
        """Read the files for whoever asked; refused where too many wait already."""
        if len(self._asked) >= MAX_WAITING:
            self._refused.append(asked)
            return
        self._asked.append(asked)
        self._next()

    def outcomes(self, at_ms: int) -> Iterator[RegistryChanged | RegistryRefused]:
        """What has become of readings, in the order in which they were asked for."""
        while self._refused:
            asked = self._refused.popleft()
            reason = f"{MAX_WAITING} reloads wait already; ask again in a moment"
            yield RegistryRefused(reason, (), asked.identity, asked.header, at_ms)
        while self._reading is not None:
            try:
                found = self._done.get_nowait()
            except queue.Empty:
                return
            asked, self._reading = self._reading, None
            self._next()
            yield _outcome(asked, found, at_ms)

    def adopt(self, asked: AdoptPersona, declared: Registry) -> None:
        """Write a persona into the files; the hub asks for one at a time."""
        args = (asked, declared)
        threading.Thread(target=self._adopt, args=args, name="persona-writer", daemon=True).start()

    def written(self, at_ms: int) -> Iterator[PersonaWritten]:
        """What has become of it."""
        while not self._written.empty():
            name, problem, registry = self._written.get()
            yield PersonaWritten(name, problem, registry, at_ms)

    def keep(self) -> None:
        """Keep a copy of what the hub starts with. Raises RegistryError, OSError."""
        keep_copy(self._home.registry, self._home.models, self._home.registry_copies, check_files=False)

    def past_with(self, lacking: Mapping[str, set[str]]) -> Registry | None:
        """The newest registry of the past that has all of these names, by section; else the newest that has any."""
        if not lacking:
            return None
        partly: Registry | None = None
        for past in past_registries(self._home.registry_copies, self._home.models):
            missing = sum(len(names - getattr(past, section).keys()) for section, names in lacking.items())
            if not missing:
                return past
            if partly is None and missing < sum(map(len, lacking.values())):
                partly = past
        return partly

    def _next(self) -> None:
        if self._reading is None and self._asked:
            self._reading = self._asked.popleft()
            threading.Thread(target=self._read, name="registry-reader", daemon=True).start()

    def _read(self) -> None:
        home = self._home
        try:
            # Whether model files exist concerns the inference services, not the hub.
            self._done.put(keep_copy(home.registry, home.models, home.registry_copies, check_files=False))
        except (RegistryError, OSError) as err:
            self._done.put(err)

    def _adopt(self, asked: AdoptPersona, declared: Registry) -> None:
        name = asked.persona.name
        try:
            self._written.put((name, None, adopt(asked, self._home, declared)))
        except NotWritten as err:
            self._written.put((name, str(err), None))
        except Exception as err:  # noqa: BLE001  a bug there must not leave the hub waiting for an outcome for ever
            self._written.put((name, f"writing it failed: {err!r}", None))


def _outcome(
    asked: ReadRegistry, found: Registry | RegistryError | OSError, at_ms: int
) -> RegistryChanged | RegistryRefused:
    match found:
        case RegistryError():
            count = len(found.problems)
            reason = f"the registry has {count} problem{'s' if count > 1 else ''}"
            return RegistryRefused(reason, found.problems, asked.identity, asked.header, at_ms)
        case OSError():
            reason = f"no copy of the registry can be kept in the home: {found}"
            return RegistryRefused(reason, (), asked.identity, asked.header, at_ms)
        case _:
            if asked.digest not in (None, found.digest):
                reason = "the files are not those that were checked: somebody has changed them meanwhile; try again"
                return RegistryRefused(reason, (), asked.identity, asked.header, at_ms)
            return RegistryChanged(found, asked.identity, asked.header, at_ms)
