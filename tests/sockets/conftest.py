"""A private address for each test: short, since the path of a unix socket has a limit of 107 bytes."""

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield f"ipc://{folder}/run/hub.sock"
