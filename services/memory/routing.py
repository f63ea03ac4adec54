"""Which choice to take: what the rules say, what outcomes have taught, and how much is worth trying (pure).

One `Bandit` per (subject, task type) holds what is known of its arms, the choices. Two posteriors share the work: a
*plain* one that only compares arms, and a *local* one that also knows clusters and the text's embedding; each counts as
much as it has predicted well (Bayesian model averaging), so a stream without structure is not chased for any.

Choosing is Thompson sampling: an arm is taken with the probability that it is the best, where the uncertainty is that
of the arms as a whole plus a small part of that of the place. Sampling each place's full uncertainty would go on
exploring in every corner far longer than its outcomes can repay. A greedy rule would lock onto the first arm that does
well.

A question about a decomposition says how wide its options are; then the terms of the staged reward (`staged.py`) are
added to what is compared, at the weight of the day. Values and posteriors hold raw rewards only.

Change: each arm keeps a CUSUM of how much better its recent deviation would have predicted it than its posterior did;
past `ALARM` most of its evidence is forgotten. A new model forgets all of it, a new prompt three quarters.

No clock, no randomness: a `seed` comes with each question, and the same outcomes in the same order give the same state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np

from protocol.messages.memory import Advised, ArmValue, ArmView, Option, Question
from services.kit.expectation import expected
from services.memory.embedding import DIMENSION, Vector
from services.memory.posterior import NOISE, STATE_ARRAYS, Array, Place, Posterior, Prior
from services.memory.staged import STAGING, Staging

PRIOR_MEAN: Final = 0.5
"""Expected reward of an arm that nobody has tried."""
PLAIN: Final = Prior(intercept=0.06, cluster=0.0, embedding=0.0, shared=0.7)
LOCAL: Final = Prior(intercept=0.06, cluster=0.04, embedding=0.04, shared=0.7)
PROJECTED: Final = 64
"""Dimensions that the embedding is projected to, at random but always the same (Johnson-Lindenstrauss)."""

RULES_BONUS: Final = 0.08
"""Head start of the rules' choice; fades as outcomes take the place of the prior."""
CONFIDENCE: Final = 0.6
"""With at least this probability of being better the learned choice replaces the rules'."""
MIN_OUTCOMES: Final = 5.0
"""So many outcomes of an arm must be remembered before it can replace the rules' choice."""
BOLDNESS: Final = 0.7
"""Share of the arms' own standard deviation that is sampled."""
LOCAL_BOLDNESS: Final = 0.2
"""Share of the whole standard deviation at a place that is sampled on top."""
SECONDS_WEIGHT: Final = 0.02
"""What a choice that takes twice as long as the fastest must make up for in reward."""
_DRAWS: Final = 512
_NEVER: Final = (0.0, 0.0)

ALARM: Final = 5.0
"""An arm has changed when its recent deviation predicts e^5 times better than its posterior (log-likelihood ratio)."""
RECENT: Final = 0.98
"""Weight of an outcome after one more of the same arm, in the recent deviation: a window of 50."""
KEPT_AFTER_ALARM: Final = 0.2
KEPT_AFTER_PROMPT: Final = 0.5
AGEING: Final = 2e-5
"""Share of its prior variance that each outcome adds to what is unknown of an arm, so that a bad one is tried again."""

MAX_ARMS: Final = 16
MAX_CLUSTERS: Final = 64
MAX_FOUND_CLUSTERS: Final = 32
FOUND_CLUSTER_FLOOR: Final = 0.45
"""Cosine to a centroid from which a text without a cluster's name belongs to it."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One scored decision, as the log has it."""

    seq: int
    """Of the outcome."""
    decision_seq: int
    subject: str
    task_type: str
    choice: str
    cluster: str
    vector: Vector | None
    reward: float
    seconds: float
    model: str
    prompt: str
    finish: float | None = None
    """Share of its assigned steps that finished; only of a decomposition whose staged reward was credited."""
    stage: int = 0
    """How many were credited before it."""


