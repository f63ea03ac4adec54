"""Every kind of message with the body it carries, and what ends a request of that kind.

The only list of kinds: the hub answers anything else with `error`, and a contract test holds golden bytes for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from protocol.messages import batch, gate, infer, memory, persona, plan, registry, reply, result, session, task
from protocol.messages.base import Message


class Empty(Message):
    """A body without fields."""


BODIES: Final[Mapping[str, type[Message]]] = {
    "session.hello": session.Hello,
    "session.welcome": session.Welcome,
    "session.reject": session.Reject,
    "session.ping": session.Ping,
    "session.pong": session.Pong,
    "session.goodbye": session.Goodbye,
    "session.reside": session.Reside,
    "session.status": session.StatusRequest,
    "session.report": session.StatusReport,
    "registry.reload": registry.Reload,
    "registry.reloaded": registry.Reloaded,
    "registry.changed": registry.RegistryChanged,
    "persona.make": persona.MakePersona,
    "persona.made": persona.PersonaMade,
    "persona.list": persona.PersonaQuery,
    "persona.listing": persona.PersonaListing,
    "persona.trials": persona.PersonasOnTrial,
    "model.load": session.ModelQuery,
    "model.unload": session.ModelQuery,
    "model.report": session.ModelReport,
    "task.submit": task.Submit,
    "task.accepted": task.Accepted,
    "task.watch": result.Watch,
    "task.event": result.TaskEvent,
    "task.result": result.TaskView,
    "task.show": result.TaskQuery,
    "task.detail": result.TaskView,
    "task.artefact": result.ArtefactQuery,
    "task.content": result.ArtefactReply,
    "task.cancel": result.CancelQuery,
    "task.cancelled": result.Cancelled,
    "task.extend": task.Extend,
    "task.extended": task.Extended,
    "task.list": result.ListQuery,
    "task.listing": result.Listing,
    "plan.request": plan.PlanRequest,
    "plan.partial": plan.PlanPartial,
    "plan.final": plan.PlanFinal,
    "plan.cancel": Empty,
    "infer.request": infer.InferRequest,
    "infer.partial": infer.InferPartial,
    "infer.final": infer.InferFinal,
    "infer.cancel": Empty,
    "batch.request": batch.BatchRequest,
    "batch.partial": batch.BatchPartial,
    "batch.final": batch.BatchFinal,
    "batch.cancel": Empty,
    "gate.request": gate.GateRequest,
    "gate.final": gate.GateFinal,
    "gate.cancel": Empty,
    "memory.request": memory.MemoryRequest,
    "memory.final": memory.MemoryFinal,
    "memory.cancel": Empty,
    "error": reply.ErrorReply,
    "refused": reply.Refused,
}

#: Requests the hub answers itself -> the kind of their final.
HUB_REQUESTS: Final[Mapping[str, str]] = {
    "session.status": "session.report",
    "registry.reload": "registry.reloaded",
    "persona.make": "persona.made",
    "persona.list": "persona.listing",
    "model.load": "model.report",
    "model.unload": "model.report",
    "task.submit": "task.accepted",
    "task.watch": "task.result",
    "task.show": "task.detail",
    "task.artefact": "task.content",
    "task.cancel": "task.cancelled",
    "task.extend": "task.extended",
    "task.list": "task.listing",
    "batch.request": "batch.final",
}

#: Requests the hub brokers to a worker with credit; their final is `<family>.final`.
CALL_REQUESTS: Final = frozenset({"plan.request", "infer.request", "gate.request", "memory.request"})

#: Requests that end with `<family>.cancel` when nobody waits for them any more.
CANCELLABLE: Final = CALL_REQUESTS | {"batch.request"}

#: What ends a request, whoever answered it.
ENDINGS: Final = frozenset(
    {"error", "refused", "plan.final", "infer.final", "gate.final", "memory.final", *HUB_REQUESTS.values()}
)

#: Failure code of the `error` with which a hub answers any message of a peer that has not said HELLO to it.
UNKNOWN_PEER: Final = "peer.unknown"

#: The one event that is not journalled: it repeats the `seq` of the newest event that is.
STEP_TOKENS: Final = "step.tokens"


def family(kind: str) -> str:
    """The part before the dot: `infer` of `infer.request`."""
    return kind.partition(".")[0]
