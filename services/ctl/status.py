"""`status`: every service with what supervisord and the hub say about it, and the hub's queues and totals."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from dataclasses import asdict
from typing import Any

from protocol.messages.session import MemoryBudget, ModelReport, PeerReport, StatusReport
from services.ctl.commands import Commands, Context
from services.ctl.hub import try_status
from services.ctl.outcomes import ExitCode
from services.ctl.readiness import HUB, ServiceRow, merge
from services.ctl.screen import Screen, mebibytes, seconds
from services.ctl.supervisor import ProcessInfo, Supervisor, SupervisorGone
from services.kit.config import Home
from services.kit.registry import RegistryError, load_registry

COLUMNS = ("service", "state", "process", "pid", "slots", "memory", "tokens/s", "queued", "lag", "registry", "reason")


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    commands.add("status", _status, "show every service: state, slots, memory, speed, queues")


def _status(_args: Namespace, context: Context) -> ExitCode:
    home, screen = context.home, context.screen
    processes: list[ProcessInfo] = []
    supervised = True
    try:
        processes = Supervisor(home).processes()
    except SupervisorGone:
        supervised = False
    report = asyncio.run(try_status(home, timeout_s=5.0))
    rows = merge(processes, report)
    if screen.json:
        screen.document(
            {
                "home": str(home.root),
                "supervised": supervised,
                "hub": report,
                "services": [_as_data(row, report) for row in rows],
            }
        )
    else:
        _print(screen, rows, report, home, supervised=supervised)
    return ExitCode.OK if report is not None else ExitCode.UNREACHABLE


def _unapplied(home: Home, report: StatusReport) -> str | None:
    """A sentence where the files say something else than the hub works with."""
    try:
        declared = load_registry(home.registry, home.models, check_files=False)
    except RegistryError as err:
        return f"the registry in {home.registry} has {len(err.problems)} problems: tierline registry check"
    if report.registry in (None, declared.digest):
        return None
    return f"the registry in {home.registry} has changed and is not taken up yet: tierline registry reload"


def _print(
    screen: Screen, rows: list[ServiceRow], report: StatusReport | None, home: Home, *, supervised: bool
) -> None:
    if rows:
        screen.table(COLUMNS, [_cells(row, report) for row in rows])
    if not supervised:
        screen.line("no supervisord runs at this home; start the stack with: tierline up", style="yellow")
    if report is None:
        screen.line("the hub does not answer; see: tierline tail scheduler", style="red")
        return
    if (behind := _unapplied(home, report)) is not None:
        screen.line(behind, style="yellow")
    screen.heading("hub")
    screen.line(f"epoch {report.hub_epoch}, pid {report.hub_pid}, up {seconds(report.uptime_ms)}")
    for name, figures in (("tasks", report.tasks), ("queued", report.queued), ("counters", report.counters)):
        screen.line(f"{name}: {', '.join(f'{key} {value}' for key, value in sorted(figures.items())) or 'none'}")
    for capability, reason in (report.circuits or {}).items():
        screen.line(f"{capability} is left alone: {reason}", style="yellow")
    if report.memory is not None:
        screen.line(memory_line(report.memory), style="yellow" if report.memory.low else None)
    for place in report.models:
        if place.residency != "hot":
            screen.line(_place_line(place))
    if report.clients:
        screen.heading("clients")
        screen.table(
            ("client", "weight", "tasks", "waiting", "running"),
            [
                (one.client, f"{one.weight:g}", str(one.tasks), str(one.waiting), str(one.running))
                for one in report.clients
            ],
        )


def _cells(row: ServiceRow, report: StatusReport | None) -> tuple[str, ...]:
    peer = row.peer
    pid = row.process_info.pid if row.process_info else peer.pid if peer else 0
    if row.name == HUB and not pid and report is not None:
        pid = report.hub_pid
    if peer is None:
        digest = report.registry if report is not None and row.name == HUB else None
        return (row.name, row.state, row.process, str(pid or ""), "", "", "", "", "", (digest or "")[:8], row.reason)
    queued = sum(report.queued.get(capability, 0) for capability in peer.capabilities) if report else 0
    return (
        row.name,
        row.state,
        row.process,
        str(pid or ""),
        slots(peer),
        mebibytes(peer.rss_bytes),
        speed(peer.metrics),
        str(queued),
        f"{peer.loop_lag_ms:.0f} ms",
        (peer.registry or "")[:8] + (" lags" if lags(peer, report) else ""),
        row.reason,
    )


def memory_line(memory: MemoryBudget) -> str:
    """The budget of all models in one line."""
    left = "" if memory.available_bytes is None else f", the machine has {mebibytes(memory.available_bytes)} left"
    low = "; it is short of memory: idle warm models are unloaded" if memory.low else ""
    return f"models hold {mebibytes(memory.held_bytes)} of {mebibytes(memory.budget_bytes)}{left}{low}"


def _place_line(place: ModelReport) -> str:
    held = f", holds {mebibytes(place.held_bytes)}" if place.held_bytes else f", needs {mebibytes(place.need_bytes)}"
    waiting = f"; work {place.waiting}" if place.waiting else ""
    large = f"; it {place.too_large}" if place.too_large and place.too_large not in waiting else ""
    return f"{place.residency} model {place.model}: {place.state}{held}, {place.loads} loads{waiting}{large}"


def size_notes(report: StatusReport | None) -> list[str]:
    """One sentence for each model that was found to be too large for the budget."""
    models = report.models if report is not None else []
    return [f"{place.model} {place.too_large}" for place in models if place.too_large]


def slots(peer: PeerReport) -> str:
    """Slots in use, of all it has now. `granted` and `used` are running totals; what is left of them is free."""
    busy = len(peer.in_flight)
    return f"{busy}/{max(0, peer.granted - peer.used) + busy}"


def lags(peer: PeerReport, report: StatusReport | None) -> bool:
    """True for a service that works with another registry than the hub."""
    return report is not None and peer.registry is not None and peer.registry != report.registry


def speed(metrics: dict[str, Any]) -> str:
    """Generated tokens per second as the service reports them; empty for services without a model."""
    value = metrics.get("tokens_per_s")
    return f"{value:.1f}" if isinstance(value, int | float) else ""


def _as_data(row: ServiceRow, report: StatusReport | None) -> dict[str, Any]:
    process = row.process_info
    return {
        "name": row.name,
        "state": row.state,
        "reason": row.reason,
        "is_hub": row.name == HUB,
        "process": None if process is None else {**asdict(process), "output": str(process.output)},
        "peer": row.peer,
        "registry_lags": row.peer is not None and lags(row.peer, report),
    }
