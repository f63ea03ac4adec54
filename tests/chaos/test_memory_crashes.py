"""`tierline bench memory --crashes`, the short form: three kills, every file flipped and deleted, a full disk.

The long form is `tierline bench memory --crashes 50`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


def test_on_its_worst_days_the_memory_loses_nothing_and_answers_nothing_wrong() -> None:
    argv = [sys.executable, "-m", "services.ctl", "bench", "memory", "--crashes", "3", "--json"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=800)
    assert done.stdout, done.stderr[-4_000:]
    figures = json.loads(done.stdout)
    assert (figures["lost"], figures["wrong_answers"]) == (0, 0), figures["details"]
    assert done.returncode == 0
    assert figures["kills"] == 3
    assert figures["kills_under_writes"] > 0
    assert figures["acknowledged"] > 0
    assert figures["flips"] >= 16, "eight files after a clean stop, more after kill -9"
    assert figures["deletions"] >= 8
    assert figures["rebuilt"] > 0
    assert figures["restored"] > 0
