"""What every `python -m services.<name>` does with its command line, before it starts anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.kit.config import CHECKOUT

SERVICES = sorted(path.parent.name for path in (CHECKOUT / "services").glob("*/__main__.py"))


def started(service: str, home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"services.{service}", *argv],
        cwd=CHECKOUT,
        env={**os.environ, "TIERLINE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_all_services_are_looked_at() -> None:
    assert {"ctl", "gates", "inference", "memory", "planner", "scheduler"} <= set(SERVICES)


@pytest.mark.parametrize("service", SERVICES)
def test_help_explains_and_starts_nothing(service: str, tmp_path: Path) -> None:
    done = started(service, tmp_path / "home", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("service", SERVICES)
def test_an_argument_that_does_not_exist_is_refused(service: str, tmp_path: Path) -> None:
    done = started(service, tmp_path / "home", "--prot", "5555")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not (tmp_path / "home").exists()
