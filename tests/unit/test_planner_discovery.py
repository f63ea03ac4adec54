"""Only dependencies that carry nothing and guard nothing are dropped."""

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.task import Budget, Output, Plan, Step, TaskIR
from protocol.plan_graph import find_problems, needs
from services.planner.discovery import data_needs, discover


def step(number: int, reads: list[str], after: list[str], *, ordered: bool = False, out: str | None = None) -> Step:
    return Step(
        id=f"S{number}",
        actor="worker",
        action="work",
        inputs=reads,
        outputs=[Output(name=out or f"a{number}")],
        depends_on=after,
        ordered=ordered,
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Acyclic plans of up to nine steps whose edges, data and control, go from lower to higher numbers."""
    steps = []
    for number in range(draw(st.integers(1, 9))):
        earlier = list(range(number))
        some = st.lists(st.sampled_from(earlier), unique=True) if earlier else st.just([])
        reads = [f"a{other}" for other in draw(some)]
        after = [f"S{other}" for other in draw(some)]
        steps.append(step(number, reads, after, ordered=draw(st.booleans())))
    return Plan(steps=draw(st.permutations(steps)))


@settings(max_examples=300, deadline=None)
@given(plans())
def test_only_edges_without_data_go_and_nothing_else_changes(plan: Plan) -> None:
    found = discover(plan)
    before = {item.id: item for item in plan.steps}
    after = {item.id: item for item in found.plan.steps}
    data = data_needs(plan)
    removed = {(edge.step, edge.depends_on) for edge in found.removed}
    assert data_needs(found.plan) == data
    assert find_problems(TaskIR(objective="x", plan=found.plan, budget=Budget())) == []
    for edge in found.removed:
        assert edge.depends_on not in data[edge.step]
        assert not before[edge.step].ordered
        assert edge.reason
    for ident, old in before.items():
        new = after[ident]
        assert {(ident, other) for other in old.depends_on} - {(ident, other) for other in new.depends_on} == {
            edge for edge in removed if edge[0] == ident
        }
        assert new.model_copy(update={"depends_on": old.depends_on}) == old
        assert needs(found.plan)[ident] >= data[ident]
        if not old.ordered:
            assert set(new.depends_on) <= data[ident]


def test_a_chain_without_data_becomes_a_fan_out_and_says_why() -> None:
    found = discover(Plan(steps=[step(1, [], []), step(2, [], ["S1"]), step(3, ["a1", "a2"], ["S2", "S1"])]))
    assert [(edge.step, edge.depends_on) for edge in found.removed] == [("S2", "S1")]
    assert "no output of S1 is read by S2" in found.removed[0].reason
    assert "ordered" in found.removed[0].reason


def test_an_edge_that_the_data_implies_anyway_is_said_to_be_implied() -> None:
    found = discover(Plan(steps=[step(1, [], []), step(2, ["a1"], []), step(3, ["a2"], ["S1"])]))
    assert "keeps the order already" in found.removed[0].reason


def test_ordered_steps_keep_their_order() -> None:
    assert discover(Plan(steps=[step(1, [], []), step(2, [], ["S1"], ordered=True)])).removed == ()


def test_two_steps_that_are_kept_in_one_file_keep_their_order() -> None:
    plan = Plan(steps=[step(1, [], [], out="notes"), step(2, [], ["S1"], out="Notes.md")])
    assert discover(plan).removed == ()


def test_thousands_of_needless_edges_are_dropped_quickly() -> None:
    steps = [step(number, [], [f"S{other}" for other in range(max(0, number - 4), number)]) for number in range(5_000)]
    found = discover(Plan(steps=steps))
    assert len(found.removed) == 4 * 5_000 - 10
    assert all(not item.depends_on for item in found.plan.steps)
