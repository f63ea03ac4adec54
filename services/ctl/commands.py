"""What a command is: a parser with `--json` on it and a function that gets the parsed arguments and a context.

Groups (`stack`, `doctor`, `run`, …) register their commands here; `__main__` builds all and calls one.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter, _SubParsersAction
from collections.abc import Callable
from dataclasses import dataclass

from services.ctl.outcomes import ExitCode
from services.ctl.screen import Screen
from services.kit.config import Home


@dataclass(frozen=True, slots=True)
class Context:
    """What every command needs: where the stack lives and where to write."""

    home: Home
    screen: Screen


Run = Callable[[Namespace, Context], ExitCode]


class Commands:
    """Commands under one parser; each one takes `--json`."""

    def __init__(self, parser: ArgumentParser) -> None:
        self._parsers: _SubParsersAction[ArgumentParser] = parser.add_subparsers(
            metavar="COMMAND", required=True, title="commands"
        )

    def add(self, name: str, run: Run, summary: str, *, epilog: str = "") -> ArgumentParser:
        """Add a command; `summary` is one sentence for both help pages."""
        parser = self._parsers.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=RawDescriptionHelpFormatter
        )
        # No default here: it would overwrite a --json that stands before the command.
        parser.add_argument("--json", action="store_true", default=SUPPRESS, help="print JSON for programs")
        parser.set_defaults(run=run)
        return parser

    def group(self, name: str, summary: str) -> Commands:
        """Add a command that only holds further commands, such as `registry check`."""
        return Commands(self._parsers.add_parser(name, help=summary, description=summary))
