"""`tail`: the log lines of one service or of all, merged by time, as they are written."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from typing import Final

from services.ctl.commands import Commands, Context
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.screen import STYLES, Screen, one_line
from services.ctl.service_logs import Follower, LogLine

_POLL_S: Final = 0.25
_LEVELS: Final = ("debug", "info", "warning", "error")
_SAID: Final = frozenset({"ts", "level", "service", "event"})


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add("tail", _tail, "follow the logs of all services, or of those named; --json prints raw lines")
    parser.add_argument("services", nargs="*", metavar="SERVICE", help="such as scheduler or inference-worker")
    parser.add_argument("-n", "--lines", type=int, default=10, metavar="N", help="earlier lines of each service (10)")
    parser.add_argument("--no-follow", action="store_true", help="print the earlier lines and end")
    parser.add_argument("--of-task", metavar="TASK", help="only lines about this task")
    parser.add_argument("--level", choices=_LEVELS, default="debug", help="only lines of this level or worse")


def _tail(args: Namespace, context: Context) -> ExitCode:
    logs, screen = context.home.logs, context.screen
    if args.lines < 0:
        raise BadInput(f"--lines {args.lines}: must not be negative")
    there = sorted(path.stem for path in logs.glob("*.jsonl"))
    for service in args.services:
        if service not in there:
            raise BadInput(f"there is no log of {service!r} in {logs}; there are: {', '.join(there) or 'none'}")
    if not there:
        raise BadInput(f"there are no logs in {logs}; start the stack with: tierline up")
    follower = Follower(logs, args.services)
    lines = follower.begin(args.lines)
    while True:
        for line in lines:
            if _wanted(line, args):
                _print(screen, line)
        if args.no_follow:
            return ExitCode.OK
        time.sleep(_POLL_S)
        lines = follower.new_lines()


def _wanted(line: LogLine, args: Namespace) -> bool:
    level = line.fields.get("level", "error")
    severe = _LEVELS.index(level) if level in _LEVELS else len(_LEVELS)
    if severe < _LEVELS.index(args.level):
        return False
    return args.of_task is None or line.fields.get("task") == args.of_task


def _print(screen: Screen, line: LogLine) -> None:
    if screen.json:
        screen.record(line.fields or {"service": line.service, "raw": line.raw})
        return
    if not line.fields:
        screen.line(f"{line.service}: {line.raw}")
        return
    fields = " ".join(f"{name}={_value(value)}" for name, value in line.fields.items() if name not in _SAID)
    stamp = str(line.fields.get("ts", ""))[11:23]
    level = str(line.fields.get("level", ""))
    service = str(line.fields.get("service", line.service))
    screen.line(
        f"{stamp} {level:7} {service:20} {line.fields.get('event', '')} {fields}".rstrip(),
        style={"warning": STYLES["warn"], "error": STYLES["error"], "debug": "dim"}.get(level),
    )


def _value(value: object) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 300)
