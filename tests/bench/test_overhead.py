"""`tierline bench overhead` prints every figure that is promised of it, on a short history."""

from __future__ import annotations

import json

import pytest

from services.ctl.__main__ import main


def test_overhead_growth_and_memory_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overhead", "--runs", "1", "--history", "2000", "--json"]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert "2000 steps" in printed.err
    assert figures["history_steps"] == 2000
    assert figures["history_growth"] > 0, "a ratio of costs; its goal is checked by the full run"
    assert 20 < figures["rss_mb"] < 500
    assert 0 < figures["fanout_commits_per_step"] < 0.5, "group commit: many steps share a transaction"
    # A chain has one thing to write at a time, or two where a worker is quicker than the hub looks for more.
    assert 0.5 <= figures["chain_commits_per_step"] < 1.5
    for name in ("raw_zmq_fanout_us", "raw_zmq_chain_us", "fanout_us_per_step", "chain_us_per_step"):
        assert figures[name] > 0
