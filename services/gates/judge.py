"""One gate on the files of one request, from its entry in the registry to its typed result.

Here it is decided what a pass is: the gate's own tool has run to its end on every file it is for, and found nothing.
Everything else is `fail` (the artefact's fault), `error` (nothing is known about the artefact) or `skipped` (there was
nothing to judge). When gates run, and how many at once, is left to `machine`; how a command is run, to `tool_gate`.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from protocol.errors import BadFrame, CallFailed, CallRefused, DeadlineExceeded
from protocol.messages.failure import Category, Finding
from protocol.messages.gate import GateRequest, GateResult, Verdict
from protocol.messages.infer import InferFinal, InferRequest
from services.gates import criteria
from services.gates.process import Bounds, How, run_bounded
from services.gates.sandbox import Sandbox
from services.gates.tool_gate import CannotJudge, ToolGate
from services.gates.tool_run import shortened
from services.gates.verdict_cache import VerdictCache, key_of
from services.gates.workspace import Workspace
from services.kit.clock import Clock
from services.kit.registry import GateEntry, Registry

_MAX_FINDINGS: Final = 200
_MAX_MESSAGE_CHARS: Final = 4_000
_CHECK_OF: Final = {
    "schema": ["-I", str(Path(__file__).with_name("schema_check.py"))],
    "taskir": ["-m", "services.gates.taskir_check"],
}
_CHECK_MEMORY_BYTES: Final = 1024**3
_CHECK_OUTPUT_BYTES: Final = 1024**2

Ask = Callable[[str, InferRequest, float], Awaitable[InferFinal]]
"""Asks a model, by registry name, with a bound in seconds; raises what `Service.ask` raises."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What a gate has to say: its findings, and more words where a pass deserves some."""

    findings: Sequence[Finding]
    message: str = ""


