"""What a result says in words."""

from __future__ import annotations

from services.ctl.result_view import told_steps


def test_a_decision_about_many_steps_names_the_first() -> None:
    assert told_steps([""]) == "task"
    assert told_steps(["S1", "S2", "S3"]) == "S1, S2, S3"
    assert told_steps([f"S{n}" for n in range(1000)]) == "S0 and 999 more"
