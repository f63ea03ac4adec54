"""Whether a stack is up: supervisord's view and the hub's view of every service, made into one verdict.

Pure: `up` feeds in what both say, twice a second, and prints what comes out. A process that runs is not a service that
is ready; only the hub's report says so. A service that crashes again and again is reported before the deadline, since
waiting longer would not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.messages.session import PeerReport, StatusReport
from services.ctl.supervisor import ProcessInfo

HUB: Final = "scheduler"
"""The program that is the hub itself: it is ready when it answers."""

CRASHES: Final = 4
"""Starts of one program, while waiting, after which waiting longer is pointless."""

_UP: Final = frozenset({"ready", "degraded", "parked", "unloading"})


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """One service with what both sides say about it."""

    name: str
    state: str
    """`ready` and the other states of the hub where it knows the service, else supervisord's word, else `absent`; of a
    service that the hub leaves alone because its calls fail `degraded`."""
    process: str
    """supervisord's word."""
    reason: str
    process_info: ProcessInfo | None
    peer: PeerReport | None

    @property
    def up(self) -> bool:
        """True when it works, if only in part: a gates service without a sandbox is `degraded`, a model that is loaded
        on demand `parked`.
        """
        return self.state in _UP


def merge(processes: Sequence[ProcessInfo], report: StatusReport | None) -> list[ServiceRow]:
    """One row per program and per peer that no program stands for, by name; clients are not listed."""
    peers = {peer.service: peer for peer in report.peers if peer.capabilities} if report is not None else {}
    known = {process.name: process for process in processes}
    rows = []
    for name in sorted({*known, *peers, *([HUB] if report is not None else [])}):
        process, peer = known.get(name), peers.get(name)
        state, reason = process.state if process else "absent", process.description if process else ""
        if name == HUB and report is not None:
            state, reason = "ready", ""
        elif process is not None and process.state == "running":
            if name == HUB:
                state, reason = "starting", "it does not answer yet"
            else:
                state, reason = "starting", "it has not said hello to the hub yet" if report else "the hub is not there"
        if peer is not None and (process is None or process.state == "running"):
            state, reason = peer.state, peer.reason or ""
            if state == "ready" and (left_alone := _left_alone(peer, report)) is not None:
                state, reason = "degraded", left_alone  # it thinks well of itself, and the hub gives it no work
        rows.append(ServiceRow(name, state, process.state if process else "", reason, process, peer))
    return rows


def _left_alone(peer: PeerReport, report: StatusReport | None) -> str | None:
    """Why the hub leaves a service alone whose calls fail one after another; None where it does not."""
    circuits = (report.circuits if report is not None else None) or {}
    return next((circuits[capability] for capability in peer.capabilities if capability in circuits), None)


@dataclass(slots=True)
class Readiness:
    """Follows a starting stack over time."""

    rows: list[ServiceRow] = field(default_factory=list)
    _starts: dict[str, set[int]] = field(default_factory=dict)

    def observe(self, processes: Sequence[ProcessInfo], report: StatusReport | None) -> list[ServiceRow]:
        """Take one look; returns the rows whose state changed since the last one."""
        before = {row.name: row.state for row in self.rows}
        for process in processes:
            if process.pid:
                self._starts.setdefault(process.name, set()).add(process.pid)
        self.rows = merge(processes, report)
        return [row for row in self.rows if before.get(row.name) != row.state]

    @property
    def ready(self) -> bool:
        """True when the hub and every other service work."""
        return bool(self.rows) and all(row.up for row in self.rows)

    @property
    def hopeless(self) -> list[ServiceRow]:
        """Services that will not come up by waiting."""
        return [
            row
            for row in self.rows
            if not row.up and (row.state == "fatal" or len(self._starts.get(row.name, ())) >= CRASHES)
        ]

    @property
    def missing(self) -> list[ServiceRow]:
        """Services that are not up."""
        return [row for row in self.rows if not row.up]
