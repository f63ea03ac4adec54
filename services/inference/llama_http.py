"""The HTTP API of a llama.cpp server as values and typed errors.

Everything the server sends is bounded and checked here: a broken engine is an EngineError, never a KeyError further
up. Which failure the hub is told, what counts as healthy for how long, and what is generated, others decide.

What this costs is taken from cores that decode: calls have a connection each (`exchange`), and the looks at an engine
that are taken every second one that is kept, both with parsers that are compiled.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, Protocol

from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.failure import Category
from services.inference.exchange import Exchange, ExchangeBroken
from services.inference.gathering import Gathering
from services.inference.plain_http import aiohttp

_MAX_EVENT_BYTES: Final = 16 * MAX_ARTEFACT_CHARS
"""One event may hold a whole answer, escaped; anything larger is no answer."""

_MAX_ERROR_BYTES: Final = 64 * 1024
_MAX_BODY_BYTES: Final = 16 * 1024**2
"""What is no stream is a small object; the state of hundreds of slots has some hundred kilobytes."""
GATHER_S: Final = 0.08
"""Time between two looks at an answer that has begun, where it is the only one; each of n at once is looked at n times
as seldom, so that what it costs does not grow with their number."""
_LARGEST: Final = 2**40
"""No figure of a server is larger, in tokens, bytes or milliseconds. JSON is read with infinities and with integers of
any length, which no message can carry; sums of these can be sent too."""
_PROBE_TIMEOUT_S: Final = 5.0
_PROBE: Final = aiohttp.ClientTimeout(total=None, sock_connect=_PROBE_TIMEOUT_S, sock_read=_PROBE_TIMEOUT_S)
_LEAST_BYTES: Final = 256
"""The head of an answer has some 170 bytes and comes when a slot takes the prompt, its first event some 300 more when
the prompt is read: for the head alone nobody needs to wake up while cores read."""
_METRIC: Final = re.compile(r"^llamacpp:([a-z_]+) ([0-9.eE+-]+)$", re.MULTILINE)
_OK: Final = 200
_LOADING: Final = 503
_REPLACED: Final = "the engine is being replaced"
_TOO_LONG: Final = "exceed_context_size_error"
_CALLERS_FAULT: Final = frozenset({"invalid_request_error", "not_supported_error"})


class EngineError(Exception):
    """Something went wrong between us and the engine."""


class EngineGone(EngineError):
    """The connection broke or could not be made: the child died, hangs, or is being replaced."""


class EngineFaulty(EngineError):
    """The engine answered with an error of its own or with something that is no answer."""


class RequestInvalid(EngineError):
    """The engine calls the request wrong, such as a grammar that cannot be read: the same request fails again."""


class EngineUnavailable(EngineError):
    """No answer was begun, and the reason is none of the classes above: it brings the failure the caller is told."""

    def __init__(self, code: str, category: Category, message: str, **evidence: Any) -> None:
        super().__init__(message)
        self.code = code
        self.category = category
        self.evidence = evidence


class PromptTooLong(EngineError):
    """The prompt does not fit the context of one slot. Both numbers in tokens."""

    def __init__(self, prompt_tokens: int, context_tokens: int) -> None:
        super().__init__(f"the prompt has {prompt_tokens} tokens, a slot's context {context_tokens}")
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a streamed answer; a field is None where the event does not carry it."""

    text: str
    finish_reason: str | None
    usage: Usage | None
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    """Per token of the piece the log probabilities of its most probable candidates, where they were asked for."""
    more: bool = False
    """The next one has come together with it."""
    thought: str = ""
    """What the model says to itself, where the engine tells that from the answer."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer has cost, as llama.cpp counts it."""

    prompt_tokens: int
    """Cached ones included."""
    cached_tokens: int
    generated_tokens: int
    prompt_ms: float
    generate_ms: float
    draft_tokens: int = 0
    """Tokens that were guessed ahead; 0 where the process does not speculate."""
    accepted_tokens: int = 0
    """Those among them that the model would have chosen itself."""


