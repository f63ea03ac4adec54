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


def gate(name: str, *depends_on: str, cores: int = 1, settled: GateResult | None = None) -> PlannedGate:
    return PlannedGate(name, Category.CODE, cores, depends_on, settled)


def result(name: str, verdict: Verdict = Verdict.PASS, at_ms: int = 0) -> GateResult:
    return GateResult(gate=name, verdict=verdict, category=Category.CODE, started_ms=at_ms, ended_ms=at_ms)


def verdicts(commands: list[Command]) -> list[tuple[str, str]]:
    (finish,) = [command for command in commands if isinstance(command, Finish)]
    return [(one.gate, one.verdict.value) for one in finish.results]


def test_independent_gates_start_at_once_within_the_budget() -> None:
    machine = GateMachine(2)
    assert machine.handle(RunAsked("r", (gate("a"), gate("b"), gate("c")), 0)) == [Start("r", "a"), Start("r", "b")]
    assert machine.handle(GateEnded("r", "b", result("b"), 1)) == [Start("r", "c")]
    assert (machine.running, machine.waiting, machine.free) == (2, 0, 0)


def test_results_stand_in_the_order_asked_for_whichever_finished_first() -> None:
    machine = GateMachine(4)
    machine.handle(RunAsked("r", (gate("c"), gate("a"), gate("b")), 0))
    machine.handle(GateEnded("r", "b", result("b"), 1))
    machine.handle(GateEnded("r", "a", result("a", Verdict.FAIL), 2))
    assert verdicts(machine.handle(GateEnded("r", "c", result("c"), 3))) == [
        ("c", "pass"),
        ("a", "fail"),
        ("b", "pass"),
    ]


def test_a_gate_whose_dependency_failed_is_skipped_with_the_reason_and_so_are_those_behind_it() -> None:
    machine = GateMachine(4)
    machine.handle(RunAsked("r", (gate("third", "second"), gate("second", "first"), gate("first")), 0))
    (finish,) = machine.handle(GateEnded("r", "first", result("first", Verdict.FAIL), 7))
    assert isinstance(finish, Finish)
    assert verdicts([finish]) == [("third", "skipped"), ("second", "skipped"), ("first", "fail")]
    assert finish.results[1].message == "not run: it depends on first, which failed"
    assert finish.results[0].message == "not run: it depends on second, which was skipped"
    assert finish.results[0].started_ms == finish.results[0].ended_ms == 7


def test_a_dependency_that_could_not_judge_holds_its_gates_back_as_well() -> None:
    machine = GateMachine(1)
    machine.handle(RunAsked("r", (gate("lint"), gate("unit", "lint")), 0))
    commands = machine.handle(GateEnded("r", "lint", result("lint", Verdict.ERROR), 1))
    assert verdicts(commands) == [("lint", "error"), ("unit", "skipped")]


def test_a_dependency_outside_the_request_is_ignored() -> None:
    assert GateMachine(1).handle(RunAsked("r", (gate("unit", "lint"),), 0)) == [Start("r", "unit")]


def test_a_dependency_with_nothing_to_judge_is_no_hindrance() -> None:
    nothing = result("shell", Verdict.SKIPPED)
    asked = RunAsked("r", (gate("shell", settled=nothing), gate("unit", "shell")), 0)
    assert GateMachine(1).handle(asked) == [Start("r", "unit")]


def test_a_run_in_which_everything_is_settled_finishes_at_once() -> None:
    commands = GateMachine(1).handle(RunAsked("r", (gate("x", settled=result("x", Verdict.ERROR)),), 0))
    assert verdicts(commands) == [("x", "error")]


def test_a_wide_gate_waits_for_its_cores_and_is_not_overtaken() -> None:
    machine = GateMachine(2)
    machine.handle(RunAsked("r", (gate("a"),), 0))
    assert machine.handle(RunAsked("s", (gate("wide", cores=2), gate("b")), 0)) == []
    assert machine.handle(GateEnded("r", "a", result("a"), 1))[1:] == [Start("s", "wide")]
    assert machine.handle(GateEnded("s", "wide", result("wide"), 2)) == [Start("s", "b")]


def test_a_gate_wider_than_the_budget_gets_all_of_it() -> None:
    machine = GateMachine(2)
    assert machine.handle(RunAsked("r", (gate("huge", cores=99),), 0)) == [Start("r", "huge")]
    assert machine.free == 0


def test_cancel_kills_what_runs_drops_what_waits_and_frees_cores_only_when_they_are_free() -> None:
    machine = GateMachine(1)
    machine.handle(RunAsked("r", (gate("a"), gate("b")), 0))
    assert machine.handle(RunAsked("s", (gate("c"),), 0)) == []
    assert machine.handle(Cancelled("r", 1)) == [KillGate("r", "a")]
    assert machine.handle(Cancelled("r", 1)) == []
    assert machine.free == 0
    assert machine.handle(GateEnded("r", "a", result("a", Verdict.ERROR), 2)) == [Start("s", "c")]


def test_cancel_after_the_end_changes_nothing() -> None:
    machine = GateMachine(1)
    machine.handle(RunAsked("r", (gate("a"),), 0))
    machine.handle(GateEnded("r", "a", result("a"), 1))
    assert machine.handle(Cancelled("r", 2)) == []


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
                cores=draw(st.integers(1, 5)),
                settled=draw(st.sampled_from([None, None, None, result(name, Verdict.SKIPPED)])),
            )
            for name in names
        ]
        made.append(tuple(gates))
    return made


@settings(max_examples=150, deadline=None)
@given(planned=runs(), budget=st.integers(1, 4), data=st.data())
def test_never_over_budget_one_result_per_gate_in_order_and_nothing_is_left(
    planned: list[tuple[PlannedGate, ...]], budget: int, data: st.DataObject
) -> None:
    clock, machine = VirtualClock(), GateMachine(budget)
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
                        assert other not in here or here[other].settled or ended[run, other] is Verdict.PASS
                    running[run, name] = min(here[name].cores, budget)
                    assert sum(running.values()) <= budget
                    count += 1
                    heapq.heappush(ending, (clock.now_ms() + data.draw(st.integers(1, 9)), count, run, name))
                case KillGate(run, name):
                    assert run in cancelled
                    assert (run, name) in running
                case Finish(run, results):
                    assert run not in finished
                    assert run not in cancelled
                    finished[run] = [one.gate for one in results]

    for number, gates in enumerate(planned):
        carry_out(machine.handle(RunAsked(str(number), gates, clock.now_ms())))
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
    assert (machine.free, machine.running, machine.waiting) == (budget, 0, 0)
