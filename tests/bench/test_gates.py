"""`bench gates` on a few problems: every promised figure is printed, and none of them is won by checking nothing."""

from __future__ import annotations

import json

import pytest

from services.ctl.__main__ import main


def test_a_sample_of_the_corpus_is_judged_as_it_is_outside(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gates", "--sample", "2", "--quick", "--no-escapes", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["canonical"], figures["canonical_passed"]) == (2, 2)
    assert figures["mutants"] == 6
    assert figures["mutants_failing_outside"] >= 3
    assert (figures["mutants_missed"], figures["mutants_refused_wrongly"], figures["unexpected"]) == (0, 0, [])
    assert figures["categories"]["CODE"] >= 3
    assert figures["cache_hits"] == 2
    assert figures["parallel_speedup"] > 0
    assert {"overhead_ms_p50", "overhead_lint_ms_p50", "overhead_unit_ms_p50"} <= figures.keys()
