"""Which calls have waited long enough for a model that its service cannot serve. Pure.

A slot that is busy comes free, a model that loads is loaded at last, and a process that is gone is started again: for
those a call waits until its deadline. A service that is DEGRADED has found something that a person may have to repair,
such as a damaged model file or a refused key. So such a wait is bounded, by `caps.degraded_wait_ms` of the failure
table, and ends as a lack of RESOURCE with the service's own words; whether the same work waits once more is the table's
to say. A role with a `lateral` model that is served has gone there long before (`lateral.py`).
"""

from __future__ import annotations

from protocol.messages.failure import Category, Failure
from protocol.messages.session import PeerState
from services.scheduler.broker import Broker
from services.scheduler.calls import Command

_PREFIX = "infer."


def given_up(broker: Broker, wait_ms: int, at_ms: int) -> list[Command]:
    """Ends of the calls that have waited so long for a model of which no worker is READY and one is DEGRADED."""
    ends: list[Command] = []
    for target in broker.unserved.longer_than(wait_ms, at_ms):
        failure = _failure(broker, target, at_ms) if target.startswith(_PREFIX) else None
        if failure is not None:
            ends += broker.refuse_waiting(target, failure, at_ms, after_ms=wait_ms)
    return ends


def _failure(broker: Broker, target: str, at_ms: int) -> Failure | None:
    """What is wrong with the workers of this model; None if one of them is well, or may be in a moment."""
    peers = [peer for peer in broker.peers.values() if target in peer.capabilities]
    states = {peer.state for peer in peers}
    if PeerState.DEGRADED not in states or states & {PeerState.READY, PeerState.LOADING, PeerState.STARTING}:
        return None
    reasons = "; ".join(
        f"{peer.service}: {peer.reason or 'it gives no reason'}" for peer in peers if peer.state is PeerState.DEGRADED
    )
    since_ms = broker.unserved.since(target)
    waited_s = 0 if since_ms is None else (at_ms - since_ms) / 1000
    return Failure(
        code="model.degraded",
        category=Category.RESOURCE,
        origin="scheduler",
        message=f"the model {target.removeprefix(_PREFIX)} has not been ready for {waited_s:.0f} s "
        f"({reasons[:6_000]}); repair what its service says, then ask again",
    )
