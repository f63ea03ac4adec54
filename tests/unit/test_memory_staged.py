"""The staged reward: its terms, its schedule, and that the log credits it once, also over a kill and an import."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from protocol.messages.memory import (
    Advise,
    DecisionRecord,
    Forget,
    Import,
    MemoryFinal,
    Option,
    Outcome,
    Question,
    RecordDecisions,
    RecordOutcomes,
    Row,
    Spread,
    Staged,
)
from services.memory.advisor import Advisor
from services.memory.embedding import Embedder
from services.memory.log import LOG_FILE, Entry, MemoryLog
from services.memory.log_reader import LogReader
from services.memory.log_restore import open_log
from services.memory.routing import Bandit, Observation
from services.memory.staged import STAGING, Staging, finish_term, parallel_term
from services.memory.telling import tell_nobody

WIDE = Spread(width=4, assigned=4, finished=3, useful=3)
SERIAL = Spread(width=1, assigned=0, finished=0, useful=0)


def decided(
    log: MemoryLog, ident: str, choice: str = "doc.map-join/4", task_type: str = "doc", cluster: str = "map-join/4/0"
) -> None:
    record = DecisionRecord(
        decision_id=ident,
        task_id=f"task-{ident}",
        subject="decomposition",
        choice=choice,
        alternatives=["doc.single/1"],
        propensity=0.5,
        task_type=task_type,
        features={"widest": 4.0, "rules_width": 4.0},
        cluster=cluster,
    )
    (answer,) = log.commit([Entry(RecordDecisions(decisions=[record]))])
    assert answer == MemoryFinal(stored=1)


def outcome(ident: str, reward: float = 1.0, spread: Spread | None = WIDE) -> Outcome:
    return Outcome(decision_id=ident, reward=reward, seconds=2.0, attempts=1, spread=spread, at_ms=7)


def ended(log: MemoryLog, *outcomes: Outcome) -> object:
    return log.commit([Entry(RecordOutcomes(outcomes=list(outcomes)))])[0]


def staged_of(folder: Path, ident: str) -> Staged:
    reader = LogReader(folder)
    (explained,) = reader.explain([ident])
    reader.close()
    assert explained.outcome is not None
    assert explained.outcome.staged is not None
    return explained.outcome.staged


def test_the_reward_is_the_three_terms_of_the_formula() -> None:
    credited = Staging(parallel=0.1, finish=0.1, anneal_over=400).credit(1.0, WIDE, stage=100)
    assert credited.weight == pytest.approx(0.075)
    assert (credited.parallel, credited.finish) == (0.75, 0.75)
    assert credited.shaped == pytest.approx(1.0 + 0.075 * 0.75 + 0.075 * 0.75)


def test_a_task_without_parallel_steps_has_no_parallel_term_and_nothing_unfinished() -> None:
    assert (parallel_term(SERIAL.width), finish_term(SERIAL)) == (0.0, 1.0)


def test_both_weights_fall_from_a_tenth_to_nothing_and_stay_there() -> None:
    over = STAGING.anneal_over
    assert over is not None
    assert [STAGING.weight(stage) for stage in (0, over // 2, over, over * 9)] == pytest.approx([0.1, 0.05, 0.0, 0.0])
    assert Staging(anneal_over=None).weight(10**6) == 0.1


def test_against_one_step_a_split_gains_only_if_more_than_one_of_its_steps_finishes() -> None:
    serial = STAGING.incentive(0, 1, 1.0)
    gains = [STAGING.incentive(0, 4, finished / 4) - serial for finished in range(5)]
    assert gains[0] < 0
    assert gains[1] == pytest.approx(0)
    assert all(gain > 0 for gain in gains[2:])


@pytest.mark.parametrize("fields", [{"assigned": 2}, {"finished": 2}, {"width": 0}])
def test_a_spread_that_contradicts_itself_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Spread.model_validate(WIDE.model_dump() | fields)


def test_the_log_credits_each_decomposition_once_and_counts_stages_per_type_of_task(tmp_path: Path) -> None:
    log = MemoryLog(tmp_path)
    for ident in ("a", "b"):
        decided(log, ident)
    decided(log, "c", task_type="chat")
    ended(log, outcome("a"))
    assert ended(log, outcome("a", reward=0.0), outcome("b", reward=0.0)) == MemoryFinal(stored=1, duplicates=1)
    ended(log, outcome("c"))
    first, second, other = (staged_of(tmp_path, ident) for ident in ("a", "b", "c"))
    assert (first.stage, second.stage, other.stage) == (0, 1, 0)
    assert first.shaped == pytest.approx(1.15)
    assert second.weight == pytest.approx(0.1 * (1 - 1 / 400))
    assert second.shaped == pytest.approx(0.0 + second.weight * 1.5)
    log.close()


def test_the_stage_survives_a_kill_and_a_log_that_is_made_anew(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    log = MemoryLog(first)
    for number in range(5):
        decided(log, f"d{number}")
        ended(log, outcome(f"d{number}"))
    killed = tmp_path / "killed"
    shutil.copytree(first, killed)  # as kill -9 leaves it: nothing was folded or closed
    without = tmp_path / "without"
    shutil.copytree(first, without)
    (without / LOG_FILE).unlink()
    log.close()
    embedder = Embedder()
    for folder in (killed, without):
        restarted = open_log(folder, embedder, tell_nobody)
        decided(restarted, "next")
        ended(restarted, outcome("next"))
        restarted.close()
        assert staged_of(folder, "next").stage == 5


def test_forgetting_rewinds_no_stage(tmp_path: Path) -> None:
    log = MemoryLog(tmp_path)
    for number in range(3):
        decided(log, f"d{number}")
        ended(log, outcome(f"d{number}"))
    log.forget(Forget(task_ids=["task-d0", "task-d1", "task-d2"]))
    decided(log, "next")
    ended(log, outcome("next"))
    assert staged_of(tmp_path, "next").stage == 3
    log.close()


def test_values_are_of_raw_rewards_and_the_staged_one_is_kept_apart(tmp_path: Path) -> None:
    log = MemoryLog(tmp_path)
    decided(log, "a")
    ended(log, outcome("a", reward=1.0))
    reader = LogReader(tmp_path)
    (value,) = reader.values_of("decomposition")
    assert value.q == pytest.approx(0.5 + 0.3 * 0.5)
    ((_, (seen,)),) = reader.observations(0, reader.seq)
    assert (seen.reward, seen.finish, seen.stage) == (1.0, 0.75, 0)
    reader.close()
    log.close()


def test_what_a_sender_claims_is_replaced_and_what_is_imported_is_kept(tmp_path: Path) -> None:
    claim = Staged(stage=399, weight=0.1, parallel=1, finish=1, shaped=2)
    log = MemoryLog(tmp_path)
    for ident in ("sent", "old", "after", "plain"):
        decided(log, ident)
    ended(log, outcome("sent").model_copy(update={"staged": claim}))
    assert staged_of(tmp_path, "sent").stage == 0
    row = Row(seq=9, outcome=outcome("old").model_copy(update={"staged": claim}))
    log.commit([Entry(Import(rows=[row]), imported=(None,))])
    assert staged_of(tmp_path, "old") == claim
    ended(log, outcome("after"))
    assert staged_of(tmp_path, "after").stage == 400, "the log is as far as what it took in"
    ended(log, outcome("plain", spread=None).model_copy(update={"staged": claim}))
    with pytest.raises(AssertionError):
        staged_of(tmp_path, "plain")
    log.close()


# Choosing


def seen(number: int, choice: str, reward: float, finish: float) -> Observation:
    return Observation(
        seq=2 * number + 1,
        decision_seq=2 * number,
        subject="decomposition",
        task_type="doc",
        choice=choice,
        cluster="c",
        vector=None,
        reward=reward,
        seconds=1.0,
        model="",
        prompt="",
        finish=finish,
        stage=number,
    )


def question(width: int | None) -> Question:
    options = [Option(choice="doc.single", width=width and 1), Option(choice="doc.map-join", width=width)]
    return Question(key="width", subject="decomposition", cluster="c", rules_choice="doc.single", options=options)


def test_the_terms_are_added_at_the_weight_of_the_day_and_fade() -> None:
    bandit = Bandit()
    early = bandit.advise(question(4), None, 1).arms
    assert [arm.staged for arm in early] == pytest.approx([0.1, 0.175])
    for number in range(200):
        bandit.learn(seen(number, "doc.map-join", 1.0, finish=0.25))
    half = bandit.advise(question(4), None, 1).arms
    assert half[1].staged == pytest.approx(0.05 * (0.75 + 0.25), abs=0.002), "few of its steps finish, so it gains less"
    for number in range(200, 400):
        bandit.learn(seen(number, "doc.map-join", 1.0, finish=0.25))
    assert [arm.staged for arm in bandit.advise(question(4), None, 1).arms] == [0.0, 0.0]


def test_what_splits_well_in_one_kind_says_nothing_of_another(tmp_path: Path) -> None:
    log = MemoryLog(tmp_path)
    for number in range(40):
        for kind, choice, reward in (
            ("one", "doc.map-join/4", 1.0),
            ("one", "doc.single/1", 0.0),
            ("other", "doc.map-join/4", 0.0),
            ("other", "doc.single/1", 1.0),
        ):
            ident = f"{kind}-{choice}-{number}"
            decided(log, ident, choice, cluster=kind)
            spread = SERIAL if choice == "doc.single/1" else WIDE
            ended(log, outcome(ident, reward, spread))
    advisor = Advisor(tmp_path, Embedder())
    options = [Option(choice="doc.single", width=1), Option(choice="doc.map-join", width=4)]
    for kind, right in (("one", "doc.map-join"), ("other", "doc.single")):
        asked = Question(key="width", subject="decomposition", cluster=kind, rules_choice="doc.single", options=options)
        (advice,) = advisor.advise(Advise(text="write it down", task_type="doc", questions=[asked], seed=1))
        assert advice.learned_choice == right
        assert advisor.bandit("decomposition", "doc", kind).stage == 80
    advisor.close()
    log.close()


def test_questions_without_widths_know_no_stage() -> None:
    arms = Bandit().advise(question(None), None, 1).arms
    assert [arm.staged for arm in arms] == [0.0, 0.0]


def test_an_unfinished_split_is_no_longer_wanted_although_it_is_as_good() -> None:
    def chance_of_splitting(staging: Staging) -> float:
        bandit = Bandit(staging)
        for number in range(200):
            bandit.learn(seen(number, "doc.single", 0.8, finish=1.0))
            bandit.learn(seen(number, "doc.map-join", 0.8, finish=0.1))
        return bandit.advise(question(8), None, 1).arms[1].chance

    unguarded, guarded = (chance_of_splitting(Staging(finish=finish, anneal_over=None)) for finish in (0.0, 0.1))
    assert unguarded > 0.7
    assert guarded < 0.5


def test_a_snapshot_keeps_stage_and_finished_shares() -> None:
    bandit = Bandit()
    for number in range(30):
        bandit.learn(seen(number, "doc.map-join", 1.0, finish=0.5))
    names, arrays = bandit.state()
    other = Bandit()
    other.restore(names, arrays)
    assert other.stage == 30
    assert other.advise(question(4), None, 3) == bandit.advise(question(4), None, 3)
