"""`bench barrier` on real processes: a scheduler that works in waves could not come below 0.7 s."""

from __future__ import annotations

import pytest

from services.ctl.bench import barrier


@pytest.mark.timeout(120)
def test_a_chain_beside_a_long_step_is_not_held_back_by_it() -> None:
    figures = barrier.measure(3)
    assert figures["ideal_s"] == 0.4
    assert 0.4 <= figures["wall_s"] < 0.5
    assert figures["wall_s"] <= figures["client_wall_s"] < 0.7
