"""The failure table applied: category x what was before x level, against DESIGN's table written out a second time.

`EXPECTED` is that second statement. It is not read from the registry, so a change of `failures.yaml` or of the engine
that changes what happens to anybody's step fails here and has to be agreed to.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.failure import Category, Failure
from services.kit.registry import FailureTable, Registry
from services.scheduler.failures import SCOPES, Action, History, Past, Work, decide, is_backends_fault, kills, react
from tests.unit.simulation import CHECKOUT, shipped_registry

REGISTRY = shipped_registry()
REGISTRY_FOLDER = CHECKOUT / "registry"
CHAIN = ("worker", "coder", "architect")
"""The longest chain of the shipped roles."""
QUALITY = [category for category in Category if category not in (Category.PEER, Category.RESOURCE)]

RETRIES = {Category.FORMAT: 3, Category.SCHEMA: 2, Category.CODE: 2, Category.LOGIC: 1}
ESCALATES = {Category.SCHEMA, Category.CODE, Category.LOGIC, Category.TIMEOUT, Category.EARLY_ABORT}
CAP, DEATHS, PAUSES, MAX_LEVELS = 3, 3, 3, (0, 1, 2)


def expected(category: Category, same: int, others: int, level: int, max_level: int) -> str:
    """DESIGN, section 8, once more: what follows failure number `same + 1` of this kind in the role of this level."""
    if category is Category.POLICY:
        return "fail"
    if same + others >= CAP:
        return "fail"
    if same < RETRIES.get(category, 0):
        return "retry"
    if category not in ESCALATES:
        return "fail"
    return "escalate" if level < max_level and level + 1 < len(CHAIN) else "fail"


MATRIX = [
    (category, same, level, max_level)
    for category, same, level, max_level in product(QUALITY, range(5), range(3), MAX_LEVELS)
    if level <= max_level
]


@pytest.mark.parametrize(("category", "same", "level", "max_level"), MATRIX)
def test_every_category_at_every_retry_and_level_does_what_the_design_says(
    category: Category, same: int, level: int, max_level: int
) -> None:
    before = [Past(role, Category.TIMEOUT) for role in CHAIN[:level]]
    history = History([*before, *[Past(CHAIN[level], category)] * same], max_level=max_level)
    action = decide(REGISTRY, Work.INFERENCE, category, CHAIN[level], history)
    assert action.kind == expected(category, same, level, level, max_level)
    assert action.role == (CHAIN[level + 1] if action.kind == "escalate" else CHAIN[level])
    assert action.constrained == (category is Category.SCHEMA and action.kind == "retry")
    assert decide(REGISTRY, Work.GATES, category, CHAIN[level], history) == action, "gates are judged by the same table"


@pytest.mark.parametrize(("losses", "repeats"), list(product(range(5), range(6))))
def test_a_lost_worker_is_run_again_until_it_counts_as_poison(losses: int, repeats: int) -> None:
    for work in Work:
        action = decide(REGISTRY, work, Category.PEER, "worker", History(repeats=repeats, losses=losses))
        assert action.kind == ("fail" if losses >= DEATHS else "rerun")
        if action.kind == "rerun":
            assert action.delay_ms == min(30_000, 200 * 2**repeats)


@pytest.mark.parametrize("repeats", range(6))
def test_a_lack_of_resources_pauses_longer_each_time_and_then_fails(repeats: int) -> None:
    for work in Work:
        action = decide(REGISTRY, work, Category.RESOURCE, "worker", History(repeats=repeats, max_level=2))
        goes_on = repeats < PAUSES or work is Work.MEMORY
        assert action.kind == ("backoff" if goes_on else "fail"), "only what nobody waits for has all the time"
        if goes_on:
            assert action.delay_ms == min(30_000, 1_000 * 2**repeats)


@pytest.mark.parametrize(("work", "category"), list(product(Work, QUALITY)))
def test_work_of_the_task_itself_is_never_given_to_a_stronger_role(work: Work, category: Category) -> None:
    if SCOPES[work].climbs:
        return
    action = decide(REGISTRY, work, category, "planner", History(max_level=2))
    again = work in (Work.PLAN, Work.REPLAN) and category in RETRIES
    assert action.kind == ("retry" if again else "fail")


def test_the_table_of_works_has_a_line_for_each() -> None:
    assert set(SCOPES) == set(Work)


def test_every_rule_names_its_line_in_failures_yaml() -> None:
    text = (REGISTRY_FOLDER / "failures.yaml").read_text("utf-8").splitlines()
    for category in Category:
        action = decide(REGISTRY, Work.INFERENCE, category, "worker", History(max_level=2))
        where, named = action.rule.split(":", 2)[:2]
        line, name = named.split(" ")
        assert where == "failures.yaml"
        assert text[int(line) - 1].strip().startswith(f"{name}:")
    capped = decide(REGISTRY, Work.INFERENCE, Category.CODE, "worker", History([Past("x", Category.LOGIC)] * 3))
    assert text[int(capped.rule.split(":")[1].split(" ")[0]) - 1].strip().startswith("retries_per_step:")


def test_a_broken_process_is_told_from_broken_work() -> None:
    def of(category: Category, code: str) -> Failure:
        return Failure(code=code, category=category, origin="test", message="x")

    assert is_backends_fault(of(Category.PEER, "engine.died"))
    assert is_backends_fault(of(Category.RESOURCE, "engine.not_ready"))
    assert not is_backends_fault(of(Category.PEER, "peer.draining"))
    for code in ("remote.no_room", "remote.rejected", "remote.no_key", "model.degraded"):
        assert not is_backends_fault(of(Category.RESOURCE, code)), "whoever knows the server judges it, and nobody else"
    assert not any(is_backends_fault(of(category, "x")) for category in QUALITY)
    assert kills(REGISTRY, of(Category.PEER, "engine.died"))
    assert not kills(REGISTRY, of(Category.PEER, "call.cancelled"))
    assert not kills(REGISTRY, of(Category.RESOURCE, "engine.not_ready"))
    assert react(REGISTRY, Work.BATCH, of(Category.PEER, "engine.died"), "worker", History()).blame


def test_a_larger_budget_takes_the_place_of_the_last_retry_before_an_escalation() -> None:
    def arm(category: Category, same: int, *, pays: bool, role: str = "worker", max_level: int = 2) -> str | None:
        history = History([Past(role, category)] * same, max_level=max_level, harder_pays=pays)
        return decide(REGISTRY, Work.GATES, category, role, history).arm

    assert [arm(Category.CODE, same, pays=True) for same in range(3)] == [None, "harder", "escalated"]
    assert [arm(Category.CODE, same, pays=False) for same in range(3)] == [None, "plain", "escalated"]
    assert arm(Category.LOGIC, 0, pays=True) == "harder"
    assert [arm(Category.FORMAT, same, pays=True) for same in range(3)] == [None] * 3, "it never escalates"
    assert arm(Category.TIMEOUT, 0, pays=True) == "escalated", "the same role would spend the same time again"
    assert arm(Category.CODE, 1, pays=True, role="architect") is None, "nobody is above: nothing to compare it with"
    assert arm(Category.CODE, 1, pays=True, max_level=0) is None


def with_escalations(pairs: dict[str, str]) -> Registry:
    """A registry whose roles escalate like this; the rules of the registry are not asked."""
    roles = {name: role.model_copy(update={"escalates_to": pairs.get(name)}) for name, role in REGISTRY.roles.items()}
    return replace(REGISTRY, roles=MappingProxyType(roles))


def with_caps(retries: int) -> FailureTable:
    caps = REGISTRY.failures.caps.model_copy(update={"retries_per_step": retries})
    return replace(REGISTRY.failures, caps=caps)


def play(
    registry: Registry, categories: list[Category], role: str, *, work: Work = Work.INFERENCE, max_level: int = 2
) -> list[Action]:
    """Attempts that fail in these ways, as long as there is a next one; counts what the engine counts."""
    past: list[Past] = []
    actions: list[Action] = []
    losses, repeats = 0, dict.fromkeys(Category, 0)
    for category in categories:
        losses += category is Category.PEER
        history = History(tuple(past), repeats[category], losses, max_level)
        action = decide(registry, work, category, role, history)
        actions.append(action)
        if action.kind == "fail":
            break
        if action.repeats:
            repeats[category] += 1
        else:
            past.append(Past(role, category))
            repeats, role = dict.fromkeys(Category, 0), action.role
    return actions


def test_two_roles_that_escalate_to_each_other_never_hand_a_step_back() -> None:
    circle = replace(with_escalations({"worker": "coder", "coder": "worker"}), failures=with_caps(100))
    actions = play(circle, [Category.TIMEOUT] * 20, "worker", max_level=100)
    assert [action.kind for action in actions] == ["escalate", "fail"]
    assert "has tried this step already" in actions[-1].rule


HISTORIES = st.lists(st.sampled_from(list(Category)), min_size=40, max_size=60)


@given(HISTORIES, st.sampled_from(sorted(REGISTRY.roles)), st.sampled_from(list(Work)), st.integers(0, 4))
def test_every_history_ends_within_the_caps(categories: list[Category], role: str, work: Work, max_level: int) -> None:
    endless = [category for category in categories if not (work is Work.MEMORY and category is Category.RESOURCE)]
    actions = play(REGISTRY, [*endless, *[Category.POLICY]], role, work=work, max_level=max_level)
    assert actions[-1].kind == "fail"
    assert all(action.rule.startswith("failures.yaml:") for action in actions)
    assert sum(not action.repeats for action in actions) <= CAP + 1
    assert sum(action.kind == "rerun" for action in actions) < DEATHS
    climbed = [action.role for action in actions if action.kind == "escalate"]
    assert len(climbed) == len(set(climbed)) <= max_level, "nobody is handed the step twice"


def test_reruns_and_pauses_use_no_attempt_up() -> None:
    mixed = [Category.PEER, Category.CODE, Category.RESOURCE, Category.PEER, Category.CODE, Category.CODE]
    kinds = [action.kind for action in play(REGISTRY, mixed, "worker")]
    assert kinds == ["rerun", "retry", "backoff", "rerun", "retry", "escalate"]
