"""The gate machine, driven in virtual time."""

from __future__ import annotations

import heapq

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.failure import Category
from protocol.messages.gate import GateResult, Verdict
from services.gates.machine import Cancelled, Command, Finish, GateEnded, GateMachine, KillGate, PlannedGate, RunAsked
from services.gates.machine import StartGate as Start
from services.kit.clock import VirtualClock


def gate(
    name: str,
    *depends_on: str,
    cores: int = 1,
    required: bool = True,
    stays: bool = False,
    settled: GateResult | None = None,
) -> PlannedGate:
    return PlannedGate(name, Category.CODE, cores, depends_on, required, stays, settled)


def result(name: str, verdict: Verdict = Verdict.PASS, at_ms: int = 0) -> GateResult:
    return GateResult(gate=name, verdict=verdict, category=Category.CODE, started_ms=at_ms, ended_ms=at_ms)


def machine_of(*, stop: bool = False, uncounted: int = 4) -> GateMachine:
    return GateMachine(uncounted_at_once=uncounted, stop_after_failure=stop)


def asked(run: str, gates: tuple[PlannedGate, ...], at_ms: int = 0, *, cores: int = 4) -> RunAsked:
    return RunAsked(run, gates, cores, at_ms)


def verdicts(commands: list[Command]) -> list[tuple[str, str]]:
    (finish,) = [command for command in commands if isinstance(command, Finish)]
    return [(one.gate, one.verdict.value) for one in finish.results]


def test_independent_gates_start_at_once_within_the_cores_reserved_for_their_run() -> None:
    machine = machine_of()
    assert machine.handle(asked("r", (gate("a"), gate("b"), gate("c")), cores=2)) == [Start("r", "a"), Start("r", "b")]
    assert machine.handle(asked("s", (gate("a"), gate("b")), cores=1)) == [Start("s", "a")]
    assert machine.handle(GateEnded("r", "b", result("b"), 1)) == [Start("r", "c")]
    assert (machine.running, machine.waiting) == (3, 1)


def test_results_stand_in_the_order_asked_for_whichever_finished_first() -> None:
    machine = machine_of()
    machine.handle(asked("r", (gate("c"), gate("a"), gate("b"))))
    machine.handle(GateEnded("r", "b", result("b"), 1))
    machine.handle(GateEnded("r", "a", result("a", Verdict.FAIL), 2))
    assert verdicts(machine.handle(GateEnded("r", "c", result("c"), 3))) == [
        ("c", "pass"),
        ("a", "fail"),
        ("b", "pass"),
    ]


def test_a_gate_whose_dependency_failed_is_skipped_with_the_reason_and_so_are_those_behind_it() -> None:
    machine = machine_of()
    machine.handle(asked("r", (gate("third", "second"), gate("second", "first"), gate("first"))))
    (finish,) = machine.handle(GateEnded("r", "first", result("first", Verdict.FAIL), 7))
    assert isinstance(finish, Finish)
    assert verdicts([finish]) == [("third", "skipped"), ("second", "skipped"), ("first", "fail")]
    assert finish.results[1].message == "not run: it depends on first, which failed"
    assert finish.results[0].message == "not run: it depends on second, which was skipped"
    assert finish.results[0].started_ms == finish.results[0].ended_ms == 7


def test_a_dependency_that_could_not_judge_holds_its_gates_back_as_well() -> None:
    machine = machine_of()
    machine.handle(asked("r", (gate("lint"), gate("unit", "lint"))))
    commands = machine.handle(GateEnded("r", "lint", result("lint", Verdict.ERROR), 1))
    assert verdicts(commands) == [("lint", "error"), ("unit", "skipped")]


def test_an_advisory_dependency_holds_nothing_back() -> None:
    machine = machine_of(stop=True)
    machine.handle(asked("r", (gate("style", required=False), gate("unit", "style"))))
    assert machine.handle(GateEnded("r", "style", result("style", Verdict.FAIL), 1)) == [Start("r", "unit")]


