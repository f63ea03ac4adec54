"""What inference services know of the memory that they and those beside them will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.inference_stack import FAKE_BINARY, InferenceStack

FAKE = {"binary": str(FAKE_BINARY), "engine": "llama-server", "slots": 2, "context_tokens": 512, "threads": 1}


@pytest.fixture
def stack() -> Iterator[InferenceStack]:
    with InferenceStack() as running:
        yield running


def test_hot_models_that_do_not_fit_together_are_refused_at_their_start_the_later_ones_of_the_registry(
    stack: InferenceStack,
) -> None:
    (stack.registry / "hardware.yaml").write_text("hardware:\n  memory_bytes: 250000000\n")
    for name in ("first", "second", "third"):  # 101 MB each
        stack.entry(name, **FAKE)
        stack.script(name, {"default": "fine"})
    for name in ("third", "second", "first"):
        stack.start(name)
    stack.hub.await_peer("inference-first", "ready")
    stack.hub.await_peer("inference-second", "ready")
    stack.hub.await_peer("inference-third", "degraded")
    reason = stack.hub.pongs["inference-third"].reason or ""
    assert "models.yaml:" in reason
    assert "models.third.residency: it needs 100," in reason
    assert (
        "of the hot models before it (first, second), and the machine has 250,000,000: make one of them warm" in reason
    )
    assert not (stack.root / "logs" / "inference-third.engine.out").exists()
    stack.model_path("first").unlink()  # a file that is not there takes nothing
    stack.hub.await_peer("inference-third", "ready")
