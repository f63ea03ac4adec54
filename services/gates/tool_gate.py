"""One gate's command on the files of one request: placeholders filled in, run in the sandbox, its output read.

A command runs once for each artefact, for each file of tests, or once, as its placeholders say. What of its end is the
artefact's fault and what the tool's is decided here; what a pass is, in `judge`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from protocol.messages.failure import Category, Finding
from services.gates.parsers import PARSERS
from services.gates.process import Ended, How
from services.gates.sandbox import CHECKS, REPORT, WORKSPACE, Channel, Limits, Sandbox, SandboxBroken
from services.gates.tool_run import Reading, ToolRun
from services.gates.workspace import Subject, Workspace
from services.kit.clock import Clock
from services.kit.registry import GateEntry

_VERSION_LIMITS: Final = Limits(10.0)
_KEY_BYTES: Final = 32
_NOT_STARTED: Final = (126, 127)
_NOT_STARTED_SAYS: Final = b"prlimit: failed to execute "
"""What the sandbox's own last step says. A command could say it too, and would win an error instead of a verdict."""
_OWN_COMMAND: Final = frozenset({"workspace", "python"})
"""Placeholders in a task's own command."""


class CannotJudge(Exception):
    """The gate gives no verdict on the artefact. RESOURCE: something is missing here; POLICY: it was asked wrongly."""

    def __init__(self, code: str, category: Category, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.category = category


@dataclass(frozen=True, slots=True)
class ToolGate:
    """A gate with an argv, on these files."""

    gate: GateEntry
    workspace: Workspace
    check_command: Sequence[str] | None
    sandbox: Sandbox
    clock: Clock

    async def version(self) -> bytes | None:
        """What identifies the tool, for the key of a cached result; None if it does not say.

        Raises CannotJudge if the command, or the tool that it names, is not here.
        """
        for _, argv in self._commands():
            self._demand(argv)
        first = next((argv for _, argv in self._commands()), None)
        if first is None:
            return None
        own = [argument.format_map(self._fixed()) for argument in self.gate.version_argv]
        return await self.sandbox.fingerprint(first[0], own, self._run_version)

    async def run(self) -> list[Finding]:
        """Findings of all its runs. Raises CannotJudge."""
        deadline_ms = self.clock.now_ms() + int(self.gate.timeout_s * 1000)
        found: list[Finding] = []
        for number, (target, argv) in enumerate(self._commands()):
            left_s = max(0.001, (deadline_ms - self.clock.now_ms()) / 1000)
            reading = await self._one(number, target, argv, left_s)
            if reading.broken is not None:
                raise CannotJudge("gate.tool_failed", Category.RESOURCE, reading.broken)
            found += reading.findings
        return found

    def _commands(self) -> Iterator[tuple[Subject, list[str]]]:
        """Each call: the file it is about (of several the first) and its arguments."""
        judged = self.workspace.judged_by(self.gate)
        fixed = self._fixed()
        match self.gate.target:
            case "artefact":
                for subject in judged:
                    yield subject, self.gate.command(**fixed, artefact=_inside(subject))
            case "test":
                for subject in self.workspace.tests_for(self.gate):
                    yield subject, self.gate.command(**fixed, test=_inside(subject))
            case "artefacts":
                yield judged[0], self.gate.command(**fixed, artefacts=[_inside(subject) for subject in judged])
            case "command":
                yield judged[0], self.gate.command(**fixed, command=self._own_command())
            case _:
                yield judged[0], self.gate.command(**fixed)

    def _fixed(self) -> dict[str, str]:
        return {"workspace": WORKSPACE, "python": self.sandbox.python, "checks": CHECKS, "report": REPORT}

    def _own_command(self) -> list[str]:
        if self.check_command is None:
            message = "the task has no check_command: give it one, or take this gate out of its gates"
            raise CannotJudge("gate.no_command", Category.POLICY, message)
        values = {name: value for name, value in self._fixed().items() if name in _OWN_COMMAND}
        filled = []
        for argument in self.check_command:
            for name, value in values.items():
                argument = argument.replace(f"{{{name}}}", value)
            filled.append(argument)
        return filled

    def _demand(self, argv: Sequence[str]) -> None:
        """Raise CannotJudge if what this argv names is not there."""
        advice = "install it, or take the gate out of registry/gates.yaml"
        if self.sandbox.find(argv[0]) is None:
            what = f"the command {argv[0]!r}"
        # The sandbox shows the installation this process runs from, so what can be imported is the same.
        elif argv[0] == self.sandbox.python and argv[1:2] == ["-m"] and not _importable(argv[2:3]):
            what = f"the Python module {argv[2]!r}"
        else:
            return
        raise CannotJudge("gate.tool_missing", Category.RESOURCE, f"{what} is not installed here: {advice}")

    async def _run_version(self, argv: Sequence[str]) -> bytes | None:
        try:
            ended = await self.sandbox.run(argv, files={}, limits=self._memory(_VERSION_LIMITS))
        except (SandboxBroken, OSError):
            return None
        whole = ended.how is How.EXITED and ended.status == 0
        return hashlib.sha256(ended.out + ended.err).digest() if whole else None

    def _memory(self, limits: Limits) -> Limits:
        return replace(limits, memory_bytes=self.gate.memory_bytes)

    async def _one(self, number: int, target: Subject, argv: Sequence[str], left_s: float) -> Reading:
        report = self.workspace.folder / f"report-{self.gate.name}-{number}" if self._fills_report() else None
        limits = self._memory(Limits(left_s, max(1, self.gate.cores)))
        judged = frozenset(subject.file for subject in self.workspace.subjects if subject.judged)
        channel: Channel | None = None
        if self.gate.parser == "tests":
            channel = Channel(secrets.token_bytes(_KEY_BYTES), {"TIERLINE_UNDER_CHECK": "/".join(judged)})
        try:
            ended = await self.sandbox.run(
                argv, files=self.workspace.files(), limits=limits, report=report, channel=channel
            )
        except SandboxBroken as err:
            raise CannotJudge("sandbox.failed", Category.RESOURCE, str(err)) from err
        except OSError as err:
            raise CannotJudge("sandbox.failed", Category.RESOURCE, f"bwrap could not be started: {err}") from err
        run = ToolRun(
            gate=self.gate.name,
            category=self.gate.category,
            target=target.file,
            artefacts=self.workspace.names(),
            status=ended.status,
            out=ended.out,
            err=ended.err,
            report=None if report is None else _head(report, limits.output_bytes),
            pattern=self.gate.pattern,
            under_check=judged,
            records=ended.report,
            key=b"" if channel is None else channel.key,
        )
        if ended.how is not How.EXITED:
            return self._cut_short(run, ended, limits)
        if ended.status in _NOT_STARTED and ended.err.startswith(_NOT_STARTED_SAYS):
            return Reading(broken=f"it cannot be started in the sandbox: {run.said()}")
        return PARSERS[self.gate.parser](run)

    def _fills_report(self) -> bool:
        return "report" in self.gate.placeholders()

    def _cut_short(self, run: ToolRun, ended: Ended, limits: Limits) -> Reading:
        """A run that was killed: the artefact's fault if it was executed or provoked the output, else the tool's."""
        bounds: Mapping[How, str] = {
            How.TIMED_OUT: f"{self.gate.timeout_s:g} s",
            How.FLOODED: f"{limits.output_bytes} bytes of output",
            How.GREW: f"{limits.memory_bytes} bytes of memory",
        }
        message = f"killed: {ended.how.value} (allowed: {bounds[ended.how]})"
        if self.gate.executes or ended.how is How.FLOODED:
            return Reading((run.finding(message, rule=ended.how.name.lower().replace("_", "-")),))
        return Reading(broken=message)


def _inside(subject: Subject) -> str:
    return f"{WORKSPACE}/{subject.file}"


def _importable(names: Sequence[str]) -> bool:
    return all(importlib.util.find_spec(name.partition(".")[0]) is not None for name in names)


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)
