"""The report of any finished task adds up: random graphs, outcomes, gates, deaths, restarts, cancels and deadlines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import event, given, settings
from hypothesis import strategies as st

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.result import AttemptView, CancelQuery, CriticalPath, Segment, StepState, TaskView
from protocol.messages.task import Extend
from tests.unit.simulation import Answer, World, final_of, stack, task_of

BAD = ("FORMAT", "CODE", "TIMEOUT", "RESOURCE", "PEER", "POLICY")
answers = st.lists(
    st.tuples(st.integers(0, 2_500), st.sampled_from(("ok",) * 12 + BAD)),
    min_size=1,
    max_size=12,
)
troubles = st.lists(
    st.tuples(
        st.integers(0, 4_000),
        st.sampled_from(
            [
                "kill worker",
                "kill specialist",
                "kill gates",
                "kill planner",
                "kill hub",
                "freeze worker",
                "cancel",
                "cancel S1",
                "extend",
            ]
        ),
        st.integers(0, 5_000),
    ),
    max_size=4,
)
steps_of = st.lists(
    st.tuples(
        st.lists(st.integers(0, 8), max_size=3),
        st.sampled_from(["worker", "worker", "coder", "extractor"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(
    steps=steps_of,
    outcomes=answers,
    happens=troubles,
    slots=st.integers(1, 3),
    final_gates=st.booleans(),
    deadline_s=st.sampled_from([None, None, None, 3.0]),
    items=st.integers(-1, 4),
)
def test_segments_cover_the_wall_clock_of_any_finished_task(
    steps: list[tuple[list[int], str, bool]],
    outcomes: list[tuple[int, str]],
    happens: list[tuple[int, str, int]],
    slots: int,
    final_gates: bool,
    deadline_s: float | None,
    items: int,
) -> None:
    turns = iter(range(1_000_000))

    def infer(header: Header, body: bytes) -> Answer:
        took_ms, word = outcomes[next(turns) % len(outcomes)]
        if word == "ok":
            return took_ms, final_of(json.dumps(["item"] * items) if header.step == "L" else "fine")
        return took_ms, Failure(code="x", category=Category(word), origin="test", message=word)

    world = stack(infer, slots=slots)
    world.peers["gates"].answer = lambda header, body: verdicts(world, body, next(turns))
    specs: list[dict[str, object]] = [
        {"id": f"S{i}", "actor": actor, "inputs": sorted({f"S{j}.out" for j in needs if j < i})}
        | ({"gates": ["lint"]} if gated else {})
        for i, (needs, actor, gated) in enumerate(steps)
    ]
    if items >= 0:  # a list, a step mapped over it, and one that reads what came of it
        specs += [
            {"id": "L", "outputs": [{"name": "items", "kind": "json"}]},
            {"id": "M", "map_over": "items", "outputs": [{"name": "parts"}]},
            {"id": "J", "inputs": ["parts", "S0.out"]},
        ]
    ir = task_of(specs, gates=["lint"] if final_gates else [], deadline_s=deadline_s)
    task = world.submit(ir)
    for at_ms, what, for_ms in happens:
        world.run_for(at_ms)
        disturb(world, task, what, for_ms)
    view = world.finish(task, limit_ms=900_000)
    event(view.state.value)
    assert view.critical_path is not None
    check_path(view, view.critical_path)
    check_attempts(view)
    check_figures(view, view.critical_path)


def verdicts(world: World, body: bytes, turn: int) -> Answer:
    """Gates that wait a little before they begin, by the clock of their own process, and fail every seventh time."""
    request = unpack_body(GateRequest, body)
    verdict = Verdict.FAIL if turn % 7 == 6 else Verdict.PASS
    begun = world.now + 30
    results = [
        GateResult(gate=name, verdict=verdict, category=Category.CODE, started_ms=begun, ended_ms=begun + 50)
        for name in request.gates
    ]
    return 90, GateFinal(results=results)


def disturb(world: World, task: str, what: str, for_ms: int) -> None:
    verb, _, whom = what.partition(" ")
    if verb == "cancel":
        world.client("task.cancel", CancelQuery(task_id=task, step=whom or None))
    elif verb == "extend":
        more = {"id": f"X{world.now}", "actor": "worker", "action": "more", "outputs": [{"name": f"x{world.now}"}]}
        world.client("task.extend", Extend(task_id=task, steps=[more]))
    elif whom == "hub":
        world.kill_hub()
        world.run_for(for_ms)
        world.boot_hub()
    else:
        peer = world.peers[whom if whom in world.peers else f"inference-{whom}"]
        if verb == "kill":
            peer.kill()
            world.run_for(for_ms)
            peer.start()
        else:
            peer.frozen = True
            world.run_for(for_ms + 8_000)
            peer.thaw()


def check_path(view: TaskView, report: CriticalPath) -> None:
    assert view.ended_ms is not None
    assert report.wall_ms == view.ended_ms - view.created_ms
    if report.wall_ms == 0:
        assert report.path == []
        return
    assert contiguous(report.path)
    assert report.path[0].start_ms == view.created_ms
    assert report.path[0].what == "planning"
    assert report.path[-1].end_ms == view.ended_ms
    late = {one.step for one in report.path if one.what == "waiting"}
    assert all((step or "").startswith("X") for step in late), "only a step that was added later has no cause to wait"
    # What the path says of a step is what its attempts say of it.
    told = {(step.id, one.what, one.start_ms, one.end_ms) for step in view.steps for one in segments(step.attempts)}
    for one in report.path:
        if one.step is not None and one.what != "waiting":
            assert (one.step, one.what, one.start_ms, one.end_ms) in told


def check_attempts(view: TaskView) -> None:
    for step in view.steps:
        for attempt in step.attempts:
            end = attempt.ended_ms or step.ended_ms
            assert end is not None, "no attempt of a finished task is open"
            assert contiguous(attempt.segments)
            if end > attempt.queued_ms:
                assert attempt.segments[0].start_ms == attempt.queued_ms
                assert attempt.segments[-1].end_ms == end
            if attempt.failure is not None:
                assert not {"inference", "gates"} & {one.what for one in attempt.segments}
        assert all(one.ended_ms == two.queued_ms for one, two in pairwise(step.attempts))


def check_figures(view: TaskView, report: CriticalPath) -> None:
    begun = {step.id for step in view.steps if step.ready_ms is not None}
    assert report.slack_ms.keys() == begun
    assert all(slack >= 0 for slack in report.slack_ms.values())
    on_path = [one.step for one in report.path if one.step is not None]
    if on_path:
        assert report.slack_ms[on_path[-1]] == 0
    assert report.lower_bound_ms <= report.wall_ms
    assert report.work_ms >= sum(
        one.end_ms - one.start_ms
        for one in report.path
        if one.what in ("planning", "inference", "gates", "retry", "checks")
    )
    assert 1 <= report.critical_steps <= report.total_steps
    if view.plan is None:
        assert report.predicted is None
        return
    assert report.predicted is not None
    chain = report.predicted.steps
    needs = {step.id: step.needs for step in view.steps}
    assert all(before in needs[after] for before, after in pairwise(chain))
    assert report.predicted.length_ms > 0
    assert report.total_steps >= 1 + sum(1 for step in view.steps if step.state is StepState.DONE and step.attempts)


def segments(attempts: Sequence[AttemptView]) -> list[Segment]:
    return [one for attempt in attempts for one in attempt.segments]


def contiguous(parts: list[Segment]) -> bool:
    return all(one.end_ms > one.start_ms for one in parts) and all(
        one.end_ms == two.start_ms for one, two in pairwise(parts)
    )
