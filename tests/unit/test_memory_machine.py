"""The pure part of memory: values stay probabilities, ranking keeps its invariants, projections are judged by rule."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.memory.machine import (
    LEARNING_RATE,
    Z_LIMIT,
    Candidate,
    Found,
    Recovery,
    RetrievalPolicy,
    episode_value,
    first_of_each,
    lineage_digest,
    ranked,
    recovery,
    scored,
    unseen,
    z_scores,
)

REWARDS = st.lists(st.floats(0, 1), max_size=200)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        task_id=st.text("abc", min_size=1, max_size=4),
        similarity=st.floats(-1, 1),
        q=st.floats(0, 1),
    ),
    max_size=24,
    unique_by=lambda each: each.task_id,
)


@given(REWARDS)
def test_q_stays_a_probability_whatever_the_rewards(rewards: list[float]) -> None:
    value = unseen("role", "doc", "worker")
    for reward in rewards:
        value = scored(value, reward, 1.0)
        assert 0 <= value.q <= 1
    assert value.count == len(rewards)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=100))
def test_mean_seconds_is_the_mean_of_all_outcomes(seconds: list[float]) -> None:
    value = unseen("role", "doc", "worker")
    for each in seconds:
        value = scored(value, 1.0, each)
    assert value.mean_seconds == pytest.approx(math.fsum(seconds) / len(seconds), rel=1e-9, abs=1e-6)


def test_the_first_outcome_starts_from_the_prior_of_one_half() -> None:
    assert scored(unseen("role", "doc", "worker"), 1.0, 4.0).q == 0.5 + LEARNING_RATE * 0.5
    assert scored(unseen("role", "doc", "worker"), 0.0, 4.0).q == 0.5 - LEARNING_RATE * 0.5


@given(st.lists(st.sampled_from("abcdefgh")), st.sets(st.sampled_from("abcdefgh")))
def test_each_id_has_an_effect_once_however_often_it_comes(ids: list[str], known: set[str]) -> None:
    effective = [ids[position] for position in first_of_each(ids, known)]
    assert len(effective) == len(set(effective))
    assert set(effective) == set(ids) - known


@given(st.lists(st.sampled_from("abcdefgh")), st.randoms())
def test_the_same_ids_have_an_effect_in_any_order(ids: list[str], chance) -> None:
    shuffled = list(ids)
    chance.shuffle(shuffled)
    assert {ids[p] for p in first_of_each(ids, set())} == {shuffled[p] for p in first_of_each(shuffled, set())}


@given(st.lists(st.floats(-1, 1), max_size=40))
def test_z_scores_are_finite_clamped_and_keep_the_order(values: list[float]) -> None:
    scores = z_scores(values)
    assert len(scores) == len(values)
    assert all(math.isfinite(score) and abs(score) <= Z_LIMIT for score in scores)
    for (a, za), (b, zb) in zip(
        zip(values, scores, strict=True), zip(values[1:], scores[1:], strict=True), strict=False
    ):
        assert za <= zb if a < b else za >= zb


def test_values_without_spread_have_no_z_score() -> None:
    assert z_scores([0.7, 0.7, 0.7]) == [0.0, 0.0, 0.0]
    assert z_scores([]) == []


def test_one_outlier_is_clamped() -> None:
    assert max(z_scores([0.0] * 50 + [1.0])) == Z_LIMIT


@given(CANDIDATES, st.integers(1, 16), st.randoms())
def test_ranking_does_not_depend_on_the_order_of_the_candidates(pool: list[Candidate], k: int, chance) -> None:
    shuffled = list(pool)
    chance.shuffle(shuffled)
    best = ranked(pool, k, RetrievalPolicy())
    assert best == ranked(shuffled, k, RetrievalPolicy())
    assert len(best) == min(k, len(pool))
    assert len({each.task_id for each in best}) == len(best)


@given(CANDIDATES)
def test_no_candidate_is_ranked_below_one_that_is_worse_in_both(pool: list[Candidate]) -> None:
    order = ranked(pool, len(pool), RetrievalPolicy())
    for earlier, later in itertools.pairwise(order):
        assert not (later.similarity > earlier.similarity + 1e-6 and later.q > earlier.q + 1e-6)


@given(CANDIDATES)
def test_the_weight_goes_from_similarity_alone_to_value_alone(pool: list[Candidate]) -> None:
    near = ranked(pool, len(pool), RetrievalPolicy(q_weight=0.0))
    assert z_scores([each.similarity for each in near]) == sorted(
        z_scores([each.similarity for each in near]), reverse=True
    )
    good = ranked(pool, len(pool), RetrievalPolicy(q_weight=1.0))
    assert z_scores([each.q for each in good]) == sorted(z_scores([each.q for each in good]), reverse=True)


def test_what_worked_overtakes_what_is_only_a_little_nearer() -> None:
    nearer = Candidate("failed", 0.80, 0.1)
    better = Candidate("worked", 0.78, 0.9)
    far = Candidate("far", 0.40, 0.5)
    assert [each.task_id for each in ranked([nearer, better, far], 2, RetrievalPolicy())] == ["worked", "failed"]


def test_an_episode_without_scored_decisions_is_one_outcome_on_the_prior() -> None:
    assert episode_value([], succeeded=True) == pytest.approx(0.65)
    assert episode_value([], succeeded=False) == pytest.approx(0.35)
    assert episode_value([0.2, 0.6], succeeded=False) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (None, Recovery.REBUILD),
        (Found("other", 5), Recovery.REBUILD),
        (Found("log", 11), Recovery.REBUILD),
        (Found("log", 4), Recovery.CATCH_UP),
        (Found("log", 10), Recovery.KEEP),
    ],
    ids=["missing", "of another log", "ahead", "behind", "in step"],
)
def test_a_projection_is_kept_only_when_nothing_speaks_against_it(found: Found | None, verdict: Recovery) -> None:
    assert recovery(found, "log", 10)[0] is verdict


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(0, 9)), max_size=20), st.randoms())
def test_the_digest_knows_rows_not_their_order(rows: list[tuple[str, int]], chance) -> None:
    shuffled = list(rows)
    chance.shuffle(shuffled)
    assert lineage_digest(rows) == lineage_digest(shuffled)
    assert lineage_digest(rows) != lineage_digest([*rows, ("one more", 1)])
