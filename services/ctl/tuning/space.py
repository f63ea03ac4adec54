"""What may be tried for one model entry, and where it starts: pure.

Axes hold only what a person could write into models.yaml, and no option that can never be used: one whose fields the
other fields of the entry forbid, that the kind of model rules out, or that the service would not follow under such a
load. What depends on the room that is left and on the build, the registry's rules and the engine say when it is about
to be measured: there a refusal is news.

Fields are only ever set, never taken out, and an option may follow any other one of its axis: so each sets every field
that counts once the other has won.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from services.ctl.tuning.search import Axis, Point, Value
from services.kit.registry import ModelEntry
from services.kit.registry.launch import Launch

Objective: TypeAlias = Literal["latency", "throughput"]
"""latency: one stream by itself. throughput: all slots at once."""

_BATCHES: Final = ((512, 128), (512, 256), (2_048, 512), (2_048, 1_024))
"""Tokens of a batch, and computed at once; the third is llama.cpp's own."""
_LOOKUPS: Final = (
    *(("ngram-simple", 4, 24), ("ngram-simple", 12, 48), ("ngram-map-k", 8, 48), ("ngram-map-k", 8, 96)),
    ("ngram-mod", 24, 64),
)
"""Kind, equal tokens, guessed tokens; the last is llama.cpp's own, whose shortest guess is 48."""
_NGRAM_MOD: Final = ((16, 8, 24), (16, 16, 48), (24, 48, 64))
"""Equal tokens, shortest and longest guess, for an entry with n_min: no other lookup has that field."""
_DRAFT_LENGTHS: Final = (4, 8, 16, 24)
_MOST_SLOTS: Final = 64


def start_of(entry: ModelEntry) -> Point:
    """The entry as it stands, in the fields that are tried; those it leaves to a default are not in it, except for the
    policy of a speculation: it says whether the rest counts, so that every option sets it."""
    fields = entry.model_dump(exclude_defaults=True)
    found: dict[str, Value] = {"threads": entry.threads, "slots": entry.slots}
    for name in ("threads_batch", "batch_tokens", "ubatch_tokens"):
        if name in fields:
            found[name] = fields[name]
    found |= {f"speculation.{name}": value for name, value in fields.get("speculation", {}).items() if name != "draft"}
    if "speculation" in fields:
        found["speculation.policy"] = entry.speculation.policy
    return Point.of(found)


def axes_of(launch: Launch, cores: int, objective: Objective) -> tuple[Axis, ...]:
    """The axes in the order of what they usually bring. `cores` are those that may be used.

    Slots are for throughput: one stream uses one, and more of them cost it memory only. Speculation is for single
    streams: with all slots at work the service decodes plainly, whatever the entry has, unless its policy is `always`.
    """
    entry = launch.entry
    most = _most_threads(launch, cores)
    threads = sorted({*_doubling(most), most, max(1, most // 2)})
    axes = [Axis("threads", tuple({"threads": count} for count in threads))]
    if objective == "throughput":
        slots = {entry.slots, entry.slots * 2, entry.slots * 4, max(1, entry.slots // 2)}
        axes.append(Axis("slots", tuple({"slots": count} for count in sorted(slots) if count <= _MOST_SLOTS)))
    if (objective == "latency" or entry.speculation.policy == "always") and _may_guess(launch):
        axes.append(Axis("speculation", _speculations(entry, objective)))
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


def _speculations(entry: ModelEntry, objective: Objective) -> tuple[Mapping[str, Value], ...]:
    """Ways to guess ahead, and not to. A field cannot be taken out of an entry, so what it has is switched off."""
    has = entry.speculation
    without: Mapping[str, Value] = {"speculation.policy": "off" if objective == "latency" else "auto"}
    on: Mapping[str, Value] = {"speculation.policy": "auto" if has.policy == "off" else has.policy}
    if not has.types and has.policy == "auto":
        on = {}  # as in the start of such an entry: nothing is there that could be off
    guesses: tuple[Mapping[str, Value], ...]
    if has.type == "draft":
        guesses = tuple({"speculation.n_max": length} for length in _DRAFT_LENGTHS if length >= (has.n_min or 0))
    elif has.n_min is not None:
        guesses = tuple(
            {"speculation.ngram_n": n, "speculation.n_min": least, "speculation.ngram_m": m}
            for n, least, m in _NGRAM_MOD
        )
    else:
        guesses = tuple(
            {"speculation.type": kind, "speculation.ngram_n": n, "speculation.ngram_m": m} for kind, n, m in _LOOKUPS
        )
    return (*((without,) if has.types else ()), *({**on, **guess} for guess in guesses))


def _may_guess(launch: Launch) -> bool:
    """Whether the registry lets such a model guess ahead at all: with a recurrent state it takes a leave."""
    recurrent = launch.facts is not None and launch.facts.recurrent is not None
    return not recurrent or bool(launch.entry.speculation_on_recurrent.allowed_builds)


def _most_threads(launch: Launch, cores: int) -> int:
    """Threads that the registry allows: over several NUMA nodes one for each physical core, if it is bound to none."""
    hardware = launch.hardware
    if hardware is None or launch.cores or len(hardware.nodes) < 2:
        return cores
    return min(cores, len(set(hardware.physical_cores().values())))


def _doubling(most: int) -> list[int]:
    """1, 2, 4, … up to `most`."""
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]
