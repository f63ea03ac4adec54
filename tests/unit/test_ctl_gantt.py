from __future__ import annotations

from protocol.messages.result import (
    AttemptView,
    CriticalPath,
    Segment,
    StepState,
    StepView,
    TaskState,
    TaskView,
)
from services.ctl.gantt import gantt, path_rows, path_summary

START = 1_700_000_000_000


def attempt(queued: int, started: int, inferred: int, ended: int, number: int = 1) -> AttemptView:
    return AttemptView(
        number=number,
        role="worker",
        model="worker",
        key="k",
        queued_ms=START + queued,
        started_ms=START + started,
        inferred_ms=START + inferred,
        ended_ms=START + ended,
    )


def step(ident: str, *attempts: AttemptView, state: StepState = StepState.DONE) -> StepView:
    return StepView(id=ident, actor="worker", action="", state=state, needs=[], attempts=list(attempts))


def segment(name: str | None, what: str, start: int, end: int) -> Segment:
    return Segment.model_validate({"step": name, "what": what, "start_ms": START + start, "end_ms": START + end})


def view(steps: list[StepView], path: list[Segment], wall: int) -> TaskView:
    critical = CriticalPath(wall_ms=wall, work_ms=wall, parallelism=1.5, path=path, slack_ms={}, overlapping_steps=2)
    return TaskView(
        task_id="t",
        state=TaskState.SUCCEEDED,
        objective="o",
        task_type="doc",
        priority="batch",
        created_ms=START,
        last_seq=1,
        steps=steps,
        critical_path=critical,
    )


EXAMPLE = view(
    [
        step("S1", attempt(100, 200, 500, 600)),
        step("S2", attempt(100, 100, 300, 300)),
        step("S3", state=StepState.SKIPPED),
    ],
    [
        segment(None, "planning", 0, 100),
        segment("S1", "queueing", 100, 200),
        segment("S1", "inference", 200, 500),
        segment("S1", "gates", 500, 600),
        segment(None, "checks", 600, 1_000),
    ],
    1_000,
)


def test_bars_stand_where_the_time_was_spent() -> None:
    assert gantt(EXAMPLE, 10)[:4] == [
        "task   |p     cccc|",
        "S1   * | .===g    | 0.50 s",
        "S2     | ==       | 0.20 s",
        "S3     |          | skipped",
    ]


def test_the_axis_names_the_wall_clock() -> None:
    assert gantt(EXAMPLE, 20)[-1].split() == ["0", "s", "1.00", "s"]


def test_only_plain_ascii_is_drawn() -> None:
    assert all(line.isascii() and line.isprintable() for line in gantt(EXAMPLE, 40))


def test_a_stretch_too_short_for_the_scale_is_still_seen() -> None:
    short = view([step("S1", attempt(999, 999, 1_000, 1_000))], [segment("S1", "inference", 999, 1_000)], 100_000)
    assert "=" in gantt(short, 20)[1]


def test_every_attempt_of_a_step_is_drawn() -> None:
    twice = view(
        [step("S1", attempt(0, 0, 400, 500), attempt(500, 600, 1_000, 1_000, number=2))],
        [segment("S1", "inference", 0, 1_000)],
        1_000,
    )
    assert gantt(twice, 10)[1] == "S1   * |====g.====| 1.00 s"


def test_an_attempt_that_never_started_and_a_wall_of_nothing_do_no_harm() -> None:
    lost = AttemptView(number=1, role="r", model="m", key="k", queued_ms=START)
    assert gantt(view([step("S1", lost, state=StepState.CANCELLED)], [segment("S1", "queueing", 0, 0)], 0), 10)


def test_a_task_without_a_critical_path_has_no_picture() -> None:
    assert gantt(EXAMPLE.model_copy(update={"critical_path": None}), 10) == []


def test_the_path_is_listed_with_its_shares() -> None:
    assert EXAMPLE.critical_path is not None
    assert path_rows(EXAMPLE.critical_path)[2] == ("S1", "inference", "0.30 s", "30 %")
    assert "parallelism 1.50, 2 steps overlapped" in path_summary(EXAMPLE.critical_path)
