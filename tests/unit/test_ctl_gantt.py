"""The timetable on a terminal: what is drawn, what is marked, and that a wide plan does not flood the screen."""

from __future__ import annotations

import pytest

from protocol.messages.result import (
    AttemptView,
    CriticalPath,
    PredictedPath,
    Segment,
    StepState,
    StepView,
    TaskState,
    TaskView,
)
from services.ctl.gantt import MAX_ROWS, gantt, path_rows, path_summary
from services.ctl.timetable import most_at_work, notable, timetable

START = 1_700_000_000_000
FRAME = len("S1   || 99 min 59 s")
"""Columns beside the axis for labels of two characters, such as `S1` would have were `task` not longer."""


def segment(name: str | None, what: str, start: int, end: int) -> Segment:
    return Segment.model_validate({"step": name, "what": what, "start_ms": START + start, "end_ms": START + end})


def attempt(*parts: tuple[str, int, int], number: int = 1, open_: bool = False, role: str = "worker") -> AttemptView:
    return AttemptView(
        number=number,
        role=role,
        model="worker",
        key="k",
        queued_ms=START + parts[0][1],
        ended_ms=None if open_ else START + parts[-1][2],
        segments=[segment(None, *part) for part in parts],
    )


def step(ident: str, *attempts: AttemptView, state: StepState = StepState.DONE) -> StepView:
    return StepView(id=ident, actor="worker", action="", state=state, needs=[], attempts=list(attempts))


def view(steps: list[StepView], path: list[Segment], wall: int, **fields: object) -> TaskView:
    critical = CriticalPath(wall_ms=wall, work_ms=wall, parallelism=1.5, path=path, slack_ms={}, overlapping_steps=2)
    return TaskView(
        task_id="t",
        state=TaskState.SUCCEEDED,
        objective="o",
        task_type="doc",
        priority="batch",
        created_ms=START,
        ended_ms=START + wall,
        last_seq=1,
        steps=steps,
        critical_path=critical,
    ).model_copy(update=fields)


def lines(task: TaskView, axis: int, now: int = 0) -> list[str]:
    return [line.text for line in gantt(task, axis + FRAME + 2, START + now)]


