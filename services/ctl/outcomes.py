"""How a command ends: the four exit codes, and one error class per code that is not a result.

Scripts branch on these numbers, so they are promised (DESIGN section 1) and set nowhere else. A command raises where
the fact is known; only `__main__` turns the error into a message and a number.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of every `tierline` command."""

    OK = 0
    FAILED = 1
    """The task failed or was cancelled, a check of `doctor` failed, a service did not become ready."""
    BAD_INPUT = 2
    """Bad usage, a bad file, a bad registry, an unknown task: repeating the command cannot help."""
    UNREACHABLE = 3
    """No hub answers, or it takes no more work at present."""
    INTERRUPTED = 130
    """Ended by Ctrl-C, as shells count it."""


class CommandError(Exception):
    """The command cannot go on. The text is for a person: what is wrong, where, and what to do next."""

    code = ExitCode.FAILED

    def __init__(self, message: str, *, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.details = details
        """Further lines, one problem each, such as `models.yaml:12: …`."""


class BadInput(CommandError):
    """What the user gave cannot be used: repair it."""

    code = ExitCode.BAD_INPUT


class BadUsage(BadInput):
    """The arguments make no command."""

    def __init__(self, message: str, *, command: str, usage: str) -> None:
        super().__init__(message)
        self.command = command
        """Name of the command that was called, with those it belongs to."""
        self.usage = usage
        """How to call it: `usage: …`, with the newline at its end."""


class Unreachable(CommandError):
    """No hub answers: start the stack, or look why it is not there."""

    code = ExitCode.UNREACHABLE
