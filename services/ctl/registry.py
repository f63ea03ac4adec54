"""`models`, `roles` and `registry check`: what the operator declared, with the live state where a hub answers."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any, Final

from protocol.messages.session import PeerReport
from services.ctl.commands import Commands, Context
from services.ctl.hub import try_status
from services.ctl.outcomes import ExitCode
from services.ctl.reload import add_reload
from services.ctl.screen import mebibytes, one_line
from services.ctl.stack_files import checked_registry
from services.ctl.status import slots, speed
from services.kit.config import Home

_MODEL_COLUMNS: Final = (
    *("model", "tier", "state", "engine", "slots", "context", "threads"),
    *("file", "memory", "tokens/s", "roles", "path"),
)


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    commands.add("models", _models, "list the model entries of the registry with the state of their processes")
    commands.add("roles", _roles, "list the roles of the registry with the model behind each and its state")
    group = commands.group("registry", "check or take up the files that declare models, roles, personas, gates")
    check = group.add("check", _check, "check every rule of the registry; names file, line and field of each problem")
    add_reload(group)
    check.add_argument("--no-files", action="store_true", help="leave out model files, for a machine without them")


def _peers(home: Home) -> dict[str, PeerReport]:
    report = asyncio.run(try_status(home, timeout_s=3.0))
    return {peer.service: peer for peer in report.peers} if report is not None else {}


def _models(_args: Namespace, context: Context) -> ExitCode:
    registry = checked_registry(context.home, check_files=False)
    peers = _peers(context.home)
    rows, data = [], []
    for model in registry.models.values():
        peer = peers.get(f"inference-{model.name}")
        size = model.path.stat().st_size if model.path is not None and model.path.is_file() else None
        roles = [role.name for role in registry.roles_of(model.name)]
        rows.append(
            (
                model.name,
                model.tier,
                peer.state if peer else "not running",
                str(peer.metrics.get("engine", model.engine)) if peer else model.engine,
                slots(peer) if peer else str(model.slots),
                str(model.context_tokens),
                str(model.threads),
                mebibytes(size) if size is not None else "missing" if model.path is not None else "",
                mebibytes(peer.rss_bytes) if peer else "",
                speed(peer.metrics) if peer else "",
                ", ".join(roles),
                model.path.name if model.path is not None else model.base_url or "",
            )
        )
        entry: dict[str, Any] = model.model_dump(mode="json")
        data.append({**entry, "file_bytes": size, "roles": roles, "live": peer})
    if context.screen.json:
        context.screen.document({"digest": registry.digest, "models": data})
    else:
        context.screen.table(_MODEL_COLUMNS, rows)
    return ExitCode.OK


def _roles(_args: Namespace, context: Context) -> ExitCode:
    registry = checked_registry(context.home, check_files=False)
    peers = _peers(context.home)
    states = {
        name: peers[f"inference-{name}"].state if f"inference-{name}" in peers else "not running"
        for name in registry.models
    }
    if context.screen.json:
        context.screen.document(
            {
                "digest": registry.digest,
                "roles": [
                    {
                        **role.model_dump(mode="json"),
                        "state": states[role.model],
                        "escalation": [above.name for above in registry.escalation_chain(role.name)],
                    }
                    for role in registry.roles.values()
                ],
            }
        )
        return ExitCode.OK
    context.screen.table(
        ("role", "model", "state", "max tokens", "timeout", "escalates to", "for"),
        [
            (
                role.name,
                role.model,
                states[role.model],
                str(role.max_tokens),
                f"{role.timeout_s:g} s",
                " -> ".join(above.name for above in registry.escalation_chain(role.name)),
                one_line(role.description, 80),
            )
            for role in registry.roles.values()
        ],
    )
    return ExitCode.OK


def _check(args: Namespace, context: Context) -> ExitCode:
    registry = checked_registry(context.home, check_files=not args.no_files)
    if context.screen.json:
        context.screen.document(
            {
                "folder": str(context.home.registry),
                "digest": registry.digest,
                "notes": [str(note) for note in registry.notes],
            }
        )
        return ExitCode.OK
    for note in registry.notes:
        context.screen.line(f"note: {note}", style="yellow")
    counts = f"{len(registry.models)} models, {len(registry.roles)} roles, {len(registry.personas)} personas"
    context.screen.line(f"{context.home.registry} is good: {counts}, {len(registry.gates)} gates")
    return ExitCode.OK
