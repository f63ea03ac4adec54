"""How fast one point is: starts an engine of its own with these settings, gives it work, ends it.

The command line is the one that the inference service would use, from a registry in which the point is written down,
and in the mode that it would be in with so many streams; what the registry's rules, the budget or the engine refuse is
`Unusable` with their reason. The work is half prose, half
a copy of something in the prompt, as decoding in pipelines is; both have a prompt to read, new each time so that no
cache answers. Never touches the engine of a running service.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol.messages.infer import ChatMessage, InferRequest, Sampling
from services.ctl.bench.lookup import CODE, PROSE, copy_task
from services.ctl.launch_view import looked_at
from services.ctl.tuning.search import Point
from services.ctl.tuning.space import Objective
from services.inference.command_line import HOST, modes_of
from services.inference.engines import Engine, environment
from services.inference.generation import payload_of
from services.inference.llama_http import EngineError, LlamaServer, Usage
from services.inference.speculation import mode_under
from services.kit import children
from services.kit.config import Home
from services.kit.registry import Registry, RegistryError, load_registry
from services.kit.registry.launch import Launch
from services.kit.registry.memory import memory_needs
from services.kit.registry.models_file import with_settings

FILE: Final = "models.yaml"
_COPIED: Final = "\n\n\n".join(CODE.split("\n\n\n")[:2])
_MOST_TOKENS: Final = 96
_LEAST_TOKENS: Final = 16
_REHEARSED_TOKENS: Final = 4
_ROUND_S: Final = 1.5
"""Seconds of decoding of one answer that a measurement aims at, within the bounds above."""
_LOAD_POLL_S: Final = 0.05
_END_S: Final = 2.0


class Unusable(Exception):
    """These settings cannot be used here; the text says why."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What one measurement has shown, in tokens per second."""

    tokens_per_s: float
    """Answers' tokens over the time from sending to the last one, reading of the prompts included: what is compared."""
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    """Of one stream, while it decodes."""
    accepted_share: float
    """Accepted share of the guesses; 0 without any."""


