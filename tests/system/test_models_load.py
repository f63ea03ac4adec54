"""`models load` of a model whose file cannot be used: the reason is there at once, and repairing it is enough."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.ctl import residency
from services.ctl.bench.bare_stack import BareStack
from services.kit.config import CHECKOUT
from tests.conftest import temporary_home
from tests.fakes.gguf_files import write_tiny_gguf
from tests.system.inference_stack import FAKE_BINARY
from tests.waiting import until

DAMAGED = b"GGUF" + b"\xff" * 200


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def stack(file: Path) -> Iterator[BareStack]:
    noop = {"engine": "noop", "context_tokens": 4096}
    worker = {"tier": "C", "engine": "llama-server", "binary": str(FAKE_BINARY), "path": str(file)}
    models = {
        "front": {"tier": "A", **noop},
        "specialist": {"tier": "B", **noop},
        "worker": {**worker, "context_tokens": 2048, "residency": "cold"},
    }
    with temporary_home() as path, BareStack(path, models=models, core=("scheduler",)) as running:
        yield running


@pytest.fixture
def damaged(stack: BareStack, file: Path) -> Iterator[bytes]:
    """The model is out of memory, and its file cannot be read; what the good one holds."""
    good = file.read_bytes()
    file.write_bytes(DAMAGED)
    yield good
    file.write_bytes(good)
    done = models(stack, "unload", "worker")
    assert done.wait(100) == 0, done.communicate()


def models(stack: BareStack, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.ctl", "models", *argv], cwd=CHECKOUT, env=stack.environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_file_that_is_repaired_meanwhile_is_loaded(stack: BareStack, file: Path, damaged: bytes) -> None:
    loading = models(stack, "load", "worker", "--json")
    assert loading.stderr is not None
    assert loading.stderr.readline().startswith("worker is degraded: ")
    file.write_bytes(damaged)
    out, err = loading.communicate(timeout=100)
    assert loading.returncode == 0, out + err
    assert json.loads(out)["state"] == "loaded"


def test_a_wait_that_is_shorter_ends_with_the_reason_too(stack: BareStack, file: Path, damaged: bytes) -> None:
    begun = models(stack, "load", "worker", "--wait", "0")
    assert begun.wait(100) == 0
    until(lambda: any(one.state == "degraded" for one in stack.client.status().models), "it is degraded")
    loading = models(stack, "load", "worker", "--wait", "1")
    _, err = loading.communicate(timeout=100)
    assert loading.returncode == 1
    assert "worker is not loaded after 1 s: " in err
    assert str(file) in err.splitlines()[-1]


def test_a_damaged_file_is_said_at_once_and_ends_the_command_long_before_its_wait(
    stack: BareStack, file: Path, damaged: bytes
) -> None:
    began_s = time.monotonic()
    loading = models(stack, "load", "worker", "--wait", "600")
    assert loading.stderr is not None
    first = loading.stderr.readline()
    assert time.monotonic() - began_s < residency.GRACE_S / 2
    assert first.startswith("worker is degraded: ")
    assert str(file) in first
    assert "next try in" in first
    out, err = loading.communicate(timeout=100)
    assert loading.returncode == 1
    assert out == ""
    last = err.splitlines()[-1]
    assert f"worker was not loaded within {residency.GRACE_S:g} s" in last
    assert str(file) in last
