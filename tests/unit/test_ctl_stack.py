from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from protocol.messages.session import PeerReport, StatusReport
from services.ctl.readiness import CRASHES, Readiness, merge
from services.ctl.service_logs import Follower, last_lines, telling_line
from services.ctl.stack_files import registry_changed, write_programs
from services.ctl.status import slots
from services.ctl.supervisor import ProcessInfo
from services.kit.config import CHECKOUT, Home, load_home
from services.kit.registry import load_registry


def process(name: str, state: str = "running", pid: int = 1) -> ProcessInfo:
    return ProcessInfo(name, state, pid, "pid 1, uptime 0:00:05", 5, Path(f"/logs/{name}.out"))


def peer(name: str, state: str = "ready", reason: str | None = None) -> PeerReport:
    return PeerReport(
        service=name,
        epoch="e",
        state=state,
        reason=reason,
        capabilities=["gate"],
        granted=12,
        used=9,
        in_flight=["k1"],
        silent_ms=0,
        pid=1,
        loop_lag_ms=0,
        rss_bytes=0,
        metrics={},
    )


def report(*peers: PeerReport) -> StatusReport:
    return StatusReport(hub_epoch="h", hub_pid=1, uptime_ms=1, peers=list(peers), queued={}, tasks={}, counters={})


def test_a_running_process_is_not_ready_before_the_hub_says_so() -> None:
    readiness = Readiness()
    readiness.observe([process("scheduler"), process("gates")], None)
    assert {row.name: row.state for row in readiness.rows} == {"scheduler": "starting", "gates": "starting"}
    readiness.observe([process("scheduler"), process("gates")], report())
    assert [row.name for row in readiness.missing] == ["gates"]
    readiness.observe([process("scheduler"), process("gates")], report(peer("gates", "loading", "reading the model")))
    assert readiness.missing[0].reason == "reading the model"
    readiness.observe([process("scheduler"), process("gates")], report(peer("gates")))
    assert readiness.ready


def test_a_model_that_loads_on_demand_does_not_hold_up_the_stack() -> None:
    readiness = Readiness()
    readiness.observe([process("scheduler"), process("gates")], report(peer("gates", "parked")))
    assert readiness.ready


def test_a_service_that_works_only_in_part_does_not_hold_up_the_stack() -> None:
    readiness = Readiness()
    readiness.observe([process("scheduler"), process("gates")], report(peer("gates", "degraded", "no sandbox")))
    assert readiness.ready


def test_a_service_that_the_hub_leaves_alone_is_degraded_with_the_reason_whatever_it_says_of_itself() -> None:
    bad = peer("inference-a").model_copy(update={"capabilities": ["infer.a"]})
    told = report(bad, peer("inference-b")).model_copy(update={"circuits": {"infer.a": "circuit open: HTTP 500"}})
    rows = {row.name: row for row in merge([process("inference-a"), process("inference-b")], told)}
    assert (rows["inference-a"].state, rows["inference-a"].reason) == ("degraded", "circuit open: HTTP 500")
    assert (rows["inference-b"].state, rows["inference-b"].reason) == ("ready", "")


def test_an_empty_stack_is_not_ready() -> None:
    assert not Readiness().ready


def test_a_dead_process_is_not_ready_although_the_hub_has_not_noticed_yet() -> None:
    rows = merge([process("gates", "backoff", 0)], report(peer("gates")))
    assert {row.name: row.state for row in rows}["gates"] == "backoff"


def test_a_service_that_crashes_again_and_again_is_hopeless() -> None:
    readiness = Readiness()
    for pid in range(1, CRASHES + 1):
        assert not readiness.hopeless
        readiness.observe([process("scheduler"), process("memory", "starting", pid)], report())
    assert [row.name for row in readiness.hopeless] == ["memory"]
    readiness.observe([process("scheduler"), process("memory", pid=9)], report(peer("memory")))
    assert not readiness.hopeless


def test_only_changes_are_reported() -> None:
    readiness = Readiness()
    assert len(readiness.observe([process("scheduler")], None)) == 1
    assert readiness.observe([process("scheduler")], None) == []


def test_free_slots_are_what_is_left_of_running_totals() -> None:
    assert slots(peer("gates")) == "1/4"


