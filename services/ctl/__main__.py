"""Entry point of `tierline`: builds the parser, runs one command, turns its errors into a message and an exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from io import TextIOWrapper
from types import FrameType

from services.ctl import (
    batch,
    bench,
    choices,
    doctor,
    explain,
    journal,
    memory,
    plan,
    registry,
    replay,
    run,
    simulate,
    stack,
    status,
    tail,
    tasks,
    tune,
)
from services.ctl.commands import Commands, Context, home_of
from services.ctl.outcomes import CommandError, ExitCode
from services.ctl.screen import Screen
from services.kit.config import load_home

_EPILOG = """exit codes: 0 ok, 1 the task or a check failed, 2 bad usage or bad input, 3 the system is unreachable
Every command takes --json. The stack lives in TIERLINE_HOME, its configuration in TIERLINE_REGISTRY."""


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="tierline",
        description="Runs one job on many language models.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    commands = Commands(parser)
    for group in (
        stack,
        status,
        doctor,
        run,
        batch,
        tasks,
        plan,
        simulate,
        explain,
        tail,
        replay,
        journal,
        memory,
        choices,
        registry,
        tune,
        bench,
    ):
        group.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _as_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a locale that lacks a character must not end a command
            stream.reconfigure(errors="backslashreplace")
    screen = Screen(sys.stdout, sys.stderr, as_json=args.json)
    try:
        code: ExitCode = args.run(args, Context(home_of(args, load_home()), screen))
    except CommandError as err:
        if screen.json:
            screen.document({"error": {"exit": int(err.code), "message": str(err), "details": list(err.details)}})
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


def _as_interrupt(number: int, _frame: FrameType | None) -> None:
    """End as after Ctrl-C, so that a benchmark takes its processes along; a second signal must not cut that short."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
