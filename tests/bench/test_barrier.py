"""`bench barrier` on real processes: a scheduler that works in waves could not come below 0.7 s."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from services.ctl.bench import barrier
from services.ctl.outcomes import ExitCode
from services.kit.config import CHECKOUT


@pytest.mark.timeout(120)
def test_a_chain_beside_a_long_step_is_not_held_back_by_it() -> None:
    figures = barrier.measure(3)
    assert figures["ideal_s"] == 0.4
    assert 0.4 <= figures["wall_s"] < 0.65, "how close it comes, the benchmark says; waves take 0.7"
    assert figures["wall_s"] <= figures["client_wall_s"]


@pytest.mark.timeout(120)
def test_a_benchmark_that_is_told_to_end_takes_its_processes_along() -> None:
    bench = subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "bench", "barrier", "--runs", "1000", "--json"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started: list[psutil.Process] = []
    end = time.monotonic() + 60
    while len(started) < 4 and time.monotonic() < end:
        time.sleep(0.2)
        started = psutil.Process(bench.pid).children(recursive=True)
    assert len(started) >= 4
    bench.terminate()
    assert bench.wait(60) == ExitCode.INTERRUPTED
    assert psutil.wait_procs(started, timeout=10)[1] == []
