"""Bayesian linear regression of rewards: one shared block of weights plus one block per arm, updated row by row.

    reward(x, arm) = prior mean + (w_shared + w_arm) · x + noise          w ~ N(0, prior), noise ~ N(0, NOISE)

What all arms have in common (some tasks are hard for everybody) lands in the shared block, so that what is learned of
one arm does not pass for a difference between arms. x is an intercept, the projected embedding, and an indicator of
the cluster; columns are made when they are first needed, so a posterior is as large as what it has met. Pure:
arithmetic on its arguments. Which arm to take is `routing.py`.

Kalman filter form of the update (Rasmussen & Williams, Gaussian Processes, 2.1): with g = P x and s = NOISE + x·g,
m ← m + g (r - x·m) / s and P ← P - g gᵀ / s. Forgetting is one step of an Ornstein-Uhlenbeck process towards the prior.

P has a few megabytes, and going through it for every outcome would cost more than all the rest. So the last rows
g / √s are kept beside it and subtracted `PENDING` at a time: P = base - Σ gᵢ gᵢᵀ / sᵢ. Which rows are pending is part
of the state, so that one read back from a snapshot rounds as the one that went on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NOISE: Final = 0.2
"""Variance of one reward around its expectation: a Bernoulli variable's is at most 0.25, here about 0.2."""

PENDING: Final = 32
"""Updates that are subtracted from the covariance together: one pass over it in place of so many."""
_ROWS_AT_ONCE: Final = 64
"""Of the covariance in such a pass, so that what is subtracted stays in the cache."""
_MORE_COLUMNS: Final = 128
"""Room made at a time: growing by a share of the size would leave half of a large covariance unused."""

SHARED: Final = ""
"""Name of the block that all arms share."""


STATE_ARRAYS: Final = ("mean", "base", "pending", "prior_var")
"""Names of what `Posterior.state` returns."""


@dataclass(frozen=True, slots=True)
class Prior:
    """Variances of the weights before any outcome, and what part of each the arms have in common."""

    intercept: float
    cluster: float
    embedding: float
    """Of each projected dimension; 0 together with `cluster` makes a posterior that only knows arms."""
    shared: float
    """In [0, 1): correlation between the rewards of two arms at the same place."""

    @property
    def local(self) -> bool:
        """Whether it tells one task from another."""
        return self.cluster > 0 or self.embedding > 0