EXAMPLE = view(
    [
        step("S1", attempt(("queueing", 100, 200), ("inference", 200, 500), ("gates", 500, 600))),
        step("S2", attempt(("inference", 100, 300))),
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
    assert lines(EXAMPLE, 10)[:4] == [
        "task   |p     cccc|",
        "S1   * | .===g    | 0.50 s",
        "S2     | ==       | 0.20 s",
        "S3     |          | skipped",
    ]


def test_steps_of_the_critical_path_are_told_from_others() -> None:
    assert [line.critical for line in gantt(EXAMPLE, 80, START)[:4]] == [False, True, False, False]


def test_the_axis_names_the_wall_clock_and_the_legend_only_what_is_drawn() -> None:
    axis, *legend = lines(EXAMPLE, 60)[4:]
    assert axis.split() == ["0", "s", "1.00", "s"]
    assert legend[-1].endswith("* on the critical path")
    assert "= inference" in legend[0]
    assert not any("retry" in line or "loading" in line for line in legend)


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_all_is_plain_ascii(columns: int) -> None:
    long = step("x" * 64, attempt(("inference", 0, 1_000)))
    task = view([*EXAMPLE.steps, long], EXAMPLE.critical_path.path if EXAMPLE.critical_path else [], 6_000_000)
    drawn = gantt(task, columns, START)
    assert all(len(line.text) <= columns for line in drawn)
    assert all(line.text.isascii() and line.text.isprintable() for line in drawn)


def test_a_stretch_too_short_for_the_scale_is_still_seen() -> None:
    short = view([step("S1", attempt(("inference", 999, 1_000)))], [segment("S1", "inference", 999, 1_000)], 100_000)
    assert "=" in lines(short, 20)[1]


def test_every_attempt_of_a_step_has_a_line_with_its_segments() -> None:
    first = attempt(("retry", 0, 400))
    second = attempt(("backoff", 400, 500), ("loading", 500, 600), ("inference", 600, 1_000), number=2)
    task = view([step("S1", first, second)], [segment("S1", "inference", 0, 1_000)], 1_000)
    assert lines(task, 10)[1:3] == ["S1#1 * |rrrr      | 0.40 s", "S1#2 * |    bl====| 0.60 s"]


def test_a_running_task_is_drawn_until_now() -> None:
    task = view(
        [
            step("S1", attempt(("queueing", 100, 200), open_=True), state=StepState.INFERRING),
            step("S2", state=StepState.WAITING),
        ],
        [],
        0,
        critical_path=None,
        ended_ms=None,
        state=TaskState.RUNNING,
    )
    assert lines(task, 10, now=1_000)[:3] == [
        "task   |          |",
        "S1     | .========| 0.90 s",
        "S2     |          | waiting",
    ]


def test_an_attempt_that_never_started_and_a_wall_of_nothing_do_no_harm() -> None:
    lost = AttemptView(number=1, role="r", model="m", key="k", queued_ms=START)
    assert gantt(view([step("S1", lost, state=StepState.CANCELLED)], [segment("S1", "queueing", 0, 0)], 0), 10, START)


def test_a_task_without_steps_has_no_picture() -> None:
    assert gantt(view([], [segment(None, "planning", 0, 100)], 100), 80, START) == []


def wide(count: int) -> TaskView:
    """`count` steps, four at a time; every hundredth was tried again, one failed, S7 is on the path."""
    steps = []
    for n in range(count):
        begin = n // 4 * 100
        bar = (
            attempt(("queueing", 0, begin), ("inference", begin, begin + 100))
            if begin
            else attempt(("inference", 0, 100))
        )
        again = attempt(("inference", begin + 100, begin + 101), number=2)
        tries = (bar, again) if n % 100 == 99 else (bar,)
        steps.append(step(f"S{n}", *tries, state=StepState.FAILED if n == 500 else StepState.DONE))
    return view(steps, [segment("S7", "inference", 0, 25 * count)], 25 * count)


def test_a_plan_of_a_thousand_steps_is_summed_up_and_not_printed() -> None:
    task = wide(1_000)
    drawn = gantt(task, 100, START)
    assert len(drawn) <= MAX_ROWS + 8
    texts = [line.text for line in drawn]
    assert texts[1].startswith("worker")
    assert set(texts[1].split("|")[1]) <= {"4", "5"}
    assert texts[1].endswith("1000 steps")
    shown = {line.split()[0].partition("#")[0] for line in texts[2:] if "|" in line}
    assert {"S7", "S500", "S99", "S999"} <= shown
    assert any("1 of all 1000 failed" in text for text in texts)


def test_notable_steps_leave_room_for_the_path_however_much_went_wrong() -> None:
    steps = [step(f"S{n}", attempt(("inference", n, n + 1)), state=StepState.FAILED) for n in range(100)]
    steps += [step(f"P{n}", attempt(("inference", n, n + 1))) for n in range(100)]
    task = view(steps, [segment(f"P{n}", "inference", n, n + 1) for n in range(100)], 100)
    chosen = [one.id for one in notable(task, 20)]
    assert len(chosen) == 20
    assert notable(EXAMPLE, 20) == EXAMPLE.steps
    assert sum(name.startswith("S") for name in chosen) >= 5
    assert sum(name.startswith("P") for name in chosen) >= 5


def test_how_many_are_at_work_is_counted_per_column() -> None:
    rows = timetable(wide(8), START).rows
    assert most_at_work(rows, [START, START + 50, START + 100, START + 150, START + 200, START + 300]) == [
        4,
        4,
        4,
        4,
        0,
    ]


def test_the_path_is_listed_with_its_shares_and_a_long_one_by_kind() -> None:
    assert EXAMPLE.critical_path is not None
    assert path_rows(EXAMPLE.critical_path)[2] == ("S1", "inference", "0.30 s", "30 %")
    long = [segment(f"S{n}", "inference" if n % 2 else "queueing", n * 10, n * 10 + 10) for n in range(100)]
    critical = EXAMPLE.critical_path.model_copy(update={"path": long})
    assert path_rows(critical) == [
        ("50 stretches", "queueing", "0.50 s", "50 %"),
        ("50 stretches", "inference", "0.50 s", "50 %"),
    ]


def test_the_summary_sets_what_was_predicted_beside_what_came() -> None:
    assert EXAMPLE.critical_path is not None
    critical = EXAMPLE.critical_path.model_copy(
        update={
            "predicted": PredictedPath(length_ms=2_500, steps=[f"S{n}" for n in range(20)]),
            "critical_steps": 3,
            "total_steps": 4,
            "lower_bound_ms": 900,
            "bound_by": "worker",
        }
    )
    text = "\n".join(path_summary(critical))
    assert "parallelism 1.50, 2 steps overlapped; no schedule of these attempts takes less than 0.90 s" in text
    assert "achieved:  S1, 0.30 s of inference" in text
    assert "predicted: S0 -> S1 -> S2 -> S3 -> S4 -> S5 -> (11 more) -> S17 -> S18 -> S19, 2.50 s" in text
    assert "CriticalSteps 3 of 4 steps" in text
