"""One gate on the files of one request, from its entry in the registry to its typed result.

Here it is decided what a pass is: the gate's own tool has run to its end on every file it is for, and found nothing.
Everything else is `fail` (the artefact's fault), `error` (nothing is known about the artefact) or `skipped` (there was
nothing to judge). When gates run, and how many at once, is left to `machine`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.messages.failure import Category, Finding
from protocol.messages.gate import GateResult, Verdict
from services.gates.process import Bounds, How, run_bounded
from services.gates.sandbox import WORKSPACE, Limits, Sandbox, SandboxBroken
from services.gates.tool_run import Reading, ToolRun, shortened
from services.gates.tools import OTHER, TOOLS, Tool, missing, tool_name
from services.gates.workspace import Subject, Workspace
from services.kit.clock import Clock
from services.kit.registry import GateEntry

_MAX_FINDINGS: Final = 200
_SCHEMA_CHECK: Final = Path(__file__).with_name("schema_check.py")
_SCHEMA_MEMORY_BYTES: Final = 1024**3
_SCHEMA_OUTPUT_BYTES: Final = 1024**2


class CannotJudge(Exception):
    """The gate gives no verdict on the artefact. RESOURCE: something is missing here; POLICY: it was asked wrongly."""

    def __init__(self, code: str, category: Category, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.category = category


@dataclass(frozen=True, slots=True)
class Judge:
    """Runs gates. `sandbox` is the reason why there is none, where there is none."""

    sandbox: Sandbox | str
    clock: Clock

    async def run(self, gate: GateEntry, workspace: Workspace, schema: Mapping[str, Any] | None) -> GateResult:
        """Judge; never raises for anything that an artefact, a schema or a tool can do."""
        started_ms = self.clock.now_ms()
        try:
            if gate.builtin is not None:
                findings = await self._against_schema(gate, workspace, schema)
            else:
                findings = await self._with_tool(gate, workspace)
        except CannotJudge as err:
            return self._result(gate, Verdict.ERROR, started_ms, err.category, shortened(str(err)))
        if not findings:
            return self._result(gate, Verdict.PASS, started_ms, gate.category, "")
        more = f", of which the first {_MAX_FINDINGS} are given" if len(findings) > _MAX_FINDINGS else ""
        message = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}{more}: {findings[0].message}"
        return self._result(gate, Verdict.FAIL, started_ms, gate.category, shortened(message), findings)

    def _result(
        self,
        gate: GateEntry,
        verdict: Verdict,
        started_ms: int,
        category: Category,
        message: str,
        findings: list[Finding] | None = None,
    ) -> GateResult:
        return GateResult(
            gate=gate.name,
            verdict=verdict,
            category=category,
            message=message,
            findings=(findings or [])[:_MAX_FINDINGS],
            started_ms=started_ms,
            ended_ms=self.clock.now_ms(),
        )

    async def _with_tool(self, gate: GateEntry, workspace: Workspace) -> list[Finding]:
        if isinstance(self.sandbox, str):
            raise CannotJudge("sandbox.unavailable", Category.RESOURCE, self.sandbox)
        if (what := missing(gate.argv, self.sandbox.find)) is not None:
            advice = "install it, or take the gate out of registry/gates.yaml"
            raise CannotJudge("gate.tool_missing", Category.RESOURCE, f"{what} is not installed here: {advice}")
        tool = TOOLS.get(tool_name(gate.argv), OTHER)
        targets = workspace.tests_for(gate) if tool.on_tests else workspace.judged_by(gate)
        deadline_ms = self.clock.now_ms() + int(gate.timeout_s * 1000)
        found: list[Finding] = []
        for number, target in enumerate(targets):
            report = workspace.folder / f"report-{gate.name}-{number}" if tool.reports else None
            left_s = max(0.001, (deadline_ms - self.clock.now_ms()) / 1000)
            reading = await _Job(gate, tool, target, workspace, report, Limits(left_s, gate.cores)).run(self.sandbox)
            if reading.broken is not None:
                raise CannotJudge("gate.tool_failed", Category.RESOURCE, reading.broken)
            found += reading.findings
        return found

    async def _against_schema(
        self, gate: GateEntry, workspace: Workspace, schema: Mapping[str, Any] | None
    ) -> list[Finding]:
        schema_file = workspace.folder / f"schema-{gate.name}"
        if schema is not None:
            schema_file.write_text(json.dumps(schema), encoding="utf-8")
        targets = {subject.path.name: subject for subject in workspace.judged_by(gate)}
        files = [str(subject.path) for subject in targets.values()]
        argv = [sys.executable, "-I", str(_SCHEMA_CHECK), "-" if schema is None else str(schema_file), *files]
        bounds = Bounds(gate.timeout_s, _SCHEMA_OUTPUT_BYTES, _SCHEMA_MEMORY_BYTES)
        ended = await run_bounded(argv, bounds=bounds, env={"LANG": "C.UTF-8"})
        if ended.how is not How.EXITED or ended.status != 0:
            why = ended.err.decode("utf-8", "replace")[-500:] or f"exit status {ended.status}"
            reason = why if ended.how is How.EXITED else f"{ended.how.value} (allowed: {gate.timeout_s:g} s)"
            raise CannotJudge("gate.tool_failed", Category.RESOURCE, f"the check against the schema: {reason}")
        verdict = json.loads(ended.out)
        if "schema_error" in verdict:
            message = f"json_schema cannot be used: {verdict['schema_error']}"
            raise CannotJudge("gate.bad_schema", Category.POLICY, message)
        return [
            Finding(
                gate=gate.name,
                category=gate.category,
                message=shortened(f"{item['path']}: {item['message']}"),
                artefact=targets[item["file"]].artefact,
                file=targets[item["file"]].file,
                rule=item["rule"],
            )
            for item in verdict["findings"]
        ]


@dataclass(frozen=True, slots=True)
class _Job:
    """One call of a gate's tool, on one file."""

    gate: GateEntry
    tool: Tool
    target: Subject
    workspace: Workspace
    report: Path | None
    limits: Limits

    async def run(self, sandbox: Sandbox) -> Reading:
        path = f"{WORKSPACE}/{self.target.file}"
        argv = self.gate.command(artefact=path, workspace=WORKSPACE, python=sandbox.python)
        try:
            ended = await sandbox.run(
                [*argv, *self.tool.arguments],
                files=self.workspace.files(),
                limits=self.limits,
                report=self.report,
            )
        except SandboxBroken as err:
            raise CannotJudge("sandbox.failed", Category.RESOURCE, str(err)) from err
        except OSError as err:
            raise CannotJudge("sandbox.failed", Category.RESOURCE, f"bwrap could not be started: {err}") from err
        run = ToolRun(
            gate=self.gate.name,
            category=self.gate.category,
            target=self.target.file,
            artefacts=self.workspace.names(),
            status=ended.status,
            out=ended.out,
            err=ended.err,
            report=_head(self.report, self.limits.output_bytes) if self.report is not None else None,
        )
        return self.tool.read(run) if ended.how is How.EXITED else self._cut_short(run, ended.how)

    def _cut_short(self, run: ToolRun, how: How) -> Reading:
        """A run that was killed: the artefact's fault if it was executed or provoked the output, else the tool's."""
        bound = {
            How.TIMED_OUT: f"{self.gate.timeout_s:g} s",
            How.FLOODED: f"{self.limits.output_bytes} bytes of output",
            How.GREW: f"{self.limits.memory_bytes} bytes of memory",
        }[how]
        message = f"killed: {how.value} (allowed: {bound})"
        if self.tool.runs_artefact or how is How.FLOODED:
            return Reading((run.finding(message, rule=how.name.lower().replace("_", "-")),))
        return Reading(broken=message)


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)