def registry_home(tmp_path: Path) -> Home:
    return load_home({"TIERLINE_HOME": str(tmp_path / "home"), "TIERLINE_REGISTRY": str(CHECKOUT / "registry")}).make()


def test_every_model_gets_a_program_and_a_model_that_left_takes_its_own_along(tmp_path: Path) -> None:
    home = registry_home(tmp_path)
    registry = load_registry(home.registry, home.models, check_files=False)
    (home.conf_d / "inference-gone.conf").write_text("[program:inference-gone]\n")
    (home.conf_d / "local.conf").write_text("; the operator's own\n")
    changed = write_programs(home, registry)
    assert changed == {"inference-gone", *(f"inference-{name}" for name in registry.models)}
    text = (home.conf_d / "inference-worker.conf").read_text()
    assert "[program:inference-worker]" in text
    assert "services.inference --model worker" in text
    assert "@MODEL@" not in text
    assert (home.conf_d / "local.conf").exists()
    assert not (home.conf_d / "inference-gone.conf").exists()
    assert write_programs(home, registry) == set()


def test_a_changed_registry_is_noticed_once_and_a_first_start_is_no_change(tmp_path: Path) -> None:
    home = registry_home(tmp_path)
    registry = load_registry(home.registry, home.models, check_files=False)
    assert not registry_changed(home, registry)
    assert not registry_changed(home, registry)
    assert registry_changed(home, replace(registry, digest="another"))
    assert not registry_changed(home, replace(registry, digest="another"))


def log_line(event: str, level: str = "info", ts: str = "2026-01-01T00:00:02.000Z") -> str:
    return json.dumps({"ts": ts, "level": level, "service": "memory", "event": event})


def test_the_telling_line_is_the_last_error_of_this_start(tmp_path: Path) -> None:
    lines = [log_line("old", "error", "2025-01-01T00:00:00.000Z"), log_line("db.locked", "error"), log_line("after")]
    (tmp_path / "memory.jsonl").write_text("\n".join(lines) + "\n")
    found = telling_line(tmp_path, "memory", None, crashed=False, since="2026-01-01T00:00:00.000000Z")
    assert found is not None
    assert "db.locked" in found[1]
    assert telling_line(tmp_path, "memory", None, crashed=False, since="2027") is None


def test_a_crash_explains_itself_on_standard_error(tmp_path: Path) -> None:
    output = tmp_path / "memory.out"
    output.write_text("Traceback (most recent call last):\nModuleNotFoundError: No module named 'kuzu'\n\n")
    (tmp_path / "memory.jsonl").write_text(log_line("warned", "warning") + "\n")
    found = telling_line(tmp_path, "memory", output, crashed=True, since="")
    assert found == (output, "ModuleNotFoundError: No module named 'kuzu'")
    assert telling_line(tmp_path, "nothing", tmp_path / "none.out", crashed=True, since="") is None


def test_following_shows_each_line_once_in_order_of_time_over_all_services(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(log_line("a1", ts="1") + "\n" + log_line("a2", ts="3") + "\n")
    (tmp_path / "b.jsonl").write_text(log_line("b1", ts="2") + "\n")
    follower = Follower(tmp_path, [])
    assert [line.fields["event"] for line in follower.begin(10)] == ["a1", "b1", "a2"]
    assert follower.new_lines() == []
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write(log_line("a3", ts="4")[:20])
        stream.flush()
        assert follower.new_lines() == []  # half a line is not a line yet
        stream.write(log_line("a3", ts="4")[20:] + "\n")
    (tmp_path / "c.jsonl").write_text(log_line("c1", ts="5") + "\n")  # a service that has just started
    assert [line.fields["event"] for line in follower.new_lines()] == ["a3", "c1"]


def test_following_survives_rotation_and_lines_that_are_not_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(log_line("a1") + "\n")
    follower = Follower(tmp_path, ["a"])
    assert follower.begin(0) == []
    path.rename(tmp_path / "a.jsonl.1")
    path.write_text("plain words \u2028 of a library\n[1]\n")
    assert [line.raw for line in follower.new_lines()] == ["plain words \u2028 of a library", "[1]"]
    path.unlink()
    assert follower.new_lines() == []
    assert last_lines(path, 5) == []
