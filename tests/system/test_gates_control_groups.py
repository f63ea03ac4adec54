"""Two services that make control groups on one machine, with the kernel's own groups."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from services.gates.control_groups import ControlGroups

BYTES = 64 * 1024**2


def found() -> ControlGroups:
    groups = ControlGroups.found()
    if groups is None:
        pytest.skip("no control groups can be made here: they are not delegated")
    return groups


def test_a_service_that_starts_leaves_the_empty_groups_of_a_living_one_alone() -> None:
    group = found().make(BYTES, 16)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found()  # another service begins between the making of a group and its first process
        group.admit(child.pid)
        assert all(str(child.pid) in (folder / "cgroup.procs").read_text().split() for folder in group.folders)
        child.communicate(b"\n")
    asyncio.run(group.remove())
    assert not any(folder.exists() for folder in group.folders)


def test_groups_of_one_that_was_killed_go_with_the_next_start() -> None:
    script = (
        "import os; from services.gates.control_groups import ControlGroups\n"
        f"print(*ControlGroups.found().make({BYTES}, 16).folders, flush=True); os.kill(os.getpid(), 9)"
    )
    found()
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    left = [Path(folder) for folder in said.split()]
    assert left
    assert all(folder.exists() for folder in left)
    found()
    assert not any(folder.exists() for folder in left)
