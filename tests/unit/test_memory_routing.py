"""The routing policy in worlds whose truth is known: it tries, settles, notices changes, survives wrong rewards."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.memory import Advised, Option, Question
from services.memory.embedding import DIMENSION, Vector
from services.memory.routing import (
    CONFIDENCE,
    MAX_ARMS,
    MIN_OUTCOMES,
    Bandit,
    Observation,
    chances_of_best,
)


def direction(seed: int) -> Vector:
    raw = np.random.default_rng(seed).standard_normal(DIMENSION)
    return (raw / np.linalg.norm(raw)).astype(np.float32)


TEXT = direction(0)


def ask(*choices: str, rules: str = "", cluster: str = "k", model: str = "m", prompt: str = "p") -> Question:
    options = [Option(choice=choice, model=model, prompt=prompt) for choice in choices]
    return Question(key="q", subject="role", cluster=cluster, rules_choice=rules or choices[0], options=options)


class World:
    """Draws rewards of true qualities, online: only what was taken is seen."""

    def __init__(self, seed: int, wrong: float = 0.0) -> None:
        self.bandit = Bandit()
        self.wrong = wrong
        self._random = np.random.default_rng(seed)
        self._seq = 0

    def see(self, choice: str, reward: float, model: str = "m", prompt: str = "p", **fields: object) -> None:
        self._seq += 2
        seen = {
            "seq": self._seq + 1,
            "decision_seq": self._seq,
            "subject": "role",
            "task_type": "doc",
            "choice": choice,
            "cluster": "k",
            "vector": TEXT,
            "reward": reward,
            "seconds": 1.0,
            "model": model,
            "prompt": prompt,
            **fields,
        }
        self.bandit.learn(Observation(**seen))  # type: ignore[arg-type]  # the fields are those of an Observation

    def advise(self, question: Question, vector: Vector = TEXT) -> Advised:
        return self.bandit.advise(question, vector, int(self._random.integers(2**62)))

    def live(self, quality: dict[str, float], steps: int, **fields: object) -> list[str]:
        """So many steps; the choices taken."""
        taken = []
        for _ in range(steps):
            choice = self.advise(ask(*quality, **fields)).choice  # type: ignore[arg-type]  # as above
            good = self._random.random() < quality[choice]
            if self._random.random() < self.wrong:
                good = not good
            self.see(choice, float(good), **{key: value for key, value in fields.items() if key != "rules"})  # type: ignore[arg-type]
            taken.append(choice)
        return taken


def share(taken: list[str], choice: str) -> float:
    return taken.count(choice) / len(taken)


def test_without_outcomes_the_rules_are_favoured_and_every_other_arm_has_a_chance() -> None:
    advised = Bandit().advise(ask("a", "b", "c", rules="b"), TEXT, 1)
    chances = {arm.choice: arm.chance for arm in advised.arms}
    assert chances["b"] == max(chances.values())
    assert min(chances.values()) > 0.1
    assert math.isclose(sum(chances.values()), 1)
    assert (advised.learned_choice, advised.evidence) == ("b", 0)


@pytest.mark.parametrize("seed", range(3))
def test_it_settles_on_the_better_arm_against_the_rules(seed: int) -> None:
    world = World(seed)
    taken = world.live({"worker": 0.3, "coder": 0.9}, 100)
    assert share(taken[-40:], "coder") > 0.85
    advised = world.advise(ask("worker", "coder"))
    assert advised.learned_choice == "coder"
    assert advised.confidence > CONFIDENCE
    assert advised.evidence >= MIN_OUTCOMES


def test_a_first_arm_that_does_well_does_not_lock_the_others_out() -> None:
    """A greedy rule stays for ever with an arm of mean 0.7, once the other has failed its first try."""
    found = 0
    for seed in range(6):
        world = World(seed)
        world.see("good", 1.0)
        world.see("better", 0.0)
        found += share(world.live({"good": 0.65, "better": 0.9}, 250)[-50:], "better") > 0.6
    assert found >= 5


def test_a_new_arm_gets_tried_after_hundreds_of_outcomes_of_the_others() -> None:
    world = World(1)
    world.live({"a": 0.6, "b": 0.4}, 200)
    taken = world.live({"a": 0.6, "b": 0.4, "new": 0.95}, 120)
    assert "new" in taken[:40]
    assert share(taken[-40:], "new") > 0.7


def test_another_model_behind_an_arm_forgets_it_and_another_prompt_forgets_half() -> None:
    world = World(2)
    for _ in range(40):
        world.see("a", 0.0)
        world.see("b", 1.0)

    def outcomes(**version: str) -> float:
        return world.advise(ask("a", "b", **version)).arms[0].outcomes

    assert outcomes() == 40
    assert outcomes(prompt="p2") == pytest.approx(10)
    assert outcomes(model="m2") == 0
    fresh = world.advise(ask("a", "b", model="m2")).arms[0]
    assert fresh.chance > world.advise(ask("a", "b")).arms[0].chance
    world.see("a", 1.0, model="m2")
    assert world.bandit.arms["a"].count == 1


def test_a_late_outcome_of_the_old_model_is_left_out() -> None:
    world = World(3)
    world.see("a", 0.0)
    world.see("a", 1.0, model="m2")
    world.see("a", 0.0, decision_seq=1)
    arm = world.bandit.arms["a"]
    assert (arm.model, arm.count) == ("m2", 1)


@pytest.mark.parametrize("wrong", [0.05, 0.2])
def test_wrong_rewards_do_not_sink_it(wrong: float) -> None:
    shares = [share(World(seed, wrong).live({"a": 0.35, "b": 0.85}, 200)[-80:], "b") for seed in range(3)]
    assert min(shares) > 0.75


@pytest.mark.parametrize("seed", range(4))
def test_memories_that_all_contradict_the_truth_are_outlived(seed: int) -> None:
    world = World(seed, wrong=1.0)
    world.live({"a": 0.35, "b": 0.85}, 40)  # the first tenth of all outcomes, every one of them reversed
    world.wrong = 0.0
    assert share(world.live({"a": 0.35, "b": 0.85}, 360)[-60:], "b") > 0.9


@pytest.mark.parametrize("poisoned", [0.05, 0.2])
def test_an_arm_that_is_praised_falsely_does_not_win(poisoned: float) -> None:
    shares = []
    for seed in range(4):
        world, chance = World(seed), np.random.default_rng(seed + 100)
        taken = []
        for _ in range(240):
            taken += world.live({"a": 0.35, "b": 0.85}, 1)
            if chance.random() < poisoned:  # whatever became of it, somebody says it was good
                world.see("a", 1.0)
        shares.append(share(taken[-80:], "b"))
    assert min(shares) > 0.6
    assert sum(shares) / len(shares) > 0.75


def test_it_recovers_when_the_qualities_change_places() -> None:
    shares, alarms = [], 0
    for seed in range(4):
        world = World(seed)
        world.live({"a": 0.85, "b": 0.4}, 300)
        shares.append(share(world.live({"a": 0.4, "b": 0.85}, 200)[-80:], "b"))
        alarms += world.bandit.arms["a"].alarms
    assert sum(shares) / len(shares) > 0.8
    assert alarms >= 3


def test_an_arm_that_stays_as_it_is_raises_no_alarm() -> None:
    world = World(5)
    world.live({"a": 0.7, "b": 0.5}, 600)
    assert sum(arm.alarms for arm in world.bandit.arms.values()) == 0


def test_where_each_arm_is_better_at_something_both_are_taken_where_they_are() -> None:
    world = World(6)
    for _ in range(60):
        for cluster, good in (("code", "coder"), ("facts", "worker")):
            for choice in ("coder", "worker"):
                world.see(choice, float(choice == good), cluster=cluster, vector=None)
    for cluster, good in (("code", "coder"), ("facts", "worker")):
        advised = world.bandit.advise(ask("coder", "worker", cluster=cluster), None, 1)
        assert advised.learned_choice == good
        assert advised.arms[0].similar_outcomes == 60


def test_without_cluster_names_the_texts_themselves_tell_tasks_apart() -> None:
    world = World(7)
    one, two = direction(1), direction(2)
    for _ in range(60):
        for vector, good in ((one, "coder"), (two, "worker")):
            for choice in ("coder", "worker"):
                world.see(choice, float(choice == good), cluster="", vector=vector)
    question = ask("coder", "worker", cluster="")
    assert world.bandit.advise(question, one, 1).learned_choice == "coder"
    assert world.bandit.advise(question, two, 1).learned_choice == "worker"
    assert world.bandit.cluster_of("", one) != world.bandit.cluster_of("", two)


def test_a_slower_or_dearer_arm_must_be_better_by_its_price() -> None:
    world = World(8)
    for number in range(60):
        world.see("fast", float(number % 2), seconds=1.0)
        world.see("slow", float(number % 2), seconds=64.0)
    slow, fast = (world.advise(ask("slow", "fast", rules="slow")).arms[at] for at in (0, 1))
    assert fast.value - slow.value > 0.05
    assert slow.seconds == pytest.approx(64)
    dear = ask("slow", "fast").model_copy(update={"options": [Option(choice="slow", cost=0.9), Option(choice="fast")]})
    assert world.bandit.advise(dear, TEXT, 1).choice == "fast"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.floats(0, 1),
            st.sampled_from(["", "k", "l"]),
            st.sampled_from(["m", "m2"]),
            st.booleans(),
        ),
        max_size=60,
    ),
    st.integers(0, 2**62),
)
def test_any_outcomes_give_sound_advice_the_same_from_a_replay_and_from_a_snapshot(
    outcomes: list[tuple[str, float, str, str, bool]], seed: int
) -> None:
    def told() -> Bandit:
        world = World(0)
        for number, (choice, reward, cluster, model, embedded) in enumerate(outcomes):
            vector = direction(number % 5) if embedded else None
            world.see(choice, reward, model=model, cluster=cluster, vector=vector)
        return world.bandit

    first = told()
    question = ask("b", "a", "c", "d")
    advised = first.advise(question, TEXT, seed)
    assert 0 < advised.propensity <= 1
    assert math.isclose(sum(arm.chance for arm in advised.arms), 1, abs_tol=1e-9)
    assert all(math.isfinite(arm.value) and math.isfinite(arm.deviation) for arm in advised.arms)
    assert advised.won != "learned" or (advised.confidence >= CONFIDENCE and advised.evidence >= MIN_OUTCOMES)
    assert told().advise(question, TEXT, seed) == advised
    names, arrays = first.state()
    restored = Bandit()
    restored.restore(json.loads(json.dumps(names)), arrays)
    assert restored.advise(question, TEXT, seed) == advised


def test_arms_are_bounded_and_the_longest_unused_one_goes() -> None:
    world = World(9)
    for number in range(MAX_ARMS + 3):
        world.see(f"arm{number}", 1.0)
    assert len(world.bandit.arms) == MAX_ARMS
    assert "arm2" not in world.bandit.arms


def test_chances_of_three_agree_with_those_of_two() -> None:
    cov = np.diag([0.04, 0.04, 0.0001])
    two = chances_of_best(np.array([0.6, 0.5]), cov[:2, :2], np.random.default_rng(1))
    three = chances_of_best(np.array([0.6, 0.5, -9.0]), cov, np.random.default_rng(1))
    assert two.sum() == pytest.approx(1)
    assert three[:2] == pytest.approx(two, abs=0.06)
    assert three[2] == 0
