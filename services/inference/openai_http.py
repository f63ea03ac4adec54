"""The OpenAI-compatible HTTP API of a server elsewhere, as the same values and typed errors as our own child's.

One request, one try: what is tried again, and when the server is left alone, `remote` decides. Requests come in
llama.cpp's terms (`generation.payload_of`) and leave in the dialect of the entry; everything the server sends is
bounded and checked. Its key goes into one header and nowhere else: texts of the server are cleaned of it, and of those
that were used before, which an answer that comes late may quote.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from protocol.limits import MAX_ARTEFACT_CHARS
from services.inference.llama_http import (
    EngineError,
    EngineFaulty,
    EngineGone,
    Piece,
    PromptTooLong,
    RequestInvalid,
    Usage,
    candidate_logprobs,
    duration_ms,
    token_count,
    whole_characters,
)
from services.inference.retry import retry_after_s
from services.inference.sse import EventStream, EventTooLarge
from services.kit.registry import ModelEntry

_MAX_EVENT_BYTES: Final = 16 * MAX_ARTEFACT_CHARS
_MAX_BODY_BYTES: Final = 1024 * 1024
_PROBE_TIMEOUT_S: Final = 10.0
_NO_ANSWER: Final = f"the server gave no whole answer within {_PROBE_TIMEOUT_S:g} s"
_WRITE_TIMEOUT_S: Final = 60.0
_STANDARD: Final = (
    *("messages", "max_tokens", "stream", "stream_options", "temperature", "top_p", "seed"),
    *("logprobs", "top_logprobs"),
)
#: dialect -> our name of a parameter -> the server's; what stands in neither table is not sent.
EXTRAS: Final[Mapping[str, Mapping[str, str]]] = {
    "openai": {},
    "vllm": {"top_k": "top_k", "min_p": "min_p", "repeat_penalty": "repetition_penalty"},
    "llama-server": {
        name: name
        for name in (
            "top_k",
            "min_p",
            "repeat_penalty",
            "grammar",
            "cache_prompt",
            "t_max_predict_ms",
        )
    },
}
_TOO_LONG: Final = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_FINISHED: Final[Mapping[str, str]] = {"stop": "stop", "eos": "stop", "eos_token": "stop", "length": "length"}
_KEPT_KEYS: Final = 64
"""Keys that texts are cleaned of. No answer is so late that more have been used since it was asked for."""
_BROKEN: Final = (httpx.HTTPError, OSError, UnicodeError)
"""What httpx raises where a connection breaks or brings nonsense: garbage inside of TLS is OSError, a redirect to a
host whose name is none UnicodeError."""
_CHARS_PER_TOKEN: Final = 4
"""For servers that count nothing: a usual length of an English token."""


class Unreachable(EngineGone):
    """No connection was made, so nothing has begun: safe to try again."""


class NoRoom(EngineError):
    """429 or 503: the server did not begin. `overloaded` tells 503 from 429, where it is well and we are too many."""

    def __init__(self, message: str, *, overloaded: bool, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.overloaded = overloaded
        self.retry_after_s = retry_after_s


class Rejected(EngineError):
    """The server does not want us (401, 403) or has not what the entry names (404): repair the entry or the key."""


@dataclass(slots=True)
class _Answer:
    """What has come of one answer so far."""

    finish: str | None = None
    usage: Mapping[str, Any] | None = None
    timings: Mapping[str, Any] | None = None
    pieces: int = 0
    first_s: float | None = None


class OpenAiServer:
    """Client of one server. Raises only EngineError; another key may be used for every request."""

    def __init__(self, entry: ModelEntry) -> None:
        if entry.base_url is None or entry.remote_model is None:
            raise ValueError(
                f"model {entry.name} has no base_url or no remote_model: the registry's rules ask for both"
            )
        self._entry = entry
        self._model = entry.remote_model
        self._base = entry.base_url.rstrip("/")
        try:
            httpx.Request(
                "GET", self._base
            )  # what the registry's rule lets pass, such as names that no IDNA encoder takes
        except (httpx.InvalidURL, UnicodeError) as err:
            raise ValueError(str(err)) from err
        self._dialect = entry.remote.dialect
        self._key: str | None = None
        self._used: dict[str, None] = {}
        """Keys that were sent, oldest first."""
        ca_file = entry.remote.ca_file
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(_PROBE_TIMEOUT_S, connect=entry.remote.connect_timeout_s, write=_WRITE_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=entry.slots),
            verify=True if ca_file is None else ssl.create_default_context(cafile=str(ca_file.expanduser())),
            proxy=entry.remote.proxy,
            trust_env=False,  # neither a proxy nor a .netrc of the environment: prompts go where the registry says
            follow_redirects=False,  # the key must not follow to another host
            headers={"Accept-Encoding": "identity"},  # a few bytes can unpack to more than there is memory
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # else every answer could add some, for good
        )

    def use_key(self, key: str) -> None:
        """Send this key from the next request on."""
        self._key = key
        self._used.pop(key, None)
        self._used[key] = None
        while len(self._used) > _KEPT_KEYS:
            del self._used[next(iter(self._used))]

    async def close(self) -> None:
        """Close all connections; running answers end with EngineGone."""
        await self._http.aclose()

    async def probe(self) -> None:
        """Return if the server is well and has the entry's model, else raise what is wrong with it."""
        models = await self._get(f"{self._base}/models")
        listed = models.get("data") if isinstance(models, dict) else None
        names = [str(one.get("id")) for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if names and self._model not in names:
            have = self._clean(", ".join(names[:20]))[:500]
            raise Rejected(f"the server has no model {self._model!r}: repair remote_model; it has: {have}")
        if self._dialect != "openai":  # these say here whether the model is loaded
            await self._get(f"{_origin(self._base)}/health", parse=False)

    async def chat(self, payload: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """Stream one answer; closing the iterator closes the connection, by which such servers notice a cancel.

        The last piece, and only that one, carries the finish reason and the usage.
        """
        body = self._translated(payload)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        answer = _Answer()
        limits = self._entry.remote
        timeout = httpx.Timeout(_WRITE_TIMEOUT_S, connect=limits.connect_timeout_s, read=None)
        try:
            request = self._http.build_request(
                "POST", f"{self._base}/chat/completions", json=body, headers=self._headers(), timeout=timeout
            )
            async with _within(began_s + limits.first_token_timeout_s, _no_token(limits.first_token_timeout_s)):
                response = await self._http.send(request, stream=True)
            async with aclosing(response), aclosing(_events(response)) as events:
                if response.status_code != 200:
                    async with _within(loop.time() + _PROBE_TIMEOUT_S, _NO_ANSWER):
                        body_of_error = await _bounded(response)
                    raise self._refusal(response, body_of_error)
                _check_plain(response)
                kind = response.headers.get("content-type", "")
                if kind.startswith(("application/json", "text/html")):
                    raise EngineFaulty(
                        f"the server answered with {self._clean(kind)[:80]} where a stream was asked for"
                    )
                due_s, silence_s = began_s + limits.first_token_timeout_s, limits.first_token_timeout_s
                while True:
                    # Comments keep a connection open, not our patience: what counts is data.
                    async with _within(due_s, _no_token(silence_s)):
                        data = await anext(events, None)
                    if data is None or data.strip() == b"[DONE]":
                        break
                    now_s = loop.time()
                    answer.first_s = now_s if answer.first_s is None else answer.first_s
                    due_s, silence_s = now_s + limits.silence_timeout_s, limits.silence_timeout_s
                    yield self._piece(data, answer)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as err:
            raise Unreachable(f"no connection to {_origin(self._base)}: {_reason(err)}") from err
        except _BROKEN as err:
            raise EngineGone(f"the connection to {_origin(self._base)} broke: {type(err).__name__}") from err
        if answer.finish is None:
            raise EngineGone("the server ended its answer before it was complete")
        yield Piece("", answer.finish, _usage(answer, body, began_s, loop.time()))

    def _translated(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The request as this server takes it."""
        names = EXTRAS[self._dialect]
        if "grammar" in payload and "grammar" not in names:
            raise RequestInvalid(
                f"model {self._entry.name} is remote with dialect {self._dialect}, which takes no GBNF grammar: use "
                "json_schema, or a role on a llama.cpp model"
            )
        body = {name: payload[name] for name in _STANDARD if name in payload}
        body |= {theirs: payload[ours] for ours, theirs in names.items() if ours in payload}
        if body.get("top_k") == 0 and self._dialect == "vllm":
            body["top_k"] = -1  # off
        wanted = payload.get("response_format")
        match self._entry.remote.response_format:
            case "json_schema" if wanted is not None:
                body["response_format"] = wanted
            case "json_object" if wanted is not None:
                body["response_format"] = {"type": "json_object"}
            case _:
                body.pop("response_format", None)
        return {"model": self._model, **body}

    def _piece(self, data: bytes, answer: _Answer) -> Piece:
        event = _json(data)
        if not isinstance(event, dict):
            raise EngineFaulty("the server sent an event that is not an object")
        if event.get("error") is not None or event.get("object") == "error":
            raise self._error(200, event)
        if isinstance(event.get("usage"), dict):
            answer.usage = event["usage"]
        if isinstance(event.get("timings"), dict):
            answer.timings = event["timings"]
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        if (finish := choice.get("finish_reason")) is not None:
            answer.finish = self._finish(finish)
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        text = whole_characters(_text(delta.get("content")))
        thought = whole_characters(_text(delta.get("reasoning_content", delta.get("reasoning"))))
        answer.pieces += bool(text or thought)
        return Piece(text, None, None, candidate_logprobs(choice.get("logprobs")), thought=thought)

    def _finish(self, reason: Any) -> str:
        if reason == "content_filter":
            raise RequestInvalid("the server's content filter ended the answer")
        if not isinstance(reason, str) or reason not in _FINISHED:
            raise EngineFaulty(f"the server ended its answer with {self._clean(str(reason))[:80]!r}")
        return _FINISHED[reason]

    def _headers(self) -> dict[str, str]:
        return {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

    async def _get(self, url: str, *, parse: bool = True) -> Any:
        due_s = asyncio.get_running_loop().time() + _PROBE_TIMEOUT_S  # httpx bounds single reads, and drips have no end
        try:
            async with (
                _within(due_s, _NO_ANSWER),
                self._http.stream("GET", url, headers=self._headers()) as response,
            ):
                body = await _bounded(response)
                if response.status_code != 200:
                    raise self._refusal(response, body)
                _check_plain(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as err:
            raise Unreachable(f"no connection to {_origin(self._base)}: {_reason(err)}") from err
        except _BROKEN as err:
            raise EngineGone(f"no answer from {_origin(self._base)}: {type(err).__name__}") from err
        return _json(body) if parse else None

    def _refusal(self, response: httpx.Response, body: bytes) -> EngineError:
        """The typed error of an answer that is not 200: decided by its status and by codes, never by its text."""
        status = response.status_code
        try:
            event = _json(body)
        except EngineFaulty:
            event = {}
        if status in (429, 503):
            again_s = retry_after_s(response.headers.get("retry-after"), datetime.now(UTC))
            message = f"the server has no room (HTTP {status}): {self._message(event)}"
            return NoRoom(message, overloaded=status == 503, retry_after_s=again_s)
        return self._error(status, event if isinstance(event, dict) else {})

    def _error(self, status: int, event: Mapping[str, Any]) -> EngineError:
        error = event.get("error")
        error = error if isinstance(error, dict) else event
        codes = {str(error.get("code")), str(error.get("type"))}
        message = self._message(event)
        if codes & _TOO_LONG:
            return PromptTooLong(token_count(error.get("n_prompt_tokens")), self._entry.context_tokens)
        if status in (301, 302, 303, 307, 308):
            return Rejected(f"the server sends us elsewhere (HTTP {status}), which is not followed: repair base_url")
        if status in (401, 403):
            return Rejected(f"the server refuses the key of model {self._entry.name} (HTTP {status}): {message}")
        if status in (404, 405):
            return Rejected(
                f"the server knows no such thing (HTTP {status}): check base_url, which usually ends in /v1, and "
                f"remote_model: {message}"
            )
        if status in (400, 413, 422) or (status == 200 and str(error.get("code")) in ("400", "422")):
            return RequestInvalid(message)
        return EngineFaulty(f"the server failed (HTTP {status}): {message}")

    def _message(self, event: Any) -> str:
        error = event.get("error", event) if isinstance(event, dict) else event
        message = error.get("message") if isinstance(error, dict) else error
        return self._clean(str(message or "it gives no reason"))[:500]

    def _clean(self, text: str) -> str:
        """A text of the server that can be sent on, without our keys: some quote the one that they refuse."""
        for key in sorted(self._used, key=len, reverse=True):  # a key may be the beginning of another one
            text = text.replace(key, "[key]")
        return whole_characters(text)


@asynccontextmanager
async def _within(due_s: float, otherwise: str) -> AsyncGenerator[None, None]:
    """EngineGone, with these words, if what is inside is not done at `due_s` of the loop's clock."""
    try:
        async with asyncio.timeout_at(due_s):
            yield
    except TimeoutError as err:
        raise EngineGone(otherwise) from err


def _no_token(limit_s: float) -> str:
    return f"the server sent no token for {limit_s:g} s"


def _check_plain(response: httpx.Response) -> None:
    """Raise EngineFaulty for an answer that would have to be unpacked."""
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise EngineFaulty("the server sent its answer compressed, though it was asked not to: switch that off there")


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    stream = EventStream(_MAX_EVENT_BYTES)
    try:
        async for part in response.aiter_raw():
            for data in stream.feed(part):
                yield data
        for data in stream.end():
            yield data
    except EventTooLarge as err:
        raise EngineFaulty(f"the server sent {err}") from err


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:
        raise EngineFaulty(f"the server sent {len(data)} bytes that are no JSON") from err


def _text(content: Any) -> str:
    """Text of a delta: a string, nothing, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [None]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) != len(parts):
        raise EngineFaulty("the server sent an answer whose text is no text")
    return "".join(texts)


def _usage(answer: _Answer, body: Mapping[str, Any], began_s: float, ended_s: float) -> Usage:
    """What the answer has cost: the server's figures, ours where it has none (an estimate for the prompt)."""
    usage, timings = answer.usage or {}, answer.timings or {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    first_s = ended_s if answer.first_s is None else answer.first_s
    asked = sum(len(str(turn["content"])) for turn in body["messages"]) // _CHARS_PER_TOKEN
    return Usage(
        prompt_tokens=token_count(usage.get("prompt_tokens"), asked),
        cached_tokens=token_count(cached, 0),
        generated_tokens=token_count(usage.get("completion_tokens"), answer.pieces),
        prompt_ms=duration_ms(timings.get("prompt_ms"), (first_s - began_s) * 1000),
        generate_ms=duration_ms(timings.get("predicted_ms"), (ended_s - first_s) * 1000),
    )


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _reason(err: Exception) -> str:
    """What a failed connect says, without the request that httpx keeps in it."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message}); see remote.ca_file"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(err).__name__


async def _bounded(response: httpx.Response) -> bytes:
    """The body of an answer that is no stream. Raises EngineFaulty where it is longer than such an answer can be."""
    body = bytearray()
    async for part in response.aiter_raw():
        body += part
        if len(body) > _MAX_BODY_BYTES:
            raise EngineFaulty(f"more than {_MAX_BODY_BYTES} bytes came where a short answer belongs")
    return bytes(body)
