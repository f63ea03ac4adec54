"""What a command is: a parser with `--json` on it and a function that gets the parsed arguments and a context.

Groups (`stack`, `doctor`, `run`, …) register their commands here; `__main__` builds all and calls one.
"""

from __future__ import annotations

from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
    _SubParsersAction,
)
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NoReturn

from services.ctl.outcomes import BadUsage, ExitCode
from services.ctl.screen import Screen
from services.kit.config import Home

_MOST: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Context:
    """What every command needs: where the stack lives and where to write."""

    home: Home
    screen: Screen


def home_of(args: Namespace, home: Home) -> Home:
    """The home with the registry and the machine that a command was told to look at."""
    registry: Path | None = getattr(args, "registry", None)
    hardware: Path | None = getattr(args, "hardware", None)
    if registry is not None:
        home = replace(home, registry=registry.absolute())
    return home if hardware is None else replace(home, hardware=hardware.absolute())


def count(text: str) -> int:
    """Type of an argument that says how many: a whole number from 1. Taking 0 for 1 would answer another question."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:10]) <= _MOST:
        raise ArgumentTypeError(f"expected a whole number from 1 to {_MOST}, got {text!r}")
    return int(text)


class Parser(ArgumentParser):
    """Raises BadUsage where argparse would print and exit, so that a program that asked for JSON is answered in it.

    Those of its commands are of this class as well.
    """

    def error(self, message: str) -> NoReturn:
        """What argparse calls with what it did not understand."""
        raise BadUsage(message, command=self.prog, usage=self.format_usage())


Run = Callable[[Namespace, Context], ExitCode]


class Commands:
    """Commands under one parser; each one takes `--json`."""

    def __init__(self, parser: ArgumentParser) -> None:
        self._parsers: _SubParsersAction[ArgumentParser] = parser.add_subparsers(
            metavar="COMMAND", required=True, title="commands"
        )

    def add(self, name: str, run: Run, summary: str, *, epilog: str = "", elsewhere: bool = False) -> ArgumentParser:
        """Add a command; `summary` is one sentence for both help pages. With `elsewhere` it can look at another
        registry and another machine than those of this home.
        """
        parser = self._parsers.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=RawDescriptionHelpFormatter
        )
        # No default here: it would overwrite a --json that stands before the command.
        parser.add_argument("--json", action="store_true", default=SUPPRESS, help="print JSON for programs")
        if elsewhere:
            parser.add_argument("--registry", type=Path, metavar="DIR", help="another folder of registry files")
            parser.add_argument(
                "--hardware", type=Path, metavar="FILE", help="another hardware.yaml: that of another machine"
            )
        parser.set_defaults(run=run)
        return parser

    def group(self, name: str, summary: str) -> Commands:
        """Add a command that only holds further commands, such as `registry check`."""
        return Commands(self._parsers.add_parser(name, help=summary, description=summary))
