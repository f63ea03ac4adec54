"""`models` and `registry check`: what the operator declared, with the live state where a hub answers."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from typing import Any, Final

from protocol.messages.session import PeerReport, StatusReport
from services.ctl.commands import Commands, Context
from services.ctl.hub import try_status
from services.ctl.launch_view import explain_launch
from services.ctl.outcomes import ExitCode
from services.ctl.prefix_room import room_notes
from services.ctl.reload import add_reload
from services.ctl.residency import move_model
from services.ctl.screen import mebibytes, seconds
from services.ctl.stack_files import checked_registry
from services.ctl.status import memory_line, size_notes, slots, speed
from services.kit.registry.memory import memory_needs

_MODEL_COLUMNS: Final = (
    *("model", "tier", "residency", "state", "engine", "slots", "context", "threads"),
    *("file", "needs", "held", "measured", "last used", "tokens/s", "roles", "path"),
)


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    models = commands.add(
        "models", _models, "list the model entries with their state; load or unload one by name", elsewhere=True
    )
    models.add_argument("action", nargs="?", choices=("load", "unload"), help="move a warm or cold model")
    models.add_argument("name", nargs="?", metavar="NAME", help="of its entry in models.yaml")
    models.add_argument("--wait", type=float, default=600, metavar="S", help="seconds to wait for it; 0 = only ask")
    models.add_argument(
        "--explain", metavar="NAME", help="print the command line of one model, each flag with its line and its rule"
    )
    group = commands.group("registry", "check or take up the files that declare models, roles, personas, gates")
    check = group.add(
        "check",
        _check,
        "check every rule of the registry; names file, line and field of each problem",
        elsewhere=True,
    )
    add_reload(group)
    check.add_argument("--no-files", action="store_true", help="leave out model files, for a machine without them")


def _peers(report: StatusReport | None) -> dict[str, PeerReport]:
    return {peer.service: peer for peer in report.peers} if report is not None else {}


def _models(args: Namespace, context: Context) -> ExitCode:
    if args.action is not None:
        return move_model(context, args.action, args.name, wait_s=args.wait)
    registry = checked_registry(context.home, check_files=False)
    if args.explain is not None:
        return explain_launch(args.explain, registry, context)
    report = asyncio.run(try_status(context.home, timeout_s=3.0))
    peers = _peers(report)
    needs = memory_needs(registry.models)
    places = {place.model: place for place in report.models} if report is not None else {}
    rows, data = [], []
    for model in registry.models.values():
        peer = peers.get(f"inference-{model.name}")
        place = places.get(model.name)
        size = model.path.stat().st_size if model.path is not None and model.path.is_file() else None
        roles = [role.name for role in registry.roles_of(model.name)]
        rows.append(
            (
                model.name,
                model.tier,
                f"{model.residency}{', pinned' if model.pinned else ''}",
                peer.state if peer else "not running" if model.name in registry.served else "inside others",
                str(peer.metrics.get("engine", model.engine)) if peer else model.engine,
                slots(peer) if peer else str(model.slots),
                str(model.context_tokens),
                str(model.threads),
                mebibytes(size) if size is not None else "missing" if model.path is not None else "",
                mebibytes(place.need_bytes if place else needs[model.name]),
                mebibytes(place.held_bytes) if place else "",
                mebibytes(place.measured_bytes) if place and place.measured_bytes else "",
                _ago(place.used_ms) if place else "",
                speed(peer.metrics) if peer else "",
                ", ".join(roles),
                model.path.name if model.path is not None else model.base_url or "",
            )
        )
        entry: dict[str, Any] = model.model_dump(mode="json")
        data.append({**entry, "file_bytes": size, "roles": roles, "live": peer, "memory": place})
    if context.screen.json:
        context.screen.document({"digest": registry.digest, "models": data})
    else:
        context.screen.table(_MODEL_COLUMNS, rows)
        if report is not None and report.memory is not None:
            context.screen.line(memory_line(report.memory))
        for note in size_notes(report):
            context.screen.line(f"note: {note}", style="yellow")
    return ExitCode.OK


def _ago(used_ms: int | None) -> str:
    return "" if used_ms is None else f"{seconds(max(0, time.time() * 1000 - used_ms))} ago"


def _check(args: Namespace, context: Context) -> ExitCode:
    registry = checked_registry(context.home, check_files=not args.no_files)
    measured = size_notes(asyncio.run(try_status(context.home, timeout_s=3.0)))
    room = room_notes((registry.launch(name) for name in registry.served), context.home)
    notes = [*map(str, registry.notes), *room, *measured]
    if context.screen.json:
        context.screen.document({"folder": str(context.home.registry), "digest": registry.digest, "notes": notes})
        return ExitCode.OK
    for note in notes:
        context.screen.line(f"note: {note}", style="yellow")
    counts = f"{len(registry.models)} models, {len(registry.roles)} roles, {len(registry.personas)} personas"
    context.screen.line(f"{context.home.registry} is good: {counts}, {len(registry.gates)} gates")
    return ExitCode.OK
