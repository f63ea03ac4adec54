"""`bench barrier` on real processes, in steps so long that only waves could take much more than the ideal."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from services.ctl.bench import barrier
from services.ctl.outcomes import ExitCode
from services.kit.config import CHECKOUT
from tests.waiting import until


def test_a_chain_beside_a_long_step_is_not_held_back_by_it() -> None:
    figures = barrier.measure(1, step_s=0.8)
    assert figures["ideal_s"] == pytest.approx(3.2)
    assert 3.2 <= figures["wall_s"] < 5.4, "how close it comes, the benchmark says; waves take 5.6"
    assert figures["wall_s"] <= figures["client_wall_s"]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, ExitCode.INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_benchmark_that_is_ended_takes_its_processes_along(number: signal.Signals, status: int) -> None:
    bench = subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "bench", "barrier", "--runs", "1000", "--json"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    below = psutil.Process(bench.pid)
    until(lambda: len(below.children(recursive=True)) >= 4, "its stack is being started")
    started = below.children(recursive=True)
    bench.send_signal(number)
    assert bench.wait(90) == status
    assert psutil.wait_procs(started, timeout=90)[1] == []
