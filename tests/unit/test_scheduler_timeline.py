"""Where the time of attempts and tasks goes, in virtual time where every cause is known."""

from __future__ import annotations

import pytest

from protocol.header import Header
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal, GateResult, Verdict
from protocol.messages.result import Segment, TaskQuery, TaskView
from protocol.messages.session import Hello, PeerState
from services.scheduler.broker import Broker
from services.scheduler.calls import Call, Start
from services.scheduler.resources import Tokens
from services.scheduler.stages import critical_steps, depths
from services.scheduler.timeline import Timeline
from tests.unit.simulation import Answer, World, final_of, say, stack, task_of


def spent(segments: list[Segment]) -> list[tuple[str, int]]:
    """Kinds and durations, to the nearest 100 ms: messages take 1 ms and ticks come every 100."""
    return [
        (one.what, round((one.end_ms - one.start_ms) / 100) * 100)
        for one in segments
        if one.end_ms - one.start_ms >= 50
    ]


def attempt(view: TaskView, step: int = 0, number: int = 0) -> list[tuple[str, int]]:
    return spent(view.steps[step].attempts[number].segments)


def failing_once(category: Category, took_ms: int = 400) -> Answer:
    return took_ms, Failure(code="x", category=category, origin="test", message="once")


def test_waiting_while_no_worker_is_ready_is_loading_and_not_queueing() -> None:
    world = stack(say("fine", 1_000))
    world.peers["inference-worker"].kill()
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(5_000)
    world.peers["inference-worker"].start()
    result = world.finish(task)
    assert attempt(result) == [("loading", 5_000), ("inference", 1_000)]
    assert result.critical_path is not None
    assert spent(result.critical_path.path) == [("loading", 5_000), ("inference", 1_000)]


def test_a_worker_that_says_it_is_loading_counts_as_none() -> None:
    world = stack(say("fine", 1_000))
    session = world.peers["inference-worker"].session
    session.state = PeerState.LOADING
    world.run_for(1_500)  # the next pong says so
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(3_000)
    session.state = PeerState.READY
    result = world.finish(task)
    (what, took), inference = attempt(result)
    assert what == "loading"
    assert 3_000 <= took <= 4_200
    assert inference == ("inference", 1_000)


def test_taken_slots_are_queueing_and_a_worker_lost_meanwhile_is_told_apart() -> None:
    world = stack(say("fine", 2_000), slots=1)
    task = world.submit(task_of([{"id": "A"}, {"id": "B"}]))
    world.run_for(1_000)
    world.peers["inference-worker"].kill()
    world.run_for(3_000)
    world.peers["inference-worker"].start()
    result = world.finish(task)
    # That it died is noticed with the next ping, up to a second later; what was lost queues behind what waited.
    (retry, lost_ms), *rest = attempt(result, 0)
    assert retry == "retry"
    assert 1_000 <= lost_ms <= 2_000
    away_ms = 4_000 - lost_ms
    assert rest == [("loading", away_ms), ("queueing", 2_000), ("inference", 2_000)]
    assert attempt(result, 1) == [("queueing", lost_ms), ("loading", away_ms), ("inference", 2_000)]


def test_an_idle_model_that_was_away_while_nobody_waited_is_no_loading() -> None:
    world = stack(say("fine", 1_000))
    worker = world.peers["inference-worker"]
    worker.kill()
    gone = world.submit(task_of([{"id": "S1"}]))
    world.run_for(1_000)
    world.client("task.cancel", TaskQuery(task_id=gone))
    world.run_for(1_000)
    worker.start()
    world.run_for(2_000)
    result = world.finish(world.submit(task_of([{"id": "S1"}])))
    assert attempt(result) == [("inference", 1_000)]


def test_a_wait_that_nobody_waited_to_the_end_of_is_not_told_of_a_later_call() -> None:
    broker = Broker(Tokens(cores=4))
    broker.ask(Call(key="gone", kind="infer.request", target="infer.worker", queued_ms=0))
    assert broker.next_start(0) is None
    broker.cancel("gone")
    broker.on_tick(100)
    assert broker.next_start(100) is None
    hello = Hello(
        service="w", protocol_min=1, protocol_max=1, capabilities=["infer.worker"], state=PeerState.READY, pid=1
    )
    broker.on_hello(b"w", hello, "e-1", 1, 200)
    held = Call(key="held", kind="infer.request", target="infer.worker", queued_ms=300, hold_until_ms=1_000)
    broker.ask(held)
    assert broker.next_start(300) is None
    broker.on_tick(1_000)
    start = broker.next_start(1_000)
    assert isinstance(start, Start)
    assert start.unserved_ms is None