def test_a_dependency_outside_the_request_is_ignored() -> None:
    assert machine_of().handle(asked("r", (gate("unit", "lint"),))) == [Start("r", "unit")]


def test_a_dependency_with_nothing_to_judge_is_no_hindrance() -> None:
    nothing = result("shell", Verdict.SKIPPED)
    event = asked("r", (gate("shell", settled=nothing), gate("unit", "shell")))
    assert machine_of().handle(event) == [Start("r", "unit")]


def test_a_run_in_which_everything_is_settled_finishes_at_once() -> None:
    commands = machine_of().handle(asked("r", (gate("x", settled=result("x", Verdict.ERROR)),)))
    assert verdicts(commands) == [("x", "error")]


def test_a_wide_gate_waits_for_its_cores_and_is_not_overtaken_by_a_narrow_one() -> None:
    machine = machine_of()
    assert machine.handle(asked("r", (gate("a"), gate("wide", cores=2), gate("b")), cores=2)) == [Start("r", "a")]
    assert machine.handle(GateEnded("r", "a", result("a"), 1)) == [Start("r", "wide")]
    assert machine.handle(GateEnded("r", "wide", result("wide"), 2)) == [Start("r", "b")]


def test_a_gate_wider_than_what_is_reserved_gets_all_of_it() -> None:
    machine = machine_of()
    assert machine.handle(asked("r", (gate("huge", cores=99), gate("a")), cores=2)) == [Start("r", "huge")]


def test_gates_that_cost_no_cores_start_beside_the_others_and_are_bounded_too() -> None:
    machine = machine_of(uncounted=2)
    gates = (gate("unit"), gate("types"), *(gate(name, cores=0) for name in "abc"))
    assert machine.handle(asked("r", gates, cores=1)) == [Start("r", "unit"), Start("r", "a"), Start("r", "b")]
    assert machine.handle(GateEnded("r", "a", result("a"), 1)) == [Start("r", "c")]


def test_when_a_required_gate_has_failed_what_costs_something_is_stopped_and_the_rest_goes_on() -> None:
    machine = machine_of(stop=True)
    gates = (gate("unit"), gate("types"), gate("later"), gate("lint", cores=0, stays=True), gate("quick"))
    machine.handle(asked("r", gates, cores=2))
    assert machine.handle(GateEnded("r", "types", result("types", Verdict.FAIL), 5)) == [KillGate("r", "unit")]
    assert machine.handle(GateEnded("r", "unit", result("unit", Verdict.ERROR), 6)) == []
    (finish,) = machine.handle(GateEnded("r", "lint", result("lint"), 7))
    assert isinstance(finish, Finish)
    assert [(one.gate, one.verdict.value) for one in finish.results] == [
        ("unit", "skipped"),
        ("types", "fail"),
        ("later", "skipped"),
        ("lint", "pass"),
        ("quick", "skipped"),
    ]
    assert finish.results[0].message == "stopped: types, which is required, has failed"
    assert finish.results[2].message == "not run: types, which is required, has failed"


def test_without_that_policy_and_after_an_advisory_failure_everything_goes_on() -> None:
    for machine, required in ((machine_of(), True), (machine_of(stop=True), False)):
        machine.handle(asked("r", (gate("unit"), gate("types", required=required)), cores=2))
        assert machine.handle(GateEnded("r", "types", result("types", Verdict.FAIL), 5)) == []
        assert verdicts(machine.handle(GateEnded("r", "unit", result("unit"), 6))) == [
            ("unit", "pass"),
            ("types", "fail"),
        ]


def test_cancel_kills_what_runs_and_drops_what_waits() -> None:
    machine = machine_of()
    machine.handle(asked("r", (gate("a"), gate("b")), cores=1))
    assert machine.handle(Cancelled("r", 1)) == [KillGate("r", "a")]
    assert machine.handle(Cancelled("r", 1)) == []
    assert (machine.running, machine.waiting) == (1, 0)
    assert machine.handle(GateEnded("r", "a", result("a", Verdict.ERROR), 2)) == []
    assert machine.running == 0


