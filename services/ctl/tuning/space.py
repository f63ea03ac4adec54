"""What may be tried for one model entry, and where it starts: pure.

Axes hold only what a person could write into models.yaml. Whether a combination is allowed for this file and build, the
registry's rules and the engine say when it is about to be measured; nothing of that is repeated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from services.ctl.tuning.search import Axis, Point, Value
from services.kit.registry import ModelEntry

Objective: TypeAlias = Literal["latency", "throughput"]
"""latency: one stream by itself. throughput: all slots at once."""

_BATCHES: Final = ((512, 128), (512, 256), (2_048, 512), (2_048, 1_024))
"""Tokens of a batch, and computed at once; the third is llama.cpp's own."""
_LOOKUPS: Final = (("ngram-simple", 4, 24), ("ngram-simple", 12, 48), ("ngram-map-k", 8, 48), ("ngram-map-k", 8, 96))
_DRAFT_LENGTHS: Final = (4, 8, 16, 24)
_MOST_SLOTS: Final = 64


def start_of(entry: ModelEntry) -> Point:
    """The entry as it stands, in the fields that are tried; those it leaves to a default are not in it."""
    fields = entry.model_dump(exclude_defaults=True)
    found: dict[str, Value] = {"threads": entry.threads, "slots": entry.slots}
    for name in ("threads_batch", "batch_tokens", "ubatch_tokens"):
        if name in fields:
            found[name] = fields[name]
    found |= {f"speculation.{name}": value for name, value in fields.get("speculation", {}).items() if name != "draft"}
    return Point.of(found)


def axes_of(entry: ModelEntry, cores: int, objective: Objective) -> tuple[Axis, ...]:
    """The axes in the order of what they usually bring. `cores` are those that may be used.

    Speculation is for single streams: with all slots at work the inference service switches it off anyway.
    """
    threads = sorted({*_doubling(cores), cores, max(1, cores // 2)})
    axes = [Axis("threads", tuple({"threads": count} for count in threads))]
    if objective == "throughput":
        slots = {entry.slots, entry.slots * 2, entry.slots * 4, max(1, entry.slots // 2)}
        axes.append(Axis("slots", tuple({"slots": count} for count in sorted(slots) if count <= _MOST_SLOTS)))
    else:
        axes.append(Axis("speculation", _speculations(entry)))
    if cores > 1:
        axes.append(Axis("threads_batch", tuple({"threads_batch": count} for count in threads)))
    batches = tuple({"batch_tokens": batch, "ubatch_tokens": at_once} for batch, at_once in _BATCHES)
    axes.append(Axis("batch", batches))
    return tuple(axis for axis in axes if axis.options)


def changes(start: Point, best: Point) -> dict[str, Value]:
    """Fields to set, so that an entry at the start becomes the best."""
    before = dict(start.settings)
    return {name: value for name, value in best.settings if before.get(name) != value}


def words(point: Point, start: Point | None = None) -> str:
    """Settings for people; with a start only what differs from it."""
    shown: Mapping[str, Value] = dict(point.settings) if start is None else changes(start, point)
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "as it is"


def _speculations(entry: ModelEntry) -> tuple[Mapping[str, Value], ...]:
    """Ways to guess ahead, and not to. A field cannot be taken out of an entry, so what it has is switched off."""
    has = entry.speculation.types and entry.speculation.policy != "off"
    without: Mapping[str, Value] = {"speculation.policy": "off"} if entry.speculation.types else {}
    on: Mapping[str, Value] = {} if entry.speculation.policy != "off" else {"speculation.policy": "auto"}
    if entry.speculation.type == "draft":
        lengths = tuple({**on, "speculation.n_max": length} for length in _DRAFT_LENGTHS)
        return (without, *lengths)
    lookups = tuple(
        {**on, "speculation.type": kind, "speculation.ngram_n": n, "speculation.ngram_m": m} for kind, n, m in _LOOKUPS
    )
    return (without, *lookups) if has else lookups


def _doubling(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]
