"""When the engine guesses ahead: every rule of the policy, in virtual time, and what holds for any history."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference import speculation as sp
from services.inference.command_line import Mode
from services.inference.speculation import Answered, SpeculationPolicy

BOTH = (Mode.SPECULATING, Mode.PLAIN)


class Bench:
    """A policy with a clock, and an engine that changes at once when asked."""

    def __init__(self, modes: tuple[Mode, ...] = BOTH, launch_ms: int = 100) -> None:
        self.policy = SpeculationPolicy(modes)
        self.launch_ms = launch_ms
        self.now_ms = 1_000
        self.policy.launched(self.now_ms, self.policy.mode, launch_ms)

    def wait(self, seconds: float) -> None:
        self.now_ms += int(seconds * 1000)

    def answer(self, tokens_per_s: float, *, accepted: float = 0.0, drafts: int = 0, tokens: int = 100) -> None:
        """One answer that has the engine for itself."""
        self.policy.load(self.now_ms, 1)
        self.wait(tokens / tokens_per_s)
        guessing = self.policy.mode is Mode.SPECULATING
        self.policy.load(self.now_ms, 0)
        self.policy.answered(
            Answered(
                mode=self.policy.mode,
                alone=True,
                generated_tokens=tokens,
                generate_ms=tokens * 1000 / tokens_per_s,
                draft_tokens=drafts if guessing else 0,
                accepted_tokens=int(drafts * accepted) if guessing else 0,
            )
        )

    def overlapping(self, accepted: float, drafts: int, tokens: int = 100, answer_s: float = 2.0) -> Mode:
        """One answer beside which another runs for a third of its time. The mode that is wanted at its end."""
        for active, share in ((1, 0.69), (2, 0.31)):
            self.policy.load(self.now_ms, active)
            self.wait(answer_s * share)
            wanted = self.policy.choose(self.now_ms).mode
        drafts = drafts if self.policy.mode is Mode.SPECULATING else 0
        accepted_tokens = int(drafts * accepted)
        self.policy.answered(Answered(self.policy.mode, False, tokens, answer_s * 1000, drafts, accepted_tokens))
        return wanted

    def batch(self, seconds: float, active: int = 4) -> None:
        self.policy.load(self.now_ms, active)
        for _ in range(int(seconds * 10)):
            self.wait(0.1)
            self.policy.choose(self.now_ms)

    def settle(self) -> Mode:
        """Idle for long enough, then change if the policy asks for it."""
        self.policy.load(self.now_ms, 0)
        self.wait(2 * sp.STAY_LAUNCHES * self.launch_ms / 1000 + sp.LEAST_STAY_MS / 1000)
        choice = self.policy.change(self.now_ms)
        if choice is not None:
            self.policy.launched(self.now_ms, choice.mode, self.launch_ms)
        return self.policy.mode


def test_copying_keeps_guessing_and_prose_ends_it() -> None:
    bench = Bench()
    for _ in range(5):
        bench.answer(200, accepted=0.9, drafts=100)
    assert bench.settle() is Mode.SPECULATING
    for _ in range(5):
        bench.answer(50, accepted=0.1, drafts=100)
    assert bench.settle() is Mode.PLAIN
    assert "% of the guesses" in bench.policy.choose(bench.now_ms).reason


def test_a_failed_trial_is_repeated_with_growing_pauses() -> None:
    bench = Bench()
    pauses = []
    for _ in range(4):
        while bench.policy.mode is Mode.SPECULATING:
            bench.answer(50, accepted=0.1, drafts=100)
            bench.settle()
        began = bench.now_ms
        while bench.settle() is Mode.PLAIN:
            bench.answer(70)
        pauses.append(bench.now_ms - began)
    assert pauses[0] >= sp.FIRST_PAUSE_MS * 0.8
    assert all(later > 1.5 * earlier for earlier, later in pairwise(pauses))


def test_guesses_that_are_accepted_but_not_faster_are_found_out() -> None:
    bench = Bench()
    modes = set()
    for _ in range(60):
        guessing = bench.policy.mode is Mode.SPECULATING
        bench.answer(60 if guessing else 70, accepted=0.8, drafts=100)
        modes.add(bench.settle())
        if "times the plain speed" in bench.policy.choose(bench.now_ms).reason:
            break
    assert modes == {Mode.SPECULATING, Mode.PLAIN}, "the plain speed was measured, which takes a plain engine"
    assert bench.policy.choose(bench.now_ms).mode is Mode.PLAIN
    assert "0.86 times" in bench.policy.choose(bench.now_ms).reason


def test_a_batch_is_plain_and_a_single_stream_afterwards_guesses_again() -> None:
    bench = Bench()
    for _ in range(3):
        bench.answer(200, accepted=0.9, drafts=100)
    bench.batch(3)
    assert bench.policy.choose(bench.now_ms).mode is Mode.PLAIN
    assert bench.policy.change(bench.now_ms) is None, "never under running work"
    assert bench.settle() is Mode.PLAIN
    for _ in range(20):
        bench.answer(70)
    assert bench.settle() is Mode.SPECULATING


def test_a_load_between_the_bounds_does_not_toggle() -> None:
    policy = Bench().policy
    now_ms = 10_000
    modes = []
    for active in (2, 1, 2, 1, 1, 2) * 20:
        policy.load(now_ms, active)
        for _ in range(5):
            now_ms += 100
            modes.append(policy.choose(now_ms).mode)
    changes = sum(one is not other for one, other in pairwise(modes))
    assert changes <= 1


def test_bad_guesses_are_found_out_though_no_answer_ever_has_the_engine_for_itself() -> None:
    bench = Bench()
    wanted = [bench.overlapping(0.05, drafts=200) for _ in range(4)]
    assert Mode.PLAIN in wanted, "two answers are a trial"
    assert bench.policy.mode is Mode.SPECULATING, "the engine has no idle moment"
    while bench.now_ms < sp.PATIENCE_MS + 10_000:
        bench.overlapping(0.05, drafts=200)
        bench.policy.hold(bench.now_ms)
    held = bench.policy.hold(bench.now_ms)
    assert held is not None
    assert held.mode is Mode.PLAIN, "so one is made"
    figures = bench.policy.figures(bench.now_ms)
    assert sp.FEW_STREAMS < float(figures["streams"]) < sp.MANY_STREAMS
    assert "5% of the guesses were accepted" in str(figures["mode_reason"])


def test_good_guesses_stay_while_answers_overlap_and_the_reason_says_that_no_speed_is_known() -> None:
    bench = Bench()
    assert {bench.overlapping(0.9, drafts=100) for _ in range(50)} == {Mode.SPECULATING}
    reason = bench.policy.choose(bench.now_ms).reason
    assert "90% of the guesses are accepted" in reason
    assert "overlap" in reason


def test_one_short_answer_is_no_trial() -> None:
    bench = Bench()
    bench.overlapping(0.0, drafts=400, tokens=sp.TRIAL_TOKENS - 1)
    assert bench.policy.choose(bench.now_ms).mode is Mode.SPECULATING


def test_a_busy_engine_is_not_changed_but_held_after_a_while() -> None:
    bench = Bench()
    bench.batch(sp.LEAST_STAY_MS / 1000 + 3)
    assert bench.policy.change(bench.now_ms) is None
    assert bench.policy.hold(bench.now_ms) is None
    bench.batch(sp.PATIENCE_MS / 1000 + 1)
    held = bench.policy.hold(bench.now_ms)
    assert held is not None
    assert held.mode is Mode.PLAIN


def test_an_engine_that_fails_while_guessing_comes_back_plain() -> None:
    bench = Bench()
    bench.policy.failed(bench.now_ms, Mode.SPECULATING, "SIGSEGV")
    choice = bench.policy.choose(bench.now_ms)
    assert choice.mode is Mode.PLAIN
    assert "SIGSEGV" in choice.reason
    bench.wait(sp.FIRST_PAUSE_MS / 1000 + 1)
    assert bench.policy.choose(bench.now_ms).mode is Mode.SPECULATING


@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@pytest.mark.parametrize("modes", [BOTH, (Mode.PLAIN,), (Mode.SPECULATING,)])
def test_the_mode_under_a_load_is_the_one_that_the_policy_ends_in(modes: tuple[Mode, ...], streams: int) -> None:
    bench = Bench(modes)
    bench.batch(60, active=streams)
    assert sp.mode_under(modes, streams) is bench.policy.choose(bench.now_ms).mode


def test_where_the_registry_leaves_no_choice_nothing_changes() -> None:
    for modes in ((Mode.PLAIN,), (Mode.SPECULATING,)):
        bench = Bench(modes)
        bench.batch(100)
        bench.policy.failed(bench.now_ms, modes[0], "died")
        assert bench.policy.choose(bench.now_ms).mode is modes[0]
        assert bench.settle() is modes[0]


HISTORY = st.lists(
    st.tuples(
        st.integers(0, 60_000),
        st.integers(0, 5),
        st.integers(0, 300),
        st.floats(0, 1),
        st.integers(1, 20_000),
        st.booleans(),
    ),
    max_size=60,
)


@given(HISTORY)
def test_no_history_changes_an_engine_at_work_or_too_early(
    history: list[tuple[int, int, int, float, int, bool]],
) -> None:
    policy = SpeculationPolicy(BOTH)
    now_ms, since_ms, active = 0, 0, 0
    policy.launched(0, policy.mode, 200)
    for wait_ms, new_active, tokens, accepted, took_ms, alone in history:
        now_ms += wait_ms
        choice = policy.change(now_ms)
        if choice is not None:
            assert active == 0
            assert choice.mode is not policy.mode
            assert choice.reason
            assert now_ms - since_ms >= sp.LEAST_STAY_MS
            policy.launched(now_ms, choice.mode, 200)
            since_ms = now_ms
        policy.load(now_ms, new_active)
        active = new_active
        drafts = tokens if policy.mode is Mode.SPECULATING else 0
        policy.answered(Answered(policy.mode, alone, tokens, float(took_ms), drafts, int(drafts * accepted)))
        figures = policy.figures(now_ms)
        assert 0 <= float(figures["acceptance"]) <= 1


@given(HISTORY, st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(1, 4)), min_size=25, max_size=25))
def test_bad_guesses_end_speculation_whatever_came_before_and_whatever_the_load_is(
    history: list[tuple[int, int, int, float, int, bool]], bad: list[tuple[int, bool, int]]
) -> None:
    policy = SpeculationPolicy(BOTH)
    now_ms = 0
    for wait_ms, active, tokens, accepted, took_ms, alone in history:
        now_ms += wait_ms
        policy.choose(now_ms)
        policy.load(now_ms, active)
        policy.answered(Answered(Mode.SPECULATING, alone, tokens, float(took_ms), tokens, int(tokens * accepted)))
    policy.choose(now_ms)
    for active, alone, drafts in bad:
        policy.load(now_ms, active)
        policy.answered(Answered(Mode.SPECULATING, alone, 100, 1_000.0, 100 * drafts, 5))
    assert policy.choose(now_ms).mode is Mode.PLAIN
