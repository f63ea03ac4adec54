"""`registry reload`: what the files say now becomes what the running stack works with, without a restart.

The order makes every moment a good one to be killed in: check, copy, let the link show the copy, tell the hub, add
programs, then wait for processes to drain and take their programs away. Whatever is left undone the next reload, or
the next `up`, does; a service that is started in between reads the new copy. Where the hub refuses, the link goes back.

To have followed is not to work: a model whose file or engine cannot be used is degraded, and named with its reason.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from protocol.messages.registry import Reloaded
from protocol.messages.session import PeerReport, StatusReport
from services.ctl.commands import Commands, Context
from services.ctl.hub import connect, try_status
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.screen import Screen
from services.ctl.stack_files import (
    checked_registry,
    made_home,
    remember_registry,
    stack_lock,
    taken_up,
    write_programs,
)
from services.ctl.supervisor import Supervisor, SupervisorGone
from services.kit.config import Home
from services.kit.registry import Registry, make_current

_POLL_S = 0.3
_GRACE_S = 5.0
"""How long a degraded model is given once all have followed: a launch that failed by chance is repeated before that."""
_DRAINED = "draining"
_PROGRAM = "inference-"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A service that does not work with the new registry yet, or at all, or has not left yet."""

    service: str
    why: str


@dataclass(frozen=True, slots=True)
class Followers:
    """What has become of the services when the wait ended."""

    left: Sequence[Waiting] = ()
    """Those that have not followed."""
    degraded: Sequence[Waiting] = ()
    """Those that have, and do not work."""


def add_reload(group: Commands) -> None:
    """Add the command to the group `registry`."""
    parser = group.add(
        "reload",
        _reload,
        "take up the registry as it is now: add, change and drain models, roles, gates without a restart",
        epilog=(
            "A registry with errors is refused whole and the old one stays. Running work is never cut: a model that\n"
            "was removed or changed finishes what it has; removed roles stay in force for the tasks that use them.\n"
            "Exit status 1 where a service has not followed in time, or a model of this machine does not work now (in\n"
            "--json: waiting, degraded); the registry is taken up all the same. With --no-wait nobody looks."
        ),
    )
    parser.add_argument("--no-wait", action="store_true", help="do not wait until every process has followed")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="longest wait (300)")


def _reload(args: Namespace, context: Context) -> ExitCode:
    if not args.timeout >= 0:  # nor is "nan"
        raise BadInput(f"--timeout {args.timeout:g}: must be 0 or more")
    home, screen = made_home(context.home), context.screen
    checked_registry(home)  # before the lock: what is wrong is said at once
    with stack_lock(home):
        registry, before = taken_up(home)
        try:
            told = asyncio.run(_tell_hub(home, registry.digest))
        except BadInput:
            if before is not None:
                make_current(home.registry_copies, before)
            raise
        supervisor = _supervisor(home)
        started: list[str] = []
        if supervisor is not None:
            remember_registry(home, registry)
            write_programs(home, registry, remove=False)
            started = supervisor.add_programs()
        elif any(one.section == "models" and one.change == "added" for one in told.changes):
            screen.note("no supervisord runs at this home: start the processes of new models yourself")
    _say(screen, told, started)
    if args.no_wait:
        found = Followers()
    else:
        found = _await_followers(home, screen, registry, told.kept, supervisor, args.timeout)
    if screen.json:
        screen.document(_as_data(told, started, found))
        return ExitCode.FAILED if found.left or found.degraded else ExitCode.OK
    if found.left or found.degraded:
        raise _unfollowed(found, args.timeout)
    if not args.no_wait:
        screen.line("every service works with it")
    return ExitCode.OK


def _unfollowed(found: Followers, timeout_s: float) -> CommandError:
    """The error that names every service that is not as it should be, and what comes next."""
    degraded = "it is taken up, and these models do not work: repair what each one names, it is tried again by itself"
    message = f"after {timeout_s:g} s these have not followed; they still do" if found.left else degraded
    lines = [*(f"{one.service}: {one.why}" for one in found.left)]
    lines += [f"{one.service}: {'degraded: ' if found.left else ''}{one.why}" for one in found.degraded]
    return CommandError(message, details=tuple(lines))


async def _tell_hub(home: Home, digest: str) -> Reloaded:
    async with connect(home) as client:
        return await client.reload_registry(digest)


def _supervisor(home: Home) -> Supervisor | None:
    supervisor = Supervisor(home)
    try:
        supervisor.pid()
    except SupervisorGone:
        return None
    return supervisor


