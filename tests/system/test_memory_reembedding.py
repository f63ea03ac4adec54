"""Another embedding model: the running service makes every vector anew, over a kill -9 in the middle, and serves no
vector of the old one meanwhile."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protocol.messages.memory import Episode, Import, Retrieve, Row, Stats, Verify
from services.memory.embedding import Embedder
from services.memory.log_rows import find, put
from tests.system.test_memory_service import MemoryStand, started_stand

EPISODES = 3_000
QUESTIONS = [
    Retrieve(text="Compare the new contract with the old one", k=16),
    Retrieve(text="Write a date parser in Python", k=16),
]


@pytest.fixture
def stand() -> Iterator[MemoryStand]:
    with started_stand() as made:
        yield made


def fill(stand: MemoryStand) -> None:
    kinds = (
        "Compare contract {} with the one before",
        "Write parser {} for dates in Python",
        "Plan journey {} by train",
    )
    for start in range(0, EPISODES, 1_000):
        rows = [
            Row(
                seq=number + 1,
                episode=Episode(
                    task_id=f"t{number}",
                    task_type="doc",
                    objective=kinds[number % 3].format(number),
                    succeeded=True,
                    seconds=1.0,
                ),
            )
            for number in range(start, start + 1_000)
        ]
        assert stand.final(Import(rows=rows)).stored == 1_000


def as_if_embedded_by_another_model(folder: Path) -> None:
    db = sqlite3.connect(folder / "log.sqlite", isolation_level=None)
    db.execute("BEGIN")
    put(db, "meta", "embedder", "an-older-model", verb="INSERT OR REPLACE")
    for *row, vector in list(find(db, "episodes")):
        other = np.roll(np.frombuffer(vector, dtype="<f4"), 7).tobytes()
        put(db, "episodes", *row, other, verb="INSERT OR REPLACE")
    db.execute("COMMIT")
    db.close()


def similarities(stand: MemoryStand, question: Retrieve) -> dict[str, float | None]:
    return {each.task_id: each.similarity for each in stand.final(question).episodes}


def test_all_vectors_are_made_anew_in_the_background_and_old_ones_are_never_compared(stand: MemoryStand) -> None:
    embedder = Embedder()
    fill(stand)
    before = [similarities(stand, question) for question in QUESTIONS]
    assert all(len(found) == 16 for found in before)
    stand.end()
    as_if_embedded_by_another_model(stand.folder)
    stand.start()
    stand.end(signal.SIGKILL)
    opened = stand.events("memory.opened")[-1]
    assert opened["stale_vectors"] == EPISODES
    assert stand.events("memory.reembedded") == [], "killed in the middle of it"

    assert stand.try_start() is None, "the dead one may have left a word in the socket"
    deadline = time.monotonic() + 200
    while stand.final(Stats()).stats["stale_vectors"]:
        assert time.monotonic() < deadline
        for question in QUESTIONS:  # answered meanwhile, from the vectors that are new already
            asked = embedder.embed(question.text)
            for episode in stand.final(question).episodes:
                assert episode.similarity == pytest.approx(float(asked @ embedder.embed(episode.objective)), abs=1e-5)
    assert [similarities(stand, question) for question in QUESTIONS] == before
    while not stand.events("memory.reembedded"):
        assert time.monotonic() < deadline
        stand.final(Stats())
    assert stand.final(Verify()).differences == []
    stand.restart()
    assert stand.events("memory.opened")[-1]["stale_vectors"] == 0
    assert [similarities(stand, question) for question in QUESTIONS] == before