@dataclass(slots=True)
class Arm:
    """What is kept of one choice beside the posteriors."""

    model: str
    prompt: str
    since_seq: int
    """Outcomes of decisions before this belong to another model or prompt."""
    count: float = 0.0
    """Outcomes remembered, less what was forgotten."""
    seconds: float = 0.0
    """Mean of the recent ones."""
    last_seq: int = 0
    deviation: float = 0.0
    weight: float = 0.0
    cusum: float = 0.0
    alarms: int = 0
    in_cluster: dict[str, list[float]] = field(default_factory=dict)
    """Cluster -> outcomes and sum of their rewards since the last reset."""
    finished: dict[str, list[float]] = field(default_factory=dict)
    """Cluster -> decompositions and sum of the shares of their steps that finished."""

    def expected_finish(self, cluster: str) -> float:
        """Share of the steps that will finish: this cluster's mean, held back by the arm's and by one that did all."""
        count = sum(own[0] for own in self.finished.values())
        mean = (1.0 + sum(own[1] for own in self.finished.values())) / (1.0 + count)
        own_count, own_sum = self.finished.get(cluster, (0.0, 0.0))
        return (mean + own_sum) / (1.0 + own_count)

    def expected_deviation(self) -> float:
        """Mean residual of the recent window, shrunk as if ten more outcomes had met the expectation."""
        return self.deviation / (self.weight + 10)

    def likely_shift(self) -> float:
        """The recent deviation times how likely it is more than chance, by the likelihood ratio so far."""
        return self.expected_deviation() * (1 - math.exp(-self.cusum))


@cache
def _projection() -> Array:
    """(256, 64) with orthonormal columns, scaled so that lengths are kept on average. Made when it is first used: the
    library below starts its threads for it, which whoever only imports this should not wait for."""
    square = np.random.default_rng(20_250).standard_normal((DIMENSION, PROJECTED))
    basis, _ = np.linalg.qr(square)
    return np.asarray(basis * math.sqrt(DIMENSION / PROJECTED), dtype=np.float64)


