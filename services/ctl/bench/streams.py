"""What the bus costs an answer: the same prompts through the hub and straight to the engine's HTTP port, in turn.

Both reach the same llama.cpp process, whose port and key are those of the running child. The direct side has no bus,
no service, no partials: a loop over the events, with the HTTP library that the service streams with. Each pair sends
as many prompts at once as there are streams, first one way and then the other, and every second pair the other way
round, so that what else the machine does meets both. A ratio is made within a pair, and the median is over all pairs:
on a shared virtual machine one pair says little (a standard deviation of 6 % where nothing else ran), hence so many.
First tokens scatter more than that, by some 40 ms for four streams: further pairs, of answers that end soon after their
beginning, are made for them, and the standard error over all pairs is told. Of several streams the first to begin
is compared with the first, the second with the second, and so on: llama.cpp reads the prompts that have arrived
together, so that the streams of a round begin in steps of a whole batch. Which of them share a step is chance, and
moves their beginning further than all that the bus does. So what passes on the way from the client to the service
and back is told as well: of each answer the time to its first text at the client without that at its service.

Both sides do the same work. Prompts are equally long and differ from their first character on, so that all there is in
a cache is what the chat template puts before them; and every slot has read that before anything is measured, since
llama.cpp by itself goes on in the slot it used last, while the service takes the one that was used longest ago. How
many tokens were read and written for an answer is reported for both sides: figures of unequal work would say nothing.

The service replaces an engine whose slots work for nobody it knows, for five seconds on end, and the direct side is
nobody it knows. So a direct answer is shorter than that, and before and after it the service sees its own calls or
free slots. Where the machine was too busy for that, the pair is repeated on the new engine, a few times.

Long prompts are another matter: the service has the engine read them one after the other, where it would read all at
once by itself (`services/inference/turns.py`). `measure_turns` says what that is worth to those who wait.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
import string
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from protocol.client import AsyncClient
from protocol.messages.infer import ChatMessage, InferPartial, InferRequest, Sampling
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.overhead import BenchmarkFailedError
from services.inference.embedded import API_KEY_VARIABLE
from services.inference.generation import payload_of

_CALL_S: Final = 300.0
_CANCEL_S: Final = 10.0
_CANCELLED_TOKENS: Final = 400
_DIRECT_S: Final = 2.0
_REHEARSED_TOKENS: Final = 16
"""Of answers from which the length of the others is reckoned: enough to tell reading from writing."""
PAIRS_S: Final = 48.0
"""Seconds of a run for pairs of whole answers with one number of streams: short ones are made more often. With half of
it the standard errors at eight streams were twice those at one."""
_LEAST_PAIRS, _MOST_PAIRS = 4, 12
"""Of a run; even numbers, so that the last answer goes over the bus."""
BEGINNINGS_PER_RUN: Final = 24
"""Pairs for the time to the first token alone; an even number as well."""
_STREAMED_SHARE: Final = 0.9
"""Of the answers, at least: a machine that stands still for some 50 ms has a short one come whole."""
_SEEN_FREE_S: Final = 1.3
"""The service looks at the slots once a second."""
_LEAST_TOKENS: Final = 4
_REPEATS: Final = 3
"""Pairs that may be lost to a machine that is too busy."""
_TURNS: Final = 2
"""Long prompts at once: a direct round of more takes so long on two cores that the service replaces the engine."""
LONG_WORDS: Final = 80
"""Of a long prompt: some 250 tokens, longer than what is read together."""
_FREE_POLL_S: Final = 0.005
"""Asking for free slots without a pause would take the cores from the engine that has to free one."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where the engine of a stack's model listens, for a client that goes around the bus."""

    base_url: str
    key: str

    @classmethod
    def of(cls, stack: BareStack, model: str) -> EngineAddress:
        """Read from the running child; only its own user can."""
        process = Path(f"/proc/{metrics_of(stack, model)['child_pid']}")
        command = process.joinpath("cmdline").read_bytes().decode().split("\0")
        pairs = (pair.partition("=") for pair in process.joinpath("environ").read_bytes().decode().split("\0"))
        key = next(value for name, _, value in pairs if name == API_KEY_VARIABLE)
        return cls(f"http://127.0.0.1:{command[command.index('--port') + 1]}", key)

    def client(self) -> aiohttp.ClientSession:
        """A client with its key, without proxies, and with a connection for each request, as the service has.

        Raises aiohttp.ClientError, as for any status of an error.
        """
        return aiohttp.ClientSession(
            self.base_url,
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=aiohttp.ClientTimeout(total=_CALL_S),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            raise_for_status=True,
        )


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer as its client saw it."""

    first_s: float
    """From sending to the first text."""
    tokens: int
    read_tokens: int
    """Tokens of its prompt that were not in the slot's cache."""
    transit_s: float = 0.0
    """Of `first_s`, what passed outside of the service."""
    streamed: bool = True
    """False if its first text came with its end: the machine stood still for as long as the answer took."""


