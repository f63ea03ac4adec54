"""Upkeep on real files: what is forgotten is gone, what differs is found and mended, large indexes find neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from protocol.messages.memory import Cure, Episode, Forget, Lesson, RecordDecisions, RecordOutcomes, Retrieve
from services.memory.embedding import DIMENSION, Embedder
from services.memory.log import Entry, MemoryLog
from services.memory.log_reader import EpisodeAdded
from services.memory.log_rows import find, put
from services.memory.machine import SIMILARITY_FLOOR, similarity_floor
from services.memory.projector import fresh_vectors
from services.memory.vectors import VectorIndex
from tests.unit.test_memory_log import decision, outcome
from tests.unit.test_memory_projections import rows_among
from tests.unit.test_memory_projector import QUESTION, Told, embedder, graph_of, log, opened

__all__ = ["embedder", "log"]  # fixtures


def clustered(count: int) -> npt.NDArray[np.float32]:
    chance = np.random.default_rng(5)
    centres = chance.normal(size=(60, DIMENSION))
    raw = centres[chance.integers(0, 60, count)] + 0.8 * chance.normal(size=(count, DIMENSION))
    unit: npt.NDArray[np.float32] = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)
    return unit


def rows(matrix: npt.NDArray[np.float32], start: int = 1) -> list[EpisodeAdded]:
    return [EpisodeAdded(seq, f"t{seq}", "doc", vector) for seq, vector in enumerate(matrix, start=start)]


def test_an_index_past_the_exact_size_grows_and_is_rebuilt_to_the_same_answers_and_finds_the_neighbours(
    tmp_path: Path,
) -> None:
    matrix = clustered(24_000)
    grown = VectorIndex(tmp_path, "log", exact_below=20_000)
    for start in range(0, len(matrix), 3_000):
        grown.apply(start + 3_000, rows(matrix[start : start + 3_000], start + 1))
        assert grown.exact == (start + 3_000 < 20_000)
    rebuilt = VectorIndex(tmp_path, "log", exact_below=20_000)
    rebuilt.apply(len(matrix), rows(matrix))
    grown.snapshot()
    loaded = VectorIndex.load(tmp_path)
    assert not loaded.exact
    assert np.array_equal(grown.vectors(), matrix)
    odd = rows_among(range(1, len(matrix) + 1, 2))
    found = 0
    for query in matrix[::400]:
        answer = grown.nearest(query, 10)
        assert answer == rebuilt.nearest(query, 10) == loaded.nearest(query, 10)
        exact = set(np.argsort(-(matrix @ query))[:10] + 1)
        found += len(exact & {row for row, _ in answer})
        assert all(row % 2 for row, _ in grown.nearest(query, 5, odd))
    assert found / (10 * len(matrix[::400])) >= 0.98


def test_the_similarity_floor_is_that_of_the_strangers_in_the_store() -> None:
    chance = np.random.default_rng(3)
    strangers = chance.normal(0.1, 0.08, 9_000)
    friends = chance.uniform(0.5, 0.9, 1_000)
    floor = similarity_floor([*strangers, *friends])
    assert floor == pytest.approx(float(np.quantile(strangers, 0.99)), abs=0.03)
    assert similarity_floor([]) == SIMILARITY_FLOOR
    assert similarity_floor([0.9] * 1000) == 0.5, "a store about one thing still finds it"
    assert similarity_floor([-0.1] * 1000) == 0.25


def test_the_floor_of_a_small_store_is_the_constant_and_then_follows_the_store(
    tmp_path: Path, log: MemoryLog, embedder: Embedder
) -> None:
    projector = opened(tmp_path, embedder, Told())
    assert projector.floor == SIMILARITY_FLOOR
    strange = np.random.default_rng(1).normal(size=(300, DIMENSION)).astype(np.float32)
    projector._vectors.add(rows(strange / np.linalg.norm(strange, axis=1, keepdims=True), 1_000))
    assert projector.floor == 0.25, "random directions are hardly alike"
    projector.close()


def test_what_is_forgotten_is_in_no_file_and_in_no_value(tmp_path: Path, log: MemoryLog, embedder: Embedder) -> None:
    text = "Compare the zanzibarian ledgers"
    episode = Episode(task_id="secret", task_type="doc", objective=text, succeeded=True, seconds=3.0, at_ms=5)
    log.commit(
        [
            Entry(RecordDecisions(decisions=[decision("s-0", "hidden", "secret"), decision("s-1", "c1", "secret")])),
            Entry(
                RecordOutcomes(outcomes=[outcome("s-0"), outcome("s-1", 0.0)], episode=episode), embedder.embed(text)
            ),
        ]
    )
    projector = opened(tmp_path, embedder, Told())
    assert "secret" in {each.task_id for each in projector.retrieve(Retrieve(text=text, k=16))[0]}
    before = projector.reader.value("role", "doc", "c1")
    assert log.forget(Forget(task_ids=["secret"])) == 5
    assert "secret" not in {each.task_id for each in projector.retrieve(Retrieve(text=text, k=16))[0]}, (
        "also before the rebuild"
    )
    assert projector.reader.value("role", "doc", "hidden") is None
    after = projector.reader.value("role", "doc", "c1")
    assert before is not None
    assert after is not None
    assert after.count == before.count - 1
    assert after.q > before.q, "its failure is forgotten too"
    projector.close()
    assert log.forget(Forget(task_ids=["secret"])) == 0
    fresh = opened(tmp_path, embedder, Told())
    assert fresh.verify() == []
    fresh.close()
    log.close()
    holding = [path.name for path in tmp_path.rglob("*") if path.is_file() and b"zanzibarian" in path.read_bytes()]
    assert holding == []


def test_forgetting_by_age_and_by_choice(tmp_path: Path, log: MemoryLog, embedder: Embedder) -> None:
    projector = opened(tmp_path, embedder, Told())
    counts = projector.reader.counts()
    assert log.forget(Forget(before_ms=7)) == 0, "the youngest row of a task counts: its outcomes are of 7"
    assert log.forget(Forget(choice="c0", subject="persona")) == 0
    removed = log.forget(Forget(choice="c0", subject="role"))
    left = projector.reader.counts()
    assert removed == (counts["decisions"] - left["decisions"]) + (counts["outcomes"] - left["outcomes"]) > 0
    assert left["episodes"] == counts["episodes"]
    assert {value.choice for value in projector.reader.values_of("role")} == {"c1", "c2"}
    log.forget(Forget(before_ms=8))
    assert all(count == 0 for name, count in projector.reader.counts().items() if name != "log_seq")
    projector.close()


def test_verify_names_what_differs_and_a_rebuild_mends_it(tmp_path: Path, log: MemoryLog, embedder: Embedder) -> None:
    projector = opened(tmp_path, embedder, Told())
    assert projector.verify() == []
    graph = graph_of(projector)
    (value,) = find(log._db, "choice_values", "WHERE choice = 'c1'")
    put(log._db, "choice_values", *value[:3], 0.99, *value[4:], verb="INSERT OR REPLACE")
    graph._run("MATCH (:Decision {decision_id: 't2-0'})-[r:OF_CHOICE]->() DELETE r")
    graph._run("MATCH (:Episode {task_id: 't1'})-[r:IN_CLUSTER]->() DELETE r")
    projector._vectors.add(rows(clustered(1), 999))
    told = {(each.part, each.what.split(",")[0].split(":")[0]) for each in projector.verify()}
    assert told == {
        ("values", "role c1 for doc"),
        ("vectors", "row 999 is held"),
        ("graph", "lacks decision t2-0 t2 role doc c2"),
        ("graph", "lacks cluster t1 doc"),
    }
    assert log.replay_values() == 1
    projector._vectors = fresh_vectors(tmp_path)
    projector._graph_thread.submit(projector._keeper.rebuild, "test").result()
    assert projector.verify() == []
    projector.close()


def test_what_cured_similar_failures_is_told_with_how_often_it_helped(
    tmp_path: Path, log: MemoryLog, embedder: Embedder
) -> None:
    cure = Cure(failure_code="gate.lint", finding="undefined name 'os'", action="retry", role="coder")
    other = Cure(failure_code="gate.unit", finding="1 != 2", action="escalate", role="architect")
    for task, text, cures in (
        ("a", "Compare contract one with its draft", [cure, other]),
        ("b", "Compare contract two with its draft", [cure]),
        ("c", "Bake a cake with chocolate", [other, other]),
    ):
        done = outcome(f"{task}-0").model_copy(update={"cures": cures})
        episode = Episode(task_id=task, task_type="doc", objective=text, succeeded=True, seconds=1.0)
        log.commit(
            [
                Entry(RecordDecisions(decisions=[decision(f"{task}-0", task=task)])),
                Entry(RecordOutcomes(outcomes=[done], episode=episode), embedder.embed(text)),
            ]
        )
    projector = opened(tmp_path, embedder, Told())
    _, lessons = projector.retrieve(Retrieve(text="Compare contract nine with its draft", k=8))
    assert lessons == [
        Lesson(failure_code="gate.unit", finding="1 != 2", action="escalate", role="architect", times=3),
        Lesson(failure_code="gate.lint", finding="undefined name 'os'", action="retry", role="coder", times=2),
    ]
    assert projector.verify() == []
    assert projector.retrieve(Retrieve(text="Train timetable for Portugal"))[1] == []
    projector.close()


def test_vectors_of_two_embedders_never_meet_while_they_are_made_anew(
    tmp_path: Path, log: MemoryLog, embedder: Embedder
) -> None:
    before = opened(tmp_path, embedder, Told())
    answers = before.retrieve(QUESTION)
    before.close()
    for row in list(find(log._db, "episodes")):
        put(
            log._db, "episodes", *row[:-1], bytes(1024), verb="INSERT OR REPLACE"
        )  # whatever an older model made of them
    assert log.adopt_embedder("another", embedder.embed) == 4
    projector = opened(tmp_path, embedder, Told())
    assert projector.retrieve(QUESTION)[0] == []
    assert log.reembed_some(embedder.embed, rows=2) == 2
    partly = projector.retrieve(QUESTION)[0]
    assert {each.task_id for each in partly} == {"t0", "t1"}
    assert projector.verify() == []
    assert log.reembed_some(embedder.embed) == 2
    assert log.reembed_some(embedder.embed) == 0
    assert projector.retrieve(QUESTION) == answers
    projector.close()
    told = Told()
    again = opened(tmp_path, embedder, told)
    assert not told.rebuilt, "the finished index was kept"
    assert again.retrieve(QUESTION) == answers
    again.close()
