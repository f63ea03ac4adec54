"""A server elsewhere as the engine of an entry: tries again where that is safe, and leaves it alone while it fails.

The decisions are `services.kit.breaker`'s and `retry`'s, the HTTP is `openai_http`'s; here are the clock, the dice, the
key and the figures. While the circuit is open the service is DEGRADED with the reason, so that the hub keeps its work,
and what is here already fails at once and says when the probe comes. The key is read for every request: it may
be changed while the service runs.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Final

from protocol.messages.failure import Category
from protocol.messages.session import PeerState
from services.inference.llama_http import (
    EngineError,
    EngineGone,
    EngineUnavailable,
    Piece,
    PromptTooLong,
    RequestInvalid,
    Usage,
)
from services.inference.openai_http import NoRoom, OpenAiServer, Rejected, Unreachable
from services.inference.retry import RetryPolicy, pause_s
from services.kit import breaker as b
from services.kit.clock import Clock
from services.kit.config import Home, SecretUnusableError, load_secret
from services.kit.logs import Log, LogEvent
from services.kit.registry import ModelEntry

REMOTE_PROBED = LogEvent("remote.probed", "number reason took_ms")
REMOTE_OPENED = LogEvent("remote.circuit_opened", "reason opened", "warning")
REMOTE_CLOSED = LogEvent("remote.circuit_closed", "opened")
REMOTE_RETRY = LogEvent("remote.retry", "tried pause_ms reason")
REMOTE_BUG = LogEvent("remote.bug", "error", "error")

_TICK_S: Final = 0.1
_SILENT_S: Final = 10.0
"""A caller who gives up after so long without a word has met a silence, though its deadline came before our patience
ended; half of that patience is enough as well."""
_CONNECT_AGAIN_S: Final = 5.0


class RemoteEngine:
    """One server elsewhere. `report` is called with every state the hub should know."""

    def __init__(
        self, entry: ModelEntry, home: Home, clock: Clock, log: Log, report: Callable[[PeerState, str | None], None]
    ) -> None:
        self._entry = entry
        self._home = home
        self._clock = clock
        self._log = log
        self._report = report
        self._http: OpenAiServer | None = None
        limits = entry.remote
        self._retries = RetryPolicy(limits.attempts, limits.pause_max_s)
        self._breaker = b.Breaker(
            b.BreakerPolicy(
                failures=limits.breaker_failures,
                window_ms=int(limits.breaker_window_s * 1000),
                pause_ms=int(limits.probe_after_s * 1000),
                pause_max_ms=int(limits.probe_max_s * 1000),
            )
        )
        self._decided = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._counts = dict.fromkeys(("remote_answers", "remote_failures", "remote_no_room", "remote_retries"), 0)
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._generate_ms = 0.0
        self.engine_name: str = entry.engine
        self.calls = 0
        """Calls that are being worked on."""
        self.reason: str | None = None
        """Why nothing is sent, for people."""
        self.crashed = False

    @property
    def server(self) -> RemoteEngine:
        """Who answers: this, also while the circuit is open, since it knows best what to say then."""
        return self

    async def start(self) -> None:
        """Begin; returns when the first probe is answered: READY, or DEGRADED with a reason."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the key and the prompts
        self._spawn_task(self._connect())
        await self._decided.wait()

    async def _connect(self) -> None:
        """Make the client as soon as it can be made: a file of certificates may be put right while the service runs."""
        while self._http is None:
            try:
                self._http = OpenAiServer(self._entry)
            except (OSError, ValueError) as err:  # certificates that cannot be read, a host name that is none
                self.reason = (
                    f"base_url, remote.ca_file or remote.proxy of model {self._entry.name} cannot be used: {err}; "
                    f"repair it: tried again every {_CONNECT_AGAIN_S:g} s"
                )
                self._report(PeerState.DEGRADED, self.reason)
                self._decided.set()
                await asyncio.sleep(_CONNECT_AGAIN_S)
        self._spawn_task(self._tick())
        self._feed(b.Started(self._clock.now_ms()))

    async def stop(self) -> None:
        """End all that is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    def progressed(self) -> None:
        """A piece of an answer has come; the timeouts of `openai_http` watch over that."""

    def child_bytes(self) -> int:
        """Memory of a child: there is none."""
        return 0

    def figures(self) -> dict[str, Any]:
        """What the hub is told with every pong."""
        breaker, now = self._breaker, self._clock.now_ms()
        waits_ms = max(0, breaker.probe_at_ms - now) if breaker.state is b.BreakerState.OPEN else None
        return {
            "engine": self.engine_name,
            "remote_model": self._entry.remote_model,
            "base_url": self._entry.base_url,
            "breaker": breaker.state.value,
            "breaker_opened": breaker.opened,
            "breaker_probes": breaker.probes,
            "breaker_probe_in_ms": waits_ms,
            "requests_processing": self.calls,
            "tokens_predicted_total": self._generated_tokens,
            "prompt_tokens_total": self._prompt_tokens,
            "tokens_per_s": round(self._generated_tokens / self._generate_ms * 1000, 1) if self._generate_ms else 0.0,
            **self._counts,
        }

    async def chat(self, payload: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """Stream one answer, see `ChatServer`. Tries again only what cannot have begun."""
        tried = 0
        while True:
            server = self._admitted()
            tried += 1
            asked_ms, heard = self._clock.now_ms(), False
            try:
                async with aclosing(server.chat(payload)) as pieces:
                    async for piece in pieces:
                        heard = True
                        if piece.usage is not None:
                            self._succeeded(piece.usage)
                        yield piece
            except asyncio.CancelledError:
                waited_s = (self._clock.now_ms() - asked_ms) / 1000
                if not heard and waited_s >= min(_SILENT_S, self._entry.remote.first_token_timeout_s / 2):
                    self._failed(EngineGone(f"no word within {waited_s:.1f} s, which was all the time that a call had"))
                raise
            except (NoRoom, Unreachable) as err:
                await self._pause(err, tried)
            except (PromptTooLong, RequestInvalid):
                self._feed(b.Succeeded(self._clock.now_ms()))  # the request is wrong, the server is well
                raise
            except Rejected as err:
                self._failed(err, at_once=True)
                raise EngineUnavailable("remote.rejected", Category.RESOURCE, str(err)) from err
            except EngineError as err:
                self._failed(err)
                raise
            else:
                return

    def _admitted(self) -> OpenAiServer:
        """The server with its key. Raises EngineUnavailable where nothing may be sent."""
        if self._http is None:
            message = self.reason or "the connection is being made ready; try again later"
            raise EngineUnavailable("engine.not_ready", Category.RESOURCE, message)
        if not self._breaker.admits:
            waits_ms = max(0, self._breaker.probe_at_ms - self._clock.now_ms())
            said = f"{self._entry.name} is left alone: {self.reason or 'its first probe is under way'}"
            raise EngineUnavailable(
                "breaker.open",
                Category.PEER,
                said,
                retry_after_ms=waits_ms,
                breaker=self._breaker.state.value,
            )
        self._take_key(self._http)
        return self._http

    def _take_key(self, server: OpenAiServer) -> None:
        name = self._entry.api_key_env
        if name is None:
            return
        try:
            server.use_key(load_secret(self._home, name))
        except SecretUnusableError as err:
            self._feed(b.Failed(self._clock.now_ms(), str(err), at_once=True))
            raise EngineUnavailable("remote.no_key", Category.RESOURCE, str(err)) from err

    async def _pause(self, err: NoRoom | Unreachable, tried: int) -> None:
        """Wait before the next try. Raises EngineUnavailable if there is to be none."""
        asked_s = None
        if isinstance(err, NoRoom):
            asked_s = err.retry_after_s
            self._counts["remote_no_room"] += 1
        if isinstance(err, Unreachable) or err.overloaded:
            self._failed(err)
        wait_s = pause_s(self._retries, tried, asked_s, random.random())  # noqa: S311  jitter
        if wait_s is None:
            unreachable = isinstance(err, Unreachable)
            raise EngineUnavailable(
                "remote.unreachable" if unreachable else "remote.no_room",
                Category.PEER if unreachable else Category.RESOURCE,
                f"{err}; tried {tried} times",
                tried=tried,
                retry_after_ms=None if asked_s is None else int(asked_s * 1000),
            ) from err
        self._counts["remote_retries"] += 1
        self._log.write(REMOTE_RETRY, tried=tried, pause_ms=int(wait_s * 1000), reason=str(err))
        await asyncio.sleep(wait_s)

    def _succeeded(self, usage: Usage) -> None:
        self._counts["remote_answers"] += 1
        self._prompt_tokens += usage.prompt_tokens - min(usage.prompt_tokens, usage.cached_tokens)
        self._generated_tokens += usage.generated_tokens
        self._generate_ms += usage.generate_ms
        self._feed(b.Succeeded(self._clock.now_ms()))

    def _failed(self, err: EngineError, *, at_once: bool = False) -> None:
        self._counts["remote_failures"] += 1
        self._feed(b.Failed(self._clock.now_ms(), str(err), at_once))

    # The breaker's commands.

    def _feed(self, event: b.Event) -> None:
        for command in self._breaker.handle(event):
            match command:
                case b.Probe(number):
                    self._spawn_task(self._probe(number))
                case b.Report(state, reason):
                    self._on_report(state, reason)

    def _on_report(self, state: b.BreakerState, reason: str | None) -> None:
        self.reason = reason
        if state is b.BreakerState.CLOSED:
            self._log.write(REMOTE_CLOSED, opened=self._breaker.opened)
            self._report(PeerState.READY, None)
        else:
            self._log.write(REMOTE_OPENED, reason=reason, opened=self._breaker.opened)
            self._report(PeerState.DEGRADED, reason)
        self._decided.set()

    async def _probe(self, number: int) -> None:
        began = self._clock.now_ms()
        reason: str | None = None
        try:
            if self._http is None:
                raise EngineUnavailable("engine.not_ready", Category.RESOURCE, "there is no connection")
            if self._entry.api_key_env is not None:
                self._http.use_key(load_secret(self._home, self._entry.api_key_env))
            await self._http.probe()
        except (EngineError, SecretUnusableError) as err:
            reason = str(err)
        now = self._clock.now_ms()
        self._log.write(REMOTE_PROBED, number=number, reason=reason, took_ms=now - began)
        self._feed(b.ProbeEnded(now, number, reason))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._feed(b.Ticked(self._clock.now_ms()))

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._log.write(REMOTE_BUG, error=repr(error))
        self.crashed = True
        os.kill(os.getpid(), signal.SIGTERM)  # supervisord starts it again: better than one that nobody watches