@dataclass(frozen=True, slots=True)
class Round:
    """Some answers that were asked for at once."""

    tokens_per_s: float
    firsts_ms: tuple[float, ...]
    """Times to the first text, rising."""
    read_tokens: float
    """Mean of an answer."""
    written_tokens: float
    """Mean of an answer."""
    transit_ms: float
    """Median time to the first text that passed outside of the service; 0 where there is none."""
    streamed: int
    """Answers whose text came in pieces."""
    cpu_ms: float = 0.0
    """What an answer cost the process of its service, its engine not included. Counted in ticks of 10 ms."""

    @property
    def first_ms(self) -> float:
        """Median time to the first text."""
        return statistics.median(self.firsts_ms)

    def tokens_in(self, seconds: float) -> int:
        """Tokens of an answer that would end after so long, at the speed that this one had once all had begun."""
        last_s = self.firsts_ms[-1] / 1000
        took_s = self.written_tokens * len(self.firsts_ms) / self.tokens_per_s
        return int(1 + (seconds - last_s) * max(0.0, self.written_tokens - 1) / max(0.001, took_s - last_s))


class EngineReplacedError(BenchmarkFailedError):
    """The engine went away during a direct answer: its service took it for stuck."""


def metrics_of(stack: BareStack, model: str) -> dict[str, Any]:
    """The figures of a model's service, as its last pong brought them."""
    return next(peer.metrics for peer in stack.client.status().peers if peer.service == f"inference-{model}")


def measure_streams(
    stack: BareStack,
    model: str,
    streams: tuple[int, ...],
    runs: int,
    answer_tokens: int,
    beginnings: int = BEGINNINGS_PER_RUN,
    pairs_s: float = PAIRS_S,
) -> dict[str, dict[str, float]]:
    """Figures by number of streams: `tokens_ratio` (bus over direct) and `ttft_added_ms_p50`, with the standard errors
    of their means over the pairs (`_se`), `ttft_transit_ms_p50`, which of the first token is the bus's own,
    `service_cpu_ms`, which an answer costs the process of its service, and of each side speed, tokens read and tokens
    written for an answer.

    `beginnings` are the pairs of a run that are made for the first token alone, those of whole answers take some
    `pairs_s` seconds of it. Raises BenchmarkFailedError.
    """
    return asyncio.run(_Comparison(stack, model).figures(streams, runs, answer_tokens, beginnings, pairs_s))


def measure_turns(stack: BareStack, model: str, pairs: int, words: int = LONG_WORDS) -> dict[str, float | None]:
    """Long prompts at once, through the bus over direct: `turns_first_ratio` of the times to the first text in the mean
    over the prompts, `turns_last_ratio` of that of the last one to begin; medians over the pairs.

    None where the machine takes so long for the direct ones that the service replaces the engine.
    """
    comparison = _Comparison(stack, model, lambda number, tokens: _long_request(number, tokens, words))
    try:
        return {**asyncio.run(comparison.turns(pairs))}
    except EngineReplacedError:
        comparison.until_back()
        return {"turns_first_ratio": None, "turns_last_ratio": None}


