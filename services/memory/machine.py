"""The pure part of memory: how a value learns, how memories are ranked, when a projection is to be trusted.

Functions of their arguments only: no clock, file, database or randomness. The log (`log.py`) calls `scored` inside the
transaction that stores an outcome; the projector (`projector.py`) calls `ranked` for every retrieval and `recovery` at
every start. Which choice to take by the values is not decided here but by learned routing (a later issue).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.messages.memory import Value

LEARNING_RATE: Final = 0.3
"""Step of the update, MemRL's alpha. Var(Q) ≤ alpha/(2-alpha)·Var(r): 0.18 of the reward's variance remains."""

PRIOR_Q: Final = 0.5
"""Value of a choice nobody has tried: as likely to succeed as to fail."""

SIMILARITY_FLOOR: Final = 0.35
"""δ of phase A. With wordllama-256, twelve pairs of paraphrased objectives have cosines of 0.33 to 0.86 (median 0.60)
and the 264 pairs of strangers among them at most 0.32 (99th percentile 0.27); so 0.35 lets no stranger through and
loses one friend in twelve. A memory that is not there costs less than a wrong one. Measured by
`pytest tests/unit/test_memory_embedding.py`, which fails when a new embedding makes this constant wrong."""

FLOOR_RANGE: Final = (0.25, 0.5)
"""Bounds of a δ taken from the store: below, words that all texts share would count as likeness; above, a store about
one thing only would find nothing in itself."""

Z_LIMIT: Final = 3.0
"""z-scores are clamped to ± this, so that one outlier cannot decide alone (MemRL)."""

_NO_SPREAD: Final = 1e-9


@dataclass(frozen=True, slots=True)
class RetrievalPolicy:
    """Constants of the two-phase retrieval."""

    floor: float = SIMILARITY_FLOOR
    """δ: a cosine must lie above this."""
    q_weight: float = 0.5
    """λ in [0, 1]: 0 ranks by similarity alone, 1 by value alone."""

    def pool(self, k: int) -> int:
        """k1, how many nearest memories enter phase B to have `k` come out: 2k, at least 5 (MemRL uses 5/3, 10/5)."""
        return max(5, 2 * k)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One memory that passed phase A."""

    task_id: str
    similarity: float
    """Cosine to the query, in [-1, 1]."""
    q: float
    """Value of what was done then, in [0, 1]."""


class Recovery(StrEnum):
    """What a projection needs at start."""

    KEEP = "keep"
    CATCH_UP = "catch_up"
    REBUILD = "rebuild"


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a projection on disk and held against its manifest or the log's own contents."""

    log_id: str
    applied_seq: int


def similarity_floor(pairs: Sequence[float]) -> float:
    """δ for a store whose episodes resemble each other like this; the constant where `pairs` is empty.

    Meant is the 99th percentile of strangers' similarities. Pairs of a store are strangers and friends mixed, and
    friends fill the upper end; so it is found by mirroring the lower one, which is the strangers' alone, at the
    median: δ = 2·median - 1st percentile.
    """
    if not pairs:
        return SIMILARITY_FLOOR
    ordered = sorted(pairs)
    median, low = ordered[len(ordered) // 2], ordered[len(ordered) // 100]
    return min(max(2 * median - low, FLOOR_RANGE[0]), FLOOR_RANGE[1])


def unseen(subject: str, task_type: str, choice: str) -> Value:
    """The value of a choice before its first outcome."""
    return Value(subject=subject, task_type=task_type, choice=choice, q=PRIOR_Q, count=0, mean_seconds=0.0)


def scored(value: Value, reward: float, seconds: float) -> Value:
    """The value after one outcome; `reward` in [0, 1], `seconds` finite and ≥ 0, so that q stays in [0, 1].

    Q ← Q + LEARNING_RATE (r - Q), an average that forgets exponentially (MemRL, arXiv 2601.03192: the update of
    Q-learning without a successor state). Mean seconds: m ← m + (s - m) / n, the plain running mean (Welford 1962).
    """
    count = value.count + 1
    return value.model_copy(
        update={
            "q": value.q + LEARNING_RATE * (reward - value.q),
            "count": count,
            "mean_seconds": value.mean_seconds + (seconds - value.mean_seconds) / count,
        }
    )


def first_of_each(ids: Sequence[str], known: Collection[str]) -> list[int]:
    """Positions of the ids that have an effect: the first of each that is not known yet. The others are duplicates."""
    taken: set[str] = set()
    firsts = []
    for position, ident in enumerate(ids):
        if ident not in known and ident not in taken:
            taken.add(ident)
            firsts.append(position)
    return firsts


def episode_value(choice_values: Collection[float], succeeded: bool) -> float:
    """Value of what was done in an episode: the mean Q of the choices taken in it that have been scored.

    An episode without any scored decision is one outcome on top of the prior. `fsum` makes the mean independent of the
    order of the rows, and thereby of how a projection was built.
    """
    if choice_values:
        return math.fsum(choice_values) / len(choice_values)
    return scored(unseen("", "", ""), 1.0 if succeeded else 0.0, 0.0).q


def z_scores(values: Sequence[float]) -> list[float]:
    """(x - mean) / standard deviation over the pool, clamped to ±3; all zero where the values have no spread."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    if deviation < _NO_SPREAD:
        return [0.0] * len(values)
    return [max(-Z_LIMIT, min(Z_LIMIT, (value - mean) / deviation)) for value in values]


def ranked(candidates: Sequence[Candidate], k: int, policy: RetrievalPolicy) -> list[Candidate]:
    """Phase B: the best `k` by (1-λ)·z(similarity) + λ·z(Q), z over the candidates given (MemRL, arXiv 2601.03192).

    The order of the argument does not matter; ties go to the more similar, then to the smaller task id.
    """
    pool = sorted(candidates, key=lambda each: (-each.similarity, each.task_id))
    by_similarity = z_scores([each.similarity for each in pool])
    by_q = z_scores([each.q for each in pool])
    weight = policy.q_weight
    scores = [(1 - weight) * near + weight * good for near, good in zip(by_similarity, by_q, strict=True)]
    order = sorted(range(len(pool)), key=lambda position: -scores[position])  # stable: keeps the order of ties
    return [pool[position] for position in order[:k]]


def recovery(found: Found | None, log_id: str, log_seq: int) -> tuple[Recovery, str]:
    """What to do with a projection, and the reason for the log. `found` is None where it is missing or doubtful."""
    if found is None:
        return Recovery.REBUILD, "missing or not to be trusted"
    if found.log_id != log_id:
        return Recovery.REBUILD, f"made from another log ({found.log_id}, this one is {log_id})"
    if found.applied_seq > log_seq:
        return Recovery.REBUILD, f"ahead of the log ({found.applied_seq} > {log_seq})"
    if found.applied_seq < log_seq:
        return Recovery.CATCH_UP, f"{log_seq - found.applied_seq} changes behind"
    return Recovery.KEEP, "in step"


def lineage_digest(rows: Iterable[tuple[str | int, ...]]) -> str:
    """sha256 over a set of rows, in whatever order they come: equal for the graph and for the log it stands for."""
    whole = hashlib.sha256()
    for line in sorted(json.dumps(row) for row in rows):
        whole.update(line.encode("ascii") + b"\n")
    return whole.hexdigest()