@dataclass(slots=True)
class Measurer:
    """Measures points of one entry. `memory_bytes` is what it may take, None = all that the registry allows."""

    home: Home
    model: str
    objective: Objective
    folder: Path
    """For the registries that hold the points, and the engine's output."""
    memory_bytes: int | None = None
    engine: str = ""
    """Name of the engine, once a point was measured."""
    _answer_tokens: int = 0
    _number: int = 0
    _known: dict[Point, tuple[Launch, Engine]] = field(default_factory=dict)

    def measure(self, point: Point) -> Speed:
        """Start an engine, measure, end it. Raises Unusable."""
        if point not in self._known:
            self._known[point] = self._prepared(point)
        launch, engine = self._known[point]
        self.engine = engine.name
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        streams = 1 if self.objective == "latency" else launch.entry.slots
        command = engine.command(launch, port, mode_under(modes_of(launch), streams))
        return asyncio.run(self._measured(launch, command, port, streams))

    def _prepared(self, point: Point) -> tuple[Launch, Engine]:
        """The entry with these settings, as the registry's own reader gives it, and the engine that takes it."""
        registry = registry_with(self.home, self.folder, self.model, point)
        launch, engine, refusals = looked_at(registry.launch(self.model), self.home)
        if refusals:
            raise Unusable("; ".join(refusals))
        facts = {} if launch.facts is None else {self.model: launch.facts}
        need = memory_needs(registry.models, facts)[self.model]
        if self.memory_bytes is not None and need > self.memory_bytes:
            raise Unusable(f"needs {need >> 20} MiB beside the running stack, which leaves {self.memory_bytes >> 20}")
        return launch, engine

    async def _measured(self, launch: Launch, command: list[str], port: int, streams: int) -> Speed:
        key = secrets.token_urlsafe(24)
        output = self.folder / "engine.out"
        child = await children.spawn(command, output=output, env=environment(os.environ, key))
        server = LlamaServer(port, key)
        try:
            await self._loaded(launch, child, server, output)
            rehearsed = await self._round(server, 1, _REHEARSED_TOKENS)
            if not self._answer_tokens:  # all points get answers of one length
                fits = int(rehearsed.generated_tokens_per_s * _ROUND_S)
                self._answer_tokens = max(_LEAST_TOKENS, min(_MOST_TOKENS, fits))
            return await self._round(server, streams, self._answer_tokens)
        except EngineError as err:
            raise Unusable(f"the engine failed: {err}") from err
        finally:
            await server.close()
            await children.end(child, grace_s=_END_S)

    async def _loaded(
        self, launch: Launch, child: asyncio.subprocess.Process, server: LlamaServer, output: Path
    ) -> None:
        end_s = time.monotonic() + launch.entry.load_deadline_s
        while time.monotonic() < end_s:
            if child.returncode is not None:
                raise Unusable(f"the engine ended with status {child.returncode}: {_last_line(output)}")
            try:
                if await server.ready(launch.entry.slots):
                    return
            except EngineError:
                pass  # not listening yet; the loop has an end
            await asyncio.sleep(_LOAD_POLL_S)
        raise Unusable(f"the engine was not loaded within load_deadline_s, {launch.entry.load_deadline_s:g} s")

    async def _round(self, server: LlamaServer, streams: int, tokens: int) -> Speed:
        """One answer of each kind on every stream; the streams begin together."""
        numbers = range(self._number, self._number + streams)
        self._number += streams
        began_s = time.perf_counter()
        usages = [one for two in await asyncio.gather(*(_both(server, n, tokens) for n in numbers)) for one in two]
        took_s = time.perf_counter() - began_s
        generated, drafted = (
            sum(getattr(one, name) for one in usages) for name in ("generated_tokens", "draft_tokens")
        )
        read = sum(one.prompt_tokens - one.cached_tokens for one in usages)
        return Speed(
            tokens_per_s=generated / took_s,
            prompt_tokens_per_s=_per_s(read, sum(one.prompt_ms for one in usages)),
            generated_tokens_per_s=_per_s(generated, sum(one.generate_ms for one in usages)),
            accepted_share=sum(one.accepted_tokens for one in usages) / drafted if drafted else 0.0,
        )


def registry_with(
    home: Home, folder: Path, model: str, point: Point, note: str | None = None, *, text: str | None = None
) -> Registry:
    """The registry with a point written into its models.yaml, in a folder of its own. Raises Unusable."""
    copy = folder / "registry"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home.registry, copy, ignore=shutil.ignore_patterns("examples", "schema", "*.md"))
    before = (home.registry / FILE).read_text(encoding="utf-8") if text is None else text
    (copy / FILE).write_bytes(with_settings(before, model, dict(point.settings), note).encode())
    try:
        return load_registry(copy, home.models, hardware_file=home.hardware)
    except RegistryError as err:
        raise Unusable("; ".join(str(problem) for problem in err.problems)) from err


async def _both(server: LlamaServer, number: int, tokens: int) -> list[Usage]:
    prose = (ChatMessage(role="user", content=f"{number:04d}. {PROSE[number % len(PROSE)]}"),)
    copied = (ChatMessage(role="system", content=f"You are programmer {number:04d}."), *copy_task(_COPIED))
    return [await _answered(server, messages, tokens) for messages in (prose, copied)]


async def _answered(server: LlamaServer, messages: tuple[ChatMessage, ...], tokens: int) -> Usage:
    sampling = Sampling(temperature=0, top_k=1, seed=1)
    request = InferRequest(role="tune", messages=[*messages], max_tokens=tokens, sampling=sampling)
    payload: dict[str, Any] = payload_of(request)
    usage: Usage | None = None
    async for piece in server.chat(payload):
        usage = piece.usage or usage
    if usage is None or not usage.generated_tokens:
        raise Unusable("the engine gave no answer")
    return usage


def _last_line(output: Path) -> str:
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def _per_s(tokens: int, took_ms: float) -> float:
    return tokens * 1000 / took_ms if took_ms else 0.0