def test_the_pause_before_the_same_attempt_goes_on_is_backoff() -> None:
    turns = iter([failing_once(Category.RESOURCE)])
    world = stack(lambda header, body: next(turns, (1_000, final_of("fine"))))
    result = world.finish(world.submit(task_of([{"id": "S1"}])))
    assert len(result.steps[0].attempts) == 1
    assert attempt(result, number=0) == [("retry", 400), ("backoff", 1_000), ("inference", 1_000)]


def test_a_pause_is_cut_short_by_the_end_of_the_task() -> None:
    world = stack(lambda header, body: failing_once(Category.RESOURCE))
    result = world.finish(world.submit(task_of([{"id": "S1"}], deadline_s=0.9)))
    (only,) = (one.segments for one in result.steps[0].attempts)
    assert [one.what for one in only] == ["retry", "backoff"]
    assert only[-1].end_ms == result.ended_ms


def test_a_frozen_worker_that_comes_back_was_working_all_the_time() -> None:
    world = stack(say("fine", 20_000))
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(1_000)
    worker = world.peers["inference-worker"]
    worker.frozen = True
    world.run_for(15_000)
    worker.thaw()
    result = world.finish(task)
    assert [what for what, _ in attempt(result)] == ["inference"]


def test_a_restart_of_the_hub_leaves_a_running_attempt_in_one_piece() -> None:
    world = stack(say("fine", 5_000))
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(1_000)
    world.kill_hub()
    world.run_for(2_000)
    world.boot_hub()
    result = world.finish(task)
    assert [what for what, _ in attempt(result)] == ["inference"]


def test_waiting_for_a_free_gate_service_is_queueing() -> None:
    world = stack(say("fine", 1_000))

    def late(header: Header, body: bytes) -> Answer:
        begun = world.now + 600
        result = GateResult(
            gate="lint", verdict=Verdict.PASS, category=Category.CODE, started_ms=begun, ended_ms=begun + 400
        )
        return 1_000, GateFinal(results=[result])

    world.peers["gates"].answer = late
    result = world.finish(world.submit(task_of([{"id": "S1", "gates": ["lint"]}])))
    assert attempt(result) == [("inference", 1_000), ("queueing", 600), ("gates", 400)]


@pytest.mark.parametrize("begun_ms", [0, 5, 10**15])
def test_a_gate_with_a_wrong_clock_is_still_gates_and_nothing_else(begun_ms: int) -> None:
    line = Timeline()
    line.queued(10, 0)
    line.started(10, None)
    line.answered(100)
    line.checked(200, begun_ms)
    assert line.stretches(200, failed=False) == [("inference", 10, 100), ("gates", 100, 200)]


def test_a_clock_that_was_set_back_makes_no_overlap() -> None:
    line = Timeline()
    line.queued(1_000, 500)
    line.started(900, (0, 5_000))
    line.answered(800)
    assert line.stretches(700, failed=False) == []
    assert line.stretches(1_200, failed=False) == [("gates", 800, 1_200)]


def test_the_open_stretch_of_a_running_attempt_is_left_out() -> None:
    world = stack(say("fine", 2_000), slots=1)
    task = world.submit(task_of([{"id": "A"}, {"id": "B"}]))
    world.run_for(3_000)
    view = world.view(task)
    assert attempt(view, 0) == [("inference", 2_000)]
    assert attempt(view, 1) == [("queueing", 2_000)]
    assert view.critical_path is None


def test_a_task_that_was_cancelled_while_it_was_planned_has_a_report() -> None:
    world = stack()
    world.peers["planner"].kill()
    task = world.submit(task_of([{"id": "S1"}]))
    world.run_for(2_000)
    world.client("task.cancel", TaskQuery(task_id=task))
    report = world.finish(task).critical_path
    assert report is not None
    assert spent(report.path) == [("planning", 2_000)]
    assert report.predicted is None
    assert (report.critical_steps, report.total_steps, report.lower_bound_ms) == (1, 1, report.wall_ms)


