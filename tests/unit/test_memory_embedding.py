"""Embedding sanity: friends are near, strangers far, and a text without meaning is refused, not given a vector."""

from __future__ import annotations

import numpy as np
import pytest

from services.memory.embedding import BadVector, Embedder, Unembeddable, checked, from_bytes, to_bytes
from services.memory.machine import SIMILARITY_FLOOR

FRIENDS = [
    (
        "Compare these two contracts and list every clause that differs",
        "Compare two versions of a contract and report the clauses that changed",
    ),
    (
        "Write a Python function that parses ISO dates, with unit tests",
        "Implement a date parser in Python and cover it with pytest tests",
    ),
    (
        "Summarise the quarterly sales report for the board",
        "Write a short summary of this quarter's sales figures for management",
    ),
    ("Translate the user manual from German to English", "Translate this German handbook into English"),
    (
        "Find the security holes in this login form",
        "Review the authentication page for security vulnerabilities",
    ),
    (
        "Extract all invoice numbers and totals from the scanned pages",
        "Pull the invoice totals and numbers out of these documents",
    ),
    (
        "Write a bash script that backs up a PostgreSQL database every night",
        "Create a shell script for nightly PostgreSQL backups",
    ),
    (
        "Design a REST API for a library's book lending",
        "Draft the HTTP endpoints of a book lending service for libraries",
    ),
    (
        "Explain how photosynthesis works to a ten-year-old",
        "Describe photosynthesis in words a child understands",
    ),
    (
        "Plan a five-day trip through Portugal by train",
        "Suggest an itinerary for a train journey across Portugal",
    ),
    ("Optimise this SQL query, it takes forty seconds", "Make the slow SQL query faster"),
    (
        "Write release notes from the git history since the last tag",
        "Generate a changelog from the commits since the previous release",
    ),
]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


def test_strangers_stay_below_the_floor_and_friends_above_it(embedder: Embedder) -> None:
    left = np.stack([embedder.embed(text) for text, _ in FRIENDS])
    right = np.stack([embedder.embed(text) for _, text in FRIENDS])
    everyone = np.concatenate([left, right])
    cosines = everyone @ everyone.T
    pairs = [(i, j) for i in range(len(everyone)) for j in range(i)]
    strangers = [cosines[i, j] for i, j in pairs if i % len(FRIENDS) != j % len(FRIENDS)]
    friends = np.diag(left @ right.T)
    assert max(strangers) < SIMILARITY_FLOOR
    assert np.median(strangers) < 0.1
    assert sum(friend > SIMILARITY_FLOOR for friend in friends) >= len(friends) - 1
    assert np.median(friends) > 0.5


def test_vectors_are_unit_float32_and_the_same_every_time(embedder: Embedder) -> None:
    vector = embedder.embed("Plan a trip")
    assert vector.shape == (256,)
    assert vector.dtype == np.float32
    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-5
    assert to_bytes(vector) == to_bytes(embedder.embed("Plan a trip"))
    assert np.array_equal(from_bytes(to_bytes(vector)), vector)


@pytest.mark.parametrize("text", ["", "   \n\t", "...", "!?!", "\x00", "x" * 65_537], ids=repr)
def test_a_text_without_meaning_or_bound_is_refused(embedder: Embedder, text: str) -> None:
    with pytest.raises(Unembeddable):
        embedder.embed(text)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(256, np.float32),
        np.full(256, np.nan, np.float32),
        np.full(256, np.inf, np.float32),
        np.ones(256, np.float32),
        np.ones(255, np.float32) / np.float32(np.sqrt(255)),
        np.ones(256, np.float64) / 16,
    ],
    ids=["zero", "nan", "inf", "not unit", "short", "double"],
)
def test_a_vector_that_is_not_a_finite_unit_vector_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(BadVector):
        checked(vector)


def test_bytes_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(BadVector, match="1024"):
        from_bytes(b"\x00" * 12)
