"""One real stack for all tests that only use it: three tiers on the demo model, both engines, real gates and memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import DEMO_MODEL
from tests.conftest import temporary_home


def demo_models(**engines: str) -> dict[str, dict[str, object]]:
    """The shipped three entries, with the engine of each as asked for."""
    tiers = {"front": ("A", 2, 3072), "specialist": ("B", 1, 2048), "worker": ("C", 4, 2048)}
    return {
        name: {
            "tier": tier,
            "path": DEMO_MODEL,
            "engine": engines.get(name, "auto"),
            "slots": slots,
            "context_tokens": context,
            "threads": 1,
        }
        for name, (tier, slots, context) in tiers.items()
    }


@pytest.fixture(scope="module")
def stack() -> Iterator[BareStack]:
    """Up for all tests of a file, which leave it ready. The worker runs natively, the others in the wheel's engine."""
    models = demo_models(front="embedded", specialist="embedded", worker="llama-server")
    with temporary_home() as path, BareStack(path, models=models) as running:
        yield running
