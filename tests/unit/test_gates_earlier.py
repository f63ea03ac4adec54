"""Gates that have left the registry judge on for the tasks from before, with their role and its model."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from services.gates.earlier import with_earlier
from services.kit.registry import Registry
from tests.unit.simulation import shipped_registry

SHIPPED = shipped_registry()


def only(gates: dict[str, Any], roles: dict[str, Any], models: dict[str, Any]) -> Registry:
    return replace(
        SHIPPED, gates=MappingProxyType(gates), roles=MappingProxyType(roles), models=MappingProxyType(models)
    )


def test_what_the_registry_has_counts_and_what_it_has_not_comes_from_the_newest_that_had_it() -> None:
    gate, role, model = SHIPPED.gates["definition_of_done"], SHIPPED.roles["worker"], SHIPPED.models["worker"]
    slow, slower = gate.model_copy(update={"timeout_s": 500.0}), gate.model_copy(update={"timeout_s": 900.0})
    oldest = only({"judged": slower, "old": gate}, {"judge": role}, {"worker": model, "big": model})
    newer = only({"judged": slow}, {"judge": role.model_copy(update={"max_tokens": 9})}, {"worker": model})
    now = only({"format": SHIPPED.gates["format"]}, {"clerk": role}, {"worker": model.model_copy(update={"slots": 7})})
    joined = with_earlier(now, [newer, oldest])
    assert joined.gates.keys() == {"format", "judged", "old"}
    assert joined.gates["judged"].timeout_s == 500
    assert joined.roles.keys() == {"clerk", "judge"}
    assert joined.roles["judge"].max_tokens == 9
    assert joined.models.keys() == {"worker", "big"}
    assert joined.models["worker"].slots == 7
    assert joined.digest == now.digest