@dataclass(frozen=True, slots=True)
class Judge:
    """Runs gates. `sandbox` is the reason why there is none, where there is none.

    `registry` has the role of every gate that is run, and its model: of a removed one those it had, see `earlier`.
    """

    sandbox: Sandbox | str
    clock: Clock
    registry: Registry
    cache: VerdictCache

    async def run(self, gate: GateEntry, request: GateRequest, workspace: Workspace, ask: Ask) -> GateResult:
        """Judge; never raises for anything that an artefact, a schema, a tool or a model can do."""
        started_ms = self.clock.now_ms()
        try:
            if gate.role is not None:
                found = await self._by_role(gate, gate.role, request, workspace, ask)
                return self._found(gate, found, started_ms)
            command = None if gate.builtin is not None else self._tool_gate(gate, request, workspace)
            version = b"" if command is None else await command.version()
            key = None if version is None else self._key(gate, version, request, workspace)
            known = None if key is None else self.cache.get(key)
            if known is not None:
                now = {"cached": True, "started_ms": started_ms, "ended_ms": self.clock.now_ms()}
                return known.model_copy(update=now)
            found = Verdicts(await (self._builtin(gate, request, workspace) if command is None else command.run()))
        except CannotJudge as err:
            return self._result(gate, Verdict.ERROR, started_ms, err.category, shortened(str(err)))
        result = self._found(gate, found, started_ms)
        if key is not None:
            self.cache.put(key, result)
        return result

    def _found(self, gate: GateEntry, found: Verdicts, started_ms: int) -> GateResult:
        findings = list(found.findings)
        if not findings:
            return self._result(gate, Verdict.PASS, started_ms, gate.category, found.message)
        more = f", of which the first {_MAX_FINDINGS} are given" if len(findings) > _MAX_FINDINGS else ""
        count = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}{more}: {findings[0].message}"
        return self._result(gate, Verdict.FAIL, started_ms, gate.category, found.message or shortened(count), findings)

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
            required=gate.required,
            message=message[:_MAX_MESSAGE_CHARS],
            findings=(findings or [])[:_MAX_FINDINGS],
            started_ms=started_ms,
            ended_ms=self.clock.now_ms(),
        )

    def _tool_gate(self, gate: GateEntry, request: GateRequest, workspace: Workspace) -> ToolGate:
        if isinstance(self.sandbox, str):
            raise CannotJudge("sandbox.unavailable", Category.RESOURCE, self.sandbox)
        return ToolGate(gate, workspace, request.check_command, self.sandbox, self.clock)

    def _key(self, gate: GateEntry, version: bytes, request: GateRequest, workspace: Workspace) -> str:
        said = {"schema": request.json_schema, "command": request.check_command}
        parts = [gate.model_dump_json().encode(), version, sys.version.encode(), json.dumps(said).encode()]
        return key_of([*parts, *workspace.content()])

    async def _builtin(self, gate: GateEntry, request: GateRequest, workspace: Workspace) -> list[Finding]:
        """Check data in a child process: it needs no sandbox, and a kill ends it."""
        schema_file = workspace.folder / f"schema-{gate.name}"
        schema = request.json_schema if gate.builtin == "schema" else None
        if schema is not None:
            schema_file.write_text(json.dumps(schema), encoding="utf-8")
        targets = {subject.path.name: subject for subject in workspace.judged_by(gate)}
        files = [str(subject.path) for subject in targets.values()]
        argv = [sys.executable, *_CHECK_OF[gate.builtin or ""], "-" if schema is None else str(schema_file), *files]
        bounds = Bounds(gate.timeout_s, _CHECK_OUTPUT_BYTES, _CHECK_MEMORY_BYTES)
        ended = await run_bounded(argv, bounds=bounds, env={"LANG": "C.UTF-8"})
        if ended.how is not How.EXITED or ended.status != 0:
            why = ended.err.decode("utf-8", "replace")[-500:] or f"exit status {ended.status}"
            reason = why if ended.how is How.EXITED else f"{ended.how.value} (allowed: {gate.timeout_s:g} s)"
            raise CannotJudge("gate.tool_failed", Category.RESOURCE, f"the check of the data: {reason}")
        verdict: dict[str, Any] = json.loads(ended.out)
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

    async def _by_role(
        self, gate: GateEntry, role_name: str, request: GateRequest, workspace: Workspace, ask: Ask
    ) -> Verdicts:
        """The verdict of a model on every criterion, with its reasons."""
        role = self.registry.roles[role_name]
        judged = {subject.file: subject.path.read_text(encoding="utf-8") for subject in workspace.judged_by(gate)}
        try:
            asked = criteria.question(
                role,
                self.registry.models[role.model],
                objective=request.objective,
                criteria=request.criteria,
                artefacts=judged,
                fence=f"----{secrets.token_hex(8)}----",
                seed=int(key_of([*workspace.content(), request.objective.encode()])[:7], 16),
            )
            answer = await ask(role.model, asked, gate.timeout_s)
        except criteria.TooLarge as err:
            raise CannotJudge("judge.too_large", Category.RESOURCE, str(err)) from err
        except (CallFailed, CallRefused, DeadlineExceeded, BadFrame) as err:
            raise CannotJudge("judge.failed", Category.RESOURCE, f"{role_name} gave no verdict: {err}") from err
        points = criteria.verdicts(answer.text, request.criteria)
        if points is None:
            message = f"the answer of {role_name} is no verdict: {shortened(answer.text)[:500]}"
            raise CannotJudge("judge.unreadable", Category.RESOURCE, message)
        said = "\n".join(f"{one.number}. {'met' if one.met else 'NOT met'}: {one.reason}" for one in points)
        return Verdicts(
            [
                Finding(
                    gate=gate.name,
                    category=gate.category,
                    message=shortened(f"not met: {one.text}: {one.reason}"),
                    rule=f"criterion-{one.number}",
                )
                for one in points
                if not one.met
            ],
            shortened(said),
        )
