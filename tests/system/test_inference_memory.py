"""What inference services know of the memory that they and those beside them will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.kit.gguf_facts import read_facts
from services.kit.registry import load_registry
from services.kit.registry.memory import memory_needs
from tests.fakes.gguf_files import write_tiny_gguf
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


def test_a_service_says_what_its_model_will_take_as_the_check_of_the_registry_computes_it(
    stack: InferenceStack,
) -> None:
    heads = {"attention.head_count": 2, "attention.head_count_kv": 2}
    path = write_tiny_gguf(stack.model_path("m"), extra=heads, parameters=8_000)
    stack.entry("m", path=str(path), residency="warm", **FAKE)
    stack.start("m")
    registry = load_registry(stack.registry, stack.models)
    known, estimated = memory_needs(registry.models, {"m": read_facts(path)})["m"], memory_needs(registry.models)["m"]
    assert known != estimated
    stack.hub.await_peer("inference-m", "parked")
    stack.hub.until(lambda: stack.hub.pongs["inference-m"].needs_bytes == known, "it has read the header")
