"""Slices of a process, as the kernel shows them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from services.kit import children
from tests.kernel import slice_ms

OWN = Path("/proc/self/sched")
TELLS = "import pathlib; print(pathlib.Path('/proc/self/sched').read_text(), flush=True)"


async def told(tmp_path: Path, before: str = "", **how: int) -> str:
    """What the kernel shows of a child that runs this first."""
    output = tmp_path / "output"
    child = await children.spawn([sys.executable, "-c", before + TELLS], output=output, **how)
    assert await child.wait() == 0, output.read_text()
    return output.read_text()


@pytest.fixture(autouse=True)
def _shown() -> None:
    if slice_ms(OWN) is None:
        pytest.skip("needs Linux 6.12 or newer that shows its slices in /proc/self/sched")


async def test_a_child_has_the_slices_it_was_given_and_others_have_the_kernels(tmp_path: Path) -> None:
    longer, usual = tmp_path / "longer", tmp_path / "usual"
    for folder in (longer, usual):
        folder.mkdir()
    assert slice_ms(await told(longer, slice_ms=10)) == 10
    assert slice_ms(await told(usual)) == slice_ms(OWN)


async def test_threads_have_those_of_their_process(tmp_path: Path) -> None:
    before = (
        "import threading, pathlib\n"
        "path = lambda: f'/proc/self/task/{threading.get_native_id()}/sched'\n"
        "thread = threading.Thread(target=lambda: print(pathlib.Path(path()).read_text(), flush=True))\n"
        "thread.start(); thread.join(); raise SystemExit(0)\n"
    )
    assert slice_ms(await told(tmp_path, before, slice_ms=10)) == 10


async def test_niceness_is_kept(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from services.kit.slices import take_slices_of\n"
        "os.nice(3); os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)); take_slices_of(20)\n"
        "assert os.getpriority(os.PRIO_PROCESS, 0) == 3 + BASE, os.getpriority(os.PRIO_PROCESS, 0)\n"
        "assert os.sched_getscheduler(0) == os.SCHED_BATCH\n"
    ).replace("BASE", str(os.getpriority(os.PRIO_PROCESS, 0)))
    assert slice_ms(await told(tmp_path, code)) == 20
