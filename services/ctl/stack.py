"""`up` and `down`: the whole stack of this home, started until it is ready and stopped until nothing is left.

Both may be called twice, or at the same time: one lock covers every change, and waiting for readiness needs none.
What runs is decided by deploy/supervisord.conf, deploy/conf.d and the registry.
"""

from __future__ import annotations

import asyncio
import signal
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import psutil
from rich.live import Live

from services.ctl.commands import Commands, Context
from services.ctl.hub import try_status
from services.ctl.outcomes import CommandError, ExitCode
from services.ctl.readiness import Readiness, ServiceRow
from services.ctl.screen import Screen, grid, mebibytes
from services.ctl.service_logs import telling_line
from services.ctl.stack_files import (
    checked_registry,
    made_home,
    registry_changed,
    stack_lock,
    taken_up,
    write_programs,
)
from services.ctl.supervisor import ProcessInfo, Supervisor, SupervisorGone, SupervisorStuck
from services.kit.config import Home

_POLL_S = 0.5
_LAST_LOOKS = 2
"""Looks at a stack that seems hopeless before it is given up: a restart may just have been seen twice."""


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    up = commands.add("up", _up, "start the stack and wait until every service is ready")
    up.add_argument("--timeout", type=float, metavar="SECONDS", help="default: the slowest model's load deadline + 60")
    down = commands.add("down", _down, "stop the stack and make sure that nothing of it is left")
    down.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="then processes are killed (60)")


def _up(args: Namespace, context: Context) -> ExitCode:
    home, screen = made_home(context.home), context.screen
    checked_registry(home)  # before the lock: what is wrong is said at once
    since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    supervisor = Supervisor(home)
    with stack_lock(home):
        registry, _ = taken_up(home)
        timeout_s = args.timeout or max(model.load_deadline_s for model in registry.models.values()) + 60
        rewritten, all_anew = write_programs(home, registry), registry_changed(home, registry)
        try:
            supervisor.pid()
            changed = supervisor.apply_config(None if all_anew else rewritten)
            why = "the registry has changed, restarted: " if all_anew else "started or ended: "
            screen.note(f"a supervisord of {home.root} runs already; {why}{', '.join(changed) or 'nothing'}")
        except SupervisorGone:
            if left := stray_processes(home):
                _end(left, 10.0)
                screen.note(f"ended {len(left)} processes that an earlier supervisord had left behind")
            supervisor.start()
    readiness = asyncio.run(_await_ready(home, screen, supervisor, timeout_s))
    if screen.json:
        screen.document(
            {
                "ready": readiness.ready,
                "home": str(home.root),
                "services": [
                    {"name": row.name, "state": row.state, "reason": row.reason, "process": row.process}
                    for row in readiness.rows
                ],
            }
        )
    if readiness.ready:
        for row in readiness.rows:
            if row.state == "degraded":
                screen.note(f"{row.name} works only in part: {row.reason}")
        if not screen.json:
            screen.line(f"ready: {', '.join(row.name for row in readiness.rows)}")
        return ExitCode.OK
    why = f"not ready within {timeout_s:g} s" if not readiness.hopeless else "given up, since waiting would not help"
    raise CommandError(
        f"{why}: {', '.join(row.name for row in readiness.hopeless or readiness.missing) or 'no service'}",
        details=tuple(
            line for row in readiness.hopeless or readiness.missing for line in _explanation(home, row, since)
        ),
    )


def _explanation(home: Home, row: ServiceRow, since: str) -> Iterator[str]:
    yield f"{row.name} is {row.state}: {row.reason or 'no reason given'}"
    output = row.process_info.output if row.process_info else None
    if found := telling_line(home.logs, row.name, output, crashed=row.process != "running", since=since):
        yield f"    {found[0]}: {found[1]}"
    else:
        yield f"    nothing in {home.logs}/{row.name}.jsonl; see {home.logs}/supervisord.log"


