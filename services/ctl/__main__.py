"""Entry point of `tierline`: builds the parser, runs one command, turns its errors into a message and an exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Final

from services.ctl.commands import Commands, Context, Parser, home_of
from services.ctl.outcomes import BadInput, BadUsage, CommandError, ExitCode
from services.ctl.screen import Screen
from services.kit.config import Home, load_home

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "stack": ("up", "down"),
    "status": ("status",),
    "doctor": ("doctor",),
    "run": ("run", "submit"),
    "batch": ("batch",),
    "tasks": ("show", "watch", "cancel", "list"),
    "plan": ("plan",),
    "simulate": ("simulate",),
    "explain": ("explain",),
    "tail": ("tail",),
    "replay": ("replay",),
    "journal": ("journal",),
    "memory": ("memory",),
    "choices": ("personas", "roles"),
    "registry": ("models", "registry"),
    "tune": ("tune",),
    "bench": ("bench",),
}
"""Module of this package -> the commands that it adds, in the order of the help page. Only the module of the command
that is called is imported: all of them together take several times as long as most commands do."""

_EPILOG = """exit codes: 0 ok, 1 the task or a check failed, 2 bad usage or bad input, 3 the system is unreachable
Every command takes --json. The stack lives in TIERLINE_HOME, its configuration in TIERLINE_REGISTRY."""


def build_parser(argv: Sequence[str] = ()) -> ArgumentParser:
    """The parser for these arguments: with the commands of one group where they name one, else with all."""
    parser = Parser(
        prog="tierline",
        description="Runs one job on many language models.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    commands = Commands(parser)
    called = next((word for word in argv if not word.startswith("-")), "")
    for group in [group for group, names in GROUPS.items() if called in names] or GROUPS:
        import_module(f"services.ctl.{group}").add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _as_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a locale that lacks a character must not end a command
            stream.reconfigure(errors="backslashreplace")
    screen = Screen(sys.stdout, sys.stderr, as_json="--json" in argv)  # until the arguments are understood
    try:
        args = build_parser(argv).parse_args(argv)
        screen = Screen(sys.stdout, sys.stderr, as_json=args.json)
        code: ExitCode = args.run(args, Context(home_of(args, _home()), screen))
    except CommandError as err:
        if screen.json:
            screen.document({"error": {"exit": int(err.code), "message": str(err), "details": list(err.details)}})
        elif isinstance(err, BadUsage):
            screen.note(f"{err.usage}{err.command}: error: {err}")
        else:
            screen.note(f"tierline: {err}")
            for line in err.details:
                screen.note(f"  {line}")
        code = err.code
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.OK
    return int(code)


def _home() -> Home:
    """The home of the environment. Raises BadInput for a variable that makes no sense."""
    try:
        return load_home()
    except ValueError as err:
        raise BadInput(str(err)) from err


def _as_interrupt(number: int, _frame: FrameType | None) -> None:
    """End as after Ctrl-C, so that a benchmark takes its processes along; a second signal must not cut that short."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
