"""The failure table applied: every history has an end, and no role gets a step twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.failure import Category
from services.scheduler.failures import Action, Past, decide
from tests.unit.simulation import shipped_registry

REGISTRY = shipped_registry()


def play(categories: list[Category], role: str = "worker", max_level: int = 2) -> list[Action]:
    """Attempts that fail in these ways, as long as there is a next one."""
    past: list[Past] = []
    actions: list[Action] = []
    losses = 0
    for category in categories:
        if category is Category.PEER:
            losses += 1
            action = decide(REGISTRY, [*past, Past(role, category)], losses=losses, max_level=max_level)
        else:
            past.append(Past(role, category))
            action = decide(REGISTRY, past, losses=losses, max_level=max_level)
        actions.append(action)
        if action.kind == "fail":
            break
        role = action.role
    return actions


@given(st.lists(st.sampled_from(list(Category)), min_size=12, max_size=20), st.sampled_from(sorted(REGISTRY.roles)))
def test_every_history_ends_within_the_caps(categories: list[Category], role: str) -> None:
    actions = play(categories, role)
    assert actions[-1].kind == "fail"
    assert all(action.rule for action in actions)
    quality = [one for one, category in zip(actions, categories, strict=False) if category is not Category.PEER]
    assert len(quality) <= REGISTRY.failures.caps.retries_per_step + 1
    climbed = [action.role for action in actions if action.kind == "escalate"]
    assert len(climbed) == len(set(climbed)), "nobody is handed the step twice"


def test_a_lost_worker_never_escalates_and_never_counts_as_a_retry() -> None:
    assert [action.kind for action in play([Category.PEER, Category.PEER, Category.PEER])] == ["rerun", "rerun", "fail"]
    mixed = play([Category.PEER, Category.CODE, Category.PEER, Category.CODE, Category.CODE])
    assert [action.kind for action in mixed] == ["rerun", "retry", "rerun", "retry", "escalate"]


def test_max_level_zero_forbids_escalation() -> None:
    assert [action.kind for action in play([Category.TIMEOUT], max_level=0)] == ["fail"]


def test_lack_of_resources_backs_off_longer_each_time() -> None:
    delays = [action.delay_ms for action in play([Category.RESOURCE] * 4)]
    assert delays == [1_000, 2_000, 4_000, 0]
