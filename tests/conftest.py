"""Homes for tests: short, since the path of a unix socket has a limit of 107 bytes, and gone afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes depends on what else this machine does; timings are the benchmarks' business.
settings.register_profile("tierline", deadline=None)
settings.load_profile("tierline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--memory-kills", type=int, default=6, help="rounds of kill -9 of the memory service (long: 50)")


@contextmanager
def temporary_home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with temporary_home() as folder:
        yield folder