def test_cancel_after_the_end_changes_nothing() -> None:
    machine = machine_of()
    machine.handle(asked("r", (gate("a"),)))
    machine.handle(GateEnded("r", "a", result("a"), 1))
    assert machine.handle(Cancelled("r", 2)) == []


_FAIL = Verdict.FAIL
NAMES = [f"g{number}" for number in range(8)]


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[PlannedGate, ...]]:
    """Runs of acyclic gates: each depends on earlier names only, present or not; listed in any order."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        gates = [
            gate(
                name,
                *draw(st.lists(st.sampled_from(NAMES[: NAMES.index(name)] or ["absent"]), max_size=3)),
                cores=draw(st.integers(0, 5)),
                required=draw(st.booleans()),
                stays=draw(st.booleans()),
                settled=draw(st.sampled_from([None, None, None, result(name, Verdict.SKIPPED)])),
            )
            for name in names
        ]
        made.append(tuple(gates))
    return made


@settings(max_examples=150, deadline=None)
@given(planned=runs(), budget=st.integers(1, 4), stop=st.booleans(), data=st.data())
def test_never_over_budget_one_result_per_gate_in_order_and_nothing_is_left(
    planned: list[tuple[PlannedGate, ...]], budget: int, stop: bool, data: st.DataObject
) -> None:
    clock, machine = VirtualClock(), machine_of(stop=stop, uncounted=2)
    ending: list[tuple[int, int, str, str]] = []
    running: dict[tuple[str, str], int] = {}
    finished: dict[str, list[str]] = {}
    cancelled: set[str] = set()
    ended: dict[tuple[str, str], Verdict] = {}
    count = 0

    def carry_out(commands: list[Command]) -> None:
        nonlocal count
        for command in commands:
            match command:
                case Start(run, name):
                    assert run not in cancelled
                    assert (run, name) not in running
                    assert (run, name) not in ended, "started twice"
                    here = {one.name: one for one in planned[int(run)]}
                    for other in here[name].depends_on:
                        passed = other not in here or here[other].settled or not here[other].required
                        assert passed or ended[run, other] is Verdict.PASS
                    failed = [one for one in here.values() if one.required and ended.get((run, one.name)) is _FAIL]
                    assert not (stop and failed) or here[name].stays
                    running[run, name] = min(here[name].cores, budget)
                    mine = [cost for (owner, _), cost in running.items() if owner == run]
                    assert sum(mine) <= budget
                    assert mine.count(0) <= 2
                    count += 1
                    heapq.heappush(ending, (clock.now_ms() + data.draw(st.integers(1, 9)), count, run, name))
                case KillGate(run, name):
                    assert run in cancelled or stop
                    assert (run, name) in running
                case Finish(run, results):
                    assert run not in finished
                    assert run not in cancelled
                    finished[run] = [one.gate for one in results]

    for number, gates in enumerate(planned):
        carry_out(machine.handle(asked(str(number), gates, clock.now_ms(), cores=budget)))
    while ending:
        if (
            data.draw(st.integers(0, 9)) == 0
            and (run := str(data.draw(st.integers(0, len(planned) - 1)))) not in finished
        ):
            cancelled.add(run)
            carry_out(machine.handle(Cancelled(run, clock.now_ms())))
        at_ms, _, run, name = heapq.heappop(ending)
        clock.advance_ms(max(0, at_ms - clock.now_ms()))
        verdict = data.draw(st.sampled_from([Verdict.PASS, Verdict.PASS, Verdict.FAIL, Verdict.ERROR]))
        del running[run, name]
        ended[run, name] = verdict
        carry_out(machine.handle(GateEnded(run, name, result(name, verdict), clock.now_ms())))

    for number, gates in enumerate(planned):
        if str(number) not in cancelled:
            assert finished[str(number)] == [one.name for one in gates]
    assert (machine.running, machine.waiting) == (0, 0)