class Bandit:
    """What is known of the choices of one subject in tasks of one type."""

    def __init__(self, staging: Staging = STAGING) -> None:
        """`staging` weighs the terms of the staged reward where a question says the widths of its options."""
        self.arms: dict[str, Arm] = {}
        self.staging = staging
        self.stage = 0
        """Decompositions whose staged reward was credited."""
        self._posteriors = (Posterior(PLAIN, PROJECTED, AGEING), Posterior(LOCAL, PROJECTED, AGEING))
        self._log_weights = np.zeros(2)
        self._named: dict[str, None] = {}
        self._centroids = np.zeros((0, DIMENSION))

    def learn(self, seen: Observation) -> None:
        """Take one outcome. One of an older model or prompt than the arm has now is left out."""
        arm = self._arm(seen)
        if seen.finish is not None:
            self.stage = max(self.stage, seen.stage + 1)
        if seen.decision_seq < arm.since_seq:
            return
        if (arm.model, arm.prompt) != (seen.model, seen.prompt):
            self._forget(seen.choice, _kept(arm, seen.model, seen.prompt))
            arm.model, arm.prompt, arm.since_seq = seen.model, seen.prompt, seen.decision_seq
        cluster = self._join(seen)
        place = _place(seen.vector, cluster)
        reward = seen.reward - PRIOR_MEAN
        residual, variance = reward, 0.0
        told = []
        for share, posterior in zip(self._shares(), self._posteriors, strict=True):
            mean, uncertain = posterior.learn(place, seen.choice, reward)
            residual -= share * mean
            variance += share * (NOISE + uncertain)
            told.append(0.5 * (math.log(NOISE + uncertain) + (reward - mean) ** 2 / (NOISE + uncertain)))
        self._log_weights -= told
        self._log_weights -= self._log_weights.max()
        shift = arm.expected_deviation()
        arm.cusum = max(0.0, arm.cusum + (residual * shift - 0.5 * shift * shift) / variance)
        arm.deviation = RECENT * arm.deviation + residual
        arm.weight = RECENT * arm.weight + 1
        arm.count += 1
        arm.seconds += (seen.seconds - arm.seconds) / min(arm.count, 50)
        arm.last_seq = seen.seq
        counted = arm.in_cluster.setdefault(cluster, [0, 0.0])
        counted[0] += 1
        counted[1] += seen.reward
        if seen.finish is not None:
            finished = arm.finished.setdefault(cluster, [0, 0.0])
            finished[0] += 1
            finished[1] += seen.finish
        if arm.cusum > ALARM:
            arm.alarms += 1
            self._forget(seen.choice, KEPT_AFTER_ALARM)

    def advise(self, question: Question, vector: Vector | None, seed: int) -> Advised:
        """Weigh the options of a question at one text; changes nothing. `seed` decides the draw, and only that."""
        options = question.options
        cluster = self.cluster_of(question.cluster, vector)
        rules = [option.choice for option in options].index(question.rules_choice)
        keep = [self._keep(option) for option in options]
        mean, cov, sampled, remaining = self._outlook(options, keep, _place(vector, cluster))
        price = np.array([option.cost for option in options]) + self._time_price(options)
        staged = self._incentives(options, cluster)
        worth = mean - price + staged
        worth[rules] += RULES_BONUS * remaining[rules]
        generator = np.random.default_rng(seed)
        chances = chances_of_best(worth, sampled, generator)
        taken = int(np.searchsorted(np.cumsum(chances), generator.random() * chances.sum(), side="right"))
        taken = min(taken, len(options) - 1)
        best = int(np.argmax(worth))
        rival = rules if best != rules else int(np.argsort(-worth, kind="stable")[1])
        gap = math.sqrt(max(cov[best, best] + cov[rival, rival] - 2 * cov[best, rival], 1e-12))
        confidence = _normal_cdf(float(worth[best] - worth[rival]) / gap)
        known = [self.arms.get(option.choice) for option in options]
        counts = [0.0 if arm is None else arm.count * kept * kept for arm, kept in zip(known, keep, strict=True)]
        ready = best == rules or (confidence >= CONFIDENCE and counts[best] >= MIN_OUTCOMES)
        settled = best if ready else rules
        won = "exploration" if taken != settled else "rules" if settled == rules else "learned"
        views = [
            ArmView(
                choice=option.choice,
                expected_reward=min(max(float(mean[position]), 0.0), 1.0),
                deviation=math.sqrt(max(float(cov[position, position]), 0.0)),
                value=float(worth[position]),
                chance=float(chances[position]),
                outcomes=counts[position],
                similar_outcomes=0 if arm is None or kept < 1 else int(arm.in_cluster.get(cluster, _NEVER)[0]),
                seconds=0.0 if arm is None else arm.seconds,
                width=option.width,
                staged=float(staged[position]),
            )
            for position, (option, arm, kept) in enumerate(zip(options, known, keep, strict=True))
        ]
        return Advised(
            key=question.key,
            subject=question.subject,
            rules_choice=question.rules_choice,
            learned_choice=options[best].choice,
            choice=options[taken].choice,
            won=won,
            propensity=min(1.0, max(float(chances[taken]), 1e-6)),
            confidence=confidence,
            evidence=counts[best],
            cluster=cluster,
            arms=views,
            why=_why(views, taken, best, rules, confidence, won, cluster),
        )

    def expected(self, choices: Sequence[str], cluster: str, vector: Vector | None) -> Array:
        """Expected reward of each choice at a text, without prices."""
        options = [Option(choice=choice) for choice in choices]
        place = _place(vector, self.cluster_of(cluster, vector))
        return self._outlook(options, [self._keep(option) for option in options], place)[0]

    def cluster_of(self, named: str, vector: Vector | None) -> str:
        """The name given where it has a place, else the nearest centroid's, else empty."""
        if named:
            return named if named in self._named else ""
        if vector is None or not len(self._centroids):
            return ""
        cosines = self._centroids @ vector.astype(np.float64) / np.linalg.norm(self._centroids, axis=1)
        nearest = int(np.argmax(cosines))
        return f"~{nearest}" if cosines[nearest] >= FOUND_CLUSTER_FLOOR else ""

    @property
    def nbytes(self) -> int:
        """Memory that the posteriors need."""
        return sum(posterior.nbytes for posterior in self._posteriors)

    @property
    def weights(self) -> Array:
        """How much the plain and the local posterior count, summing to 1."""
        return np.array(self._shares())

    def _shares(self) -> tuple[float, float]:
        plain, local = (math.exp(each) for each in self._log_weights)  # the larger one is e^0
        return plain / (plain + local), local / (plain + local)

    def values(self, task_type: str) -> list[ArmValue]:
        """Outcomes of each arm by cluster, since the arm last changed."""
        found = []
        for choice, arm in self.arms.items():
            for cluster, (count, rewards) in arm.in_cluster.items():
                found.append(
                    ArmValue(
                        task_type=task_type,
                        cluster=cluster,
                        choice=choice,
                        prompt=arm.prompt,
                        outcomes=int(count),
                        mean_reward=min(1.0, max(0.0, rewards / count)),
                        deviation=expected(int(count), rewards).deviation,
                        mean_seconds=max(0.0, arm.seconds),
                    )
                )
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Everything learned: what JSON can hold, and the arrays."""
        names: dict[str, Any] = {
            "arms": {name: asdict(arm) for name, arm in self.arms.items()},
            "stage": self.stage,
            "clusters": list(self._named),
            "posteriors": [],
        }
        arrays = {"log_weights": self._log_weights, "centroids": self._centroids}
        for number, posterior in enumerate(self._posteriors):
            own, numbers = posterior.state()
            names["posteriors"].append(own)
            arrays |= {f"{number}.{key}": value for key, value in numbers.items()}
        return names, arrays

    def restore(self, names: dict[str, Any], arrays: dict[str, Array]) -> None:
        """Reverse of `state`. Raises ValueError, KeyError or TypeError where the parts do not fit."""
        self.arms = {name: Arm(**arm) for name, arm in names["arms"].items()}
        self.stage = int(names["stage"])
        self._named = dict.fromkeys(names["clusters"])
        self._log_weights, self._centroids = arrays["log_weights"].copy(), arrays["centroids"].copy()
        for number, (posterior, own) in enumerate(zip(self._posteriors, names["posteriors"], strict=True)):
            posterior.restore(own, {key: arrays[f"{number}.{key}"] for key in STATE_ARRAYS})

    def _arm(self, seen: Observation) -> Arm:
        if seen.choice not in self.arms:
            if len(self.arms) >= MAX_ARMS:
                oldest = min(self.arms, key=lambda name: self.arms[name].last_seq)
                self._forget(oldest, 0.0)
                del self.arms[oldest]
            self.arms[seen.choice] = Arm(seen.model, seen.prompt, seen.decision_seq)
        return self.arms[seen.choice]

    def _forget(self, choice: str, keep: float) -> None:
        arm = self.arms[choice]
        for posterior in self._posteriors:
            posterior.forget(choice, keep)
        arm.count *= keep * keep
        arm.deviation = arm.weight = arm.cusum = 0.0
        arm.in_cluster.clear()
        arm.finished.clear()

    def _join(self, seen: Observation) -> str:
        """The cluster of an outcome; a new one is founded while there is room."""
        if seen.cluster:
            if len(self._named) < MAX_CLUSTERS:
                self._named[seen.cluster] = None
            return self.cluster_of(seen.cluster, seen.vector)
        if seen.vector is None:
            return ""
        found = self.cluster_of("", seen.vector)
        if found:
            self._centroids[int(found[1:])] += seen.vector
        elif len(self._centroids) < MAX_FOUND_CLUSTERS:
            self._centroids = np.vstack([self._centroids, seen.vector.astype(np.float64)])
            found = f"~{len(self._centroids) - 1}"
        return found

    def _outlook(
        self, options: Sequence[Option], kept: Sequence[float], place: Place
    ) -> tuple[Array, Array, Array, Array]:
        """Mean, covariance, sampled covariance of the options' rewards; share of the prior variance that remains.

        `kept` is the part of each option's evidence that still speaks about it.
        """
        names = [option.choice for option in options]
        keep = np.array(kept)
        size, lost = len(options), 1 - keep * keep
        kept_pairs, lost_alone = np.outer(keep, keep), np.diag(lost)
        means, covs, wholes, shares = [], [], [], []
        for posterior in self._posteriors:
            view = posterior.view(place, names)
            # value_k = shared + keep_k · own_k + what the forgotten part may have become
            with_shared = keep * view.cov[0, 1:]
            means.append(PRIOR_MEAN + view.mean[0] + keep * view.mean[1:])
            covs.append(
                view.cov[0, 0]
                + with_shared
                + with_shared[:, np.newaxis]
                + kept_pairs * view.cov[1:, 1:]
                + lost_alone * view.prior_var[1:]
            )
            whole = kept_pairs * view.intercept_cov[1:, 1:] + lost_alone * view.intercept_prior[1:]
            wholes.append(whole)
            shares.append(np.minimum(np.maximum(whole.diagonal() / view.intercept_prior[1:], 0), 1))
        weights = self.weights
        mean = sum((w * m for w, m in zip(weights, means, strict=True)), np.zeros(size))
        cov = sum(
            (w * (c + np.outer(m - mean, m - mean)) for w, c, m in zip(weights, covs, means, strict=True)),
            np.zeros((size, size)),
        )
        whole = sum((w * c for w, c in zip(weights, wholes, strict=True)), np.zeros((size, size)))
        share = sum((w * s for w, s in zip(weights, shares, strict=True)), np.zeros(size))
        known = [self.arms.get(name) for name in names]
        mean = mean + keep * np.array([0.0 if arm is None else arm.likely_shift() for arm in known])
        return mean, cov, BOLDNESS**2 * whole + LOCAL_BOLDNESS**2 * cov, share

    def _incentives(self, options: Sequence[Option], cluster: str) -> Array:
        """What both terms of the staged reward add to each option now; nothing unless all say their width."""
        widths = [option.width for option in options if option.width is not None]
        if len(widths) < len(options) or self.staging.left(self.stage) == 0.0:
            return np.zeros(len(options))
        nobody = Arm("", "", 0)
        return np.array(
            [
                self.staging.incentive(self.stage, width, self.arms.get(option.choice, nobody).expected_finish(cluster))
                for option, width in zip(options, widths, strict=True)
            ]
        )

    def _keep(self, option: Option) -> float:
        arm = self.arms.get(option.choice)
        return 1.0 if arm is None else _kept(arm, option.model, option.prompt)

    def _time_price(self, options: Sequence[Option]) -> Array:
        """SECONDS_WEIGHT for each doubling over the fastest option; nothing where a duration is not known yet."""
        known = [
            arm.seconds if (arm := self.arms.get(option.choice)) is not None and arm.count >= 1 else 0.0
            for option in options
        ]
        positive = [seconds for seconds in known if seconds > 0]
        if not positive:
            return np.zeros(len(options))
        fastest = min(positive)
        return np.array([SECONDS_WEIGHT * math.log2(seconds / fastest) if seconds > 0 else 0.0 for seconds in known])


def chances_of_best(mean: Array, cov: Array, generator: np.random.Generator) -> Array:
    """Probability of each of the jointly normal values to be the largest; exact for two, by 512 draws for more."""
    if len(mean) == 2:
        spread = math.sqrt(max(float(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]), 1e-12))
        first = _normal_cdf(float(mean[0] - mean[1]) / spread)
        return np.array([first, 1 - first])
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    draws = mean + generator.standard_normal((_DRAWS, len(mean))) @ root.T
    return np.bincount(np.argmax(draws, axis=1), minlength=len(mean)) / _DRAWS


def _kept(arm: Arm, model: str, prompt: str) -> float:
    """Part of an arm's evidence that still speaks about this model and prompt."""
    if model != arm.model:
        return 0.0
    return 1.0 if prompt == arm.prompt else KEPT_AFTER_PROMPT


