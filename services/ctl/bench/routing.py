"""`tierline bench routing FILE`: does the memory's routing learn which of two models to take?

Every row of the file is a prompt with what a weak and a strong model made of it. For each seed the rows are shuffled
and replayed online through the memory service's own log and advisor: ask for advice, write decision and outcome into
the SQLite log, learn from the log; only the outcome of the arm taken is ever seen. The reward is 1 for a correct
answer, less the penalty where the strong model gave it.

`rules` always take the strong model, as the planner's table names the best role first. `greedy` takes the arm of the
higher plain mean so far. `recovery_steps` comes from a second replay in which both columns change places half-way:
steps until the mean over the last 100 steps of (reward - reward of the arm that is best from then on, same rows) is
above -0.02; the median over the seeds, a replay that never recovers counting with all its steps.

APGR is offline: the policy is given both labels of one half of the rows and ranks the other half by expected gain; the
share of the accuracy gap won back, averaged over all shares of strong calls, both halves in turn (random is 0.5).
Intervals are Student's 95 % over the seeds. Seeds are replayed side by side, a process for each core.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from protocol.messages.memory import Advise, DecisionRecord, Option, Outcome, Question, RecordDecisions, RecordOutcomes
from services.ctl.bench.outcome_file import RecordedOutcome, read_outcomes
from services.ctl.commands import Commands, Context
from services.ctl.outcomes import BadInput, ExitCode
from services.kit.children import die_with_parent
from services.memory.advisor import Advisor
from services.memory.embedding import Embedder, Unembeddable, Vector
from services.memory.log import Entry, MemoryLog
from services.memory.routing import Bandit, Observation

Array = npt.NDArray[np.float64]

ARMS: Final = ("weak", "strong")
RULES: Final = 1
_SUBJECT: Final = "role"
_TASK_TYPE: Final = "chat"
_MIN_ROWS: Final = 20
_MAX_SEEDS: Final = 1_000
_WINDOW: Final = 100
_MARGIN: Final = 0.02
_TENTHS: Final = 10
_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108  only for a private folder made there
#: Student's t for 95 % by degrees of freedom, from 1; beyond the table it is 2.0 to one decimal.
_T95: Final = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11)


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows in the order of one replay."""

    order: npt.NDArray[np.int64]
    correct: Array
    """(rows, 2) in that order: what weak and strong are worth there."""
    net: Array
    """The same less the penalty."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What one replay came to."""

    taken: npt.NDArray[np.int64]
    """Arm of each step."""
    reward: Array
    explored: float
    """Share of steps that were exploration."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the replays of all seeds have in common."""

    rows: Sequence[RecordedOutcome]
    vectors: Sequence[Vector | None]
    penalty: float


@dataclass(frozen=True, slots=True)
class OfSeed:
    """What one seed came to."""

    plain: Replay
    after_swap: tuple[float, float]
    """Mean reward after the swap, and that of the arm that is best then."""
    recovered: int | None
    apgr: float | None


_HERE: tuple[Job, Embedder] | None = None


