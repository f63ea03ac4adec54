"""What an attempt, or a prompt of a batch, asks of its model: the role's limits reach the wire; they can be off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.messages.batch import BatchRequest
from protocol.messages.infer import AbortLimits, InferRequest
from services.kit.registry import Registry
from services.kit.registry.entries import EarlyAbort
from services.scheduler.requests import batch_item_request
from tests.unit.simulation import Answer, final_of, shipped_registry, stack, task_of


def with_abort(limits: EarlyAbort) -> Registry:
    registry = shipped_registry()
    worker = registry.roles["worker"].model_copy(update={"early_abort": limits})
    return replace(registry, roles={**registry.roles, "worker": worker})


def asked(registry: Registry) -> InferRequest:
    return batch_item_request(BatchRequest(role="worker", prompts=["x"]), "x", "key", registry)


def test_every_limit_of_the_registry_is_one_of_the_wire() -> None:
    assert AbortLimits.model_fields.keys() == EarlyAbort.model_fields.keys() - {"enabled"}
    for name, field in AbortLimits.model_fields.items():
        assert field.default == EarlyAbort.model_fields[name].default, name


def test_a_roles_limits_reach_the_model_and_can_be_switched_off() -> None:
    limits = EarlyAbort(repeated_chars=900, runaway_tokens=77, entropy_nats=1.5)
    assert asked(with_abort(limits)).early_abort == AbortLimits(repeated_chars=900, runaway_tokens=77, entropy_nats=1.5)
    assert asked(with_abort(EarlyAbort(enabled=False))).early_abort is None
    assert asked(shipped_registry()).early_abort == AbortLimits(), "on unless a role says otherwise"


@pytest.mark.parametrize(("kind", "expected"), [("json", True), ("text", False)])
def test_a_step_that_makes_json_says_so(kind: str, expected: bool) -> None:
    seen: list[InferRequest] = []

    def answer(header: Header, body: bytes) -> Answer:
        seen.append(unpack_body(InferRequest, body))
        return 10, final_of("[1]")

    world = stack(answer)
    world.finish(world.submit(task_of([{"id": "S1", "outputs": [{"name": "a", "kind": kind}]}])))
    assert [one.json_output for one in seen] == [expected]
    assert seen[0].early_abort == AbortLimits()
