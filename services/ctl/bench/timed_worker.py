"""`python -m services.ctl.bench.timed_worker MODEL`: a worker that needs an exactly known time for every answer.

Benchmark equipment, put by a benchmark in the place of an inference process. It is a true peer of the hub (session,
credit, slots of the registry entry), yet decodes at exactly `TOKENS_PER_S`: a step's `max_tokens` is its time. So no
option of the product exists for measuring alone, and no registry can ask for a model that only sleeps.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Final

from protocol.messages.infer import InferFinal, InferRequest
from services.kit.config import load_home
from services.kit.registry import load_registry
from services.kit.service import Call, Service

TOKENS_PER_S: Final = 1_000
"""One millisecond a token."""


def _service(model: str) -> Service:
    home = load_home()
    slots = load_registry(home.registry, home.models, check_files=False).models[model].slots
    service = Service(home, f"inference-{model}", (f"infer.{model}",), slots=slots)

    async def hold(call: Call) -> InferFinal:
        due = time.monotonic()  # before the body is read: reading it is part of the time
        request = call.read(InferRequest)
        due += request.max_tokens / TOKENS_PER_S
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        return InferFinal(
            text="ok",
            finish_reason="stop",
            model=model,
            engine="timed",
            prompt_tokens=0,
            generated_tokens=request.max_tokens,
        )

    service.answer("infer.request", hold)
    return service


if __name__ == "__main__":
    sys.exit(asyncio.run(_service(sys.argv[1]).run()))
