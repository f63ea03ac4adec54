"""`tierline bench inference` prints every figure that is promised of it, in its short form."""

from __future__ import annotations

import json

import pytest

from services.ctl.__main__ import main


def test_streams_cancel_prefix_lookup_and_loading_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inference", "--quick", "--runs", "1", "--engines", "embedded", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    engine = figures["engines"]["embedded"]
    by_streams = (
        "tokens_ratio tokens_ratio_se ttft_added_ms_p50 ttft_transit_ms_p50 bus_tokens_per_s direct_tokens_per_s"
    )
    for name in (*by_streams.split(), "service_cpu_ms"):
        assert list(engine[name]) == ["1", "2", "4", "8"]
    on_the_way, first = engine["ttft_transit_ms_p50"], engine["bus_first_ms"]
    assert all(0 < on_the_way[streams] < first[streams] for streams in first)
    assert all(ratio > 0 for ratio in engine["tokens_ratio"].values())
    for name in ("prefix_speedup", "lookup_copy_speedup", "lookup_prose_ratio", "cancel_ms_p95", "warm_load_s"):
        assert figures[name] == engine[name] > 0
    assert engine["turns_first_ratio"] > 0 < engine["turns_last_ratio"]
    assert engine["cancel_ms_p50"] <= engine["cancel_ms_p95"]
    assert 0 < engine["lookup_copy_acceptance"] <= 1, "the copy was not guessed at all"


def test_an_engine_that_does_not_exist_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inference", "--engines", "vllm"]) == 2
    assert "llama-server, embedded" in capsys.readouterr().err
