"""Carries out what the machine of the engine's life commands: the child, its port, its health, its figures.

One child at a time, in a process group of its own that dies with this process. The decisions are `machine`'s, the
command line is `engines`', the calls are `app`'s. A bug in here ends the service (supervisord starts it again), since
an engine that nobody watches is worse than a restart.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from protocol.messages.session import PeerState
from services.inference import machine as m
from services.inference.command_line import HOST, modes_of
from services.inference.engines import Engine, EngineUnusable, choose_engine, environment
from services.inference.llama_http import EngineError, EngineFaulty, LlamaServer
from services.inference.model_file import BadModelFile
from services.inference.modes import EngineModes
from services.inference.needs import MemoryNeeds
from services.inference.slots import SlotDesk
from services.kit import children
from services.kit.clock import Clock
from services.kit.config import Home
from services.kit.gguf_facts import stamp
from services.kit.logs import Log, LogEvent
from services.kit.registry import ModelEntry, Registry
from services.kit.registry.constraints import violations
from services.kit.registry.launch import Launch

ENGINE_STARTED = LogEvent("engine.started", "launch engine pid port")
ENGINE_ENDED = LogEvent("engine.ended", "launch pid how", "warning")
ENGINE_KILLED = LogEvent("engine.killed", "launch pid reason", "warning")
ENGINE_UNLOADED = LogEvent("engine.unloaded", "launch pid")
ENGINE_BUG = LogEvent("engine.bug", "error", "error")

_TICK_S: Final = 0.1
_LOADING_POLL_S: Final = 0.1
_SERVING_POLL_S: Final = 1.0
_KILL_GRACE_S: Final = 2.0
_SLOT_FREE_S: Final = 2.0
"""A slot that says it is busy so long after its connection was closed stays busy."""
_SLOT_POLL_S: Final = 0.005
_SLOT_POLL_MAX_S: Final = 0.05
"""A slot is usually free after one more token; one that takes longer is asked about less and less often."""
_SLOT_ANSWER_S: Final = 30.0
"""A child that says nothing about its slots for so long is replaced; one batch of a large model takes seconds."""
_MEASURE_S: Final = 10.0
_FORESEE_S: Final = 10.0
_MAX_OUTPUT_BYTES: Final = 16 * 1024 * 1024
_TOTALS: Final = ("tokens_predicted_total", "prompt_tokens_total", "tokens_predicted_seconds_total")


class EngineSupervisor:
    """Keeps one engine child alive. `report` is called with every state the hub should know."""

    def __init__(
        self,
        registry: Registry,
        launch: Launch,
        home: Home,
        clock: Clock,
        log: Log,
        report: Callable[[PeerState, str | None], None],
    ) -> None:
        entry = launch.entry
        if entry.path is None:
            raise ValueError(f"model {entry.name} has no path: engine noop needs no supervisor")
        self._entry = entry
        self.desk = SlotDesk(home.prefixes(entry.name), entry.slots, log, entry.prefix_disk_bytes)
        """Who sits in which slot of the child."""
        self.modes = EngineModes(modes_of(launch), clock, self._feed)
        """Whether the child guesses ahead, and when that changes."""
        self._launched_from = replace(launch, prefix_folder=home.prefixes(entry.name))
        self._home = home
        self._clock = clock
        self._log = log
        self._report = report
        self.needs = MemoryNeeds(registry)
        """What this model and those beside it will take."""
        self._model_file = self.needs.file(entry.path)
        draft = launch.draft.path if launch.draft is not None else None
        self._draft_file = None if draft is None else self.needs.file(draft)
        self._output = home.logs / f"inference-{entry.name}.engine.out"
        self._life = m.EngineLife(load_deadline_ms=int(entry.load_deadline_s * 1000), wanted=entry.residency == "hot")
        self._decided = asyncio.Event()
        self._settled = asyncio.Event()
        """Clear during a change of mode."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._child: asyncio.subprocess.Process | None = None
        self._server: LlamaServer | None = None
        self._past = dict.fromkeys(_TOTALS, 0.0)
        self._now: dict[str, float] = {}
        self._speed = 0.0
        self._model_bytes = 0
        self._measured_s = 0.0
        self._needs_bytes = 0
        self.engine_name: str = entry.engine
        self.calls = 0
        """Calls that may hold a slot at the moment."""
        self.reason: str | None = None
        """Why the engine is not serving, for people."""
        self.crashed = False

    @property
    def server(self) -> LlamaServer | None:
        """The serving child's API; None while there is none."""
        return self._server if self._life.phase is m.Phase.SERVING else None

    async def serving(self) -> LlamaServer | None:
        """The serving child's API, after the end of a change of mode where one is under way; None while there is none.

        The caller has the deadline.
        """
        await self._settled.wait()
        return self.server

    @property
    def child_pid(self) -> int | None:
        """Process id of the child, None without one."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Begin; returns when the engine is READY for the first time, or DEGRADED with a reason, or PARKED."""
        self._spawn_task(self._foresee())
        self._spawn_task(self._tick())
        self._feed(m.Started(self._clock.now_ms()))
        await self._decided.wait()

    async def stop(self) -> None:
        """End the child and everything that watches it; writes no log, since the service has closed it by then."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._child is not None:
            await children.end(self._child, grace_s=_KILL_GRACE_S)
        if self._server is not None:
            await self._server.close()
        self.desk.clear()

    def reside(self, loaded: bool) -> None:
        """The hub wants the model in memory, or out of it."""
        now = self._clock.now_ms()
        self._feed(m.LoadAsked(now) if loaded else m.ParkAsked(now))

    def progressed(self) -> None:
        """A piece of an answer has come."""
        self._feed(m.Progressed(self._clock.now_ms(), self._life.launch))

    async def free_slot(self, server: LlamaServer) -> None:
        """Return when no more slots are busy than calls run, so that the caller's is free; or have the child replaced.

        The caller has closed its stream and taken itself out of `calls`. llama.cpp may go on decoding for nobody.
        """
        launch = self._life.launch
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        pause_s = _SLOT_POLL_S
        while server is self._server:
            try:
                busy = await server.busy_slots()
            except EngineError:
                limit_s = _SLOT_ANSWER_S  # busy with a batch, or dead, which the watch on the child will see
            else:
                if busy <= self.calls:
                    return
                limit_s = _SLOT_FREE_S
            if loop.time() - began_s > limit_s:
                self._feed(m.SlotStuck(self._clock.now_ms(), launch))
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _SLOT_POLL_MAX_S)

    def figures(self) -> dict[str, Any]:
        """What the hub is told with every pong; polled in the background, so asking costs nothing. Totals go on
        over the deaths of children, except for what the last second before a death added.
        """
        total = {name: self._past[name] + self._now.get(name, 0.0) for name in _TOTALS}
        return {
            "engine": self.engine_name,
            "model_file": self._model_file.path.name,
            "child_pid": self.child_pid,
            "child_rss_bytes": self.child_bytes(),
            "respawns": self._life.respawns,
            "loads": self._life.loads,
            "load_ms": self._life.load_ms,
            "requests_processing": int(self._now.get("requests_processing", 0)),
            "tokens_predicted_total": int(total["tokens_predicted_total"]),
            "prompt_tokens_total": int(total["prompt_tokens_total"]),
            "tokens_per_s": round(self._speed, 1),
            **self.desk.figures(),
            **self.modes.figures(),
        }

    def model_bytes(self) -> int:
        """What the loaded model is measured to take; 0 before the first measurement and without a child."""
        return self._model_bytes

    def needs_bytes(self) -> int:
        """What the model will take when it is loaded, by its files as they were looked at last; 0 = not known yet."""
        return self._needs_bytes

    def child_bytes(self) -> int:
        """Resident memory of the child in bytes; 0 without one."""
        return 0 if self._child is None else children.resident_bytes(self._child.pid)

    # The machine's commands.

    def _feed(self, event: m.Event) -> None:
        commands = self._life.handle(event)
        if self._life.changing:
            self._settled.clear()
        else:
            self._settled.set()
        for command in commands:
            match command:
                case m.Launch(launch):
                    self._spawn_task(self._launch(launch))
                case m.Kill(launch, reason):
                    self._spawn_task(self._kill(launch, reason))
                case m.Unload(launch):
                    self._spawn_task(self._unload(launch))
                case m.Report(state, reason):
                    self.reason = reason
                    if state is PeerState.READY:
                        self.modes.serving()
                    if state is not PeerState.LOADING:
                        self._decided.set()
                    self._report(state, reason)

    async def _launch(self, launch: int) -> None:
        key = secrets.token_urlsafe(24)
        try:
            engine = choose_engine(self._entry, self._home)
            self.engine_name = engine.name
            prepared = await self._prepared(engine)
            port = _free_port(self._entry)
            self._shorten_output()
            command = engine.command(self._seated(engine, prepared), port, self.modes.launching())
            child = await children.spawn(command, output=self._output, env=environment(os.environ, key))
        except (EngineUnusable, BadModelFile) as err:
            self._feed(m.LaunchFailed(self._clock.now_ms(), launch, str(err)))
            return
        except OSError as err:
            self._feed(m.LaunchFailed(self._clock.now_ms(), launch, f"the engine cannot be started: {err}"))
            return
        self._log.write(ENGINE_STARTED, launch=launch, engine=engine.name, pid=child.pid, port=port)
        self._child = child
        self._server = server = LlamaServer(port, key)
        polling = self._spawn_task(self._poll(launch, server))
        self._spawn_task(self._watch(launch, child, server, polling))
        self._feed(m.Launched(self._clock.now_ms(), launch))

    async def _prepared(self, engine: Engine) -> Launch:
        """The launch with the files as they are now. Raises BadModelFile, and EngineUnusable where a rule forbids it:
        the files may have changed since the registry was checked, and some rules ask for the build or other models."""
        facts = await self._model_file.check()
        draft_facts = await self._draft_file.check() if self._draft_file is not None else None
        prepared = self._launched_from.with_facts(facts, draft_facts)
        await engine.check(prepared)
        broken = [*violations(prepared, engine.build), *await self.needs.over_committed(prepared)]
        if broken:
            raise EngineUnusable("; ".join(map(str, broken)))
        return prepared

    def _seated(self, engine: Engine, launch: Launch) -> Launch:
        """Tell the desk about the child to come; returns the launch, without a folder where no slots are copied."""
        files = tuple(stamp(path) for path in launch.paths())
        copies = self.desk.engine_started(
            (engine.name, engine.build, files), copies=launch.takes_copies, token_bytes=launch.token_bytes
        )
        return launch if copies else replace(launch, prefix_folder=None)

    async def _kill(self, launch: int, reason: str) -> None:
        if self._child is None or launch != self._life.launch:
            return
        self._log.write(ENGINE_KILLED, launch=launch, pid=self._child.pid, reason=reason)
        await children.end(self._child, grace_s=_KILL_GRACE_S)

    async def _unload(self, launch: int) -> None:
        if self._child is None or launch != self._life.launch:
            return
        self._log.write(ENGINE_UNLOADED, launch=launch, pid=self._child.pid)
        await children.end(self._child, grace_s=_KILL_GRACE_S)

    async def _watch(
        self, launch: int, child: asyncio.subprocess.Process, server: LlamaServer, polling: asyncio.Task[None]
    ) -> None:
        """See the child's exit, whoever caused it, and clean up after it."""
        status = await child.wait()
        await children.end(child, grace_s=0)
        polling.cancel()
        self._child = None
        self._server = None
        self._model_bytes = 0
        for name in _TOTALS:
            self._past[name] += self._now.get(name, 0.0)
        self._now = {}
        how = _how_it_ended(status, self._output)
        if self._life.phase is not m.Phase.ENDING or self._life.killed_for:
            self.modes.failed(self._life.killed_for or how)
        self._log.write(ENGINE_ENDED, launch=launch, pid=child.pid, how=how)
        self._feed(m.ChildExited(self._clock.now_ms(), launch, how))
        await server.close()

    async def _poll(self, launch: int, server: LlamaServer) -> None:
        while True:
            if self._life.phase is m.Phase.SERVING:
                await self._measure(server)
                await asyncio.sleep(_SERVING_POLL_S)
                await self._poll_serving(launch, server)
                continue
            ready, why = False, None
            try:
                ready = await server.ready(self._entry.slots)
            except EngineFaulty as err:
                why = str(err)
            except EngineError:
                pass  # it does not listen yet; for how long that is no reason, the machine knows
            now = self._clock.now_ms()
            self._feed(m.HealthOk(now, launch) if ready else m.HealthFailed(now, launch, why))
            if not ready:
                await asyncio.sleep(_LOADING_POLL_S)

    async def _poll_serving(self, launch: int, server: LlamaServer) -> None:
        alive = await server.alive()
        now = self._clock.now_ms()
        self._feed(m.HealthOk(now, launch) if alive else m.HealthFailed(now, launch))
        if not alive:
            return
        try:
            metrics = await server.metrics()
            if "requests_processing" not in metrics:  # some builds do not say so; unknown is not idle
                metrics["requests_processing"] = await server.busy_slots()
        except EngineError:
            return  # in the middle of a long batch; the health check above tells whether it is worse
        if server is not self._server:
            return
        busy = int(metrics["requests_processing"])
        self._feed(m.SlotsSeen(self._clock.now_ms(), launch, busy, self.calls))
        seconds, tokens = (
            metrics.get(name, 0.0) - self._now.get(name, 0.0)
            for name in ("tokens_predicted_seconds_total", "tokens_predicted_total")
        )
        self._speed = tokens / seconds if seconds > 0 else self._speed
        self._now = metrics

    async def _measure(self, server: LlamaServer) -> None:
        """Measure what the child takes, now and then: the kernel walks through all its pages for it."""
        now_s = asyncio.get_running_loop().time()
        if self._child is None or (self._model_bytes and now_s - self._measured_s < _MEASURE_S):
            return
        self._measured_s = now_s
        measured = await asyncio.to_thread(children.proportional_bytes, self._child.pid)
        if server is self._server:
            self._model_bytes = measured

    async def _foresee(self) -> None:
        """Know what the model will take. Its files may come late, or be exchanged."""
        while True:
            self._needs_bytes = (await self.needs.of([self._entry.name]))[self._entry.name]
            await asyncio.sleep(_FORESEE_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._feed(m.Ticked(self._clock.now_ms()))
            self.modes.tick(self._life)

    def _shorten_output(self) -> None:
        if self._output.exists() and self._output.stat().st_size > _MAX_OUTPUT_BYTES:
            self._output.replace(self._output.with_suffix(".out.1"))

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._log.write(ENGINE_BUG, error=repr(error))
        self.crashed = True
        os.kill(os.getpid(), signal.SIGTERM)


def _free_port(entry: ModelEntry) -> int:
    """The entry's port if it is free, else EngineUnusable; any free one where it has none.

    Between this and the child's bind another process may take it: the child then ends and the next launch chooses anew.
    """
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the child will, so TIME_WAIT is no obstacle
        try:
            sock.bind((HOST, entry.port))
        except OSError as err:
            raise EngineUnusable(
                f"port {entry.port} of model {entry.name} is taken ({err.strerror}): stop what listens there, "
                "or set port: 0 in models.yaml for a free one"
            ) from err
        port: int = sock.getsockname()[1]
        return port


def _how_it_ended(status: int, output: Path) -> str:
    """Exit of a child for people: its signal or status, and the last line it wrote."""
    how = f"exit status {status}"
    if status < 0:
        try:
            how = signal.Signals(-status).name
        except ValueError:
            how = f"signal {-status}"
    try:
        with output.open("rb") as stream:
            stream.seek(max(0, output.stat().st_size - 4_096))
            lines = stream.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{how}, see {output}" + (f": {lines[-1][:200]}" if lines else "")
