"""Routing as a projection of the log: advice is the same from a grown state, a snapshot, and a rebuild."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.messages.memory import (
    Advise,
    Advised,
    DecisionRecord,
    Option,
    Outcome,
    Question,
    RecordDecisions,
    RecordOutcomes,
)
from services.memory.advisor import Advisor
from services.memory.embedding import Embedder
from services.memory.log import Entry, MemoryLog
from services.memory.machine import Recovery

TEXTS = ("Parse the dates of this log file", "Translate the menu of the harbour restaurant", "??")
ASK = Advise(
    text="Parse the dates in these lines",
    task_type="code",
    questions=[
        Question(
            key="q",
            subject="role",
            rules_choice="worker",
            options=[Option(choice="worker"), Option(choice="coder")],
        )
    ],
    seed=7,
)


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
def log(tmp_path: Path, embedder: Embedder) -> Iterator[MemoryLog]:
    opened = MemoryLog(tmp_path)
    opened.adopt_embedder(embedder.name, embedder.embed)
    yield opened
    opened.close()


def store(log: MemoryLog, embedder: Embedder, numbers: range) -> None:
    for number in numbers:
        text, choice = TEXTS[number % 3], ("worker", "coder")[number % 2]
        decision = DecisionRecord(
            decision_id=f"d{number}",
            task_id=f"t{number}",
            subject="role",
            choice=choice,
            propensity=0.5,
            task_type="code",
        )
        outcome = Outcome(
            decision_id=f"d{number}", reward=float(choice == "coder"), seconds=1, attempts=1, at_ms=number
        )
        vector = None if text == "??" else embedder.embed(text)
        answers = log.commit(
            [
                Entry(RecordDecisions(decisions=[decision], text=text), vector),
                Entry(RecordOutcomes(outcomes=[outcome])),
            ]
        )
        assert [answer.stored for answer in answers] == [1, 1]  # type: ignore[union-attr]  # a failure would fail here


def advice(folder: Path, embedder: Embedder) -> tuple[list[Advised], Advisor]:
    advisor = Advisor(folder, embedder)
    answer = advisor.advise(ASK)
    return answer, advisor


def test_every_acknowledged_outcome_counts_in_the_next_advice(
    log: MemoryLog, embedder: Embedder, tmp_path: Path
) -> None:
    (before,), advisor = advice(tmp_path, embedder)
    assert (before.learned_choice, before.evidence) == ("worker", 0)
    store(log, embedder, range(40))
    (after,) = advisor.advise(ASK)
    assert (after.learned_choice, after.evidence) == ("coder", 20)
    assert advisor.stats() == {"routing_seq": log.seq, "routing_arms": 2, "routing_alarms": 0}
    advisor.close()


def test_a_snapshot_and_a_rebuild_give_the_advice_of_the_state_that_grew(
    log: MemoryLog, embedder: Embedder, tmp_path: Path
) -> None:
    _, grown = advice(tmp_path, embedder)
    store(log, embedder, range(30))
    grown.advance()
    grown.snapshot()
    store(log, embedder, range(30, 40))
    expected = grown.advise(ASK)
    from_snapshot, advisor = advice(tmp_path, embedder)
    assert (advisor.verdict, from_snapshot) == (Recovery.CATCH_UP, expected)
    for file in tmp_path.glob("routing*"):
        file.unlink()
    rebuilt, advisor = advice(tmp_path, embedder)
    assert (advisor.verdict, rebuilt) == (Recovery.REBUILD, expected)


def test_what_is_longest_unused_makes_room_and_a_rebuild_forgets_the_same(
    log: MemoryLog, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("chat", "doc", "code", "ingest")
    for number in range(40):
        kind, ident = kinds[number // 10], f"r{number}"
        decision = DecisionRecord(
            decision_id=ident,
            task_id=ident,
            subject="role",
            choice=("worker", "coder")[number % 2],
            propensity=0.5,
            task_type=kind,
        )
        outcome = Outcome(decision_id=ident, reward=1.0, seconds=1, attempts=1, at_ms=number)
        entries = [Entry(RecordDecisions(decisions=[decision])), Entry(RecordOutcomes(outcomes=[outcome]))]
        log.commit(entries)
    whole = Advisor(tmp_path, embedder)
    sizes = [whole.bandit("role", kind).nbytes for kind in kinds]
    assert min(sizes) > 0
    monkeypatch.setattr("services.memory.advisor.MAX_BYTES", sum(sizes) * 5 // 8)
    bounded = Advisor(tmp_path, embedder)
    kept = [kind for kind in kinds if bounded.bandit("role", kind).nbytes]
    assert kept == ["code", "ingest"]
    bounded.snapshot()
    assert [kind for kind in kinds if Advisor(tmp_path, embedder).bandit("role", kind).nbytes] == kept


def test_a_flipped_byte_in_the_snapshot_costs_a_rebuild_and_no_answer(
    log: MemoryLog, embedder: Embedder, tmp_path: Path
) -> None:
    store(log, embedder, range(20))
    expected, advisor = advice(tmp_path, embedder)
    advisor.close()
    (snapshot,) = tmp_path.glob("routing-*")
    data = bytearray(snapshot.read_bytes())
    data[len(data) // 2] ^= 1
    snapshot.write_bytes(data)
    answer, advisor = advice(tmp_path, embedder)
    assert (advisor.verdict, answer) == (Recovery.REBUILD, expected)
    assert "altered" in advisor.reason


def test_vectors_of_another_embedding_are_made_anew_and_the_state_with_them(
    log: MemoryLog, embedder: Embedder, tmp_path: Path
) -> None:
    store(log, embedder, range(20))
    expected, advisor = advice(tmp_path, embedder)
    advisor.close()
    log.adopt_embedder("another", lambda text: embedder.embed(text[::-1] + " turned"))
    answer, advisor = advice(tmp_path, embedder)
    assert advisor.verdict is Recovery.REBUILD
    assert "another log" in advisor.reason
    assert answer != expected


def test_what_is_learned_of_a_shape_holds_for_all_its_widths(
    log: MemoryLog, embedder: Embedder, tmp_path: Path
) -> None:
    for width in (2, 3, 5):
        decision = DecisionRecord(
            decision_id=f"w{width}",
            task_id=f"t{width}",
            subject="decomposition",
            choice=f"doc.map-join/{width}",
            propensity=1,
            task_type="doc",
        )
        outcome = Outcome(decision_id=f"w{width}", reward=1, seconds=1, attempts=1, at_ms=1)
        log.commit([Entry(RecordDecisions(decisions=[decision])), Entry(RecordOutcomes(outcomes=[outcome]))])
    _, advisor = advice(tmp_path, embedder)
    assert {name: arm.count for name, arm in advisor.bandit("decomposition", "doc").arms.items()} == {"doc.map-join": 3}


def test_personas_are_valued_role_by_role_and_decisions_without_a_planner_come_with_their_outcomes(
    log: MemoryLog, embedder: Embedder, tmp_path: Path
) -> None:
    roles = ("worker", "writer")
    for number in range(60):
        # More names than one bandit has arms: no role's personas push out another's.
        decision = DecisionRecord(
            decision_id=f"p{number}",
            task_id=f"t{number}",
            subject="persona",
            choice=f"{roles[number % 2]}-{number % 20}",
            propensity=1,
            task_type="doc",
            cluster=roles[number % 2],
            prompt="digest",
        )
        outcome = Outcome(decision_id=f"p{number}", reward=float(number % 4 == 0), seconds=2, attempts=1, at_ms=1)
        (answer,) = log.commit([Entry(RecordOutcomes(decisions=[decision], outcomes=[outcome]))])
        assert answer.stored == 2  # type: ignore[union-attr]  # a failure would fail here
    advisor = Advisor(tmp_path, embedder)
    arms = {(arm.cluster, arm.choice): arm for arm in advisor.arms("persona")}
    assert len(arms) == 20
    assert {cluster for cluster, _ in arms} == set(roles)
    one = arms["worker", "worker-0"]
    assert (one.outcomes, one.mean_reward, one.prompt, one.mean_seconds) == (3, 1.0, "digest", 2.0)
    assert 0 < one.deviation < 0.3
    assert advisor.arms("role") == []
    advisor.close()
    again = Advisor(tmp_path, embedder)
    assert again.verdict is Recovery.KEEP
    assert again.arms("persona") == list(arms.values())
    again.close()
