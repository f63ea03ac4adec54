"""The demo model as entries of a benchmark's own registry, beside tiers that do nothing."""

from __future__ import annotations

import os
from typing import Any, Final

from services.ctl.outcomes import CommandError
from services.kit.config import load_home

DEMO_MODEL: Final = "SmolLM2-135M-Instruct.Q8_0.gguf"
"""What `deploy/fetch-model` brings, by its name in the models folder."""
IDLE: Final[dict[str, Any]] = {"engine": "noop", "slots": 2, "context_tokens": 4096}
"""An entry for tiers that a benchmark does not use."""


def demo_entry(engine: str, **fields: Any) -> dict[str, Any]:
    """The demo model on this engine. Raises CommandError where its file is missing."""
    path = load_home().models / DEMO_MODEL
    if not path.is_file():
        raise CommandError(f"no demo model at {path}: run deploy/fetch-model, or set TIERLINE_CACHE")
    return {"path": str(path), "engine": engine, **fields}


def decoding_threads() -> int:
    """Cores to decode with: two where there are two, since a single one leaves a batch nothing to gain from."""
    return min(2, len(os.sched_getaffinity(0)))
