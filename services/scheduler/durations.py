"""How long a step will take, learned from those that have been.

Means of the logarithm of seconds in a hierarchy: role, role and task type, and these with the size of prompt and
answer (powers of two). A finer level counts as much as it has observations; what it lacks comes from the coarser one,
and at the top from a prior: the tokens the step may write, at `PRIOR_TOKENS_PER_S`. Logarithms, so that one stalled
step does not spoil the estimate; old observations fade, so that a faster model is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

PRIOR_TOKENS_PER_S: Final = 30.0
"""Decoding speed that is assumed of a model nobody has seen: about that of a 7B on one socket."""
_SHRINKAGE: Final = 3.0
"""Observations after which a level outweighs the one above it."""
_MEMORY: Final = 64.0
"""Observations after which older ones fade: the mean becomes an exponential one."""
_LEAST_S: Final = 0.001
_PRIOR_SPREAD: Final = 1.0
"""Spread before anything was observed: within a factor of three, two times out of three."""


class Job(msgspec.Struct, frozen=True):
    """What is known of a step before it runs. One is made for each open step whenever a task is ranked."""

    role: str
    task_type: str
    prompt_chars: int
    max_tokens: int
    step: str = ""
    """Id of the step; only estimators that know better than to generalise look at it."""


class Durations(Protocol):
    """Anything that can estimate, and learn from what happened."""

    def expected_s(self, job: Job) -> float:
        """Seconds of inference to expect; 0 where nothing at all is known, so that no step is preferred."""
        ...

    def seen_s(self, job: Job) -> tuple[float, float]:
        """Seconds that jobs like this one were seen to take, and how many of its role were seen; infinite where they
        are known exactly, zeros where none was. Unlike `expected_s` it holds nothing but what was seen.
        """
        ...

    def spread(self) -> float:
        """Standard deviation of ln(actual / expected) to reckon with; 0 = the estimates are exact."""
        ...

    def observe(self, job: Job, seconds: float) -> None:
        """A job of this kind took so long."""
        ...


@dataclass(slots=True)
class _Mean:
    value: float = 0.0
    count: float = 0.0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1.0, _MEMORY)
        self.value += (value - self.value) / self.count


@dataclass(slots=True)
class LearnedDurations:
    """See the module. The tables are bounded by roles x task types x sizes."""

    _means: dict[tuple[str, ...], _Mean] = field(default_factory=dict)
    _errors: _Mean = field(default_factory=lambda: _Mean(_PRIOR_SPREAD**2, 1.0))
    """Mean of the squared logarithm of actual over expected, where the expectation was made before."""
    _expected: dict[tuple[str, str, int, int], float] = field(default_factory=dict)
    """Estimates since the last observation: a plan asks for the same ones step by step."""

    def expected_s(self, job: Job) -> float:
        """See Durations."""
        like = (job.role, job.task_type, job.prompt_chars.bit_length(), job.max_tokens)
        known = self._expected.get(like)
        if known is None:
            known = self._expected[like] = math.exp(self._expected_log_s(job, _levels(job)))
        return known

    def spread(self) -> float:
        """See Durations."""
        return math.sqrt(self._errors.value)

    def observe(self, job: Job, seconds: float) -> None:
        """See Durations."""
        self._expected.clear()
        log_s = math.log(max(_LEAST_S, seconds))
        levels = _levels(job)
        self._errors.add((log_s - self._expected_log_s(job, levels)) ** 2)
        for level in levels:
            mean = self._means.get(level)
            if mean is None:
                mean = self._means[level] = _Mean()
            mean.add(log_s)

    def seen_s(self, job: Job) -> tuple[float, float]:
        """See Durations."""
        levels = _levels(job)
        own = self._means.get(levels[0])
        return (0.0, 0.0) if own is None else (math.exp(self._drawn_to(own.value, levels[1:])), own.count)

    def observations(self) -> dict[str, int]:
        """Role -> from how many of its steps its estimates come; old ones fade, so never more than the memory holds."""
        return {level[0]: round(mean.count) for level, mean in self._means.items() if len(level) == 1}

    def state(self) -> list[tuple[list[str], float, float]]:
        """Everything learned, as plain values for the journal; the errors stand under no level."""
        means: dict[tuple[str, ...], _Mean] = {(): self._errors} | self._means
        return [(list(level), mean.value, mean.count) for level, mean in means.items()]

    def restore(self, state: Iterable[tuple[list[str], float, float]]) -> None:
        """Take up what `state` gave."""
        self._expected.clear()
        self._means = {tuple(level): _Mean(value, count) for level, value, count in state}
        self._errors = self._means.pop((), _Mean(_PRIOR_SPREAD**2, 1.0))

    def _expected_log_s(self, job: Job, levels: tuple[tuple[str, ...], ...]) -> float:
        return self._drawn_to(math.log(max(_LEAST_S, job.max_tokens / PRIOR_TOKENS_PER_S)), levels)

    def _drawn_to(self, log_s: float, levels: Iterable[tuple[str, ...]]) -> float:
        """An estimate drawn towards the means of these levels, as far as they have observations."""
        for level in levels:
            mean = self._means.get(level)
            if mean is not None:
                log_s = (mean.count * mean.value + _SHRINKAGE * log_s) / (mean.count + _SHRINKAGE)
        return log_s


class TokenSpeed:
    """Every step writes all it may, at one speed: the durations of a simulation, known exactly."""

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s

    def expected_s(self, job: Job) -> float:
        """See Durations."""
        return job.max_tokens / self._tokens_per_s

    def spread(self) -> float:
        """See Durations."""
        return 0.0

    def seen_s(self, job: Job) -> tuple[float, float]:
        """See Durations."""
        return self.expected_s(job), math.inf

    def observe(self, job: Job, seconds: float) -> None:
        """See Durations; there is nothing to learn."""


def _levels(job: Job) -> tuple[tuple[str, ...], ...]:
    """Coarse to fine."""
    sizes = f"{max(1, job.prompt_chars).bit_length()}:{max(1, job.max_tokens).bit_length()}"
    return (job.role,), (job.role, job.task_type), (job.role, job.task_type, sizes)
