"""The soak in its short form: full load, random kill -9 of scheduler, planner and workers, and the books afterwards."""

from __future__ import annotations

import pytest

from services.ctl.bench import soak

pytestmark = pytest.mark.chaos


def test_under_load_and_random_kills_nothing_is_lost_or_repeated_and_service_is_back_within_seconds() -> None:
    figures = soak.measure(seconds=12, clients=3, kill_every_s=2, seed=7)
    assert figures["lost"] == 0, figures["details"]
    assert figures["duplicate_effects"] == 0, figures["details"]
    assert figures["failed"] == 0
    assert figures["finished"] == figures["accepted"] > 0
    assert figures["steps"] == 4 * figures["finished"]
    assert sum(figures["kills"].values()) >= 3, "five, where starting a process takes no time"
    assert figures["unrecovered"] == 0
    assert figures["recovery_p95_s"] > 0, "its bar is that of `tierline bench soak` on a machine of its own"
    growth = figures["rss_growth_by_process_mb"]
    assert growth["scheduler"] < 30
    assert figures["rss_growth_mb"] < 150, "memory maps and caches of the memory service included"
