"""The projector on real files: whatever happens to a projection while it is used or while the service is away."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from protocol.messages.memory import Episode, RecordDecisions, RecordOutcomes, Retrieve
from services.kit.logs import LogEvent
from services.memory import graph
from services.memory.embedding import Embedder
from services.memory.graph import LineageGraph
from services.memory.judging import PROJECTION_REBUILT
from services.memory.log import LOG_FILE, Entry, MemoryLog
from services.memory.log_reader import LogReader
from services.memory.machine import lineage_digest
from services.memory.projector import Projector
from tests.unit.test_memory_log import decision, outcome

QUESTION = Retrieve(text="Compare two contracts", k=4)


class Told:
    """The lines that the projector has written."""

    def __init__(self) -> None:
        self.rebuilt: Counter[str] = Counter()

    def __call__(self, event: LogEvent, **fields: object) -> None:
        assert set(fields) <= set(event.fields.split())
        if event is PROJECTION_REBUILT:
            self.rebuilt[str(fields["projection"])] += 1


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
def log(tmp_path: Path, embedder: Embedder) -> Iterator[MemoryLog]:
    log = MemoryLog(tmp_path)
    log.adopt_embedder(embedder.name, embedder.embed)
    for task in range(4):
        teach(log, embedder, task)
    yield log
    log.close()


def teach(log: MemoryLog, embedder: Embedder, task: int) -> None:
    name = f"t{task}"
    objective = f"Compare contract number {task} with the one before"
    choices = [decision(f"{name}-{step}", choice=f"c{(task + step) % 3}", task=name) for step in range(2)]
    scores = [outcome(f"{name}-0", 0.0, f"gate.{task % 2}"), outcome(f"{name}-1")]
    episode = Episode(task_id=name, task_type="doc", objective=objective, succeeded=True, seconds=3.0)
    log.commit(
        [
            Entry(RecordDecisions(decisions=choices)),
            Entry(RecordOutcomes(outcomes=scores, episode=episode), embedder.embed(objective)),
        ]
    )


def opened(folder: Path, embedder: Embedder, told: Told) -> Projector:
    projector = Projector(folder, embedder, told)
    try:
        vouched, doubt = graph.vouched(folder), None
    except FileNotFoundError:
        vouched, doubt = None, "there is no graph"
    projector.start(vouched, None, doubt)
    return projector


def graph_of(projector: Projector) -> LineageGraph:
    found = projector._keeper._graph
    assert found is not None
    return found


def test_a_graph_that_fails_while_it_is_used_is_rebuilt_and_answers_the_same(
    tmp_path: Path, log: MemoryLog, embedder: Embedder
) -> None:
    told = Told()
    projector = opened(tmp_path, embedder, told)
    before = projector.retrieve(QUESTION)[0]
    assert len(before) == 4
    told.rebuilt.clear()
    projector._begin_counting()  # what was asked once is not asked again
    graph_of(projector).abandon()  # from now on every statement raises, as after a failed write
    assert projector.retrieve(QUESTION)[0] == before
    assert told.rebuilt == {"graph": 1}
    graph_of(projector).abandon()
    teach(log, embedder, 9)
    projector.advance()
    assert told.rebuilt == {"graph": 2}
    assert projector.graph_seq == projector.vectors_seq == log.seq
    projector.close()


def test_the_graph_says_what_the_log_says(tmp_path: Path, log: MemoryLog, embedder: Embedder) -> None:
    projector = opened(tmp_path, embedder, Told())
    reader = LogReader(tmp_path)
    assert lineage_digest(graph_of(projector).lineage()) == lineage_digest(reader.lineage(reader.seq))
    (first, *_) = [each for each in projector.retrieve(QUESTION)[0] if each.task_id == "t0"]
    # t0 chose c0 and c1; c0 has failed with gate.0 (t0) and gate.1 (t3), c1 with gate.1 (t1).
    assert first.failure_codes == ["gate.1", "gate.0"]
    reader.close()
    projector.close()


def test_projections_behind_the_log_catch_up_and_those_ahead_of_it_are_rebuilt(
    tmp_path: Path, log: MemoryLog, embedder: Embedder
) -> None:
    first = opened(tmp_path, embedder, Told())
    first.close()
    backup = tmp_path / "backup"
    backup.mkdir()
    log.close()
    shutil.copy(tmp_path / LOG_FILE, backup)

    later = MemoryLog(tmp_path)
    teach(later, embedder, 7)
    told = Told()
    caught_up = opened(tmp_path, embedder, told)
    assert not told.rebuilt
    assert caught_up.graph_seq == caught_up.vectors_seq == later.seq
    caught_up.close()
    later.close()

    shutil.copy(backup / LOG_FILE, tmp_path)  # an operator restored yesterday's log
    restored = opened(tmp_path, embedder, told)
    assert told.rebuilt == {"vectors": 1, "graph": 1}
    assert {each.task_id for each in restored.retrieve(QUESTION)[0]} == {"t0", "t1", "t2", "t3"}
    restored.close()


def test_what_the_graph_has_not_taken_in_yet_counts_and_counts_once(
    tmp_path: Path, log: MemoryLog, embedder: Embedder
) -> None:
    """Rows that came before and after the first question, before and after the graph took them in, and both at once."""
    projector = opened(tmp_path, embedder, Told())
    for task in range(4, 12):
        teach(log, embedder, task)
        if task == 7:
            projector.advance()
        if task == 9:
            projector.follow()
            projector.advance_graph().result()
        asked = projector.retrieve(QUESTION)
        fresh = opened_copy(tmp_path, embedder)
        assert asked == fresh.retrieve(QUESTION), f"after t{task}"
        fresh.close()
    assert projector.graph_seq < projector.vectors_seq == log.seq, "the graph was not waited for"
    projector.advance()
    assert projector.verify() == []
    projector.close()


def opened_copy(folder: Path, embedder: Embedder) -> Projector:
    """A projector that has all of the log in its graph."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    with closing(sqlite3.connect(folder / LOG_FILE)) as source, closing(sqlite3.connect(copy / LOG_FILE)) as target:
        source.backup(target)
    return opened(copy, embedder, Told())
