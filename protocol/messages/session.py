"""Sessions: how a peer introduces itself to the hub, stays alive in its eyes, and leaves."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from protocol.messages.base import Message, Millis


class PeerState(StrEnum):
    """Life cycle of a service as it reports it."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    PARKED = "parked"
    """Its model is not in memory; it loads when the hub says so (`session.reside`)."""
    UNLOADING = "unloading"
    """Its model is on the way out of memory."""


class Hello(Message):
    """First message of a session, and again after every `unknown_peer` error or reject."""

    service: str = Field(max_length=128)
    """Name of the process, such as `inference-worker`; a new epoch of the same name replaces the old one."""
    protocol_min: int = Field(ge=1)
    protocol_max: int = Field(ge=1)
    capabilities: list[str] = Field(default_factory=list, max_length=64)
    """Targets this peer answers, such as `infer.worker`; a client has none."""
    state: PeerState = PeerState.READY
    pid: int = Field(default=0, ge=0)
    in_flight: list[str] = Field(default_factory=list, max_length=10_000)
    """Keys of the calls this peer is still working on: they are re-attached, not computed again."""
    finished: list[str] = Field(default_factory=list, max_length=10_000)
    """Keys of results this peer still holds because the hub may not have read them."""


class Welcome(Message):
    """The hub's yes."""

    protocol: int
    hub_epoch: str
    ping_ms: Millis
    """The hub pings this often; a peer that hears nothing for three times as long says HELLO again."""
    drop: list[str] = Field(default_factory=list)
    """In-flight keys nobody waits for any more: cancel them."""
    resend: list[str] = Field(default_factory=list)
    """Finished keys whose result the hub has not seen: send it again."""
    registry: str | None = None
    """Digest of the registry that the hub works with: a service with another one reads it again."""


class Reject(Message):
    """The hub's no. `version` is final; `fenced` and `replaced` ask for a new epoch."""

    code: str
    message: str


class Ping(Message):
    """From the hub once a second to every service and to who waits for a call, and to any peer that was sent much since
    its last pong."""

    at_ms: Millis


class Pong(Message):
    """Answer to a ping, written by the loop that does the work; also sent unasked when the state changes."""

    state: PeerState
    reason: str | None = None
    """Why the state is not ready, for people."""
    in_flight: int = Field(ge=0)
    """Calls it is working on. Fewer than the hub knows of, twice in a row: messages were lost, the session is over."""
    loop_lag_ms: float = Field(ge=0)
    """Longest delay of the work loop since the last pong, in milliseconds."""
    rss_bytes: int = Field(ge=0)
    """Resident memory of this service plus its children, in bytes."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Service-specific figures, such as llama.cpp's token counters; shown by `tierline status`."""
    registry: str | None = None
    """Digest of the registry it works with; absent for a service that reads none."""
    model_bytes: int = Field(default=0, ge=0)
    """Memory that the loaded model is measured to take, its share of shared pages counted once; 0 = not measured."""
    needs_bytes: int = Field(default=0, ge=0)
    """Memory that its model will take when it is loaded, by the headers of its files; 0 = not known."""
    order: int = Field(default=0, ge=0)
    """Number of the newest `session.reside` of this session that it has heard; `state` is what came of it so far."""


class Reside(Message):
    """The hub's word whether a service shall have its model in memory. The service answers with pongs: at once, and
    when its state changes. One that is working refuses to unload and stays READY."""

    loaded: bool
    order: int = Field(ge=1)
    """Rises within a session; an older one that comes late has no effect, a repeated one is answered again."""


class Goodbye(Message):
    """The peer takes no new work and leaves when what it has is finished."""

    reason: str


class StatusRequest(Message):
    """Ask the hub who is there."""


class PeerReport(Message):
    """One peer as the hub sees it."""

    service: str
    epoch: str
    state: str
    """PeerState, or `suspect` when it has been silent."""
    reason: str | None = None
    capabilities: list[str]
    granted: int
    used: int
    in_flight: list[str]
    """Keys of its running calls."""
    silent_ms: Millis
    pid: int
    loop_lag_ms: float
    rss_bytes: int
    metrics: dict[str, Any]
    registry: str | None = None
    """Digest of the registry it works with, as its pongs say; one that differs from the hub's lags behind."""


class ModelReport(Message):
    """One model entry and its place in memory, as the hub sees it."""

    model: str
    residency: Literal["hot", "warm", "cold"]
    pinned: bool
    state: Literal["absent", "parked", "loading", "loaded", "unloading", "degraded"]
    """`absent`: no service for it is there."""
    need_bytes: int = Field(ge=0)
    """Memory it is expected to take: measured when it was loaded last, else by its service, its entry or estimate."""
    held_bytes: int = Field(ge=0)
    """Memory booked for it out of the budget now."""
    measured_bytes: int = Field(ge=0)
    """Memory it was measured to take at most; 0 = not yet."""
    used_ms: Millis | None = None
    """When it last had work; absent = not since the hub started."""
    loads: int = Field(default=0, ge=0)
    """Times it was told to load since the hub started."""
    waiting: str | None = None
    """Why work that needs it has to wait, for people; absent = none does."""
    too_large: str | None = None
    """Why the budget can never hold a warm or cold one beside the models that stay, so that it loads only alone, for
    people, as soon as it is measured; absent = it can."""


class MemoryBudget(Message):
    """Memory for all models together: `hardware.memory_bytes`, and what is booked of it."""

    budget_bytes: int = Field(ge=0)
    held_bytes: int = Field(ge=0)
    available_bytes: int | None = None
    """What the machine, or its control group, has left by its own account; absent = not looked at."""
    low: bool = False
    """The machine is short of memory: idle warm models are unloaded, none is loaded ahead of need."""


class ModelQuery(Message):
    """Body of `model.load` and `model.unload`: one model entry by name. Warm and cold ones only."""

    model: str = Field(max_length=128)


class ClientReport(Message):
    """One client as the hub sees it: connected, or with tasks that are not final."""

    client: str
    weight: float
    """Its share of the slots, by `registry/clients.yaml`."""
    tasks: int
    """Its tasks that are not final."""
    waiting: int
    """Calls for it that wait for a slot."""
    running: int
    """Calls for it that are worked on."""


class StatusReport(Message):
    """The hub's view of the system."""

    hub_epoch: str
    hub_pid: int
    uptime_ms: Millis
    peers: list[PeerReport]
    queued: dict[str, int]
    """Calls waiting per capability."""
    tasks: dict[str, int]
    """Number of tasks per state."""
    counters: dict[str, int]
    """Totals since the hub started, such as `duplicates` and `reattached`."""
    registry: str | None = None
    """Digest of the registry that the hub works with."""
    models: list[ModelReport] = Field(default_factory=list)
    """Every model entry with its place in memory."""
    memory: MemoryBudget | None = None
    """The budget they share."""
    clients: list[ClientReport] | None = None
    """Those with most calls first, a hundred at most; absent = the hub is of an older version."""
    circuits: dict[str, str] | None = None
    """Capabilities whose processes failed again and again and are left alone for a while, each with the reason; absent
    where there are none."""
