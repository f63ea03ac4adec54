"""One `infer.request` from payload to final: what is asked of the engine, what is streamed, how it can fail.

Knows nothing of the child's life: it is given a ChatServer and raises CallFailed with a typed failure. Deadlines and
cancellation come from outside as cancellation of the task; closing the stream is this module's answer to both. When an
answer is stopped before its end is `abort`'s decision, whether it is the JSON it should be `answer`'s.

**Back-pressure.** A piece that the way to the hub does not take is kept and joined with the next one, so what waits is
never more than the answer itself. **Repair.** An answer that is not the JSON it should be goes back once, with the
findings and under its schema, within the tokens and the time that the request has left; its figures are added.
**Open.** A schema that the engine cannot take costs the constraint and not the answer: it is shown to the model,
decoding is held to JSON of any form, and what comes is checked against the whole schema as ever.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from protocol.errors import CallFailed
from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.failure import Category, Failure, Finding
from protocol.messages.infer import ChatMessage, InferFinal, InferPartial, InferRequest
from services.inference.abort import Abort, DecodingMonitor, entropy_nats
from services.inference.answer import check_schema, judge
from services.inference.asked import asked_items
from services.inference.llama_http import (
    GATHER_S,
    ChatServer,
    EngineFaulty,
    EngineGone,
    EngineUnavailable,
    Piece,
    PromptTooLong,
    RequestInvalid,
    Usage,
)
from services.kit.json_schema import BadSchema

PARTIAL_S: Final = 0.9 * GATHER_S
"""Shortest time between two partials of a service; pieces that come faster are joined. A little shorter than the time
between two looks at an answer, so that each look can be a partial. Each of n calls at the same time has its turn every
n times as long: what partials cost is taken from the cores that decode, and must not grow with n."""

LOGPROB_CANDIDATES: Final = 10
"""Candidates per token whose probabilities are asked for where entropy is watched."""

FIGURES: Final = ("early_aborts", "repairs_begun", "repairs_done", "schemas_open", "partials_sent", "partials_held")
"""What a Generation counts: totals of the service since it started."""

_LEAST_REPAIR_TOKENS: Final = 16
_REPAIR_SHOWN_CHARS: Final = 8_000
_ANY_JSON: Final[dict[str, Any]] = {}


def payload_of(request: InferRequest, t_max_ms: int | None = None) -> dict[str, Any]:
    """Body of POST /v1/chat/completions; `t_max_ms` bounds decoding inside the engine too, should nobody be left to
    close the stream. llama.cpp looks at it at line breaks only.
    """
    payload: dict[str, Any] = {
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_prompt": True,
        **request.sampling.model_dump(exclude_none=True),
    }
    if t_max_ms is not None:
        payload["t_max_predict_ms"] = max(1, t_max_ms)
    if request.early_abort is not None and request.early_abort.entropy_nats is not None:
        payload |= {"logprobs": True, "top_logprobs": LOGPROB_CANDIDATES}
    if request.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": request.json_schema}
        payload["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.grammar is not None:
        payload["grammar"] = request.grammar
    return payload


@dataclass(slots=True)
class _Stream:
    """One answer of the engine: its text, how it ended, what it cost. No monitor where nobody asked for one."""

    monitor: DecodingMonitor | None
    began_s: float
    thinking: DecodingMonitor | None = None
    """Watches what the model thinks before it answers, where the engine tells the two apart."""
    text: list[str] = field(default_factory=list)
    chars: int = 0
    thought_chars: int = 0
    tokens: int = 0
    """Pieces of thoughts and of text: no fewer tokens than that so far."""
    finish: str | None = None
    usage: Usage | None = None
    first_s: float | None = None

    @property
    def complete(self) -> bool:
        return self.finish is not None and self.usage is not None

    @property
    def cut_off(self) -> bool:
        return self.finish == "length"


class _Refused(CallFailed):
    """The engine calls the request wrong: it cannot read the grammar, or cannot take the schema."""


class Generation:
    """One answer in the making. `service` and `model` name its origin in failures and in the final.

    `due_s` is the deadline on the clock of the event loop, `figures` the service's counters (see FIGURES), `calls` says
    how many answers the service makes at the moment.
    """

    def __init__(
        self,
        request: InferRequest,
        *,
        service: str,
        model: str,
        engine: str,
        due_s: float | None,
        figures: Counter[str],
        calls: Callable[[], int],
    ) -> None:
        self._request = request
        self._service = service
        self._model = model
        self._engine = engine
        self._due_s = due_s
        self._figures = figures
        self._calls = calls
        self._began_s = 0.0
        self._stream: _Stream | None = None
        self._before_tokens = 0
        """Of streams that have ended."""
        self._opened: _Refused | None = None
        """Why the engine could not take the schema, where it could not."""
        self._unsent: list[str] = []
        self._sent_s = 0.0

    @property
    def complete(self) -> bool:
        """True once the engine has said that the answer is complete: its slot is free then."""
        return self._stream is not None and self._stream.complete

    @property
    def begun(self) -> bool:
        """True once a piece of an answer has come from the engine, be it of its thoughts."""
        return self._stream is not None and self._stream.first_s is not None

    @property
    def spent_tokens(self) -> int:
        """Tokens that were generated so far, whatever becomes of the answer."""
        return self._before_tokens + (0 if self._stream is None else _generated(self._stream))

    async def run(
        self, server: ChatServer, partial: Callable[[InferPartial], bool], progressed: Callable[[], None]
    ) -> InferFinal:
        """Generate; `progressed` is called for every piece that arrives, `partial` says whether it was taken.

        Raises CallFailed.
        """
        request = self._request
        if request.json_schema is not None:
            try:
                await check_schema(request.json_schema)
            except BadSchema as err:
                raise self._bad_schema(err) from err
        self._began_s = asyncio.get_running_loop().time()
        try:
            first = await self._decode(server, request, progressed, partial if request.stream else None)
        except _Refused as refused:
            # There is none, or one that allows everything; or the answer was begun, so it can be taken.
            if not request.json_schema or self.begun:
                raise
            self._opened, request = refused, _opened(request)
            self._figures["schemas_open"] += 1
            try:
                first = await self._decode(server, request, progressed, partial if request.stream else None)
            except _Refused as err:
                raise refused from err  # so it was not the schema, or not alone
        failure = await self._objection(first)
        if failure is None:
            return self._final([first])
        again = self._repair_request(request, first, failure)
        if again is None:
            raise self._unusable(failure, [first])
        self._figures["repairs_begun"] += 1
        try:
            second = await self._decode(server, again, progressed, None)
        except CallFailed as err:
            if err.failure.category is Category.POLICY:  # such as a prompt that is too long with the answer in it
                raise self._unusable(failure, [first]) from err
            evidence = err.failure.evidence | {"generated_tokens": self.spent_tokens}
            raise CallFailed(err.failure.model_copy(update={"evidence": evidence})) from err
        failure = await self._objection(second)
        if failure is not None:
            raise self._unusable(failure, [first, second])
        self._figures["repairs_done"] += 1
        return self._final([first, second])

    async def _decode(
        self,
        server: ChatServer,
        request: InferRequest,
        progressed: Callable[[], None],
        partial: Callable[[InferPartial], bool] | None,
    ) -> _Stream:
        """One stream to its end; `partial` is None where nobody wants pieces."""
        loop = asyncio.get_running_loop()
        left_s = self._seconds_left()
        self._before_tokens = self.spent_tokens
        stream = self._stream = _Stream(
            _monitor(request, left_s), loop.time(), _monitor(request, left_s, thoughts=True)
        )
        payload = payload_of(request, None if left_s is None else int(left_s * 1000))
        try:
            async with aclosing(server.chat(payload)) as pieces:
                async for piece in pieces:
                    progressed()
                    now_s = loop.time()
                    self._take(stream, piece, now_s)
                    if partial is not None and piece.text:
                        self._hand_on(stream, piece, now_s, partial)
        except PromptTooLong as err:
            raise self._failed(
                "prompt.too_long",
                Category.POLICY,
                f"{err}: shorten the step's inputs, split the step, or raise context_tokens of {self._model}",
                prompt_tokens=err.prompt_tokens,
                context_tokens=err.context_tokens,
            ) from err
        except RequestInvalid as err:
            refusal = self._failed("engine.refused", Category.POLICY, f"the engine refused the request: {err}")
            raise _Refused(refusal.failure) from err
        except EngineUnavailable as err:
            raise self._failed(err.code, err.category, str(err), **err.evidence) from err
        except EngineFaulty as err:
            raise self._failed("engine.faulty", Category.PEER, str(err), generated_tokens=stream.tokens) from err
        except EngineGone as err:
            raise self._failed("engine.died", Category.PEER, str(err), generated_tokens=stream.tokens) from err
        if not stream.complete:
            message = "the engine ended its answer before it was complete"
            raise self._failed("engine.died", Category.PEER, message, generated_tokens=stream.tokens)
        return stream

    def _take(self, stream: _Stream, piece: Piece, now_s: float) -> None:
        stream.finish = piece.finish_reason or stream.finish
        stream.usage = piece.usage or stream.usage
        if not piece.text and not piece.thought:
            return
        stream.first_s = now_s if stream.first_s is None else stream.first_s
        if piece.text:
            stream.text.append(piece.text)
        stream.chars += len(piece.text)
        stream.thought_chars += len(piece.thought)
        stream.tokens += 1
        if max(stream.chars, stream.thought_chars) > MAX_ARTEFACT_CHARS:
            message = f"the answer grew beyond {MAX_ARTEFACT_CHARS} characters and was cut off"
            evidence = {"answer": "".join(stream.text)[:500], "generated_tokens": stream.tokens}
            raise self._failed("answer.too_large", Category.FORMAT, message, **evidence)
        monitor, said = (stream.monitor, piece.text) if piece.text else (stream.thinking, piece.thought)
        if monitor is None:
            return
        entropies = [entropy_nats(candidates) for candidates in piece.top_logprobs]
        found = monitor.take(said, stream.tokens, entropies) or monitor.beyond(now_s - stream.began_s)
        if found is not None:
            self._figures["early_aborts"] += 1
            raise self._aborted(found, stream)

    def _hand_on(self, stream: _Stream, piece: Piece, now_s: float, partial: Callable[[InferPartial], bool]) -> None:
        self._unsent.append(piece.text)
        if piece.more or now_s - self._sent_s < PARTIAL_S * max(1, self._calls()):
            return
        self._sent_s = now_s
        unsent = "".join(self._unsent)
        start_chars = stream.chars - len(unsent)
        if partial(InferPartial(text=unsent, generated_tokens=stream.tokens, start_chars=start_chars)):
            self._unsent.clear()
            self._figures["partials_sent"] += 1
        else:
            self._figures["partials_held"] += 1

    async def _objection(self, stream: _Stream) -> Failure | None:
        """Why the answer is not the JSON it should be; None if it is, or need not be any."""
        request = self._request
        if not request.judged or (request.json_schema is None and not request.json_output):
            return None
        schema = _ANY_JSON if request.json_schema is None else request.json_schema
        text = "".join(stream.text)
        try:
            return await judge(
                text, schema, cut_off=stream.cut_off, origin=self._service, fenced=request.json_schema is None
            )
        except BadSchema as err:
            raise self._bad_schema(err) from err

    def _repair_request(self, request: InferRequest, first: _Stream, failure: Failure) -> InferRequest | None:
        """The request that shows the engine its answer and what is wrong with it; None where nothing is left for it."""
        left_tokens = request.max_tokens - _generated(first)
        took_s = asyncio.get_running_loop().time() - first.began_s
        left_s = self._seconds_left()
        if left_tokens < _LEAST_REPAIR_TOKENS or (left_s is not None and left_s < took_s):
            return None
        points = "\n".join(f"- {finding.message[:300]}" for finding in failure.findings)
        answer = "".join(first.text)[:_REPAIR_SHOWN_CHARS]
        said = f"This answer was not accepted:\n{points}\nAnswer again with the corrected JSON and nothing else."
        messages = [
            *request.messages,
            ChatMessage(role="assistant", content=answer),
            ChatMessage(role="user", content=said),
        ]
        schema = request.json_schema
        if schema is None and request.grammar is None:
            schema = _ANY_JSON
        return request.model_copy(
            update={"messages": messages, "max_tokens": left_tokens, "json_schema": schema, "stream": False}
        )

    def _unusable(self, failure: Failure, streams: list[_Stream]) -> CallFailed:
        """The SCHEMA failure with what it has cost: paid for, though of no use."""
        spent: dict[str, Any] = {"generated_tokens": sum(_generated(stream) for stream in streams)}
        if len(streams) > 1:
            spent["repair"] = "tried once, in vain"
        if self._opened is not None:
            spent["unconstrained"] = self._opened.failure.message
        return CallFailed(failure.model_copy(update={"evidence": failure.evidence | spent}))

    def _final(self, streams: list[_Stream]) -> InferFinal:
        last, first_s = streams[-1], streams[0].first_s
        usages = [stream.usage for stream in streams if stream.usage is not None]
        finish: Literal["stop", "length"] = "length" if last.cut_off else "stop"
        return InferFinal(
            text="".join(last.text),
            finish_reason=finish,
            model=self._model,
            engine=self._engine,
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            generated_tokens=sum(usage.generated_tokens for usage in usages),
            prompt_ms=sum(usage.prompt_ms for usage in usages),
            generate_ms=sum(usage.generate_ms for usage in usages),
            first_token_ms=0.0 if first_s is None else (first_s - self._began_s) * 1000,
            repaired=len(streams) > 1,
            draft_tokens=sum(usage.draft_tokens for usage in usages),
            accepted_tokens=sum(usage.accepted_tokens for usage in usages),
        )

    def _seconds_left(self) -> float | None:
        """Until the deadline; None without one."""
        return None if self._due_s is None else max(0.0, self._due_s - asyncio.get_running_loop().time())

    def _bad_schema(self, err: BadSchema) -> CallFailed:
        """The next attempt would meet the same schema."""
        message = f"json_schema is not a JSON Schema: {err}"
        return self._failed("schema.invalid", Category.POLICY, message, generated_tokens=self.spent_tokens)

    def _aborted(self, found: Abort, stream: _Stream) -> CallFailed:
        category = Category.EARLY_ABORT
        message = f"stopped while it was written: {found.message}"
        evidence = found.evidence | {"answer": "".join(stream.text)[:500]}
        finding = Finding(gate="decoding", category=category, message=message, rule=found.code)
        failure = Failure(
            code=found.code,
            category=category,
            origin=self._service,
            message=message,
            evidence=evidence,
            findings=[finding],
        )
        return CallFailed(failure)

    def _failed(self, code: str, category: Category, message: str, **evidence: Any) -> CallFailed:
        return CallFailed(
            Failure(code=code, category=category, origin=self._service, message=message, evidence=evidence)
        )


def _opened(request: InferRequest) -> InferRequest:
    """The request for an engine that cannot take its schema: any JSON, and the model is told of which form."""
    told = f"Answer with JSON that this JSON Schema allows:\n{json.dumps(request.json_schema)[:_REPAIR_SHOWN_CHARS]}"
    *before, last = request.messages
    messages = [*before, last.model_copy(update={"content": f"{last.content}\n\n{told}"})]
    return request.model_copy(update={"messages": messages, "json_schema": _ANY_JSON})


def _monitor(request: InferRequest, left_s: float | None, *, thoughts: bool = False) -> DecodingMonitor | None:
    if request.early_abort is None:
        return None
    constrained = not thoughts and (request.json_schema is not None or request.grammar is not None)
    items = 0 if thoughts else asked_items(request)
    return DecodingMonitor(request.early_abort, request.max_tokens, left_s, constrained, items)


def _generated(stream: _Stream) -> int:
    return stream.tokens if stream.usage is None else stream.usage.generated_tokens
