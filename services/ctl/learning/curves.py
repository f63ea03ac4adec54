"""The courses as curves in a PNG: quality and share of split tasks, by family and variant."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from services.ctl.learning.ablations import Ablations
from services.ctl.learning.course import VARIANTS
from services.memory.staged import STAGING

_WINDOW_SHARE: Final = 0.05
"""Part of a course over which each point is the mean."""


def draw(ablations: Ablations, path: Path) -> None:
    """Write the picture. Raises OSError."""
    columns = len(ablations.grounds)
    figure, axes = pyplot.subplots(2, columns, figsize=(4 * columns, 6), sharex=True, squeeze=False)
    window = max(1, int(ablations.tasks * _WINDOW_SHARE))
    for column, ground in enumerate(ablations.grounds):
        family = ground.family
        upper, lower = axes[0][column], axes[1][column]
        for variant in VARIANTS:
            courses = ablations.courses[variant, family.name]
            quality = np.mean([course.quality / family.best for course in courses], axis=0)
            split = np.mean([course.widths > 1 for course in courses], axis=0)
            upper.plot(_smooth(quality, window), label=variant)
            lower.plot(_smooth(split, window), label=variant)
        upper.set_title(f"{family.name}: best width {family.best_width}")
        upper.axhline(0.95, color="grey", linewidth=0.5)
        lower.set_xlabel("tasks")
        for axis in (upper, lower):
            if STAGING.anneal_over is not None:
                axis.axvline(STAGING.anneal_over, color="grey", linewidth=0.5, linestyle=":")
            axis.set_ylim(-0.02, 1.05)
    axes[0][0].set_ylabel("quality / best width's")
    axes[1][0].set_ylabel("share of split tasks")
    axes[1][-1].legend(fontsize="small")
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", dpi=120)
    finally:
        pyplot.close(figure)


def _smooth(
    values: np.ndarray[tuple[int], np.dtype[np.float64]], window: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Mean of each value and those before it, as far as the window goes."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