async def _await_ready(home: Home, screen: Screen, supervisor: Supervisor, timeout_s: float) -> Readiness:
    readiness, deadline, hopeless = Readiness(), time.monotonic() + timeout_s, 0
    with _display(screen) as live:
        while True:
            report = await try_status(home, timeout_s=3.0)
            try:
                processes = await asyncio.to_thread(supervisor.processes)
            except SupervisorGone as err:
                raise CommandError(f"supervisord is gone; see {home.logs}/supervisord.log: {err}") from err
            changed = readiness.observe(processes, report)
            if live is not None:
                rows = [(row.name, row.state, row.reason, _memory(row)) for row in readiness.rows]
                live.update(grid(("service", "state", "reason", "memory"), rows, live=True), refresh=True)
            elif not screen.json:
                for row in changed:
                    screen.note(f"{row.name}: {row.state}{f' ({row.reason})' if row.reason else ''}")
            hopeless = hopeless + 1 if readiness.hopeless else 0
            if readiness.ready or hopeless > _LAST_LOOKS or time.monotonic() > deadline:
                return readiness
            await asyncio.sleep(_POLL_S)


@contextmanager
def _display(screen: Screen) -> Iterator[Live | None]:
    if screen.rich is None:
        yield None
        return
    with Live(console=screen.rich, auto_refresh=False) as live:
        yield live


def _memory(row: ServiceRow) -> str:
    return mebibytes(row.peer.rss_bytes) if row.peer else ""


def _down(args: Namespace, context: Context) -> ExitCode:
    home, screen = context.home, context.screen
    if not home.run.is_dir():
        return _say_stopped(screen, 0, [])
    with stack_lock(home):
        supervisor = Supervisor(home)
        try:
            processes = _with_descendants(supervisor.pid(), supervisor.processes())
            supervisor.shut_down()
        except (SupervisorGone, SupervisorStuck):
            processes = []
        _, alive = psutil.wait_procs(processes, timeout=args.timeout)
        # Also what nobody told us about: left over from a supervisord that was killed.
        left = sorted({*alive, *stray_processes(home)}, key=lambda process: process.pid)
        names = [f"{process.pid} {_command(process)}" for process in left]
        still = _end(left, 10.0)
        if still:
            raise CommandError(
                "these processes could not be ended", details=tuple(f"{item.pid} {_command(item)}" for item in still)
            )
    return _say_stopped(screen, len(processes), names)


def _say_stopped(screen: Screen, count: int, killed: list[str]) -> ExitCode:
    if screen.json:
        screen.document({"stopped": count, "killed": killed})
    elif count or killed:
        screen.line(f"stopped: {count} processes")
        for name in killed:
            screen.line(f"did not end by itself and was killed: {name}", style="yellow")
    else:
        screen.line("nothing was running")
    return ExitCode.OK


def stray_processes(home: Home) -> list[psutil.Process]:
    """Live processes of this home that supervisord started, and supervisord itself, by their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            ours = environment.get("TIERLINE_HOME") == str(home.root)
            if ours and ("SUPERVISOR_ENABLED" in environment or "supervisor.supervisord" in process.cmdline()):
                found.append(process)
        except (psutil.Error, OSError):  # gone meanwhile, or of another user and so not ours
            continue
    return found


def _with_descendants(supervisord: int, programs: Sequence[ProcessInfo]) -> list[psutil.Process]:
    found: dict[int, psutil.Process] = {}
    for pid in [supervisord, *(program.pid for program in programs if program.pid)]:
        try:
            process = psutil.Process(pid)
            found |= {item.pid: item for item in [process, *process.children(recursive=True)]}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def _end(processes: Sequence[psutil.Process], grace_s: float) -> list[psutil.Process]:
    """SIGTERM, then SIGKILL; returns what is alive even so."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        _signal(process, signal.SIGKILL)
    _, alive = psutil.wait_procs(alive, timeout=grace_s)
    return list(alive)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # already gone, which is what we want


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200] or process.name()
    except psutil.Error:
        return "(gone)"
