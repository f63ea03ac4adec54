"""Verdicts by content: found again, bounded, and never believed when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocol.messages.failure import Category, Finding
from protocol.messages.gate import GateResult, Verdict
from services.gates.verdict_cache import VerdictCache, key_of


def result(verdict: Verdict = Verdict.PASS, *, rule: str | None = None, message: str = "") -> GateResult:
    findings = [Finding(gate="unit", category=Category.CODE, message="m", rule=rule)] if rule else []
    return GateResult(
        gate="unit",
        verdict=verdict,
        category=Category.CODE,
        message=message,
        findings=findings,
        started_ms=1,
        ended_ms=2,
    )


def test_a_verdict_is_found_again_also_by_another_process(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "v", 10_000)
    failed = result(Verdict.FAIL, rule="failure")
    cache.put("a" * 64, failed)
    assert cache.get("a" * 64) == failed
    assert cache.get("b" * 64) is None
    other = VerdictCache(tmp_path / "v", 10_000)
    assert other.get("a" * 64) == failed
    assert (cache.hits, cache.misses, other.bytes) == (1, 1, cache.bytes)


@pytest.mark.parametrize(
    "passing",
    [
        result(Verdict.ERROR),
        result(Verdict.SKIPPED),
        *(result(Verdict.FAIL, rule=rule) for rule in ("timed-out", "flooded", "grew")),
    ],
)
def test_what_may_end_otherwise_next_time_is_not_kept(tmp_path: Path, passing: GateResult) -> None:
    cache = VerdictCache(tmp_path / "v", 10_000)
    cache.put("a" * 64, passing)
    assert cache.get("a" * 64) is None


def test_a_damaged_file_is_a_miss_and_goes_away(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "v", 10_000)
    for change in (lambda data: data[:-3], lambda data: data.replace(b"pass", b"fail"), lambda data: b""):
        cache.put("a" * 64, result())
        path = tmp_path / "v" / ("a" * 64)
        path.write_bytes(change(path.read_bytes()))
        assert cache.get("a" * 64) is None
        assert not path.exists()


def test_the_verdict_of_one_key_is_none_of_another(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "v", 10_000)
    cache.put("a" * 64, result())
    (tmp_path / "v" / ("a" * 64)).rename(tmp_path / "v" / ("b" * 64))
    assert cache.get("b" * 64) is None


def test_it_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    size = len(result(message="x" * 500).model_dump_json(exclude_none=True)) + 64
    cache = VerdictCache(tmp_path / "v", 5 * size)
    for number in range(5):
        key = f"{number}" * 64
        cache.put(key, result(message="x" * 500))
        os.utime(tmp_path / "v" / key, (number, number))
    assert cache.get("0" * 64) is not None  # used now, so that 1 is the oldest
    cache.put("9" * 64, result(message="x" * 500))
    there = [number for number in "0123459" if (tmp_path / "v" / (number * 64)).exists()]
    assert there == ["0", "3", "4", "9"]
    assert cache.bytes == sum(path.stat().st_size for path in (tmp_path / "v").iterdir()) <= 5 * size


def test_without_room_nothing_is_kept(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "v", 0)
    cache.put("a" * 64, result())
    assert cache.get("a" * 64) is None


def test_no_two_lists_of_parts_have_one_key() -> None:
    assert len({key_of([b"ab", b"c"]), key_of([b"a", b"bc"]), key_of([b"abc"]), key_of([b"abc", b""])}) == 4