class _Comparison:
    """The same prompts both ways; `request` makes one from its number and the tokens to write."""

    def __init__(self, stack: BareStack, model: str, request: Callable[[int, int], InferRequest] | None = None) -> None:
        self._stack = stack
        self._model = model
        self._make = request or _request
        self._service = psutil.Process(stack.processes[f"inference-{model}"].pid)
        self._numbers = itertools.count()
        self._repeats = _REPEATS

    async def figures(
        self, streams: tuple[int, ...], runs: int, answer_tokens: int, beginnings: int, pairs_s: float
    ) -> dict[str, dict[str, float]]:
        figures: dict[str, dict[str, float]] = {
            name: {}
            for name in (
                "tokens_ratio",
                "tokens_ratio_se",
                "ttft_added_ms_p50",
                "ttft_added_ms_se",
                "ttft_transit_ms_p50",
                "service_cpu_ms",
            )
        }
        async with AsyncClient(self._stack.home.hub_address, name="bench") as bus:
            await self._warm(bus)
            for count in streams:
                rehearsed = await self._over_bus(bus, count, _REHEARSED_TOKENS)
                tokens = max(_LEAST_TOKENS, min(answer_tokens, rehearsed.tokens_in(_DIRECT_S)))
                began_s = time.perf_counter()
                pairs = [await self._pair(bus, count, tokens, bus_first=True)]
                wanted = runs * _pairs_in(pairs_s, time.perf_counter() - began_s)
                pairs += [await self._pair(bus, count, tokens, turn % 2 == 0) for turn in range(1, wanted)]
                begun = pairs + [
                    await self._pair(bus, count, _LEAST_TOKENS, turn % 2 == 0) for turn in range(beginnings * runs)
                ]
                check_streamed([over for over, _ in begun])
                name = str(count)
                ratios = [one.tokens_per_s / other.tokens_per_s for one, other in pairs]
                added = statistics.median(
                    over - around
                    for one, other in begun
                    for over, around in zip(one.firsts_ms, other.firsts_ms, strict=True)
                )
                means = [statistics.mean(one.firsts_ms) - statistics.mean(other.firsts_ms) for one, other in begun]
                figures["tokens_ratio"][name] = round(statistics.median(ratios), 3)
                figures["tokens_ratio_se"][name] = round(standard_error(ratios), 3)
                figures["ttft_added_ms_p50"][name] = round(added, 2)
                figures["ttft_added_ms_se"][name] = round(standard_error(means), 2)
                figures["service_cpu_ms"][name] = round(statistics.mean(over.cpu_ms for over, _ in pairs), 1)
                transit = statistics.median(over.transit_ms for over, _ in begun)
                figures["ttft_transit_ms_p50"][name] = round(transit, 2)
                for side, taken in zip(("bus", "direct"), zip(*pairs, strict=True), strict=True):
                    for figure in ("tokens_per_s", "first_ms", "read_tokens", "written_tokens"):
                        value = statistics.median(getattr(one, figure) for one in taken)
                        figures.setdefault(f"{side}_{figure}", {})[name] = round(value, 1)
        return figures

    async def turns(self, pairs: int) -> dict[str, float]:
        async with AsyncClient(self._stack.home.hub_address, name="bench") as bus:
            await self._warm(bus)
            made = [await self._pair(bus, _TURNS, _LEAST_TOKENS, turn % 2 == 0) for turn in range(pairs)]
        firsts = [statistics.mean(one.firsts_ms) / statistics.mean(other.firsts_ms) for one, other in made]
        lasts = [one.firsts_ms[-1] / other.firsts_ms[-1] for one, other in made]
        return {
            "turns_first_ratio": round(statistics.median(firsts), 3),
            "turns_last_ratio": round(statistics.median(lasts), 3),
        }

    async def _warm(self, bus: AsyncClient) -> None:
        """From here on every slot holds how a prompt begins."""
        await self._over_bus(bus, await _free_slots(bus, self._model), _LEAST_TOKENS)

    async def _pair(self, bus: AsyncClient, count: int, tokens: int, bus_first: bool) -> tuple[Round, Round]:
        """Answers over the bus and around it; again where the engine was replaced meanwhile."""
        while True:
            if not bus_first and tokens > _LEAST_TOKENS:
                await asyncio.sleep(_SEEN_FREE_S)  # the pair before may have ended with a direct answer
            try:
                over = await self._over_bus(bus, count, tokens) if bus_first else None
                direct = await self._around(count, tokens)
                return over or await self._over_bus(bus, count, tokens), direct
            except EngineReplacedError:
                if not self._repeats:
                    raise
                self._repeats -= 1
                await asyncio.to_thread(self.until_back)
                await self._warm(bus)

    def until_back(self) -> None:
        """Wait until the replaced engine serves, and its service has said where."""
        time.sleep(_SEEN_FREE_S)
        self._stack.wait_ready([f"inference-{self._model}"])
        time.sleep(_SEEN_FREE_S)  # its next pong says where the new engine is

    async def _over_bus(self, bus: AsyncClient, count: int, tokens: int) -> Round:
        before_s = self._cpu_s()
        made = await _together([_over_bus(bus, self._model, self._request(tokens)) for _ in range(count)])
        return replace(made, cpu_ms=(self._cpu_s() - before_s) * 1000 / count)

    def _cpu_s(self) -> float:
        times = self._service.cpu_times()
        return times.user + times.system

    async def _around(self, count: int, tokens: int) -> Round:
        began_s = time.perf_counter()
        try:
            async with EngineAddress.of(self._stack, self._model).client() as http:
                return await _together([_directly(http, self._request(tokens)) for _ in range(count)])
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, FileNotFoundError) as err:
            took_s = time.perf_counter() - began_s
            raise EngineReplacedError(
                f"the engine went away during a direct answer, after {took_s:.1f} s ({type(err).__name__}): after some "
                "five its service takes it for stuck and replaces it; the machine is too busy for figures"
            ) from err

    def _request(self, tokens: int) -> InferRequest:
        return self._make(next(self._numbers), tokens)


