"""How much memory a loaded model needs, how long it takes to get there, and whether the budget can hold all of it.

Estimates, for as long as nothing is measured: the hub replaces them with what the services report. The rules
that follow from them are `rules`' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from services.kit.gguf_header import parts_of
from services.kit.model_facts import ModelFacts
from services.kit.registry.entries import ModelEntry
from services.kit.registry.launch import declared_facts, loaded_bytes

_PROCESS_BYTES: Final = 96 * 1024 * 1024
"""The engine's own code and its compute buffers for small batches."""
_KV_FACTOR: Final = 2.5
"""Bytes of KV cache (f16) per token over the square root of the file's bytes: 2.4 for SmolLM2-135M at 4 bits (30
layers, 3 KV heads of 64), 2.0 for a 7B and 1.9 for a 32B model at 4 bits with 8 KV heads of 128. Layers and width both
grow with the square root of the weights, roughly, and it is better to reserve a little too much."""
_LOAD_BYTES_PER_S: Final = 500_000_000
_LOAD_BASE_S: Final = 1.0


def memory_needs(
    models: Mapping[str, ModelEntry], facts: Mapping[str, ModelFacts] = MappingProxyType({})
) -> dict[str, int]:
    """Memory in bytes that each entry's process takes when loaded, by name: with its draft's; 0 for a draft by itself.

    `facts` are those of the files, where somebody has read them; exact figures come of these and of what is declared.
    """
    return {name: _process_bytes(entry, models, facts) for name, entry in models.items()}


def _process_bytes(entry: ModelEntry, models: Mapping[str, ModelEntry], facts: Mapping[str, ModelFacts]) -> int:
    need = memory_need_bytes(entry, facts.get(entry.name))
    draft = models.get(entry.speculation.loaded_draft or "")
    if draft is None or entry.memory_bytes is not None:
        return need
    inside = draft.model_copy(update={"tier": entry.tier, "slots": entry.slots, "context_tokens": entry.context_tokens})
    return need + max(0, memory_need_bytes(inside, facts.get(draft.name)) - _PROCESS_BYTES)


def memory_need_bytes(entry: ModelEntry, facts: ModelFacts | None = None) -> int:
    """Memory in bytes that the loaded model takes: as declared, computed from facts, else estimated.

    The estimate is file + slots * context_tokens * 2.5 * sqrt(file) + 96 MiB. 0 for a model that no process here
    computes, for a draft (its memory is its target's) and for a file that is not there.
    """
    if entry.tier == "D" or not entry.is_local:
        return 0
    if entry.memory_bytes is not None:
        return entry.memory_bytes
    if facts is None and entry.declared is not None:
        facts = declared_facts(entry.declared)
    if facts is not None:
        return loaded_bytes(entry, entry, facts) + _PROCESS_BYTES
    size = file_bytes(entry)
    if size is None:
        return 0
    return size + round(entry.slots * entry.context_tokens * _KV_FACTOR * math.sqrt(size)) + _PROCESS_BYTES


def expected_load_s(entry: ModelEntry) -> float:
    """Seconds that loading is taken to last before it was ever seen: 1 s, and 1 s for each 500 MB."""
    return _LOAD_BASE_S + (file_bytes(entry) or entry.memory_bytes or 0) / _LOAD_BYTES_PER_S


def file_bytes(entry: ModelEntry) -> int | None:
    """Size of a model's file, all parts of a split one together, else as declared; None where nothing is known."""
    if entry.path is None or not entry.is_local:
        return None
    try:
        return sum(part.stat().st_size for part in parts_of(entry.path))
    except OSError:
        return entry.declared.file_bytes if entry.declared is not None else None


def resident_floor(models: Iterable[ModelEntry], needs: Mapping[str, int]) -> int:
    """Memory that is never given to another model: that of hot ones, and of pinned ones once they are loaded."""
    return sum(needs[model.name] for model in models if model.residency == "hot" or model.pinned)


def placed_before(name: str, needs: Mapping[str, int], budget: int) -> list[str]:
    """Names of the hot entries that have their room before this one does, of `needs` in the order of the registry.

    Whoever does not fit beside those before it has none, so that one entry too many does not stop all.
    """
    placed: list[str] = []
    taken = 0
    for other, need in needs.items():
        if other == name:
            break
        if 0 < need <= budget - taken:
            placed.append(other)
            taken += need
    return placed


def largest_guest(models: Iterable[ModelEntry], needs: Mapping[str, int]) -> str | None:
    """Name of the largest warm or cold model that makes way for others; None if there is none.

    Beside everything that stays it must fit, else work that needs it could never run.
    """
    guests = [model.name for model in models if model.residency != "hot" and not model.pinned]
    return max(guests, key=lambda name: (needs[name], name), default=None)
