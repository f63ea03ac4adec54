"""What goes into the hub's machine and what comes out of it. Values only; `machine.py` says what follows from what."""

from __future__ import annotations

from typing import Any

import msgspec

from protocol.header import Header
from protocol.messages.result import ListQuery, Watch
from services.kit.logs import LogEvent
from services.kit.registry import Problem, Registry
from services.scheduler import facts as f
from services.scheduler.effects import Record
from services.scheduler.past import Known, Past
from services.scheduler.personas import AdoptPersona, KeepPersona
from services.scheduler.tasks import TaskRecord

# Events


class FrameIn(msgspec.Struct, frozen=True):
    """A message arrived on the socket."""

    identity: bytes
    frames: list[bytes]
    at_ms: int


class Undeliverable(msgspec.Struct, frozen=True):
    """Sending to this peer failed: it is gone, or its pipe is full (`full`), which for the session is the same."""

    identity: bytes
    at_ms: int
    full: bool = False


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""

    at_ms: int


class MemorySeen(msgspec.Struct, frozen=True):
    """What the machine, or its control group, has left by its own account."""

    available_bytes: int
    at_ms: int


class Restored(msgspec.Struct, frozen=True):
    """A task from the journal, to be taken up where it stood."""

    task: TaskRecord
    at_ms: int
    past: Registry | None = None
    """An earlier registry that has what the task uses and the present one has not, see `Hub.lacks`."""


class LookedUp(msgspec.Struct, frozen=True):
    """What the journal knows about the task that a message is about."""

    identity: bytes
    header: Header
    body: bytes
    task: TaskRecord | Past | Known | None
    at_ms: int


class EventsRead(msgspec.Struct, frozen=True):
    """The next facts for a watcher that came late, with their numbers; none = the journal has no more."""

    identity: bytes
    header: Header
    query: Watch
    facts: list[tuple[int, f.Fact]]


class RegistryChanged(msgspec.Struct, frozen=True):
    """The files were read for whoever asked, and have passed every rule."""

    registry: Registry
    identity: bytes
    header: Header
    at_ms: int


class PersonaWritten(msgspec.Struct, frozen=True):
    """What became of AdoptPersona. With `registry` the files, read anew, differ in this persona alone."""

    name: str
    problem: str | None
    registry: Registry | None
    at_ms: int


class RegistryRefused(msgspec.Struct, frozen=True):
    """The files were read for whoever asked, and are not taken up."""

    reason: str
    problems: tuple[Problem, ...]
    identity: bytes
    header: Header
    at_ms: int


class Reported(msgspec.Struct, frozen=True):
    """A listing or a report is made, for this request among others."""

    identity: bytes
    header: Header
    kind: str
    body: bytes
    at_ms: int


class OthersServed(msgspec.Struct, frozen=True):
    """Whatever had arrived since ServeOthers is handled."""

    at_ms: int


Event = (
    FrameIn
    | Undeliverable
    | Tick
    | MemorySeen
    | Restored
    | LookedUp
    | EventsRead
    | RegistryChanged
    | RegistryRefused
    | PersonaWritten
    | OthersServed
    | Reported
)


# Commands


class Send(msgspec.Struct, frozen=True):
    """Send this message; one that `promises` something goes out only when all facts before it are written.

    Work for a peer promises nothing: keys follow from the inputs alone, so a hub that dies before it has written what
    led to a call comes to the same call again, and its worker attaches it or answers from what it has finished.
    """

    identity: bytes
    header: bytes
    body: bytes
    promises: bool = True


class LookUp(msgspec.Struct, frozen=True):
    """Read this task from the journal and come back with LookedUp."""

    task_id: str
    identity: bytes
    header: Header
    body: bytes
    whole: bool = True
    """False where it is enough to know whether there is one: LookedUp then has `Known`."""


class ReadEvents(msgspec.Struct, frozen=True):
    """Read facts after `query.after_seq`, as many as suit, once all facts so far are written; answer EventsRead."""

    identity: bytes
    header: Header
    query: Watch


class ReadListing(msgspec.Struct, frozen=True):
    """Answer a `task.list` from the journal's index."""

    identity: bytes
    header: Header
    query: ListQuery


class ReadStatus(msgspec.Struct, frozen=True):
    """Answer a `session.status`: the report needs the journal's counts."""

    identity: bytes
    header: Header


class ReadRegistry(msgspec.Struct, frozen=True):
    """Read and check the files; come back with RegistryChanged or RegistryRefused."""

    identity: bytes
    header: Header
    digest: str | None
    """What must be found there; None = whatever there is."""


class ReloadUnsettled(msgspec.Struct, frozen=True):
    """Bring back ended tasks whose outcomes memory does not have, as Restored, while there is room."""


class ServeOthers(msgspec.Struct, frozen=True):
    """There is more to do that nobody else should wait for: come back with OthersServed."""


class Noted(msgspec.Struct, frozen=True):
    """A line for the log."""

    event: LogEvent
    fields: dict[str, Any]


Command = (
    Send
    | Record
    | KeepPersona
    | LookUp
    | ReadEvents
    | ReadListing
    | ReadStatus
    | ReadRegistry
    | AdoptPersona
    | ReloadUnsettled
    | ServeOthers
    | Noted
)
