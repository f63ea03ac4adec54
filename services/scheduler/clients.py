"""What the hub says about its clients: weights, tasks, and calls that wait or run. Pure, for `session.report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from protocol.messages.session import ClientReport
from services.scheduler.broker import Broker

_MOST: Final = 100
"""Clients in one report."""


def client_reports(broker: Broker, active: Mapping[str, int]) -> list[ClientReport]:
    """One row per client that is connected or has tasks (`active`: client -> tasks that are not final)."""
    waiting: Counter[str] = Counter()
    running: Counter[str] = Counter()
    for call in broker.calls.values():
        (waiting if call.worker is None else running)[call.client] += 1
    connected = {peer.service for peer in broker.peers.values() if not peer.is_worker}
    names = sorted(connected | active.keys(), key=lambda name: (-waiting[name] - running[name], name))
    return [
        ClientReport(
            client=name,
            weight=broker.weight_of(name),
            tasks=active.get(name, 0),
            waiting=waiting[name],
            running=running[name],
        )
        for name in names[:_MOST]
    ]
