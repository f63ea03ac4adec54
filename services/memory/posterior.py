"""Bayesian linear regression of rewards: one shared block of weights plus one block per arm, updated row by row.

    reward(x, arm) = prior mean + (w_shared + w_arm) · x + noise          w ~ N(0, prior), noise ~ N(0, NOISE)

What all arms have in common (some tasks are hard for everybody) lands in the shared block, so that what is learned of
one arm does not pass for a difference between arms. x is an intercept, the projected embedding, and an indicator of
the cluster; columns are made when they are first needed, so a posterior is as large as what it has met. Pure:
arithmetic on its arguments. Which arm to take is `routing.py`.

Kalman filter form of the update (Rasmussen & Williams, Gaussian Processes, 2.1): with g = P x and s = NOISE + x·g,
m ← m + g (r - x·m) / s and P ← P - g gᵀ / s. Forgetting is one step of an Ornstein-Uhlenbeck process towards the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

NOISE: Final = 0.2
"""Variance of one reward around its expectation: a Bernoulli variable's is at most 0.25, here about 0.2."""

SHARED: Final = ""
"""Name of the block that all arms share."""


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task lies: the projected embedding (absent: none), and its cluster's name (empty: none)."""

    embedding: Array | None
    cluster: str


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


class Posterior:
    """Mean and covariance of all weights; grows with blocks and clusters."""

    def __init__(self, prior: Prior, embedding_size: int) -> None:
        self.prior = prior
        self._width = 1 + (embedding_size if prior.local else 0)
        self._size = 0
        self._mean = np.zeros(0)
        self._cov = np.zeros((0, 0))
        self._prior_var = np.zeros(0)
        self._blocks: dict[str, int] = {}
        """Block -> its first column: the intercept, then the embedding."""
        self._clusters: dict[tuple[str, str], int] = {}
        """(block, cluster) -> column of the indicator."""

    def view(self, place: Place, arms: Sequence[str]) -> View:
        """What is expected at this place; arms nobody has met have their prior. Changes nothing."""
        blocks = [SHARED, *arms]
        features = np.zeros((len(blocks), self._size))
        for row, block in zip(features, blocks, strict=True):
            self._write_features(row, block, place)
        cov = features @ self._cov[: self._size, : self._size] @ features.T
        mean = features @ self._mean[: self._size]
        prior_var = np.array([self._prior_variance(block, place) for block in blocks])
        unseen = np.array([0.0 if block in self._blocks else 1.0 for block in blocks])
        missing = np.array([self._missing(block, place) for block in blocks])
        first = [self._blocks.get(block, -1) for block in blocks]
        known = np.array([position >= 0 for position in first])
        intercepts = np.where(np.outer(known, known), self._cov[np.ix_(first, first)] if self._size else 0.0, 0.0)
        intercept_prior = np.array([self._scale(block) * self.prior.intercept for block in blocks])
        return View(
            mean,
            cov + np.diag(np.where(unseen > 0, prior_var, missing)),
            prior_var,
            intercepts + np.diag(unseen * intercept_prior),
            intercept_prior,
        )

    def learn(self, place: Place, arm: str, reward: float) -> None:
        """Take one outcome; `reward` is given relative to the prior mean."""
        for block in (SHARED, arm):
            self._admit(block, place)
        features = np.zeros(self._size)
        self._write_features(features, SHARED, place)
        self._write_features(features, arm, place)
        gain = self._cov[: self._size, : self._size] @ features
        spread = NOISE + float(gain @ features)
        surprise = reward - float(self._mean[: self._size] @ features)
        self._mean[: self._size] += gain * (surprise / spread)
        self._cov[: self._size, : self._size] -= np.outer(gain, gain / spread)

    def forget(self, arm: str, keep: float) -> None:
        """Move an arm's block towards its prior: `keep` = 1 changes nothing, 0 is a reset."""
        if arm not in self._blocks:
            return
        own = [column for (block, _), column in self._clusters.items() if block == arm]
        columns = np.array([*range(self._blocks[arm], self._blocks[arm] + self._width), *own])
        self._mean[columns] *= keep
        self._cov[columns, : self._size] *= keep
        self._cov[: self._size, columns] *= keep
        self._cov[columns, columns] += (1 - keep * keep) * self._prior_var[columns]

    def age(self, share: float) -> None:
        """Let the intercepts of all arms drift by this share of their prior variance, at most back to it."""
        for block, column in self._blocks.items():
            if block != SHARED:
                limit = self._prior_var[column]
                self._cov[column, column] = min(
                    max(limit, self._cov[column, column]), self._cov[column, column] + share * limit
                )

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Everything learned: names as JSON, numbers as arrays."""
        clusters = [[block, cluster, column] for (block, cluster), column in self._clusters.items()]
        names = {"blocks": self._blocks, "clusters": clusters}
        size = self._size
        return names, {
            "mean": self._mean[:size],
            "cov": self._cov[:size, :size],
            "prior_var": self._prior_var[:size],
        }

    def restore(self, names: dict[str, Any], arrays: dict[str, Array]) -> None:
        """Reverse of `state`, on an object of the same prior. Raises ValueError where the parts do not fit."""
        size = len(arrays["mean"])
        blocks = {str(name): int(column) for name, column in names["blocks"].items()}
        clusters = {(str(block), str(cluster)): int(column) for block, cluster, column in names["clusters"]}
        fits = arrays["cov"].shape == (size, size) and arrays["prior_var"].shape == (size,)
        if not fits or size != len(blocks) * self._width + len(clusters) or not np.isfinite(arrays["cov"]).all():
            raise ValueError("its arrays do not fit its names")
        self._blocks, self._clusters, self._size = blocks, clusters, size
        self._mean, self._cov, self._prior_var = (arrays[key].copy() for key in ("mean", "cov", "prior_var"))

    def _scale(self, block: str) -> float:
        return self.prior.shared if block == SHARED else 1 - self.prior.shared

    def _write_features(self, row: Array, block: str, place: Place) -> None:
        """Put what this place looks like to a block into its columns; nothing where the block is unknown."""
        first = self._blocks.get(block)
        if first is None:
            return
        row[first] = 1
        if self.prior.local:
            if place.embedding is not None:
                row[first + 1 : first + self._width] = place.embedding
            cluster = self._clusters.get((block, place.cluster))
            if cluster is not None:
                row[cluster] = 1

    def _prior_variance(self, block: str, place: Place) -> float:
        variance = self.prior.intercept
        if self.prior.local:
            variance += self.prior.cluster if place.cluster else 0.0
            if place.embedding is not None:
                variance += self.prior.embedding * float(place.embedding @ place.embedding)
        return variance * self._scale(block)

    def _missing(self, block: str, place: Place) -> float:
        """Prior variance of a cluster that this block has not met."""
        if not self.prior.local or not place.cluster or (block, place.cluster) in self._clusters:
            return 0.0
        return self.prior.cluster * self._scale(block)

    def _admit(self, block: str, place: Place) -> None:
        scale = self._scale(block)
        if block not in self._blocks:
            embedding = [self.prior.embedding] * (self._width - 1)
            self._blocks[block] = self._append([scale * each for each in (self.prior.intercept, *embedding)])
        if self.prior.local and place.cluster and (block, place.cluster) not in self._clusters:
            self._clusters[block, place.cluster] = self._append([scale * self.prior.cluster])

    def _append(self, variances: Sequence[float]) -> int:
        """Make room for weights with these prior variances; returns the first new column."""
        first, size = self._size, self._size + len(variances)
        if size > len(self._mean):
            room = max(size, len(self._mean) * 3 // 2)
            mean, prior_var, cov = np.zeros(room), np.zeros(room), np.zeros((room, room))
            mean[:first], prior_var[:first] = self._mean[:first], self._prior_var[:first]
            cov[:first, :first] = self._cov[:first, :first]
            self._mean, self._prior_var, self._cov = mean, prior_var, cov
        new = np.arange(first, size)
        self._cov[new, new] = self._prior_var[new] = variances
        self._size = size
        return first
