"""The critical path of finished tasks, in virtual time where every duration is known."""

from __future__ import annotations

from protocol.header import Header
from protocol.messages.failure import Category, Failure
from tests.unit.simulation import Answer, final_of, stack, task_of

TOOK = {"A": 1_000, "B": 3_000, "C": 500, "D": 200}


def timed(header: Header, body: bytes) -> Answer:
    return TOOK[header.step or ""], final_of("fine")


def test_path_slack_and_parallelism_of_a_diamond() -> None:
    world = stack(timed)
    steps: list[dict[str, object]] = [
        {"id": "A"},
        {"id": "B", "inputs": ["A.out"]},
        {"id": "C", "inputs": ["A.out"]},
        {"id": "D", "inputs": ["B.out", "C.out"]},
    ]
    result = world.finish(world.submit(task_of(steps)))
    report = result.critical_path
    assert report is not None
    inferred = [segment.step for segment in report.path if segment.what == "inference"]
    assert inferred == ["A", "B", "D"]
    assert report.slack_ms["B"] == 0
    assert abs(report.slack_ms["C"] - 2_500) < 20
    assert report.path[0].what == "planning"
    assert report.path[0].start_ms == result.created_ms
    assert report.path[-1].end_ms == result.ended_ms
    assert all(one.end_ms == two.start_ms for one, two in zip(report.path, report.path[1:], strict=False))
    assert sum(segment.end_ms - segment.start_ms for segment in report.path) == report.wall_ms
    assert report.overlapping_steps == 2
    assert report.parallelism > 1


def test_waiting_for_a_slot_and_failed_attempts_are_segments_of_their_own() -> None:
    tries = {"n": 0}

    def answer(header: Header, body: bytes) -> Answer:
        if header.step == "B":
            tries["n"] += 1
            if tries["n"] == 1:
                return 400, Failure(code="x", category=Category.CODE, origin="test", message="once")
        return 1_000, final_of("fine")

    world = stack(answer, slots=1)
    result = world.finish(world.submit(task_of([{"id": "A"}, {"id": "B"}])))
    report = result.critical_path
    assert report is not None
    parts = [(segment.step, segment.what) for segment in report.path]
    assert ("B", "queueing") in parts
    assert ("B", "retry") in parts
    assert sum(segment.end_ms - segment.start_ms for segment in report.path) == report.wall_ms
