"""Every attempt of the corpus of hostile artefacts, on a real hub and a real gates service: none may succeed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protocol.messages.gate import GateRequest, GateResult
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.escapes import Escape, Witness, attempt, escapes
from services.ctl.bench.gates import gate_stack
from tests.conftest import temporary_home


@pytest.fixture(scope="module")
def stack() -> Iterator[BareStack]:
    with temporary_home() as path, gate_stack(path) as running:
        yield running


@pytest.fixture(scope="module")
def witness(stack: BareStack) -> Iterator[Witness]:
    with Witness(stack.home) as running:
        yield running


def test_the_corpus_has_at_least_forty_attempts_with_names_of_their_own() -> None:
    names = [escape.name for escape in escapes()]
    assert len(names) == len(set(names)) >= 40


@pytest.mark.parametrize("escape", escapes(), ids=lambda escape: escape.name)
def test_it_is_contained(stack: BareStack, witness: Witness, escape: Escape) -> None:
    def ask(request: GateRequest) -> list[GateResult]:
        return stack.client.gates(request, 30)

    assert attempt(escape, ask, witness) is None