_ONE: Final[Array] = np.ones(1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task lies: what every block sees there, and its cluster's name (empty: none)."""

    features: Array
    """One for the intercept, then the projected embedding where there is one."""
    cluster: str

    @classmethod
    def of(cls, embedding: Array | None, cluster: str) -> Place:
        """`embedding` is the projected one; None where the text has none."""
        return cls(_ONE if embedding is None else np.concatenate((_ONE, embedding)), cluster)


@dataclass(frozen=True, slots=True)
class View:
    """What a posterior says at one place: contributions of blocks, the shared one first, then the arms as asked for."""

    mean: Array
    """(1 + arms,)"""
    cov: Array
    """(1 + arms, 1 + arms)"""
    prior_var: Array
    """(1 + arms,): variance of each contribution before any outcome."""
    intercept_cov: Array
    """(1 + arms, 1 + arms): the part of `cov` that all places share."""
    intercept_prior: Array
    """(1 + arms,)"""


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where one block's features of a place lie among the weights."""

    first: int
    """The intercept's column."""
    stop: int
    """One behind the last column of the dense part: the intercept, and the embedding where the place has one."""
    cluster: int | None


class Posterior:
    """Mean and covariance of all weights; grows with blocks and clusters."""

    def __init__(self, prior: Prior, embedding_size: int, ageing: float) -> None:
        """With every outcome the intercepts of all arms drift by this share of their prior variance, at most back to
        it; what the pending ones have earned them is added when those are subtracted."""
        self.prior = prior
        self._ageing = ageing
        self._local = prior.local
        self._width = 1 + (embedding_size if prior.local else 0)
        self._of_arms = np.zeros(0, dtype=np.intp)
        """Columns of the arms' intercepts."""
        self._size = 0
        self._mean = np.zeros(0)
        self._base = np.zeros((0, 0))
        """The covariance before the pending updates."""
        self._pending = np.zeros((PENDING, 0))
        self._held = 0
        """Rows of `_pending` that are in use."""
        self._prior_var = np.zeros(0)
        self._blocks: dict[str, int] = {}
        """Block -> its first column: the intercept, then the embedding."""
        self._clusters: dict[tuple[str, str], int] = {}
        """(block, cluster) -> column of the indicator."""

    @property
    def nbytes(self) -> int:
        """Memory that the numbers need; follows from what was learned alone, not from the room made for more."""
        return 8 * self._size * (self._size + PENDING + 2)

    def view(self, place: Place, arms: Sequence[str]) -> View:
        """What is expected at this place; arms nobody has met have their prior. Changes nothing."""
        blocks = [SHARED, *arms]
        scale = np.full(len(blocks), 1 - self.prior.shared)
        scale[0] = self.prior.shared
        prior_var = scale * self._prior_variance(place)
        intercept_prior = scale * self.prior.intercept
        seats = [self._columns(block, place) for block in blocks]
        known = [(row, seat) for row, seat in enumerate(seats) if seat is not None]
        mean, cov = np.zeros(len(blocks)), np.diag(prior_var)
        intercepts = np.diag(intercept_prior)
        if known:
            rows = np.array([row for row, _ in known])
            square = np.ix_(rows, rows)
            mean[rows], cov[square] = self._contributions([seat for _, seat in known], self._dense(place))
            first = np.array([seat.first for _, seat in known])
            held = self._pending[: self._held, first]
            intercepts[square] = self._base[first[:, np.newaxis], first] - held.T @ held
            cov[rows, rows] += [self._missing(blocks[row], place) for row, _ in known]
        return View(mean, cov, prior_var, intercepts, intercept_prior)

    def learn(self, place: Place, arm: str, reward: float) -> tuple[float, float]:
        """Take one outcome; `reward` is given relative to the prior mean. Returns what was expected before, and with
        which variance of the expectation."""
        for block in (SHARED, arm):
            self._admit(block, place)
        size, dense = self._size, self._dense(place)
        gain = np.zeros(size)
        projected = np.zeros(self._held)
        held = self._pending[: self._held, :size]
        seats = [seat for block in (SHARED, arm) if (seat := self._columns(block, place)) is not None]
        for seat in seats:
            gain += dense @ self._base[seat.first : seat.stop, :size]
            projected += held[:, seat.first : seat.stop] @ dense
            if seat.cluster is not None:
                gain += self._base[seat.cluster, :size]
                projected += held[:, seat.cluster]
        gain -= projected @ held
        expected = sum(self._dot(self._mean, seat, dense) for seat in seats)
        variance = sum(self._dot(gain, seat, dense) for seat in seats)
        spread = NOISE + variance
        self._mean[:size] += gain * ((reward - expected) / spread)
        self._pending[self._held, :size] = gain / math.sqrt(spread)
        self._held += 1
        if self._held == PENDING:
            self._subtract_pending()
        return expected, variance

    def forget(self, arm: str, keep: float) -> None:
        """Move an arm's block towards its prior: `keep` = 1 changes nothing, 0 is a reset."""
        if arm not in self._blocks:
            return
        self._subtract_pending()
        own = [column for (block, _), column in self._clusters.items() if block == arm]
        columns = np.array([*range(self._blocks[arm], self._blocks[arm] + self._width), *own])
        self._mean[columns] *= keep
        self._base[columns, : self._size] *= keep
        self._base[: self._size, columns] *= keep
        self._base[columns, columns] += (1 - keep * keep) * self._prior_var[columns]

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Everything learned: names as JSON, numbers as arrays."""
        clusters = [[block, cluster, column] for (block, cluster), column in self._clusters.items()]
        names = {"blocks": self._blocks, "clusters": clusters}
        size = self._size
        return names, {
            "mean": self._mean[:size],
            "base": self._base[:size, :size],
            "pending": self._pending[: self._held, :size],
            "prior_var": self._prior_var[:size],
        }

    def restore(self, names: dict[str, Any], arrays: dict[str, Array]) -> None:
        """Reverse of `state`, on an object of the same prior. Raises ValueError where the parts do not fit."""
        size, held = len(arrays["mean"]), len(arrays["pending"])
        blocks = {str(name): int(column) for name, column in names["blocks"].items()}
        clusters = {(str(block), str(cluster)): int(column) for block, cluster, column in names["clusters"]}
        shapes = {"base": (size, size), "prior_var": (size,), "pending": (held, size)}
        fits = held < PENDING and all(arrays[name].shape == shape for name, shape in shapes.items())
        if not fits or size != len(blocks) * self._width + len(clusters):
            raise ValueError("its arrays do not fit its names")
        if not all(np.isfinite(arrays[name]).all() for name in STATE_ARRAYS):
            raise ValueError("its numbers are not finite")
        self._blocks, self._clusters, self._size, self._held = blocks, clusters, size, held
        self._of_arms = self._intercepts()
        self._mean, self._base, self._prior_var = (arrays[key].copy() for key in ("mean", "base", "prior_var"))
        self._pending = np.zeros((PENDING, size))
        self._pending[:held] = arrays["pending"]

    def _intercepts(self) -> npt.NDArray[np.intp]:
        return np.array([column for block, column in self._blocks.items() if block != SHARED], dtype=np.intp)

    def _scale(self, block: str) -> float:
        return self.prior.shared if block == SHARED else 1 - self.prior.shared

    def _dense(self, place: Place) -> Array:
        """The features that every block sees at a place."""
        return place.features if self._local else _ONE

    def _columns(self, block: str, place: Place) -> _Columns | None:
        """None where the block is unknown."""
        first = self._blocks.get(block)
        if first is None:
            return None
        width = min(self._width, len(place.features))
        return _Columns(first, first + width, self._clusters.get((block, place.cluster)))

    @staticmethod
    def _dot(weights: Array, seat: _Columns, dense: Array) -> float:
        value = float(weights[seat.first : seat.stop] @ dense)
        return value if seat.cluster is None else value + float(weights[seat.cluster])

    def _contributions(self, seats: Sequence[_Columns], dense: Array) -> tuple[Array, Array]:
        """Mean and covariance of what these blocks contribute at a place: (seats,) and (seats, seats).

        The covariance of all weights is symmetric: of each block's rows only what lies behind its own first column is
        read, and the other triangle is a copy.
        """
        size, count = self._size, len(seats)
        features, across = np.zeros((count, size)), np.zeros((count, size))
        for row, seat in enumerate(seats):
            features[row, seat.first : seat.stop] = dense
            np.matmul(dense, self._base[seat.first : seat.stop, seat.first : size], out=across[row, seat.first :])
        half = across @ features.T
        first = np.array([seat.first for seat in seats])
        cov = np.where(first[:, np.newaxis] <= first, half, half.T)
        with_cluster = [(row, seat.cluster) for row, seat in enumerate(seats) if seat.cluster is not None]
        if with_cluster:
            rows, columns = (np.array(each) for each in zip(*with_cluster, strict=True))
            lines = self._base[columns, :size]
            beside = lines @ features.T
            cov[rows, :] += beside
            cov[:, rows] += beside.T
            cov[np.ix_(rows, rows)] += lines[:, columns]
            features[rows, columns] = 1
        updates = self._pending[: self._held, :size] @ features.T
        return features @ self._mean[:size], cov - updates.T @ updates

    def _prior_variance(self, place: Place) -> float:
        """Of a block that has all of it to itself."""
        variance = self.prior.intercept
        if self._local:
            variance += self.prior.cluster if place.cluster else 0.0
            variance += self.prior.embedding * (float(place.features @ place.features) - 1)
        return variance

    def _missing(self, block: str, place: Place) -> float:
        """Prior variance of a cluster that this block has not met."""
        if not self._local or not place.cluster or (block, place.cluster) in self._clusters:
            return 0.0
        return self.prior.cluster * self._scale(block)

    def _subtract_pending(self) -> None:
        held = self._pending[: self._held, : self._size]
        for start in range(0, self._size, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, self._size))
            self._base[rows, : self._size] -= held[:, rows].T @ held
        columns = self._of_arms
        limit = self._prior_var[columns]
        drift = np.maximum(limit - self._base[columns, columns], 0.0)
        self._base[columns, columns] += np.minimum(drift, self._ageing * self._held * limit)
        self._pending[: self._held] = 0
        self._held = 0

    def _admit(self, block: str, place: Place) -> None:
        scale = self._scale(block)
        if block not in self._blocks:
            embedding = [self.prior.embedding] * (self._width - 1)
            self._blocks[block] = self._append([scale * each for each in (self.prior.intercept, *embedding)])
            self._of_arms = self._intercepts()
        if self._local and place.cluster and (block, place.cluster) not in self._clusters:
            self._clusters[block, place.cluster] = self._append([scale * self.prior.cluster])

    def _append(self, variances: Sequence[float]) -> int:
        """Make room for weights with these prior variances; returns the first new column."""
        first, size = self._size, self._size + len(variances)
        if size > len(self._mean):
            more = len(variances) if self._width == 1 else _MORE_COLUMNS
            room = max(size, len(self._mean) + more)
            mean, prior_var, base = np.zeros(room), np.zeros(room), np.zeros((room, room))
            pending = np.zeros((PENDING, room))
            mean[:first], prior_var[:first] = self._mean[:first], self._prior_var[:first]
            base[:first, :first] = self._base[:first, :first]
            pending[:, :first] = self._pending[:, :first]
            self._mean, self._prior_var, self._base, self._pending = mean, prior_var, base, pending
        new = np.arange(first, size)
        self._base[new, new] = self._prior_var[new] = variances
        self._size = size
        return first
