"""Log lines are JSON, carry only declared fields, and never grow a file without bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.kit import logs
from services.kit.clock import VirtualClock
from services.kit.logs import Log, LogEvent

DONE = LogEvent("step.done", "task step took_ms")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_has_time_level_service_event_and_its_fields(tmp_path: Path) -> None:
    log = Log(tmp_path, "worker", VirtualClock(1_700_000_000_123))
    log.write(DONE, task="T1", took_ms=12, step=None)
    log.close()
    assert lines(tmp_path / "worker.jsonl") == [
        {
            "ts": "2023-11-14T22:13:20.123Z",
            "level": "info",
            "service": "worker",
            "event": "step.done",
            "task": "T1",
            "took_ms": 12,
        }
    ]


def test_a_field_that_is_not_declared_raises_and_writes_nothing(tmp_path: Path) -> None:
    log = Log(tmp_path, "worker", VirtualClock())
    with pytest.raises(KeyError, match="'prompt'"):
        log.write(DONE, task="T1", prompt="secret")
    with pytest.raises(KeyError, match="'tas'"):
        log.write(DONE, tas="a part of a declared name is not declared")
    log.close()
    assert (tmp_path / "worker.jsonl").read_text() == ""


def test_hostile_text_stays_one_line_and_is_cut(tmp_path: Path) -> None:
    log = Log(tmp_path, "worker", VirtualClock())
    log.write(DONE, task="a\nb\u2028c\ud800" + "x" * 10_000)
    log.close()
    raw = (tmp_path / "worker.jsonl").read_bytes()
    assert raw.count(b"\n") == 1
    assert len(str(json.loads(raw)["task"])) == 2_000


def test_a_full_file_is_moved_aside_once_and_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MAX_FILE_BYTES", 1_000)
    log = Log(tmp_path, "worker", VirtualClock())
    for number in range(100):
        log.write(DONE, took_ms=number)
    log.close()
    old, new = lines(tmp_path / "worker.jsonl.1"), lines(tmp_path / "worker.jsonl")
    assert new[-1]["took_ms"] == 99
    assert [line["took_ms"] for line in old + new] == list(range(100 - len(old) - len(new), 100))
    assert {path.name for path in tmp_path.iterdir()} == {"worker.jsonl", "worker.jsonl.1"}
    assert all(path.stat().st_size <= 1_000 for path in tmp_path.iterdir())


def test_a_restarted_process_appends(tmp_path: Path) -> None:
    for number in range(2):
        log = Log(tmp_path, "worker", VirtualClock())
        log.write(DONE, took_ms=number)
        log.close()
    assert len(lines(tmp_path / "worker.jsonl")) == 2


def test_a_log_is_private_to_the_user(tmp_path: Path) -> None:
    Log(tmp_path / "logs", "worker", VirtualClock()).close()
    assert (tmp_path / "logs" / "worker.jsonl").stat().st_mode & 0o077 == 0


def test_a_batched_log_writes_at_flush_with_the_time_of_each_event(tmp_path: Path) -> None:
    clock, path = VirtualClock(1_700_000_000_123), tmp_path / "worker.jsonl"
    log = Log(tmp_path, "worker", clock, batched=True)
    log.write(DONE, task="T1")
    clock.advance_ms(90)
    log.write(DONE, task="T2")
    assert lines(path) == []
    log.flush()
    told = [(line["task"], line["ts"]) for line in lines(path)]
    assert told == [("T1", "2023-11-14T22:13:20.123Z"), ("T2", "2023-11-14T22:13:20.213Z")]
    log.close()
    assert len(lines(path)) == 2, "nothing is written twice"
