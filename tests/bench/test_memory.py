"""`tierline bench memory` on a small store: every figure is there, nothing is missed, little is forgotten."""

from __future__ import annotations

import json
import subprocess
import sys

FIGURES = {
    "retrieve_p50_ms",
    "retrieve_p99_ms",
    "decide_p50_ms",
    "decide_p99_ms",
    "write_p50_ms",
    "start_clean_s",
    "start_unclean_s",
    "size_mb",
    "recall",
}


def test_the_benchmark_prints_every_figure_and_the_memory_keeps_what_it_learned() -> None:
    argv = [sys.executable, "-m", "services.ctl", "bench", "memory", "--json", "--sizes", "300"]
    figures = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=500).stdout)
    (episodes,) = figures["episodes"].values()
    assert episodes.keys() >= FIGURES
    assert all(value > 0 for value in episodes.values())
    assert episodes["recall"] == 1.0, "the search is exact at this size"
    assert figures["forgetting_rate"] < 0.05