def _await_followers(
    home: Home, screen: Screen, registry: Registry, kept: Sequence[str], supervisor: Supervisor | None, timeout_s: float
) -> Followers:
    """Wait until every service has followed, and end the programs of models that have left as they drain."""
    deadline = time.monotonic() + timeout_s
    grace_end: float | None = None
    said: set[Waiting] = set()
    while True:
        report = asyncio.run(try_status(home, timeout_s=3.0))
        programs = [] if supervisor is None else [process.name for process in supervisor.processes()]
        if supervisor is not None and report is not None:
            for name in drained(registry, report, programs, kept):
                with stack_lock(home):
                    _stop_if_superseded(home, registry)
                    supervisor.remove_program(name)
                    (home.conf_d / f"{name}.conf").unlink(missing_ok=True)
                screen.note(f"{name} has left")
        _stop_if_superseded(home, registry)
        found = Followers(waiting(registry, report, programs), degraded(registry, report))
        now = time.monotonic()
        if not found.left and grace_end is None:
            grace_end = now + _GRACE_S
        judged = not found.left and (not found.degraded or (grace_end is not None and now >= grace_end))
        if judged or now > deadline:
            return found
        for one in found.left:
            if one not in said and one.why:
                said.add(one)
                screen.note(f"{one.service}: {one.why}")
        time.sleep(_POLL_S)


def _stop_if_superseded(home: Home, registry: Registry) -> None:
    """Raise CommandError if somebody has taken up another registry since: what is to be done follows from that one."""
    if home.current_registry.readlink().name != registry.digest:
        raise CommandError("another registry has been taken up since; this reload waits no longer")


def drained(registry: Registry, report: StatusReport, programs: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Programs of models that have left the registry and have nothing to do any more.

    One that the hub does not know is on its way to it if running tasks have it `kept`, and else of no use.
    """
    peers = {peer.service: peer for peer in report.peers}
    done = []
    for name in programs:
        peer = peers.get(name)
        if _is_gone(registry, name) and (
            f"models.{name.removeprefix(_PROGRAM)}" not in kept if peer is None else _is_drained(peer)
        ):
            done.append(name)
    return done


def waiting(registry: Registry, report: StatusReport | None, programs: Sequence[str]) -> list[Waiting]:
    """Who has not followed yet, and why."""
    if report is None:
        return [Waiting("scheduler", "the hub does not answer")]
    peers = {peer.service: peer for peer in report.peers}
    found = []
    if report.registry != registry.digest:
        found.append(Waiting("scheduler", "the hub works with another registry"))
    for name, peer in sorted(peers.items()):
        if _is_gone(registry, name):
            if name in programs or not _is_drained(peer):
                calls = f"{len(peer.in_flight)} calls run" if peer.in_flight else "running work still uses it"
                found.append(Waiting(name, "" if _is_drained(peer) else f"leaves when its work has ended: {calls}"))
        elif peer.registry is not None and peer.registry != registry.digest:
            found.append(Waiting(name, peer.reason or "reads the registry"))
        elif peer.state in ("starting", "loading"):
            found.append(Waiting(name, f"is {peer.state}"))
    found += [Waiting(name, "leaves") for name in programs if _is_gone(registry, name) and name not in peers]
    found += [Waiting(name, "is starting") for name in programs if _is_model(registry, name) and name not in peers]
    return found


def degraded(registry: Registry, report: StatusReport | None) -> list[Waiting]:
    """Models of this machine that have followed and do not work, and why. What a server elsewhere does is left out."""
    return [
        Waiting(peer.service, peer.reason or f"it does not say why; see: tierline tail {peer.service}")
        for peer in sorted(report.peers if report is not None else (), key=lambda peer: peer.service)
        if peer.state == "degraded"
        and peer.registry in (None, registry.digest)
        and _is_model(registry, peer.service)
        and registry.models[peer.service.removeprefix(_PROGRAM)].is_local
    ]


def _is_gone(registry: Registry, service: str) -> bool:
    return service.startswith(_PROGRAM) and service.removeprefix(_PROGRAM) not in registry.models


def _is_model(registry: Registry, service: str) -> bool:
    return service.startswith(_PROGRAM) and service.removeprefix(_PROGRAM) in registry.models


def _is_drained(peer: PeerReport) -> bool:
    return peer.state == _DRAINED and not peer.in_flight


def _say(screen: Screen, told: Reloaded, started: Sequence[str]) -> None:
    if screen.json:
        return
    for one in told.changes:
        screen.line(f"{one.change}: {one.section}.{one.name}")
    if not told.changes:
        screen.line(f"nothing has changed: {told.unchanged} entries are what they were")
    if told.kept:
        screen.line(f"kept for running work: {', '.join(told.kept)}")
    for name in started:
        screen.line(f"started: {name}")


def _as_data(told: Reloaded, started: Sequence[str], found: Followers) -> dict[str, Any]:
    by_change = {
        change: [f"{one.section}.{one.name}" for one in told.changes if one.change == change]
        for change in ("added", "changed", "removed")
    }
    return {
        "digest": told.digest,
        "previous": told.previous,
        **by_change,
        "unchanged": told.unchanged,
        "draining": told.draining,
        "kept": told.kept,
        "started": list(started),
        "waiting": [asdict(one) for one in found.left],
        "degraded": [asdict(one) for one in found.degraded],
    }