def _place(vector: Vector | None, cluster: str) -> Place:
    return Place.of(None if vector is None else vector.astype(np.float64) @ _projection(), cluster)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _why(arms: Sequence[ArmView], taken: int, best: int, rules: int, confidence: float, won: str, cluster: str) -> str:
    def told(position: int) -> str:
        arm = arms[position]
        staged = f" (+{arm.staged:.2f} staged)" if arm.staged > 0 else ""
        return f"{arm.choice} {arm.expected_reward:.2f}±{arm.deviation:.2f}{staged} after {arm.outcomes:.0f}"

    where = f" ({arms[best].similar_outcomes} in cluster {cluster})" if cluster else ""
    if won == "learned":
        return f"learned: {told(best)}{where} against {told(rules)}; better with confidence {confidence:.2f}"
    if won == "exploration":
        return f"exploration: tried with chance {arms[taken].chance:.2f}; {told(taken)}, best so far {told(best)}"
    if best == rules:
        return f"rules, and outcomes agree: {told(rules)}{where}"
    if arms[best].outcomes < MIN_OUTCOMES:
        return f"rules: {told(best)} looks better, but from fewer than {MIN_OUTCOMES:.0f} outcomes"
    return f"rules: {told(best)} is better with confidence {confidence:.2f} only, {CONFIDENCE} is needed"