class ChatServer(Protocol):
    """What a generation needs of a server, here or elsewhere."""

    def chat(self, payload: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """Stream one answer; closing the iterator ends the generation. Raises EngineError."""
        ...


class LlamaServer:
    """Client of one child; made and used in one event loop. Raises only EngineError."""

    def __init__(self, port: int, api_key: str) -> None:
        base_url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {api_key}"}
        self._port = port
        self._head = (
            f"Host: 127.0.0.1:{port}\r\nAuthorization: Bearer {api_key}\r\nContent-Type: application/json\r\n"
            "Connection: close\r\n"
        )
        self._open: set[Exchange] = set()
        """Everything that waits for the engine or reads from it, probes aside."""
        # It takes no proxy from the environment: one for the outside world must not see this.
        self._probes = aiohttp.ClientSession(
            base_url, headers=headers, timeout=_PROBE, connector=aiohttp.TCPConnector(limit=0)
        )
        self._slot: int | None = None
        self._answers: set[Exchange] = set()
        """Those that are being streamed, over all slots."""

    def on_slot(self, slot: int) -> LlamaServer:
        """The same server, whose answers run in this slot."""
        pinned = copy(self)
        pinned._slot = slot
        return pinned

    async def close(self) -> None:
        """Close all connections; running answers end with EngineGone, and so does whatever is asked afterwards."""
        for exchange in self._open:
            exchange.break_off(_REPLACED)
        await self._probes.close()

    async def ready(self, slots: int) -> bool:
        """True once the model is loaded, False before. Raises EngineFaulty for one that cannot be our server: it takes
        our key, and has the slots we asked for and says which of them work."""
        status, _ = await self._get("/health")
        if status == _LOADING:
            return False
        if status != _OK:
            raise EngineFaulty(f"the engine answered /health with HTTP {status}")
        found = await self._slots()
        if len(found) != slots:
            raise EngineFaulty(f"the engine has {len(found)} slots instead of {slots}")
        if not all(isinstance(slot.get("is_processing"), bool) for slot in found):
            raise EngineFaulty(
                "the engine's /slots does not say which slots are busy (is_processing), so that nobody would know when "
                "one is free: take a newer llama-server"
            )
        return True

    async def alive(self) -> bool:
        """True if the server answers at all that it is well; costs it nothing."""
        try:
            return (await self._get("/health"))[0] == _OK
        except EngineError:
            return False

    async def busy_slots(self) -> int:
        """Number of slots that are decoding. Answered between two batches, so it may take as long as one."""
        return sum(1 for slot in await self._slots() if slot.get("is_processing") is not False)

    async def metrics(self) -> dict[str, float]:
        """Counters and gauges by their name without prefix; what is no number is left out."""
        said = (await self._found("/metrics")).decode("utf-8", "replace")
        found = ((name, _figure(text)) for name, text in _METRIC.findall(said))
        return {name: value for name, value in found if value is not None}

    async def chat(self, payload: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """Stream one answer; closing the iterator closes the connection, which cancels the generation."""
        async with self._sent("/v1/chat/completions", self._pinned(payload), _LEAST_BYTES) as response:
            if response.status != _OK:
                raise _refusal(response.status, (await _bounded(response.parts()))[:_MAX_ERROR_BYTES])
            self._answers.add(response)
            try:
                with Gathering(response.socket, self._between_looks) as gathering:
                    async with aclosing(_events(response.parts())) as events:
                        async for data, more in events:
                            if data == b"[DONE]":
                                return
                            piece = _piece(data, more)
                            yield piece
                            if (piece.text or piece.thought) and not more:
                                gathering.rest()
            finally:
                self._answers.discard(response)

    def _between_looks(self) -> float:
        return GATHER_S * max(1, len(self._answers))

    async def read(self, payload: Mapping[str, Any]) -> tuple[int, float]:
        """Read a prompt into the slot's cache without an answer; returns the tokens that were not there before, and ms.

        Waits as long as it takes: whoever calls has the deadline.
        """
        silent = {**self._pinned(payload), "max_tokens": 0, "stream": False}
        data = await self._post("/v1/chat/completions", silent)
        timings = data.get("timings")
        timings = timings if isinstance(timings, dict) else {}
        return token_count(timings.get("prompt_n")), duration_ms(timings.get("prompt_ms"))

    async def save_slot(self, slot: int, name: str) -> int:
        """Write what a free slot has read to a file of the folder the engine was given; returns its size in bytes."""
        return token_count((await self._post(f"/slots/{slot}?action=save", {"filename": name})).get("n_written"))

    async def restore_slot(self, slot: int, name: str) -> int:
        """Replace what a free slot has read by a saved file; returns the tokens it holds then."""
        return token_count((await self._post(f"/slots/{slot}?action=restore", {"filename": name})).get("n_restored"))

    def _pinned(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        return dict(payload) if self._slot is None else {**payload, "id_slot": self._slot}

    async def _post(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        async with self._sent(path, payload) as response:
            body = await _bounded(response.parts())
        if response.status != _OK:
            raise _refusal(response.status, body[:_MAX_ERROR_BYTES])
        data = _json(body)
        if not isinstance(data, dict):
            raise EngineFaulty(f"the engine's answer to {path} is not an object")
        return data

    async def _slots(self) -> list[dict[str, Any]]:
        slots = _json(await self._found("/slots"))
        if not isinstance(slots, list) or not all(isinstance(slot, dict) for slot in slots):
            raise EngineFaulty("the engine's /slots is not a list of slots")
        return slots

    async def _found(self, path: str) -> bytes:
        status, body = await self._get(path)
        if status != _OK:
            raise EngineFaulty(f"the engine answered {path} with HTTP {status}")
        return body

    async def _get(self, path: str) -> tuple[int, bytes]:
        if self._probes.closed:
            raise EngineGone(_REPLACED)
        try:
            async with self._probes.get(path, allow_redirects=False) as response:
                return response.status, await _bounded(response.content.iter_any())
        except (aiohttp.ClientError, TimeoutError) as err:
            raise EngineGone(f"the connection to the engine broke at {path}: {type(err).__name__}") from err

    @asynccontextmanager
    async def _sent(
        self, path: str, payload: Mapping[str, Any], least_bytes: int = 1
    ) -> AsyncGenerator[Exchange, None]:
        """An answer that has begun. One that is not read to its end costs the connection, which cancels it.

        Raises EngineGone, also where the connections were closed: a call may have waited for its slot meanwhile.
        """
        if self._probes.closed:
            raise EngineGone(_REPLACED)
        body = json.dumps(payload).encode()
        request = f"POST {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            exchange = Exchange()
            self._open.add(exchange)
            try:
                await exchange.ask(self._port, request, least_bytes)
                yield exchange
            finally:
                self._open.discard(exchange)
                exchange.close()
        except ExchangeBroken as err:
            raise EngineGone(f"the connection to the engine broke at {path}: {err}") from err


async def _bounded(parts: AsyncIterator[bytes]) -> bytes:
    """The body of an answer that is no stream. Raises EngineFaulty where it is longer than such an answer can be."""
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > _MAX_BODY_BYTES:
            raise EngineFaulty(f"more than {_MAX_BODY_BYTES} bytes came where a short answer belongs")
    return bytes(body)


async def _events(parts: AsyncIterator[bytes]) -> AsyncGenerator[tuple[bytes, bool], None]:
    """Data of every server-sent event, and whether another one has come with it."""
    rest = bytearray()
    async for part in parts:
        rest += part
        if len(rest) > _MAX_EVENT_BYTES:
            raise EngineFaulty(f"the engine sent an event of more than {_MAX_EVENT_BYTES} bytes")
        *lines, last = rest.split(b"\n")
        rest = bytearray(last)
        found: bytes | None = None
        for line in lines:
            name, _, data = bytes(line).partition(b":")
            if name in (b"data", b"error"):
                if found is not None:
                    yield found, True
                found = data.strip()
            elif name.strip():
                raise EngineFaulty(f"the engine sent {bytes(line[:80])!r} where an event belongs")
        if found is not None:
            yield found, False


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:
        raise EngineFaulty(f"the engine sent {data[:80]!r} where JSON belongs") from err


def _refusal(status: int, body: bytes) -> EngineError:
    """The typed error of an error body: decided by its `type`, not by its text."""
    data = _json(body)
    error = data.get("error") if isinstance(data, dict) else None
    if not isinstance(error, dict):
        return EngineFaulty(f"HTTP {status} from the engine without an error body")
    kind, message = error.get("type"), whole_characters(str(error.get("message"))[:500])
    if kind == _TOO_LONG:
        return PromptTooLong(token_count(error.get("n_prompt_tokens")), token_count(error.get("n_ctx")))
    if kind in _CALLERS_FAULT:
        return RequestInvalid(message)
    return EngineFaulty(f"HTTP {status} from the engine ({whole_characters(str(kind)[:80])}): {message}")


def _piece(data: bytes, more: bool) -> Piece:
    event = _json(data)
    if not isinstance(event, dict):
        raise EngineFaulty("the engine sent an event that is not an object")
    if "error" in event or ("message" in event and "code" in event):
        raise _refusal(200, data if "error" in event else json.dumps({"error": event}).encode())
    text, thought, finish_reason = "", "", None
    top_logprobs: tuple[tuple[float, ...], ...] = ()
    choices = event.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        finish_reason = choices[0].get("finish_reason")
        delta = choices[0].get("delta")
        delta = delta if isinstance(delta, dict) else {}
        text, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
        top_logprobs = candidate_logprobs(choices[0].get("logprobs"))
    if not isinstance(text, str) or not isinstance(thought, str) or not isinstance(finish_reason, str | None):
        raise EngineFaulty("the engine sent an answer whose text is no text")
    timings = event.get("timings")
    timings = timings if isinstance(timings, dict) else {}
    return Piece(
        text=whole_characters(text),
        finish_reason=finish_reason,
        usage=_usage(event["usage"], timings) if isinstance(event.get("usage"), dict) else None,
        top_logprobs=top_logprobs,
        more=more,
        thought=whole_characters(thought),
    )


def whole_characters(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which could not be sent on."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def candidate_logprobs(logprobs: Any) -> tuple[tuple[float, ...], ...]:
    """`choices[0].logprobs` as numbers; whatever has another form is left out."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = []
    for token in tokens if isinstance(tokens, list) else ():
        candidates = token.get("top_logprobs") if isinstance(token, dict) else None
        listed = candidates if isinstance(candidates, list) else ()
        values = [one.get("logprob") for one in listed if isinstance(one, dict)]
        found.append(tuple(value for value in map(_number, values) if value is not None))
    return tuple(found)


def _usage(usage: dict[str, Any], timings: dict[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details")
    return Usage(
        prompt_tokens=token_count(usage.get("prompt_tokens")),
        cached_tokens=token_count(details.get("cached_tokens")) if isinstance(details, dict) else 0,
        generated_tokens=token_count(usage.get("completion_tokens")),
        prompt_ms=duration_ms(timings.get("prompt_ms")),
        generate_ms=duration_ms(timings.get("predicted_ms")),
        draft_tokens=token_count(timings.get("draft_n")),
        accepted_tokens=token_count(timings.get("draft_n_accepted")),
    )


def token_count(value: Any, otherwise: int = 0) -> int:
    """A number of tokens or bytes that a server gave; `otherwise` where it gave none that can be one."""
    return value if type(value) is int and 0 <= value <= _LARGEST else otherwise


def duration_ms(value: Any, otherwise: float = 0.0) -> float:
    """Milliseconds that a server gave; `otherwise` where it gave none that can be some."""
    number = _number(value)
    return otherwise if number is None or number < 0 else number


def _number(value: Any) -> float | None:
    """A number that can be one of a server's figures, None for anything else; NaN is not within any bounds."""
    return float(value) if isinstance(value, int | float) and -_LARGEST <= value <= _LARGEST else None


def _figure(text: str) -> float | None:
    try:
        return _number(float(text))
    except ValueError:
        return None
