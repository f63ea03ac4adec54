"""Compares all that is derived with the log and says what differs: the work behind `tierline memory verify`.

Nothing is mended here; `tierline memory rebuild` makes values, vectors and graph anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Final

import numpy as np

from protocol.messages.memory import Difference
from services.memory.graph import LineageGraph
from services.memory.log_reader import LogReader
from services.memory.vectors import VectorIndex

_SHOWN: Final = 10
"""Differences named per part; the rest is counted."""
_MAX_CHARS: Final = 300


def differences(reader: LogReader, vectors: VectorIndex, graph: LineageGraph) -> list[Difference]:
    """All parts; both projections must have followed the log to the same row. A damaged log is all that is told."""
    if damage := reader.damage():
        return _named("log", damage)
    found: list[Difference] = []
    for part, told in (
        ("values", _values(reader)),
        ("vectors", _vectors(reader, vectors)),
        ("graph", _graph(reader, graph)),
    ):
        found += _named(part, list(told))
    return found


def _named(part: str, texts: list[str]) -> list[Difference]:
    if len(texts) > _SHOWN:
        texts = [*texts[:_SHOWN], f"and {len(texts) - _SHOWN} more"]
    return [Difference.model_validate({"part": part, "what": text[:_MAX_CHARS]}) for text in texts]


def _values(reader: LogReader) -> Iterator[str]:
    for stored, right in reader.wrong_values():
        value = stored or right
        if value is None:
            continue
        name = f"{value.subject} {value.choice} for {value.task_type}"
        if stored is None:
            yield f"{name}: has no value although it was scored"
        elif right is None:
            yield f"{name}: has a value although it was never scored"
        else:
            stands, given = (f"{each.q:.6f} (n={each.count})" for each in (stored, right))
            yield f"{name}: stands at {stands}, the outcomes give {given}"


def _vectors(reader: LogReader, vectors: VectorIndex) -> Iterator[str]:
    after, until = reader.stale
    held = vectors.ids()
    matrix = vectors.vectors()
    place = {int(seq): position for position, seq in enumerate(held)}
    if len(place) != len(held):
        yield f"{len(held) - len(place)} rows are held twice"
    current = (reader.vectors(0, after), reader.vectors(until, vectors.applied_seq))  # not those of an older embedder
    for episode in chain(*current):
        position = place.pop(episode.seq, None)
        if position is None:
            yield f"{episode.task_id} (row {episode.seq}) is missing"
        elif episode.vector is None or not np.array_equal(matrix[position], episode.vector):
            yield f"{episode.task_id} (row {episode.seq}) has another vector than in the log"
    for seq in place:
        yield f"row {seq} is held, and no such episode is in the log"


def _graph(reader: LogReader, graph: LineageGraph) -> Iterator[str]:
    upto = graph.applied_seq
    right, held = Counter(reader.lineage(upto)), Counter(graph.lineage())
    for row in sorted((right - held).elements(), key=repr):
        yield f"lacks {' '.join(map(str, row))}"
    for row in sorted((held - right).elements(), key=repr):
        yield f"holds {' '.join(map(str, row))}, which the log does not say"