def _pairs_in(seconds: float, pair_s: float) -> int:
    fitting = int(seconds / pair_s) // 2 * 2
    return max(_LEAST_PAIRS, min(_MOST_PAIRS, fitting))


def check_streamed(rounds: Sequence[Round]) -> None:
    """Raise BenchmarkFailedError where the bus does not stream: then times to the first text would be those of ends."""
    answers, streamed = sum(len(one.firsts_ms) for one in rounds), sum(one.streamed for one in rounds)
    if streamed < _STREAMED_SHARE * answers:
        raise BenchmarkFailedError(f"of {answers} answers over the bus only {streamed} came in pieces")


def measure_cancel(stack: BareStack, model: str, count: int) -> dict[str, float]:
    """Milliseconds from a client's cancel until the hub may give the slot to somebody else: `p50`, `p95`, `slowest`.

    The engine is then asked itself: BenchmarkFailedError where it still decodes although the slot was given back.
    """
    return asyncio.run(_measure_cancel(stack, model, count))


def standard_error(values: list[float]) -> float:
    """Of their mean; 0 where there is but one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


async def _measure_cancel(stack: BareStack, model: str, count: int) -> dict[str, float]:
    took_ms: list[float] = []
    async with (
        EngineAddress.of(stack, model).client() as http,
        AsyncClient(stack.home.hub_address, name="bench") as bus,
    ):
        all_free = await _free_slots(bus, model)
        for number in range(count):
            began = asyncio.Event()
            request = _request(900_000 + number, _CANCELLED_TOKENS)

            def heard(_piece: InferPartial, at: asyncio.Event = began) -> None:
                at.set()

            call = asyncio.create_task(bus.infer(model, request, _CALL_S, on_partial=heard))
            await asyncio.wait_for(began.wait(), _CALL_S)
            await asyncio.sleep(0.007 * (number % 10))  # at any moment between two tokens
            if call.done():
                raise BenchmarkFailedError("an answer ended before it could be cancelled")
            asked_s = time.perf_counter()
            call.cancel()
            await asyncio.wait([call])
            while await _free_slots(bus, model) < all_free:
                if time.perf_counter() - asked_s > _CANCEL_S:
                    raise BenchmarkFailedError(f"no slot was free {_CANCEL_S:g} s after a cancel")
                await asyncio.sleep(_FREE_POLL_S)
            took_ms.append((time.perf_counter() - asked_s) * 1000)
            async with http.get("/slots") as response:
                slots = await response.json()
            if any(slot.get("is_processing") for slot in slots):
                raise BenchmarkFailedError("the engine still decodes for a call whose slot was given back")
    took_ms.sort()
    p95 = took_ms[min(len(took_ms) - 1, int(0.95 * len(took_ms)))]
    return {
        name: round(ms, 1) for name, ms in (("p50", statistics.median(took_ms)), ("p95", p95), ("slowest", took_ms[-1]))
    }


async def _free_slots(bus: AsyncClient, model: str) -> int:
    """Slots that the hub may still give away."""
    status = await bus.status()
    return next(peer.granted - peer.used for peer in status.peers if peer.service == f"inference-{model}")


def _request(number: int, max_tokens: int) -> InferRequest:
    # The quickest digits first: llama.cpp keeps prompts of idle slots, and would find the beginning of an older one.
    digits = f"{number:06d}"[::-1]
    return _asked(f"{string.ascii_letters[number % 52]} {digits}. Tell a long story.", max_tokens)


def _long_request(number: int, max_tokens: int, words: int) -> InferRequest:
    text = " ".join(f"w{(number * 7 + place) % 997}" for place in range(words))
    return _asked(f"{string.ascii_letters[number % 52]} {number:06d} {text}", max_tokens)


def _asked(text: str, max_tokens: int) -> InferRequest:
    sampling = Sampling(temperature=0, top_k=1, seed=1)
    messages = [ChatMessage(role="user", content=text)]
    return InferRequest(role="bench", messages=messages, max_tokens=max_tokens, sampling=sampling, stream=True)


async def _over_bus(bus: AsyncClient, model: str, request: InferRequest) -> Answered:
    first: list[float] = []

    def piece(_partial: InferPartial) -> None:
        if not first:
            first.append(time.perf_counter())

    began = time.perf_counter()
    final = await bus.infer(model, request, _CALL_S, on_partial=piece)
    first_s = (first[0] if first else time.perf_counter()) - began
    read = final.prompt_tokens - final.cached_tokens
    return Answered(first_s, final.generated_tokens, read, first_s - final.first_token_ms / 1000, bool(first))


async def _directly(http: aiohttp.ClientSession, request: InferRequest) -> Answered:
    payload = payload_of(request)
    first_s = None
    usage: dict[str, Any] = {}
    began = time.perf_counter()
    async with http.post("/v1/chat/completions", json=payload) as response:
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if first_s is None and _has_text(event):
                first_s = time.perf_counter() - began
            usage = event.get("usage") or usage
    if first_s is None or not usage.get("completion_tokens"):
        raise BenchmarkFailedError("the engine gave no answer over HTTP")
    read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return Answered(first_s, usage["completion_tokens"], read)


def _has_text(event: Mapping[str, Any]) -> bool:
    choices = event.get("choices")
    return bool(choices and choices[0].get("delta", {}).get("content"))


async def _together(ways: list[Coroutine[Any, Any, Answered]]) -> Round:
    """All of them at once."""
    began_s = time.perf_counter()
    answers = await asyncio.gather(*ways)
    took_s = time.perf_counter() - began_s
    return Round(
        tokens_per_s=sum(one.tokens for one in answers) / took_s,
        firsts_ms=tuple(sorted(one.first_s * 1000 for one in answers)),
        read_tokens=statistics.mean(one.read_tokens for one in answers),
        written_tokens=statistics.mean(one.tokens for one in answers),
        transit_ms=statistics.median(one.transit_s * 1000 for one in answers),
        streamed=sum(one.streamed for one in answers),
    )
