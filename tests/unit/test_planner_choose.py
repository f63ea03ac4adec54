"""Gates, personas, token shares and decisions: filled in where a step has none, and written down with reasons."""

from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.plan import RoutingDecision
from protocol.messages.task import Output, Plan, Step, TaskIR
from services.planner.choose import Chosen, Decomposition, as_of, choose, fitting
from services.planner.ledger import MAX_DECISIONS
from services.planner.rules import plan_by_rules
from tests.unit.planner_tasks import SHIPPED, task

WIDE = Decomposition("doc.map-join/2", ("doc.single/1",), "2 inputs")
TESTS = "from calc import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"


def chosen(task_: TaskIR) -> Chosen:
    return choose(task_, plan_by_rules(task_, SHIPPED.roles).plan, WIDE, SHIPPED, "rules")


def one(output: Output, **fields: object) -> Plan:
    return Plan(
        steps=[Step.model_validate({"id": "S1", "actor": "coder", "action": "go", "outputs": [output], **fields})]
    )


def gates(output: Output, task_: TaskIR | None = None, **fields: object) -> list[str] | None:
    made = choose(task_ or task("x", "code"), one(output, **fields), WIDE, SHIPPED, "client")
    return made.plan.steps[0].gates


def of(decisions: tuple[RoutingDecision, ...], subject: str) -> list[RoutingDecision]:
    return [decision for decision in decisions if decision.subject == subject]


def ids_of(decisions: tuple[RoutingDecision, ...]) -> list[str]:
    return [ident for decision in decisions for ident in decision.ids.values()]


def test_gates_follow_the_kind_of_output() -> None:
    assert gates(Output(name="a", kind=ArtefactKind.CODE)) == ["lint"]
    assert gates(Output(name="a", kind=ArtefactKind.JSON)) == ["schema"]
    assert gates(Output(name="a")) == []


def test_python_gates_leave_other_languages_alone() -> None:
    assert gates(Output(name="a", kind=ArtefactKind.CODE, content_type="text/x-c")) == []


def test_tests_among_the_inputs_judge_the_code_that_read_them_or_that_they_import() -> None:
    with_tests = task("x", "code").model_copy(
        update={"inputs": [Artefact(name="test_calc.py", kind=ArtefactKind.CODE, value=TESTS)]}
    )
    code = Output(name="other", kind=ArtefactKind.CODE)
    assert gates(code, with_tests) == ["lint"]
    assert gates(code, with_tests, inputs=["test_calc.py"]) == ["lint", "unit"]
    assert gates(Output(name="calc", kind=ArtefactKind.CODE), with_tests) == ["lint", "unit"]


def test_what_a_step_says_itself_is_never_overridden() -> None:
    made = choose(
        task("x", "code"),
        one(Output(name="a", kind=ArtefactKind.CODE), gates=[], persona="skeptic", max_tokens=9),
        WIDE,
        SHIPPED,
        "rules",
    )
    step = made.plan.steps[0]
    assert (step.gates, step.persona, step.max_tokens) == ([], "skeptic", 9)
    assert of(made.decisions, "persona")[0].rule == "the step names it"


def test_the_most_specific_fitting_persona_is_chosen_and_none_where_none_fits() -> None:
    assert [entry.name for entry in fitting("coder", task("x", "code"), SHIPPED)] == [
        "careful-engineer",  # two roles, and before the simplifier in the file
        "simplifier",
        "test-first",
        "security-engineer",
        "performance-engineer",
    ]
    assert fitting("worker", task("x", "doc"), SHIPPED)[0].name == "source-keeper"
    assert fitting("extractor", task("x", "chat"), SHIPPED) == []


def test_every_step_has_a_decision_for_its_role_and_the_task_one_for_its_decomposition() -> None:
    made = chosen(task("Summarise", "doc", "a", "b"))
    assert [step for decision in of(made.decisions, "role") for step in decision.ids] == ["S1", "S2", "S3"]
    role = of(made.decisions, "role")[0]
    assert (role.choice, role.propensity) == ("worker", 1.0)
    assert "extractor" in role.alternatives
    assert "worker" not in role.alternatives
    whole = of(made.decisions, "decomposition")
    assert [(item.choice, *item.ids, item.alternatives) for item in whole] == [("doc.map-join/2", "", ["doc.single/1"])]
    assert all(decision.rule for decision in made.decisions)


def test_ids_of_decisions_repeat_for_the_same_choice_only() -> None:
    first, again = chosen(task("Summarise", "doc", "a", "b")), chosen(task("Summarise", "doc", "a", "b"))
    assert first == again
    ids = ids_of(first.decisions)
    assert len(set(ids)) == len(ids)
    other_task = chosen(task("Summarise", "doc", "a", "b", task_id="t2"))
    other_choice = choose(
        task("Summarise", "doc"), one(Output(name="a")), Decomposition("x", (), "y"), SHIPPED, "client"
    )
    for other in (other_task, other_choice):
        assert not set(ids_of(other.decisions)) & set(ids)


def test_decisions_carry_the_registry_in_force() -> None:
    taken = chosen(task("Summarise", "doc", "a", "b")).decisions
    decisions = as_of(SHIPPED, taken)
    assert [one.ids for one in decisions] == [one.ids for one in taken]
    assert {decision.registry_digest for decision in decisions} == {SHIPPED.digest}
    assert all(one.prompt for one in decisions if one.subject == "role")


def test_a_small_token_budget_is_shared_out_and_a_large_one_is_left_to_the_roles() -> None:
    small = chosen(task("Summarise", "doc", "a", "b", budget={"max_tokens": 600}))
    assert [step.max_tokens for step in small.plan.steps] == [200, 200, 200]
    assert all(step.max_tokens is None for step in chosen(task("Summarise", "doc", "a", "b")).plan.steps)


def test_decisions_are_bounded_however_large_the_plan() -> None:
    steps = [Step(id=f"S{n}", actor="worker", action="go", outputs=[Output(name=f"a{n}")]) for n in range(3_000)]
    made = choose(task("x", "doc"), Plan(steps=steps), WIDE, SHIPPED, "client")
    assert MAX_DECISIONS - 2 < len(set(ids_of(made.decisions))) <= MAX_DECISIONS
    assert len(made.plan.steps) == 3_000
    assert made.plan.steps[-1].persona == "source-keeper"


def test_like_steps_share_their_decisions_and_steps_that_read_something_else_do_not() -> None:
    steps = [Step(id=f"S{n}", actor="worker", action="go", outputs=[Output(name=f"a{n}")]) for n in range(100)]
    reading = Step(id="R", actor="worker", action="read", inputs=["a0", "a1"], outputs=[Output(name="all")])
    made = choose(task("x", "doc"), Plan(steps=[*steps, reading]), WIDE, SHIPPED, "client")
    for subject in ("role", "persona"):
        like, other = of(made.decisions, subject)
        assert list(like.ids) == [step.id for step in steps]
        assert (list(other.ids), other.features["inputs"]) == (["R"], 2.0)
        assert len({*like.ids.values(), *other.ids.values()}) == 101
