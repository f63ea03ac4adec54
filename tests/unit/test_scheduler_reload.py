"""A registry taken up while tasks run: what is new serves at once, what is gone stays for those who use it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import pack_body, unpack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import ChatMessage, InferFinal, InferRequest
from protocol.messages.registry import RegistryChanged as Told
from protocol.messages.registry import Reload, Reloaded
from protocol.messages.reply import ErrorReply
from protocol.messages.result import TaskState
from services.kit.registry import Problem, Registry
from services.kit.registry.entries import ClientEntry
from services.scheduler.events import FrameIn, ReadRegistry, RegistryChanged, RegistryRefused, Send
from services.scheduler.reloading import changes, used_by, with_kept
from services.scheduler.residency import TRUST_MS
from services.scheduler.simulation.world import CLIENT, RefusedError
from tests.unit.simulation import Answer, World, final_of, say, shipped_registry, stack, task_of
from tests.unit.test_scheduler_batches import Asker

SHIPPED = shipped_registry()


def edited(base: Registry = SHIPPED, **sections: dict[str, Any]) -> Registry:
    """A registry in which entries were set or, with None, removed."""
    fresh = {
        section: MappingProxyType(
            {name: entry for name, entry in {**getattr(base, section), **entries}.items() if entry is not None}
        )
        for section, entries in sections.items()
    }
    return replace(base, digest=f"{hash(repr(fresh)) & (2**256 - 1):064x}"[:64], **fresh)


def without_worker() -> Registry:
    """The model and the role `worker` have left; roles that used the model have the front model."""
    front = {
        name: role.model_copy(update={"model": "front"})
        for name, role in SHIPPED.roles.items()
        if role.model == "worker"
    }
    return edited(models={"worker": None}, roles={**front, "worker": None})


def reload(world: World, registry: Registry) -> Reloaded:
    world.client_inbox.clear()
    world.feed(RegistryChanged(registry, CLIENT, Header(kind="registry.reload", id="r1"), world.now))
    (told,) = [body for header, body in world.client_inbox if header.corr == "r1"]
    assert isinstance(told, Reloaded), told
    return told


def slow_answer(prompts: list[InferRequest]) -> Any:
    def answer(header: Header, body: bytes) -> Answer:
        prompts.append(unpack_body(InferRequest, body))
        return 1_000, final_of("fine")

    return answer


def test_a_new_role_can_be_used_at_once_and_a_removed_one_is_refused_for_new_tasks() -> None:
    world = stack()
    clerk = SHIPPED.roles["worker"].model_copy(update={"name": "clerk", "model": "front"})
    told = reload(world, edited(roles={"clerk": clerk, "worker": None}))
    assert [(one.section, one.name, one.change) for one in told.changes] == [
        ("roles", "clerk", "added"), ("roles", "worker", "removed"),
    ]  # fmt: skip
    assert told.kept == []
    assert world.finish(world.submit(task_of([{"id": "S1", "actor": "clerk"}]))).state is TaskState.SUCCEEDED
    with pytest.raises(RefusedError, match="worker"):
        world.submit(task_of([{"id": "S1"}]))


def test_a_running_task_keeps_its_removed_role_and_model_until_it_has_ended() -> None:
    prompts: list[InferRequest] = []
    world = stack(slow_answer(prompts))
    task_id = world.submit(task_of([{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]))
    world.run(lambda: len(prompts) == 1)
    told = reload(world, without_worker())
    assert told.draining == ["worker"]
    assert set(told.kept) == {"roles.worker", "models.worker"}
    asker = Asker(world)
    refused = asker.ask(["not for new work"])
    world.run(lambda: bool(asker.said(refused)))
    assert isinstance(asker.said(refused)[-1], ErrorReply)
    assert world.hub is not None
    result = world.finish(task_id)
    assert result.state is TaskState.SUCCEEDED
    assert [attempt.worker for step in result.steps for attempt in step.attempts] == ["inference-worker"] * 2
    assert prompts[1].messages[0].content.startswith(SHIPPED.roles["worker"].prompt[:30])
    world.run_for(2_000)
    assert "worker" not in world.hub.registry.roles
    assert "worker" not in world.hub.registry.models


def test_a_running_batch_keeps_its_removed_model_to_its_last_prompt_and_no_new_one_gets_it() -> None:
    prompts: list[InferRequest] = []
    world = stack(slow_answer(prompts), slots=1)
    asker = Asker(world)
    running = asker.ask(["one", "two", "three"])
    world.run(lambda: len(prompts) == 1)
    assert reload(world, without_worker()).kept == ["models.worker"]
    refused = asker.ask(["four"], key="K2")
    world.run_for(1_500)
    assert world.hub is not None
    assert "worker" in world.hub.registry.models
    (error,) = asker.said(refused)
    assert isinstance(error, ErrorReply)
    assert error.failure.code == "role.unknown"
    world.client_inbox.clear()
    assert [answer.text for answer in asker.finish(running).answers] == ["fine"] * 3
    world.run_for(2_000)
    assert "worker" not in world.hub.registry.models


def test_a_call_of_a_program_that_waits_for_a_removed_model_is_told_when_its_service_has_gone() -> None:
    world = stack(say("fine", took_ms=1_000), slots=1)
    world.run_for(TRUST_MS + 1_000)
    asker = Asker(world)
    request = InferRequest(role="test", messages=[ChatMessage(role="user", content="Hi")], max_tokens=4)
    first, second, third, last = (asker.infer("worker", request, key) for key in ("K1", "K2", "K3", "K4"))
    world.run_for(100)
    reload(world, without_worker())
    world.run(lambda: bool(asker.said(second)), 10_000)
    assert [type(asker.said(ident)[-1]) for ident in (first, second)] == [InferFinal] * 2, "it serves on"
    world.peers["inference-worker"].kill()
    world.run(lambda: bool(asker.said(third)), 10_000)
    world.run_for(TRUST_MS - 1_000)
    assert not asker.said(last), "a worker that has died may come back"
    world.run(lambda: bool(asker.said(last)), 5_000)
    (lost,), (error,) = asker.said(third), asker.said(last)
    assert isinstance(lost, ErrorReply)
    assert lost.failure.code == "peer.lost", "it was running"
    assert isinstance(error, ErrorReply)
    assert (error.failure.code, error.failure.category) == ("model.unknown", Category.POLICY)
    assert "models.yaml has no entry 'worker'" in error.failure.message


def test_a_changed_role_is_taken_up_with_the_next_attempt() -> None:
    prompts: list[InferRequest] = []
    world = stack(slow_answer(prompts))
    task_id = world.submit(task_of([{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]))
    world.run(lambda: len(prompts) == 1)
    worker = SHIPPED.roles["worker"].model_copy(update={"prompt": "You are brand new.", "model": "front"})
    assert reload(world, edited(roles={"worker": worker})).kept == []
    result = world.finish(task_id)
    assert result.state is TaskState.SUCCEEDED
    assert "brand new" not in prompts[0].messages[0].content
    assert "brand new" in prompts[1].messages[0].content
    assert [step.attempts[0].worker for step in result.steps] == ["inference-worker", "inference-front"]


def test_an_escalation_to_a_removed_role_still_works_for_the_task_that_began_before() -> None:
    world = stack(lambda header, body: (500, Failure(code="x", category=Category.TIMEOUT, origin="t", message="m")))
    task_id = world.submit(task_of([{"id": "S1"}]))
    world.run_for(200)
    worker = SHIPPED.roles["worker"].model_copy(update={"escalates_to": None})
    told = reload(
        world, edited(roles={"worker": None, "coder": None, "clerk": worker.model_copy(update={"name": "clerk"})})
    )
    assert {"roles.worker", "roles.coder"} <= set(told.kept)
    assert [attempt.role for attempt in world.finish(task_id).steps[0].attempts] == ["worker", "coder", "architect"]


def test_a_gate_that_judges_stays_with_its_role_and_the_models_of_that() -> None:
    world = stack(say("fine", took_ms=1_000))
    assert world.hub is not None
    judge = SHIPPED.roles["worker"].model_copy(update={"name": "judge", "lateral": "front", "escalates_to": None})
    judged = SHIPPED.gates["definition_of_done"].model_copy(update={"name": "judged", "role": "judge"})
    front = {name: role.model_copy(update={"model": "front"}) for name, role in SHIPPED.roles.items()}
    reload(world, edited(roles={**front, "judge": judge}, gates={"judged": judged}))
    task_id = world.submit(task_of([{"id": "S1", "gates": ["judged"]}]))
    world.run_for(100)
    told = reload(world, edited(models={"worker": None}, roles=front))
    assert set(told.kept) == {"gates.judged", "roles.judge", "models.worker"}
    assert world.finish(task_id).state is TaskState.SUCCEEDED
    world.run_for(2_000)
    assert "judge" not in world.hub.registry.roles
    assert "worker" not in world.hub.registry.models


def test_a_restarted_hub_finds_what_its_tasks_use_in_an_earlier_registry_or_says_what_is_missing() -> None:
    prompts: list[InferRequest] = []
    for past in (SHIPPED, None):
        world = stack(slow_answer(prompts))
        task_id = world.submit(task_of([{"id": "S1"}, {"id": "S2", "inputs": ["S1.out"]}]))
        world.run_for(100)
        new = without_worker()
        world.kill_hub()
        world.registry = new
        world.past = past  # what the reader would have found among the copies
        world.boot_hub()
        if past is None:
            result = world.view(task_id)
            assert result.state is TaskState.FAILED
            assert result.failure is not None
            assert (result.failure.category, result.failure.code) == (Category.POLICY, "registry.removed")
            assert "roles.worker" in result.failure.message
            assert "reload" in result.failure.message
        else:
            assert world.finish(task_id).state is TaskState.SUCCEEDED


def test_services_that_lag_are_told_again_and_the_one_nobody_needs_is_told_to_drain() -> None:
    world = stack(say("fine", took_ms=3_000))
    assert world.hub is not None
    told = told_to(world)
    for peer in world.peers.values():
        peer.registry = SHIPPED.digest
    world.run_for(1_200)  # their next pong says so
    task_id = world.submit(task_of([{"id": "S1"}]))
    world.run_for(100)
    new = without_worker()
    reload(world, new)
    first = dict(told)
    assert {"planner", "gates", "inference-front", "inference-worker"} <= first.keys()
    assert all((one.digest, one.needed) == (new.digest, True) for one in first.values())
    told.clear()
    world.peers["inference-front"].registry = new.digest
    world.run_for(5_200)
    assert "inference-front" not in dict(told), "it has followed"
    assert dict(told)["planner"].needed
    assert world.view(task_id).state is TaskState.SUCCEEDED
    told.clear()
    world.run_for(6_000)
    assert not dict(told)["inference-worker"].needed, "the task has ended: it may go"


def told_to(world: World) -> list[tuple[str, Told]]:
    """What services are told about the registry, from now on."""
    told: list[tuple[str, Told]] = []
    carry = world.carry_to_peer

    def listen(identity: bytes, header: bytes, body: bytes) -> None:
        if unpack_header(header).kind == "registry.changed":
            told.append((world.identities[identity].service, unpack_body(Told, body)))
        carry(identity, header, body)

    world.carry_to_peer = listen  # type: ignore[method-assign]
    return told


def test_a_refused_registry_changes_nothing_and_says_every_line() -> None:
    world = stack()
    assert world.hub is not None
    problems = (Problem("models.yaml", 12, "models.front.slots", "int_type", "must be a number"),)
    asked = Header(kind="registry.reload", id="r1")
    world.submit(task_of([{"id": "S1"}]))  # the client says hello
    before = world.hub.registry
    world.feed(RegistryRefused("the registry has 1 problem", problems, CLIENT, asked, world.now))
    (send,) = [body for header, body in world.client_inbox if header.corr == "r1"]
    assert isinstance(send, ErrorReply)
    (finding,) = send.failure.findings
    assert (finding.file, finding.line, finding.rule) == ("models.yaml", 12, "int_type")
    assert send.failure.code == "registry.invalid"
    assert world.hub.registry is before
    assert world.finish(world.submit(task_of([{"id": "S1"}]))).state is TaskState.SUCCEEDED


def test_fewer_cores_cut_nothing_that_runs() -> None:
    world = stack(say("fine", took_ms=2_000))
    task_id = world.submit(task_of([{"id": f"S{number}"} for number in range(4)]))
    world.run_for(100)
    hardware = replace(SHIPPED.hardware, cores=1)
    told = reload(world, replace(SHIPPED, hardware=hardware, digest="1" * 64))
    assert [one.section for one in told.changes] == ["hardware"]
    assert world.hub is not None
    world.hub.broker.check_invariants()
    assert world.finish(task_id).state is TaskState.SUCCEEDED


def test_the_same_registry_again_changes_nothing() -> None:
    world = stack()
    told = reload(world, SHIPPED)
    assert told.changes == []
    assert told.digest == told.previous
    assert told.unchanged == changes(SHIPPED, SHIPPED)[1] > 30


def test_a_reload_is_asked_of_the_edge_with_the_digest_that_was_checked() -> None:
    world = stack()
    assert world.hub is not None
    world.submit(task_of([{"id": "S1"}]))
    header = Header(kind="registry.reload", id="r9")
    out = world.hub.handle(FrameIn(CLIENT, [pack_header(header), pack_body(Reload(digest="a" * 64))], world.now))
    (read,) = [command for command in out if isinstance(command, ReadRegistry)]
    assert (read.digest, read.header.id) == ("a" * 64, "r9")
    assert not [command for command in out if isinstance(command, Send)]


NAMES = st.sets(st.sampled_from(sorted(SHIPPED.roles)))


@settings(max_examples=60, deadline=None)
@given(gone=NAMES, actors=st.lists(st.sampled_from(sorted(SHIPPED.roles)), min_size=1, max_size=4))
def test_whatever_is_removed_a_running_task_finds_all_it_names(gone: set[str], actors: list[str]) -> None:
    world = stack(say("fine", took_ms=500))
    task_id = world.submit(task_of([{"id": f"S{number}", "actor": actor} for number, actor in enumerate(actors)]))
    world.run_for(60)
    assert world.hub is not None
    task = world.hub.engine.live[task_id]
    roles: dict[str, Any] = dict.fromkeys(gone)
    roles |= {
        name: role.model_copy(update={"escalates_to": None})
        for name, role in SHIPPED.roles.items()
        if name not in gone and role.escalates_to in gone
    }
    new = edited(roles=roles, models={"worker": None} if "worker" in gone else {})
    joined = with_kept(new, SHIPPED, used_by([task]))
    assert used_by([task]).missing(joined) == {}
    for role in joined.roles.values():
        if role.name not in new.roles:
            assert role.model in joined.models
            assert role.escalates_to is None or role.escalates_to in joined.roles
    told = reload(world, new)
    assert world.finish(task_id).state is TaskState.SUCCEEDED
    assert all(name.partition(".")[2] in SHIPPED.roles or name.startswith("models.") for name in told.kept)


def test_new_weights_of_clients_count_for_the_next_call_that_waits() -> None:
    world = stack()
    assert world.hub is not None
    assert world.hub.broker.weight_of("importer") == 1
    heavy = ClientEntry.model_validate({"name": "import*", "weight": 3})
    told = reload(world, replace(SHIPPED, clients=(heavy,), digest="2" * 64))
    assert [(one.section, one.name, one.change) for one in told.changes] == [("clients", "import*", "added")]
    assert world.hub.broker.weight_of("importer") == 3
