"""The judge of `divide` that learns: a kernel logistic regression on requests that somebody has labelled.

Its classes are balanced; it looks at the features' form (a Gaussian kernel) and at the words (tf-idf), both from
`request_features`. Pure: training and judging read and write nothing. In a module of its own since it needs NumPy,
without which most planners and commands can start; `labelled` loads it where there are rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from services.kit.threads import one_thread_each
from services.planner.divide import MAX_EVIDENCE, Opinion
from services.planner.request_features import shape_of, words_of

Matrix = npt.NDArray[np.float64]

_FORM_WEIGHT: Final = 3.0
_WORDS_WEIGHT: Final = 2.0
_WIDTH: Final = 0.5
"""Of the Gaussian: `exp(-0.5 |x - y|^2)` on standardised features, each divided by the root of their number."""
_PENALTY: Final = 1.0
_MIN_REQUESTS_OF_A_WORD: Final = 2
_CLIP: Final = 0.8
"""A single odd feature must not push a request away from all others."""
_MAX_NEWTON_STEPS: Final = 25


class TrainedJudge:
    """Learned from labelled requests; nothing of their text is kept but the words that at least two of them share."""

    def __init__(self, requests: Sequence[str], divides: Sequence[bool]) -> None:
        """Train, in this thread alone. Raises ValueError unless there are at least ten requests, with both labels among
        them.
        """
        one_thread_each()
        labels = np.asarray(divides, dtype=np.float64)
        if len(requests) < 10 or len(requests) != len(labels) or not 0 < labels.sum() < len(labels):
            raise ValueError("training needs at least ten requests, and both labels among them")
        forms = np.array([list(shape_of(request).values()) for request in requests])
        self._mean, self._spread = forms.mean(axis=0), forms.std(axis=0) + 1e-6
        bags = [words_of(request) for request in requests]
        self._index, self._rarity = _vocabulary(bags)
        self._words = list(self._index)
        self._forms = self._form(forms)
        words = np.zeros((len(bags), len(self._index)))
        for row, bag in enumerate(bags):
            numbers, values = self._bag(bag)
            words[row, numbers] = values
        kernel = _FORM_WEIGHT * _gaussian(self._forms, self._forms) + _WORDS_WEIGHT * (words @ words.T) + 1.0
        self._alpha = _fitted(kernel, labels)
        self._word_weights: Matrix = _WORDS_WEIGHT * (self._alpha @ words)

    def judge(self, request: str) -> Opinion:
        """See Judge."""
        shape = shape_of(request)
        numbers, values = self._bag(words_of(request))
        form = self._form(np.array([list(shape.values())]))
        by_form = _FORM_WEIGHT * float(_gaussian(form, self._forms)[0] @ self._alpha)
        by_word = values * self._word_weights[numbers]
        odds = by_form + float(by_word.sum()) + float(self._alpha.sum())
        told = [f"form {by_form:+.1f}", f"words {float(by_word.sum()):+.1f}"]
        told += [f"{self._words[numbers[n]]!r} {by_word[n]:+.2f}" for n in np.argsort(-np.abs(by_word))[:MAX_EVIDENCE]]
        return Opinion(1 / (1 + math.exp(-max(-30.0, min(30.0, odds)))), tuple(told), "trained")

    def _form(self, forms: Matrix) -> Matrix:
        scaled: Matrix = (forms - self._mean) / self._spread / math.sqrt(forms.shape[1])
        return np.clip(scaled, -_CLIP, _CLIP)

    def _bag(self, words: Sequence[str]) -> tuple[npt.NDArray[np.int64], Matrix]:
        """tf-idf of one request as a unit vector: the numbers of its known words, and their values."""
        counts = Counter(self._index[word] for word in words if word in self._index)
        numbers = np.fromiter(counts, dtype=np.int64, count=len(counts))
        values: Matrix = np.log1p(np.fromiter(counts.values(), dtype=np.float64, count=len(counts)))
        values = values * self._rarity[numbers]
        norm = float(np.linalg.norm(values))
        return numbers, values / norm if norm else values


def _vocabulary(bags: Sequence[Sequence[str]]) -> tuple[dict[str, int], Matrix]:
    """Word -> number, and by number how rare it is: the smoothed idf of Salton and Buckley (1988)."""
    count: dict[str, int] = {}
    for bag in bags:
        for word in set(bag):
            count[word] = count.get(word, 0) + 1
    kept = sorted(word for word, requests in count.items() if requests >= _MIN_REQUESTS_OF_A_WORD)
    rarity = np.array([math.log((1 + len(bags)) / (1 + count[word])) + 1 for word in kept])
    return {word: number for number, word in enumerate(kept)}, rarity


def _gaussian(one: Matrix, other: Matrix) -> Matrix:
    """Shape (rows of one, rows of other)."""
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    near: Matrix = np.exp(-_WIDTH * np.maximum(squares, 0.0))
    return near


def _fitted(kernel: Matrix, labels: Matrix) -> Matrix:
    """Coefficients per row: Newton's method on the penalised log loss, each class weighing the same in total."""
    rows = len(labels)
    weight = np.where(labels == 1, rows / 2 / labels.sum(), rows / 2 / (rows - labels.sum()))
    alpha = np.zeros(rows)
    for _ in range(_MAX_NEWTON_STEPS):
        odds = kernel @ alpha
        probability = 1 / (1 + np.exp(-np.clip(odds, -30, 30)))
        curvature = np.maximum(weight * probability * (1 - probability), 1e-4)
        target = odds + weight * (labels - probability) / curvature
        new = np.linalg.solve(kernel + _PENALTY * np.diag(1 / curvature), target)
        moved = float(np.abs(new - alpha).max())
        alpha = new
        if moved < 1e-4:
            break
    return alpha
