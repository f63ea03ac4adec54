"""How much memory a loaded model needs, how long it takes to get there, and whether the budget can hold all of it.

Estimates, for as long as nothing is measured: the hub replaces them with what the services report. The rules
that follow from them are `rules`' business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from services.kit.registry.entries import ModelEntry

_SPLIT_FILE: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_PROCESS_BYTES: Final = 96 * 1024 * 1024
"""The engine's own code and its compute buffers for small batches."""
_KV_FACTOR: Final = 2.5
"""Bytes of KV cache (f16) per token over the square root of the file's bytes: 2.4 for SmolLM2-135M at 4 bits (30
layers, 3 KV heads of 64), 2.0 for a 7B and 1.9 for a 32B model at 4 bits with 8 KV heads of 128. Layers and width both
grow with the square root of the weights, roughly, and it is better to reserve a little too much."""
_LOAD_BYTES_PER_S: Final = 500_000_000
_LOAD_BASE_S: Final = 1.0


def memory_need_bytes(entry: ModelEntry) -> int:
    """Memory in bytes that the loaded model takes: as declared, else estimated; 0 for engines noop and openai.

    file + slots * context_tokens * 2.5 * sqrt(file) + 96 MiB. A file that is not there counts as nothing.
    """
    if entry.engine in ("noop", "openai"):
        return 0
    if entry.memory_bytes is not None:
        return entry.memory_bytes
    size = file_bytes(entry)
    if size is None:
        return 0
    return size + round(entry.slots * entry.context_tokens * _KV_FACTOR * math.sqrt(size)) + _PROCESS_BYTES


def expected_load_s(entry: ModelEntry) -> float:
    """Seconds that loading is taken to last before it was ever seen: 1 s, and 1 s for each 500 MB."""
    return _LOAD_BASE_S + (file_bytes(entry) or entry.memory_bytes or 0) / _LOAD_BYTES_PER_S


def file_bytes(entry: ModelEntry) -> int | None:
    """Size of a model's file, all parts of a split one together; None where one is missing or none is named."""
    if entry.path is None or entry.engine == "noop":
        return None
    try:
        return sum(part.stat().st_size for part in model_parts(entry.path))
    except OSError:
        return None


def model_parts(path: Path) -> Sequence[Path]:
    """Return the files of a model: llama.cpp is given the first part of a split one and opens the others itself."""
    match = _SPLIT_FILE.search(path.name)
    if match is None:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    return [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def resident_floor(models: Iterable[ModelEntry], needs: Mapping[str, int]) -> int:
    """Memory that is never given to another model: that of hot ones, and of pinned ones once they are loaded."""
    return sum(needs[model.name] for model in models if model.residency == "hot" or model.pinned)


def largest_guest(models: Iterable[ModelEntry], needs: Mapping[str, int]) -> str | None:
    """Name of the largest warm or cold model that makes way for others; None if there is none.

    Beside everything that stays it must fit, else work that needs it could never run.
    """
    guests = [model.name for model in models if model.residency != "hot" and not model.pinned]
    return max(guests, key=lambda name: (needs[name], name), default=None)
