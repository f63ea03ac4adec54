"""The gates service at work: requests in, gates started and killed as the machine commands, results out.

Holds the clock, the tasks and the folders; `machine` decides what starts when, `judge` what a gate finds. A cancelled
request ends only when every process of its gates is dead.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from protocol.errors import BadFrame, CallFailed
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.session import PeerState
from services.gates import machine as m
from services.gates.earlier import with_earlier
from services.gates.judge import Judge
from services.gates.sandbox import Sandbox
from services.gates.verdict_cache import VerdictCache
from services.gates.workspace import Workspace, make_workspace, private_folder
from services.kit.config import CHECKOUT, Home
from services.kit.following import RegistryFollower
from services.kit.logs import LogEvent
from services.kit.registry import GateEntry, Registry, past_registries
from services.kit.service import Call, Service

SANDBOX_PROBED = LogEvent("sandbox.probed", "available reason control_groups")
GATE_ENDED = LogEvent("gate.ended", "task step attempt gate verdict category findings cached took_ms message")
GATE_BUG = LogEvent("gate.bug", "task step attempt gate error", "error")


@dataclass(slots=True)
class _Running:
    """One request being worked on."""

    call: Call
    request: GateRequest
    workspace: Workspace
    done: asyncio.Future[tuple[GateResult, ...]]
    tasks: dict[str, asyncio.Task[GateResult]] = field(default_factory=dict)


class GateService:
    """Answers `gate.request`. `service` is run by the caller, with `load` as its loading."""

    def __init__(self, home: Home, registry: Registry) -> None:
        cores = max(1, registry.hardware.cores)
        # The hub's tokens bound the runs that cost cores; those that cost none find a slot beside them.
        self.service = Service(home, "gates", ("gate",), slots=2 * cores)
        self.service.answer("gate.request", self._on_request)
        self.service.metrics = self._metrics
        self.service.follower = RegistryFollower(home, self.service.log, registry, self._take_up)
        self._registry = registry
        self._recalled: str | None = None
        """Digest of the registry under which the copies of earlier ones were last read."""
        self._cores = registry.hardware.cores
        self._leaving: asyncio.Task[None] | None = None
        policy = registry.gate_policy
        self._machine = m.GateMachine(uncounted_at_once=cores, stop_after_failure=policy.stop_after_failure)
        self._home = home
        self._folder: Path | None = None
        self._cache = VerdictCache(home.root / "verdicts", policy.cache_bytes)
        self._judge = Judge("the sandbox has not been tried yet", self.service.clock, registry, self._cache)
        self._runs: dict[str, _Running] = {}
        self._asked = 0
        self._verdicts: Counter[str] = Counter()
        self._group_version: int | None = None

    async def load(self) -> None:
        """Try the sandbox. Without one the service is ready for builtin gates, and refuses to run any command."""
        self._folder = private_folder(self._home.root)
        sandbox = Sandbox(hidden=(self._home.root, self._home.registry, CHECKOUT / "registry"))
        reason = await sandbox.probe()
        self._group_version = None if sandbox.groups is None else sandbox.groups.version
        self.service.log.write(
            SANDBOX_PROBED, available=reason is None, reason=reason, control_groups=self._group_version
        )
        self._judge = replace(self._judge, sandbox=sandbox if reason is None else reason)
        self.service.set_state(PeerState.READY, None if reason is None else f"sandbox.unavailable: {reason}"[:1_000])

    def close(self) -> None:
        """Remove the folder of this process."""
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def _take_up(self, registry: Registry, _needed: bool) -> bool:
        """Judge by these gates from now on. Removed ones stay, with the roles that judge: only tasks from before the
        change still ask for them.

        Slots follow from the cores of the machine, so a change of those is taken up by beginning anew.
        """
        if registry.hardware.cores != self._cores:
            if self._leaving is None:
                self._leaving = asyncio.get_running_loop().create_task(self._begin_anew())
            return False
        self._registry = registry
        self._judge = replace(self._judge, registry=with_earlier(registry, [self._judge.registry]))
        self._machine.stop_after_failure = registry.gate_policy.stop_after_failure
        self._cache.limit_bytes = registry.gate_policy.cache_bytes
        return True

    @property
    def _gates(self) -> Mapping[str, GateEntry]:
        """Those of the registry, and what is known of earlier ones."""
        return self._judge.registry.gates

    async def _recall(self) -> None:
        """Learn of the gates of earlier registries: the task that asks is from before a reload that came before us.

        Once for each registry: what the copies lack now they will lack later, and any client may ask for any name.
        """
        digest = self._registry.digest
        if self._recalled == digest:
            return
        copies, models = self._home.registry_copies, self._home.models
        earlier = await asyncio.to_thread(lambda: list(past_registries(copies, models)))
        self._recalled = digest
        self._judge = replace(self._judge, registry=with_earlier(self._judge.registry, earlier))

    async def _begin_anew(self) -> None:
        changed = "the cores in hardware.yaml have changed"
        if self._home.supervised:
            await self.service.leave(f"{changed}: begins anew when its gates have ended")
            self.service.end("registry")
        else:
            await self.service.leave(f"{changed}: start it again, since nobody else does")

    async def _on_request(self, call: Call) -> Message:
        request = call.read(GateRequest)
        if self._folder is None:
            raise CallFailed(
                Failure(code="gates.loading", category=Category.RESOURCE, origin="gates", message="not ready yet: wait")
            )
        if not self._gates.keys() >= set(request.gates):
            await self._recall()
        left_s = call.seconds_left(self.service.clock.now_ms())
        workspace = make_workspace(self._folder, request.artefacts, request.context)
        self._asked += 1
        name = f"run-{self._asked}"
        run = _Running(call, request, workspace, asyncio.get_running_loop().create_future())
        self._runs[name] = run
        try:
            async with asyncio.timeout(left_s):
                planned = self._plan(request, workspace)
                # Without a word from the hub: as many as the widest needs, the least that the hub would reserve.
                cores = call.header.cores or max((gate.cores for gate in planned), default=1)
                self._feed(m.RunAsked(name, planned, cores, self.service.clock.now_ms()))
                return GateFinal(results=list(await run.done))
        except TimeoutError as err:
            raise CallFailed(_too_late(request)) from err
        finally:
            # After an orderly end this changes nothing.
            self._feed(m.Cancelled(name, self.service.clock.now_ms()))
            await asyncio.gather(*run.tasks.values(), return_exceptions=True)
            del self._runs[name]
            workspace.remove()

    def _plan(self, request: GateRequest, workspace: Workspace) -> tuple[m.PlannedGate, ...]:
        """The gates of a request in its order, each once."""
        return tuple(self._planned(name, request, workspace) for name in dict.fromkeys(request.gates))

    def _planned(self, name: str, request: GateRequest, workspace: Workspace) -> m.PlannedGate:
        gate = self._gates.get(name)
        if gate is None:
            message = f"gate.unknown: registry/gates.yaml has no {name!r}; it has: {', '.join(self._registry.gates)}"
            return self._settled(name, Verdict.ERROR, Category.POLICY, message)
        why = None
        if not workspace.judged_by(gate):
            why = _not_applicable(gate, workspace)
        elif gate.role is not None and not request.criteria:
            why = "nothing to judge: the task lists no definition_of_done"
        if why is not None:
            return self._settled(name, Verdict.SKIPPED, gate.category, why, required=gate.required)
        stays = gate.cores == 0 and gate.role is None
        return m.PlannedGate(name, gate.category, gate.cores, gate.depends_on, gate.required, stays)

    def _settled(
        self, name: str, verdict: Verdict, category: Category, message: str, *, required: bool = True
    ) -> m.PlannedGate:
        now = self.service.clock.now_ms()
        result = GateResult(
            gate=name,
            verdict=verdict,
            category=category,
            required=required,
            message=message[:4_000],
            started_ms=now,
            ended_ms=now,
        )
        return m.PlannedGate(name, category, 0, required=required, settled=result)

    def _feed(self, event: m.Event) -> None:
        for command in self._machine.handle(event):
            match command:
                case m.StartGate(run, gate):
                    self._start(run, gate)
                case m.KillGate(run, gate):
                    self._runs[run].tasks[gate].cancel()
                case m.Finish(run, results):
                    self._finish(self._runs[run], results)

    def _finish(self, run: _Running, results: tuple[GateResult, ...]) -> None:
        header = run.call.header
        for result in results:
            self._verdicts[result.verdict.value] += 1
            self.service.log.write(
                GATE_ENDED,
                task=header.task,
                step=header.step,
                attempt=header.attempt,
                gate=result.gate,
                verdict=result.verdict.value,
                category=result.category.value,
                findings=len(result.findings),
                cached=result.cached,
                took_ms=result.ended_ms - result.started_ms,
                # What a finding says quotes the artefact, which is not for logs.
                message=result.message if result.verdict in (Verdict.ERROR, Verdict.SKIPPED) else None,
            )
        if not run.done.done():
            run.done.set_result(results)

    def _start(self, name: str, gate: str) -> None:
        run = self._runs[name]
        started_ms = self.service.clock.now_ms()
        entry = self._gates[gate]

        async def ask(model: str, question: InferRequest, timeout_s: float) -> InferFinal:
            """Ask on behalf of this run: the question is cancelled with it."""
            dst = f"infer.{model}"
            answer = await self.service.ask("infer.request", question, dst=dst, timeout_s=timeout_s, call=run.call)
            if not isinstance(answer, InferFinal):
                raise BadFrame("body.kind", f"{dst} answered with {type(answer).__name__}")
            return answer

        task = asyncio.create_task(self._judge.run(entry, run.request, run.workspace, ask))
        task.add_done_callback(lambda done: self._on_gate_done(name, gate, started_ms, done))
        run.tasks[gate] = task

    def _on_gate_done(self, name: str, gate: str, started_ms: int, task: asyncio.Task[GateResult]) -> None:
        """Report the end of a gate, whatever it was: the machine waits for its cores."""
        if task.cancelled():
            result = self._failed(gate, started_ms, "cancelled")
        elif (bug := task.exception()) is not None:
            header = self._runs[name].call.header
            self.service.log.write(
                GATE_BUG, task=header.task, step=header.step, attempt=header.attempt, gate=gate, error=repr(bug)
            )
            result = self._failed(gate, started_ms, f"internal.bug: {bug!r}"[:1_000])
        else:
            result = task.result()
        self._feed(m.GateEnded(name, gate, result, self.service.clock.now_ms()))

    def _failed(self, gate: str, started_ms: int, message: str) -> GateResult:
        return GateResult(
            gate=gate,
            verdict=Verdict.ERROR,
            category=Category.RESOURCE,
            required=self._gates[gate].required,
            message=message,
            started_ms=started_ms,
            ended_ms=self.service.clock.now_ms(),
        )

    def _metrics(self) -> dict[str, Any]:
        return {
            "gates_running": self._machine.running,
            "gates_waiting": self._machine.waiting,
            "requests": self._asked,
            "cache_hits": self._cache.hits,
            "cache_misses": self._cache.misses,
            "cache_bytes": self._cache.bytes,
            "control_groups": self._group_version or "none",
            **{f"gates_{verdict.value}": self._verdicts[verdict.value] for verdict in Verdict},
        }


def _not_applicable(gate: GateEntry, workspace: Workspace) -> str:
    wanted = "/".join(kind.value for kind in gate.kinds)
    languages = f" in {'/'.join(gate.languages)}" if gate.languages else ""
    there = ", ".join(f"{subject.file} ({subject.kind.value})" for subject in workspace.subjects if subject.judged)
    return f"nothing to judge: {gate.name} is for {wanted}{languages}; under check: {there}"[:4_000]


def _too_late(request: GateRequest) -> Failure:
    message = f"the deadline of the request passed before {', '.join(request.gates)} had ended; all were killed"
    return Failure(code="gates.deadline", category=Category.TIMEOUT, origin="gates", message=message)