def test_the_prediction_is_made_from_what_was_learned_and_survives_a_restart() -> None:
    took = {"A": 1_000, "B": 9_000, "C": 500, "D": 200}
    world = stack(lambda header, body: (took[header.step or ""], final_of("fine")))
    diamond: list[dict[str, object]] = [
        {"id": "A"},
        {"id": "B", "actor": "coder", "inputs": ["A.out"]},
        {"id": "C", "inputs": ["A.out"]},
        {"id": "D", "inputs": ["B.out", "C.out"]},
    ]
    for _ in range(8):
        world.finish(world.submit(task_of(diamond)))
    took["C"] = 30_000  # nobody could know
    task = world.submit(task_of(diamond))
    world.run_for(100)
    world.kill_hub()
    world.boot_hub()
    report = world.finish(task).critical_path
    assert report is not None
    assert report.predicted is not None
    assert report.predicted.steps == ["A", "B", "D"]
    assert 6_000 < report.predicted.length_ms < 12_000
    assert [one.step for one in report.path if one.what == "inference"] == ["A", "C", "D"]


def run_of(world: World, **fields: object) -> TaskView:
    steps: list[dict[str, object]] = [
        {"id": "A"},
        *({"id": f"B{n}", "inputs": ["A.out"]} for n in range(3)),
        {"id": "C", "inputs": [f"B{n}.out" for n in range(3)]},
    ]
    return world.finish(world.submit(task_of(steps, **fields)))


def test_critical_steps_count_the_attempts_of_the_busiest_step_of_each_stage() -> None:
    failures = {("B1", 1): 1, ("B1", 2): 1, ("B2", 1): 1, ("C", 1): 1}

    def infer(header: Header, body: bytes) -> Answer:
        if failures.pop((header.step or "", header.attempt or 0), None):
            return failing_once(Category.CODE)
        return 1_000, final_of("fine")

    report = run_of(stack(infer), gates=["lint"]).critical_path
    assert report is not None
    # planning 1, A 1, the stage of B's max(1, 3, 2), C 2, checks 1
    assert report.critical_steps == 1 + 1 + 3 + 2 + 1
    assert report.total_steps == 1 + 1 + 6 + 2 + 1


def test_an_attempt_that_never_began_is_no_step_and_a_lost_run_is_no_second_one() -> None:
    world = stack(say("fine", 5_000))
    world.peers["inference-specialist"].kill()
    world.run_for(2_000)  # the next ping shows it
    task = world.submit(task_of([{"id": "A"}, {"id": "B", "actor": "coder"}]))
    world.run_for(1_000)
    world.peers["inference-worker"].kill()
    world.run_for(3_000)
    world.peers["inference-worker"].start()
    world.run_for(1_000)
    assert len(world.peers["inference-worker"].started) == 2
    world.client("task.cancel", TaskQuery(task_id=task))
    report = world.finish(task).critical_path
    assert report is not None
    assert (report.critical_steps, report.total_steps) == (2, 2), "planning, and A once; B only waited"


def test_depth_is_the_longest_chain_and_a_stage_counts_its_largest_step() -> None:
    depth = depths({"A": [], "B": ["A"], "C": [], "D": ["B", "C"]})
    assert depth == {"A": 0, "C": 0, "B": 1, "D": 2}
    assert critical_steps(depth, {"A": 1, "C": 4, "B": 2, "D": 0}, checked=False) == 1 + 4 + 2 + 0


def test_the_bound_is_the_longest_chain_or_the_slots_of_the_busiest_model() -> None:
    wide = run_of(stack(say("fine", 1_000))).critical_path
    assert wide is not None
    assert wide.bound_by == "chain"
    assert 3_000 <= wide.lower_bound_ms <= wide.wall_ms < 3_200
    many = stack(say("fine", 1_000))
    result = many.finish(many.submit(task_of([{"id": f"S{n}"} for n in range(40)])))
    report = result.critical_path
    assert report is not None
    assert report.bound_by == "worker"
    slots = max(many.registry.models["worker"].slots, 4)
    assert 40_000 // slots <= report.lower_bound_ms <= report.wall_ms
    assert report.wall_ms - report.lower_bound_ms < 300
