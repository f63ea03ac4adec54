"""One `infer.request` from payload to final: what is asked of the engine, what is streamed, how it can fail.

Knows nothing of the child's life: it is given a ChatServer and raises CallFailed with a typed failure. Deadlines and
cancellation come from outside as cancellation of the task; closing the stream is this module's answer to both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Final, Literal

from protocol.errors import CallFailed
from protocol.limits import MAX_ARTEFACT_CHARS
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal, InferPartial, InferRequest
from services.inference.answer import BadSchema, check_schema, judge
from services.inference.llama_http import (
    ChatServer,
    EngineFaulty,
    EngineGone,
    EngineUnavailable,
    Piece,
    PromptTooLong,
    RequestInvalid,
    Usage,
)

PARTIAL_S: Final = 0.05
"""Shortest time between two partials of one call; pieces that come faster are joined."""


def payload_of(request: InferRequest) -> dict[str, Any]:
    """Body of POST /v1/chat/completions."""
    payload: dict[str, Any] = {
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        "max_tokens": request.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_prompt": True,
        **request.sampling.model_dump(exclude_none=True),
    }
    if request.stream:
        payload["timings_per_token"] = True  # the count of tokens in a partial; twice the bytes, so only when asked
    if request.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": request.json_schema}
        payload["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.grammar is not None:
        payload["grammar"] = request.grammar
    return payload


class Generation:
    """One answer in the making. `service` and `model` name its origin in failures and in the final."""

    def __init__(self, request: InferRequest, *, service: str, model: str, engine: str) -> None:
        self._request = request
        self._service = service
        self._model = model
        self._engine = engine
        self._text: list[str] = []
        self._chars = 0
        self._finish: str | None = None
        self._usage: Usage | None = None
        self._first_s: float | None = None
        self._unsent: list[str] = []
        self._sent_s = 0.0

    @property
    def complete(self) -> bool:
        """True once the engine has said that the answer is complete: its slot is free then."""
        return self._finish is not None and self._usage is not None

    async def run(
        self, server: ChatServer, partial: Callable[[InferPartial], None], progressed: Callable[[], None]
    ) -> InferFinal:
        """Generate; `progressed` is called for every piece that arrives. Raises CallFailed."""
        if self._request.json_schema is not None:
            try:
                check_schema(self._request.json_schema)
            except BadSchema as err:
                message = f"json_schema is not a JSON Schema: {err}"
                raise self._failed("schema.invalid", Category.POLICY, message) from err
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with aclosing(server.chat(payload_of(self._request))) as pieces:
                async for piece in pieces:
                    progressed()
                    self._take(piece, loop.time(), partial)
        except PromptTooLong as err:
            raise self._failed(
                "prompt.too_long",
                Category.POLICY,
                f"{err}: shorten the step's inputs, split the step, or raise context_tokens of {self._model}",
                prompt_tokens=err.prompt_tokens,
                context_tokens=err.context_tokens,
            ) from err
        except RequestInvalid as err:
            raise self._failed("engine.refused", Category.POLICY, f"the engine refused the request: {err}") from err
        except EngineUnavailable as err:
            raise self._failed(err.code, err.category, str(err), **err.evidence) from err
        except EngineFaulty as err:
            raise self._failed("engine.faulty", Category.PEER, str(err)) from err
        except EngineGone as err:
            raise self._failed("engine.died", Category.PEER, str(err)) from err
        return await self._final(began_s)

    def _take(self, piece: Piece, now_s: float, partial: Callable[[InferPartial], None]) -> None:
        self._finish = piece.finish_reason or self._finish
        self._usage = piece.usage or self._usage
        if not piece.text:
            return
        self._first_s = now_s if self._first_s is None else self._first_s
        self._text.append(piece.text)
        self._chars += len(piece.text)
        if self._chars > MAX_ARTEFACT_CHARS:
            message = f"the answer grew beyond {MAX_ARTEFACT_CHARS} characters and was cut off"
            raise self._failed("answer.too_large", Category.FORMAT, message, answer="".join(self._text)[:500])
        if not self._request.stream:
            return
        self._unsent.append(piece.text)
        if now_s - self._sent_s >= PARTIAL_S:
            partial(InferPartial(text="".join(self._unsent), generated_tokens=piece.generated_tokens or 0))
            self._unsent.clear()
            self._sent_s = now_s

    async def _final(self, began_s: float) -> InferFinal:
        if self._finish is None or self._usage is None:
            raise self._failed("engine.died", Category.PEER, "the engine ended its answer before it was complete")
        text = "".join(self._text)
        finish: Literal["stop", "length"] = "length" if self._finish == "length" else "stop"
        if self._request.json_schema is not None:
            schema = self._request.json_schema
            failure = await judge(text, schema, cut_off=finish == "length", origin=self._service)
            if failure is not None:
                spent = {"generated_tokens": self._usage.generated_tokens}  # paid for, though of no use
                raise CallFailed(failure.model_copy(update={"evidence": failure.evidence | spent}))
        return InferFinal(
            text=text,
            finish_reason=finish,
            model=self._model,
            engine=self._engine,
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=self._usage.cached_tokens,
            generated_tokens=self._usage.generated_tokens,
            prompt_ms=self._usage.prompt_ms,
            generate_ms=self._usage.generate_ms,
            first_token_ms=0.0 if self._first_s is None else (self._first_s - began_s) * 1000,
        )

    def _failed(self, code: str, category: Category, message: str, **evidence: Any) -> CallFailed:
        return CallFailed(
            Failure(code=code, category=category, origin=self._service, message=message, evidence=evidence)
        )
