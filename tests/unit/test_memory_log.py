"""The log on a real file: exactly once under duplicates and reordering, whole entries or none, refusals by name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.failure import Category, Failure
from protocol.messages.memory import (
    DecisionRecord,
    Episode,
    MemoryFinal,
    Outcome,
    RecordDecisions,
    RecordOutcomes,
)
from services.memory.embedding import DIMENSION, Vector
from services.memory.log import LOG_FILE, Entry, MemoryLog
from services.memory.log_reader import EpisodeAdded, LogReader
from services.memory.log_rows import LogDamaged

IDS = [f"d{number}" for number in range(8)]


def decision(ident: str, choice: str = "worker", task: str = "t1") -> DecisionRecord:
    return DecisionRecord(
        decision_id=ident,
        task_id=task,
        subject="role",
        choice=choice,
        alternatives=["coder"],
        propensity=0.5,
        task_type="doc",
        features={"length": 3.0},
    )


def outcome(ident: str, reward: float = 1.0, code: str | None = None) -> Outcome:
    return Outcome(decision_id=ident, reward=reward, seconds=2.0, attempts=1, failure_code=code, at_ms=7)


def episode(task: str) -> Episode:
    return Episode(task_id=task, task_type="doc", objective="Compare two files", succeeded=True, seconds=3.0)


def unit_vector(position: int = 0) -> Vector:
    vector = np.zeros(DIMENSION, np.float32)
    vector[position] = 1.0
    return vector


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def log(folder: Path) -> Iterator[MemoryLog]:
    opened = MemoryLog(folder)
    yield opened
    opened.close()


def only(log: MemoryLog, request: RecordDecisions | RecordOutcomes, vector: Vector | None = None) -> object:
    return log.commit([Entry(request, vector)])[0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from(IDS), max_size=6), max_size=8))
def test_each_outcome_counts_once_however_the_batches_repeat_and_reorder_them(batches: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        log = MemoryLog(Path(name))
        only(log, RecordDecisions(decisions=[decision(ident) for ident in IDS]))
        answers = log.commit([Entry(RecordOutcomes(outcomes=[outcome(ident) for ident in b])) for b in batches])
        sent = {ident for batch in batches for ident in batch}
        finals = [answer for answer in answers if isinstance(answer, MemoryFinal)]
        assert len(finals) == len(batches)
        assert sum(final.stored for final in finals) == len(sent)
        assert sum(final.stored + final.duplicates for final in finals) == sum(map(len, batches))
        reader = LogReader(Path(name))
        counts = reader.counts()
        assert counts["outcomes"] == len(sent)
        assert counts["log_seq"] == len(IDS) + len(sent)
        value = reader.explain([IDS[0]])[0].values
        assert [each.count for each in value] == ([len(sent)] if sent else [])
        reader.close()
        log.close()


def test_a_decision_known_already_is_left_as_it_is(log: MemoryLog, folder: Path) -> None:
    assert only(log, RecordDecisions(decisions=[decision("d1")])) == MemoryFinal(stored=1)
    again = only(log, RecordDecisions(decisions=[decision("d1", choice="coder"), decision("d2")]))
    assert again == MemoryFinal(stored=1, duplicates=1)
    assert LogReader(folder).explain(["d1"])[0].decision == decision("d1")


def test_an_unknown_decision_is_refused_by_name_and_leaves_nothing_behind(log: MemoryLog, folder: Path) -> None:
    only(log, RecordDecisions(decisions=[decision("d1"), decision("d2")]))
    before = log.seq
    good = Entry(RecordOutcomes(outcomes=[outcome("d2")]))
    bad = Entry(
        RecordOutcomes(outcomes=[outcome("d1"), outcome("never-decided")], episode=episode("t1")), unit_vector()
    )
    refused, stored = log.commit([bad, good])
    assert isinstance(refused, Failure)
    assert (refused.code, refused.category) == ("memory.unknown_decision", Category.POLICY)
    assert "never-decided" in refused.message
    assert refused.evidence == {"decision_ids": ["never-decided"]}
    assert stored == MemoryFinal(stored=1)
    counts = LogReader(folder).counts()
    assert (counts["outcomes"], counts["episodes"], counts["log_seq"]) == (1, 0, before + 1)
    assert log.seq == before + 1


def test_an_episode_is_stored_once_per_task(log: MemoryLog, folder: Path) -> None:
    assert only(log, RecordOutcomes(episode=episode("t1")), unit_vector()) == MemoryFinal(stored=1)
    assert only(log, RecordOutcomes(episode=episode("t1")), unit_vector(3)) == MemoryFinal(duplicates=1)
    assert LogReader(folder).counts()["episodes"] == 1


def test_the_value_of_an_episode_is_that_of_the_choices_made_in_it(log: MemoryLog, folder: Path) -> None:
    only(log, RecordDecisions(decisions=[decision("d1"), decision("d2", "coder"), decision("d3", "unscored")]))
    only(log, RecordDecisions(decisions=[decision("other", "elsewhere", task="t2")]))
    only(
        log,
        RecordOutcomes(outcomes=[outcome("d1", 1.0), outcome("d2", 0.0), outcome("other", 0.0)], episode=episode("t1")),
        unit_vector(),
    )
    reader = LogReader(folder)
    past = reader.past(log.seq)
    assert past is not None
    assert [name for *_, name in past.choices] == ["worker", "coder", "unscored"]
    assert [name for *_, name in past.scored] == ["worker", "coder"]
    assert [reader.q_of(choice) for choice in past.scored] == pytest.approx([0.65, 0.35])


def test_changes_come_in_order_and_cover_every_row(log: MemoryLog, folder: Path) -> None:
    only(log, RecordDecisions(decisions=[decision("d1"), decision("d2")]))
    only(
        log,
        RecordOutcomes(outcomes=[outcome("d1", 0.0, "gate.unit"), outcome("d2")], episode=episode("t1")),
        unit_vector(),
    )
    reader = LogReader(folder)
    ((last, changes),) = reader.changes(0, reader.seq)
    assert last == 5
    assert [(type(change).__name__, change.seq) for change in changes] == [
        ("DecisionAdded", 1),
        ("DecisionAdded", 2),
        ("Scored", 3),
        ("ChoiceFailed", 3),
        ("Scored", 4),
        ("EpisodeAdded", 5),
    ]
    assert list(reader.changes(5, 5)) == []


def test_a_new_embedder_gets_all_vectors_anew_and_another_identity_of_the_log(log: MemoryLog, folder: Path) -> None:
    assert log.adopt_embedder("first", lambda text: unit_vector(1)) == 0
    for task in range(3):
        only(log, RecordOutcomes(episode=episode(f"t{task}")), unit_vector(0))
    identity = log.log_id
    assert log.adopt_embedder("first", lambda text: unit_vector(1)) == 0
    assert log.log_id == identity
    assert log.adopt_embedder("second", lambda text: unit_vector(1)) == 3
    assert log.log_id != identity
    only(log, RecordOutcomes(episode=episode("later")), unit_vector(2))  # new ones are not made twice
    reader = LogReader(folder)

    def vectors() -> list[int | None]:
        ((_, changes),) = reader.changes(0, reader.seq, reader.stale)
        found = [change.vector for change in changes if isinstance(change, EpisodeAdded)]
        return [None if vector is None else int(np.argmax(vector)) for vector in found]

    assert vectors() == [None, None, None, 2]
    assert log.reembed_some(lambda text: unit_vector(1), rows=2) == 2
    assert vectors() == [1, 1, None, 2]
    assert log.adopt_embedder("second", lambda text: unit_vector(1)) == 1, "as after a restart in the middle"
    assert log.reembed_some(lambda text: unit_vector(1), rows=2) == 1
    assert vectors() == [1, 1, 1, 2]
    assert log.reembed_some(lambda text: unit_vector(1)) == 0


def test_a_damaged_log_is_refused_with_what_to_do(folder: Path) -> None:
    (folder / LOG_FILE).write_bytes(b"this is not a database" * 400)
    with pytest.raises(LogDamaged, match="restore the file from a backup"):
        MemoryLog(folder)
