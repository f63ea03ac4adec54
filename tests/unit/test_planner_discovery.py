"""Only dependencies that carry nothing and guard nothing are dropped."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.artefact import Artefact
from protocol.messages.task import Budget, Output, Plan, Step, TaskIR
from protocol.plan_graph import find_problems, needs
from services.kit.plan_shape import as_written
from services.planner.discovery import Discovery, data_needs, discover
from services.planner.naming import output_file


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


def test_a_parallel_group_is_a_hint_and_what_keeps_it_apart_is_said() -> None:
    grouped = [step(1, [], []), step(2, [], ["S1"]), step(3, ["a1"], []), step(4, [], ["S1"], ordered=True)]
    found = discover(Plan(steps=[one.model_copy(update={"parallel_group": "g"}) for one in grouped]))
    assert [(edge.step, edge.depends_on) for edge in found.removed] == [("S2", "S1")]
    assert "parallel group g" in found.removed[0].reason
    assert found.notes == (
        "parallel group g: S3 waits for S1 all the same, since it reads what it makes",
        "parallel group g: S4 waits for S1 all the same, since it is `ordered`",
    )


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


#: A store of named files: what a plan does to it in the serial order is what it must do in every other one.
FILES = ["", "notes", "Notes.md", "notes.md", "log", "LOG.md"]


@st.composite
def sharing_plans(draw: st.DrawFn) -> Plan:
    """Plans whose steps write into few files under several names, read earlier results, and wait at random."""
    steps: list[Step] = []
    free = draw(st.permutations(FILES[1:]))
    for number in range(draw(st.integers(1, 8))):
        name = free.pop() if free and draw(st.booleans()) else f"a{number}"
        earlier = [item.outputs[0].name for item in steps]
        some = st.lists(st.sampled_from(earlier), unique=True, max_size=2) if earlier else st.just([])
        waits = st.lists(st.sampled_from([item.id for item in steps]), unique=True) if earlier else st.just([])
        chain = [f"S{number - 1}"] if number and draw(st.booleans()) else []
        steps.append(step(number, draw(some), sorted({*draw(waits), *chain}), out=name))
    return Plan(steps=steps)


def effects(plan: Plan, order: list[str]) -> dict[str, object]:
    """Run the steps in this order on a store of files and of artefacts; every step writes what it has seen."""
    by_id = {item.id: item for item in plan.steps}
    artefacts: dict[str, object] = {}
    files: dict[str, object] = {}
    for ident in order:
        item = by_id[ident]
        seen = tuple(artefacts[name] for name in item.inputs)
        looked = tuple(files.get(file_of(name)) for name in item.inputs)
        name = item.outputs[0].name
        artefacts[name] = (ident, seen, looked)
        files[file_of(name)] = artefacts[name]
    return {"artefacts": artefacts, "files": files}


def file_of(name: str) -> str:
    return output_file(Output(name=name)).casefold()


@settings(max_examples=300, deadline=None)
@given(sharing_plans(), st.randoms(use_true_random=False))
def test_every_order_that_is_left_gives_what_the_serial_order_gives(plan: Plan, random: Random) -> None:
    found = discover(plan)
    serial = effects(plan, [item.id for item in plan.steps])
    waits = needs(found.plan)
    for _ in range(5):
        order: list[str] = []
        while len(order) < len(plan.steps):
            order.append(random.choice([s for s in waits if s not in order and waits[s] <= set(order)]))
        assert effects(plan, order) == serial
    assert discover(found.plan) == Discovery(found.plan, (), ())
    for edge in found.added:
        assert edge.step in edge.reason


def test_two_steps_that_write_one_file_keep_their_order_when_the_step_between_them_goes() -> None:
    plan = Plan(
        steps=[step(1, [], [], out="notes"), step(2, [], ["S1"]), step(3, [], ["S2"], out="notes.md")],
    )
    found = discover(plan)
    assert {(edge.step, edge.depends_on) for edge in found.removed} == {("S2", "S1"), ("S3", "S2")}
    assert [(edge.step, edge.depends_on) for edge in found.added] == [("S3", "S1")]
    assert "notes.md" in found.added[0].reason
    assert as_written(found.plan, found.removed, found.added).steps[1] == plan.steps[1]


def test_a_step_that_writes_the_file_of_an_input_waits_for_those_who_read_it() -> None:
    plan = Plan(steps=[step(1, ["notes"], []), step(2, [], ["S1"], out="notes.md")])
    assert discover(plan, [Artefact(name="notes", value="x")]).removed == ()
    assert len(discover(plan).removed) == 1
