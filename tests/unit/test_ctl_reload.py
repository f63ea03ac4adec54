"""Who has followed a reload and whose program may be taken away, from what the hub and supervisord say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol.messages.session import PeerReport, StatusReport
from services.ctl.reload import degraded, drained, waiting
from services.ctl.status import lags
from tests.unit.simulation import shipped_registry

REGISTRY = shipped_registry()
FAR = {"engine": "openai", "path": None, "base_url": "http://far:8080/v1"}
PROGRAMS = ["scheduler", "planner", *(f"inference-{name}" for name in REGISTRY.models)]


def peer(service: str, **fields: Any) -> PeerReport:
    values: dict[str, Any] = {
        "service": service, "epoch": "e", "state": "ready", "capabilities": ["x"], "granted": 1, "used": 0,
        "in_flight": [], "silent_ms": 0, "pid": 1, "loop_lag_ms": 0, "rss_bytes": 0, "metrics": {},
        "registry": REGISTRY.digest,
    }  # fmt: skip
    return PeerReport.model_validate(values | fields)


def report(*more: PeerReport, registry: str | None = REGISTRY.digest) -> StatusReport:
    peers = {one: peer(one) for one in PROGRAMS[1:]} | {one.service: one for one in more}
    return StatusReport(
        hub_epoch="h", hub_pid=1, uptime_ms=1, peers=list(peers.values()), queued={}, tasks={}, counters={},
        registry=registry,
    )  # fmt: skip


def test_all_have_followed() -> None:
    memory = peer("memory", registry=None)  # it reads none
    assert waiting(REGISTRY, report(memory), [*PROGRAMS, "memory"]) == []


def test_who_lags_loads_is_missing_or_has_work_left_is_waited_for() -> None:
    old = "0" * 64
    late = report(
        peer("planner", registry=old),
        peer("inference-front", state="loading"),
        peer("inference-gone", registry=old, state="draining", in_flight=["k"]),
        peer("inference-kept", registry=old),
        registry=old,
    )
    programs = [*PROGRAMS, "inference-gone", "inference-kept"]
    told = {one.service: one.why for one in waiting(REGISTRY, late, programs)}
    assert told == {
        "scheduler": "the hub works with another registry",
        "planner": "reads the registry",
        "inference-front": "is loading",
        "inference-gone": "leaves when its work has ended: 1 calls run",
        "inference-kept": "leaves when its work has ended: running work still uses it",
    }
    assert [one.service for one in waiting(REGISTRY, None, programs)] == ["scheduler"]


def test_a_model_that_has_followed_and_does_not_work_is_told_with_its_reason() -> None:
    seen = report(
        peer("gates", state="degraded", reason="no sandbox"),
        peer("inference-front", state="degraded", reason="the header of front.gguf is damaged"),
        peer("inference-worker", state="degraded"),
        peer("inference-gone", state="degraded", reason="not of this registry"),
    )
    assert [(one.service, one.why) for one in degraded(REGISTRY, seen)] == [
        ("inference-front", "the header of front.gguf is damaged"),
        ("inference-worker", "it does not say why; see: tierline tail inference-worker"),
    ]
    assert degraded(REGISTRY, report()) == degraded(REGISTRY, None) == []


def test_a_degraded_model_that_reads_the_registry_still_is_waited_for_and_not_judged() -> None:
    late = report(peer("inference-front", state="degraded", reason="of before", registry="0" * 64))
    assert degraded(REGISTRY, late) == []
    assert [one.service for one in waiting(REGISTRY, late, PROGRAMS)] == ["inference-front"]


def test_a_server_elsewhere_that_does_not_answer_is_no_fault_of_the_registry() -> None:
    remote = replace(REGISTRY, models={**REGISTRY.models, "far": REGISTRY.models["front"].model_copy(update=FAR)})
    assert degraded(remote, report(peer("inference-far", state="degraded", reason="refused"))) == []


def test_only_a_program_without_work_is_taken_away() -> None:
    programs = [*PROGRAMS, "inference-busy", "inference-done", "inference-dead", "inference-back"]
    seen = report(
        peer("inference-busy", state="draining", in_flight=["k"]),
        peer("inference-done", state="draining"),
    )
    assert drained(REGISTRY, seen, programs, kept=["models.back"]) == ["inference-done", "inference-dead"]


def test_a_service_lags_that_works_with_another_registry_than_the_hub() -> None:
    assert lags(peer("planner", registry="0" * 64), report())
    assert not lags(peer("planner"), report())
    assert not lags(peer("memory", registry=None), report())