def add(commands: Commands) -> None:
    """Add `bench routing`."""
    parser = commands.add(
        "routing", _run, "replay recorded outcomes of two models through the memory's learned routing"
    )
    parser.add_argument("file", type=Path, help="JSON lines: prompt, weak_correct, strong_correct, maybe domain")
    parser.add_argument("--penalty", type=float, default=0.10, help="price of the strong model (default 0.10)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="shuffled replays (default 5)")


def _run(arguments: Namespace, context: Context) -> ExitCode:
    if not 0 <= arguments.penalty <= 1:
        raise BadInput(f"--penalty {arguments.penalty:g}: expected 0 to 1")
    if not 1 <= arguments.seeds <= _MAX_SEEDS:
        raise BadInput(f"--seeds {arguments.seeds}: expected 1 to {_MAX_SEEDS}")
    rows = read_outcomes(arguments.file)
    if len(rows) < _MIN_ROWS:
        raise BadInput(f"{arguments.file}: {len(rows)} rows, at least {_MIN_ROWS} are needed")
    figures = measure(rows, arguments.penalty, arguments.seeds)
    if context.screen.json:
        context.screen.document(figures)
    else:
        context.screen.table(("figure", "value"), [(name, str(value)) for name, value in figures.items()])
    return ExitCode.OK


def measure(rows: Sequence[RecordedOutcome], penalty: float, seeds: int) -> dict[str, Any]:
    """All figures over so many shuffled replays; see the module's docstring for what they mean."""
    embedder = Embedder()
    job = Job(rows, [_vector(embedder, row.prompt) for row in rows], penalty)
    half = len(rows) // 2
    workers = min(seeds, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_take_job, initargs=(job,)) as pool:
        try:
            found = list(pool.map(_of_seed, range(seeds)))
        except BaseException:  # told to end: leaving the pool would wait for replays that nobody will read
            for child in active_children():
                child.terminate()
            raise
    streams = [_stream(rows, penalty, seed, swap=False) for seed in range(seeds)]
    plain = [each.plain for each in found]
    greedy = [float(_greedy(stream.net).mean()) for stream in streams]
    swapped = [each.after_swap for each in found]
    recovered = [each.recovered for each in found]
    ranked = [each.apgr for each in found]
    net = streams[0].net
    rewards = [float(replay.reward.mean()) for replay in plain]
    second = [float(replay.reward[half:].mean()) for replay in plain]
    second_fixed = [float(stream.net[half:].mean(axis=0).max()) for stream in streams]
    gains = [mine - fixed for mine, fixed in zip(second, second_fixed, strict=True)]
    known = [value for value in ranked if value is not None]
    return {
        "rows": len(rows),
        "seeds": seeds,
        "penalty": penalty,
        "mean_reward": _rounded(np.mean(rewards)),
        "ci95": _interval(rewards),
        "best_fixed": _rounded(net.mean(axis=0).max()),
        "second_half": _rounded(np.mean(second)),
        "second_half_best_fixed": _rounded(np.mean(second_fixed)),
        "second_half_gain": _rounded(np.mean(gains)),
        "second_half_gain_ci95": _interval(gains),
        "greedy": _rounded(np.mean(greedy)),
        "rules": _rounded(net[:, RULES].mean()),
        "oracle": _rounded(net.max(axis=1).mean()),
        "curve": _curve([replay.reward for replay in plain]),
        "exploration_share": _rounded(np.mean([replay.explored for replay in plain])),
        "strong_share": _rounded(np.mean([replay.taken.mean() for replay in plain])),
        "recovery_steps": float(np.median([len(rows) - half if step is None else step for step in recovered])),
        "recovered": sum(step is not None for step in recovered),
        "after_swap": _rounded(np.mean([mine for mine, _ in swapped])),
        "after_swap_best_fixed": _rounded(np.mean([fixed for _, fixed in swapped])),
        "apgr": _rounded(np.mean(known)) if known else None,
        "apgr_ci95": _interval(known) if known else None,
    }


def _vector(embedder: Embedder, prompt: str) -> Vector | None:
    try:
        return embedder.embed(prompt)
    except Unembeddable:
        return None


def _stream(rows: Sequence[RecordedOutcome], penalty: float, seed: int, *, swap: bool) -> Stream:
    order = np.random.default_rng(seed).permutation(len(rows))
    correct = np.array([[rows[at].weak_correct, rows[at].strong_correct] for at in order], dtype=np.float64)
    if swap:
        half = len(rows) // 2
        correct[half:] = correct[half:, ::-1].copy()
    return Stream(order, correct, correct - np.array([0.0, penalty]))


def _take_job(job: Job) -> None:
    """What all replays of this process are about, and the embedder, which cannot be sent."""
    global _HERE  # a process of a pool has no other place for what its tasks share
    die_with_parent(signal.SIGKILL)
    _HERE = job, Embedder()


def _of_seed(seed: int) -> OfSeed:
    """Both replays and the ranking of one seed, in a process of the pool."""
    if _HERE is None:
        raise RuntimeError("this process was given no rows")
    job, embedder = _HERE
    half = len(job.rows) // 2
    turned = _stream(job.rows, job.penalty, seed, swap=True)
    plain, after = _replay(job, _stream(job.rows, job.penalty, seed, swap=False), turned, seed, embedder)
    return OfSeed(
        plain=plain,
        after_swap=(float(after.mean()), float(turned.net[half:].mean(axis=0).max())),
        recovered=_recovery_steps(after, turned.net[half:]),
        apgr=_apgr(job.rows, job.vectors, seed),
    )


def _replay(job: Job, stream: Stream, turned: Stream, seed: int, embedder: Embedder) -> tuple[Replay, Array]:
    """The stream as it is, and the rewards of the second half where both columns change places there.

    Both replays have the first half in common: at its end the memory is closed, copied, and each copy goes on.
    """
    half = len(job.rows) // 2
    with tempfile.TemporaryDirectory(prefix="tierline-bench-", dir=_swift_folder()) as folder:
        straight, swapped = Path(folder) / "straight", Path(folder) / "swapped"
        straight.mkdir()
        before = _steps(job, stream, range(half), straight, seed, embedder)
        shutil.copytree(straight, swapped)
        after = _steps(job, stream, range(half, len(job.rows)), straight, seed, embedder)
        other = _steps(job, turned, range(half, len(job.rows)), swapped, seed, embedder)
    taken = np.concatenate([before.taken, after.taken])
    explored = (before.explored * half + after.explored * (len(job.rows) - half)) / len(job.rows)
    return Replay(taken, np.concatenate([before.reward, after.reward]), explored), other.reward


def _swift_folder() -> str | None:
    """A file system in memory where there is one: waiting for a disk after every row changes no figure."""
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None


def _steps(job: Job, stream: Stream, steps: range, folder: Path, seed: int, embedder: Embedder) -> Replay:
    """Row by row through the log and the advisor of the memory service."""
    options = [Option(choice=ARMS[0]), Option(choice=ARMS[1], cost=job.penalty)]
    taken = np.zeros(len(steps), dtype=np.int64)
    explored = 0
    log = MemoryLog(folder)
    log.adopt_embedder(embedder.name, embedder.embed)
    advisor = Advisor(folder, embedder)
    for number, step in enumerate(steps):
        row, vector = job.rows[stream.order[step]], job.vectors[stream.order[step]]
        question = Question(key="q", subject=_SUBJECT, cluster=row.domain, rules_choice=ARMS[RULES], options=options)
        ask = Advise(text=row.prompt, task_type=_TASK_TYPE, questions=[question], seed=seed * len(job.rows) + step)
        (advised,) = advisor.advise(ask, vector)
        taken[number] = ARMS.index(advised.choice)
        explored += advised.won == "exploration"
        decision = DecisionRecord(
            decision_id=f"d{step}",
            task_id=f"t{step}",
            subject=_SUBJECT,
            choice=advised.choice,
            alternatives=[arm for arm in ARMS if arm != advised.choice],
            propensity=advised.propensity,
            task_type=_TASK_TYPE,
            cluster=row.domain,
        )
        outcome = Outcome(
            decision_id=f"d{step}",
            reward=float(stream.correct[step, taken[number]]),
            seconds=0,
            attempts=1,
            at_ms=step,
        )
        log.commit(
            [
                Entry(RecordDecisions(decisions=[decision], text=row.prompt), vector),
                Entry(RecordOutcomes(outcomes=[outcome])),
            ]
        )
    advisor.close()
    log.close()
    return Replay(taken, stream.net[np.arange(steps.start, steps.stop), taken], explored / len(steps))


def _greedy(net: Array) -> Array:
    """Rewards of the arm whose plain mean is highest so far; an arm nobody has tried counts as 0.5."""
    total, count = np.zeros(2), np.zeros(2)
    rewards = np.zeros(len(net))
    for step, values in enumerate(net):
        means = np.where(count > 0, total / np.maximum(count, 1), 0.5)
        arm = RULES if means[0] == means[1] else int(np.argmax(means))
        rewards[step] = values[arm]
        total[arm] += values[arm]
        count[arm] += 1
    return rewards


def _recovery_steps(rewards: Array, net: Array) -> int | None:
    """Steps after the swap until the window's mean lag behind the arm that is best now is small; None if it stays."""
    lag = rewards - net[:, int(np.argmax(net.mean(axis=0)))]
    window = min(_WINDOW, len(lag))
    moving = np.convolve(lag, np.ones(window) / window, "valid")
    above = np.flatnonzero(moving >= -_MARGIN)
    return int(above[0]) + window if len(above) else None


def _apgr(rows: Sequence[RecordedOutcome], vectors: Sequence[Vector | None], seed: int) -> float | None:
    """Mean over both directions of a random split; None where the models do not differ."""
    order = np.random.default_rng(seed).permutation(len(rows))
    first, second = order[: len(rows) // 2], order[len(rows) // 2 :]
    found = [_apgr_of(rows, vectors, *pair) for pair in ((first, second), (second, first))]
    return None if None in found else float(np.mean([value for value in found if value is not None]))


def _apgr_of(
    rows: Sequence[RecordedOutcome],
    vectors: Sequence[Vector | None],
    train: npt.NDArray[np.int64],
    test: npt.NDArray[np.int64],
) -> float | None:
    bandit = Bandit()
    for number, at in enumerate(train):
        row = rows[at]
        for arm, correct in zip(ARMS, (row.weak_correct, row.strong_correct), strict=True):
            bandit.learn(
                Observation(
                    seq=number + 1,
                    decision_seq=number,
                    subject=_SUBJECT,
                    task_type=_TASK_TYPE,
                    choice=arm,
                    cluster=row.domain,
                    vector=vectors[at],
                    reward=float(correct),
                    seconds=0.0,
                    model="",
                    prompt="",
                )
            )
    expected = [bandit.expected(ARMS, rows[at].domain, vectors[at]) for at in test]
    ranking = np.argsort([weak - strong for weak, strong in expected], kind="stable")
    correct = np.array([[rows[at].weak_correct, rows[at].strong_correct] for at in test], dtype=np.float64)[ranking]
    gap = float(correct[:, 1].sum() - correct[:, 0].sum())
    if gap <= 0:
        return None
    won = np.concatenate([[0.0], np.cumsum(correct[:, 1] - correct[:, 0])]) / gap
    return float((won[1:] + won[:-1]).mean() / 2)


def _curve(rewards: Sequence[Array]) -> list[float]:
    """Mean reward per tenth of the stream."""
    tenths = [np.array_split(each, _TENTHS) for each in rewards]
    return [_rounded(np.mean([parts[tenth].mean() for parts in tenths])) for tenth in range(_TENTHS)]


def _interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of the mean; None from a single value."""
    if len(values) < 2:
        return None
    t = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else 2.0
    half = t * float(np.std(values, ddof=1)) / len(values) ** 0.5
    middle = float(np.mean(values))
    return [_rounded(middle - half), _rounded(middle + half)]


def _rounded(value: Any, digits: int = 4) -> float:
    return round(float(value), digits)
