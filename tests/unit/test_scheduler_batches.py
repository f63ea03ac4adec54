"""Batches in virtual time: order, errors per prompt, bounds, cancellation, deadlines, lost workers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import pack_body, unpack_body
from protocol.header import Header, pack_header
from protocol.kinds import Empty
from protocol.messages.base import Message
from protocol.messages.batch import BatchFinal, BatchPartial, BatchRequest
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.session import Goodbye, Hello
from protocol.messages.task import Priority
from services.scheduler import batches
from services.scheduler.effects import Ask, Drop
from services.scheduler.simulation.world import CLIENT
from tests.unit.simulation import Answer, World, final_of, say, stack, task_of
from tests.unit.test_scheduler_recovery import REGISTRY, lateral_registry
from tests.unit.test_scheduler_recovery import world_with as lateral_world


class Asker:
    """One client that asks for batches, or a model itself."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._sent = 0
        self._send("session.hello", Hello(service="client-batch", protocol_min=1, protocol_max=1))

    def _send(self, kind: str, body: Message, **fields: object) -> str:
        self._sent += 1
        header = Header(kind=kind, id=f"b{self._sent}", **fields)  # type: ignore[arg-type]
        self._last = [pack_header(header), pack_body(body)]
        self.repeat()
        return header.id

    def repeat(self) -> None:
        """The last message once more, as a client sends what is outstanding when its connection comes back."""
        self.world.to_hub(CLIENT, self._last)

    def ask(self, prompts: list[str], key: str = "K", deadline_ms: int = 60_000, **fields: object) -> str:
        request = BatchRequest.model_validate({"role": "worker", "prompts": prompts} | fields)
        return self._send("batch.request", request, key=key, deadline=self.world.now + deadline_ms, prio="batch")

    def infer(self, model: str, request: InferRequest, key: str) -> str:
        return self._send("infer.request", request, key=key, dst=f"infer.{model}", deadline=self.world.now + 60_000)

    def cancel(self, kind: str = "batch.cancel", key: str = "K", corr: str | None = None) -> None:
        self._send(kind, Empty(), key=key, corr=corr)

    def failure(self, ident: str) -> Failure:
        """That with which this request has ended, and with nothing else."""
        (body,) = self.said(ident)
        assert isinstance(body, ErrorReply), body
        return body.failure

    def said(self, ident: str) -> list[Message]:
        return [body for header, body in self.world.client_inbox if header.corr == ident]

    def finish(self, ident: str, limit_ms: int = 120_000) -> BatchFinal:
        def over() -> bool:
            return any(not isinstance(body, BatchPartial) for body in self.said(ident))

        self.world.run(over, limit_ms)
        final = self.said(ident)[-1]
        assert isinstance(final, BatchFinal), final
        return final


def echo(took_ms: int = 100) -> object:
    """Answers with the prompt itself; `fail CATEGORY` fails so, `slow` takes ten times as long."""

    def answer(header: Header, body: bytes) -> Answer:
        prompt = unpack_body(InferRequest, body).messages[-1].content
        if prompt.startswith("fail "):
            category = Category(prompt.split()[1])
            evidence = {"generated_tokens": 3}
            return took_ms, Failure(code="t.x", category=category, origin="t", message="as asked", evidence=evidence)
        return took_ms * (10 if prompt.startswith("slow") else 1), final_of(prompt.upper())

    return answer


def world_with(answer: object = None, slots: int = 4) -> World:
    return stack(answer or echo(), slots=slots)  # type: ignore[arg-type]


def test_answers_come_in_the_order_of_the_prompts_whatever_ends_first() -> None:
    asker = Asker(world_with())
    prompts = ["slow zero", *(f"p{index}" for index in range(1, 12))]
    final = asker.finish(asker.ask(prompts))
    assert [answer.text for answer in final.answers] == [prompt.upper() for prompt in prompts]
    assert final.widest == 4, "as many at once as the model has slots"
    assert final.answers[0].ended_ms > final.answers[5].ended_ms
    assert final.wall_ms <= 1_200


def test_a_prompt_that_fails_has_its_failure_and_the_others_go_on() -> None:
    asker = Asker(world_with())
    final = asker.finish(asker.ask(["a", "fail SCHEMA", "fail EARLY_ABORT", "b"]))
    first, schema, abort, last = final.answers
    assert (first.text, last.text) == ("A", "B")
    assert schema.failure is not None
    assert (schema.failure.category, schema.text, schema.generated_tokens) == (Category.SCHEMA, None, 3)
    assert abort.failure is not None
    assert abort.failure.category is Category.EARLY_ABORT


@pytest.mark.parametrize("concurrency", [None, 50])
def test_a_schema_that_cannot_be_used_ends_all_prompts_that_no_worker_has(concurrency: int | None) -> None:
    failure = Failure(code="schema.invalid", category=Category.POLICY, origin="t", message="no JSON Schema")
    world = world_with(lambda header, body: (100, failure))
    asker = Asker(world)
    asked = asker.ask([f"p{index}" for index in range(200)], json_schema={"type": "x"}, concurrency=concurrency)
    final = asker.finish(asked)
    assert [answer.failure for answer in final.answers] == [failure] * 200
    assert len(world.peers["inference-worker"].started) == 4
    assert world.hub is not None
    assert not world.hub.broker.calls


def test_what_is_not_allowed_in_one_prompt_is_no_matter_of_the_others() -> None:
    final = (asker := Asker(world_with(slots=1))).finish(asker.ask(["fail POLICY", "a"]))
    assert final.answers[1].text == "A"


def test_no_more_calls_at_once_than_asked_for() -> None:
    asker = Asker(world_with())
    final = asker.finish(asker.ask([f"p{index}" for index in range(9)], concurrency=2))
    assert final.widest == 2


def test_progress_is_told_and_bounded_in_rate() -> None:
    asker = Asker(world_with(echo(10)))
    ident = asker.ask([f"p{index}" for index in range(200)])
    asker.finish(ident)
    told = [body for body in asker.said(ident) if isinstance(body, BatchPartial)]
    assert 2 <= len(told) <= 6, "half a second of work, one partial every 100 ms at most"
    assert [piece.done for piece in told] == sorted(piece.done for piece in told)
    assert told[-1].total == 200
    assert told[-1].generated_tokens == 5 * told[-1].done


def test_the_roles_prompt_and_limits_go_with_every_prompt_and_a_seed_of_its_own() -> None:
    seen: list[InferRequest] = []

    def answer(header: Header, body: bytes) -> Answer:
        seen.append(unpack_body(InferRequest, body))
        return 10, final_of("x")

    world = world_with(answer)
    asker = Asker(world)
    asker.finish(asker.ask(["one", "two"], max_tokens=7, json_schema={"type": "object"}))
    role = world.registry.roles["worker"]
    assert [one.messages[0].content for one in seen] == [role.prompt] * 2
    assert [one.max_tokens for one in seen] == [7, 7]
    assert all(one.json_schema == {"type": "object"} and one.early_abort is not None for one in seen)
    assert seen[0].sampling.seed != seen[1].sampling.seed
    assert seen[0].sampling.temperature == role.sampling.temperature


def test_an_interactive_task_overtakes_a_long_batch() -> None:
    world = world_with(slots=1)
    asker = Asker(world)
    ident = asker.ask([f"p{index}" for index in range(30)])
    world.run_for(150)
    inbox = list(world.client_inbox)
    task = world.submit(task_of([{"id": "S1"}], priority=Priority.INTERACTIVE.value))
    world.client_inbox[:0] = inbox
    view = world.finish(task)
    assert view.ended_ms is not None
    assert view.ended_ms - view.created_ms < 400, "one running call, not the rest of the batch"
    assert asker.finish(ident).answers[29].text == "P29"


def test_a_cancel_ends_running_and_waiting_prompts_and_says_nothing() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    ident = asker.ask([f"p{index}" for index in range(20)])
    world.run_for(100)
    started = len(world.peers["inference-worker"].started)
    asker.cancel()
    world.run_for(5_000)
    assert world.hub is not None
    assert not world.hub.broker.calls
    assert len(world.peers["inference-worker"].started) == started == 4
    assert not asker.said(ident)
    again = asker.finish(asker.ask(["after"], key="other"))
    assert again.answers[0].text == "AFTER", "every slot came back"


def test_a_client_that_leaves_cancels_its_batches() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    asker.ask([f"p{index}" for index in range(20)])
    world.run_for(100)
    asker._send("session.goodbye", Goodbye(reason="done"))
    world.run_for(3_000)
    assert world.hub is not None
    assert not world.hub.broker.calls
    assert not world.hub.batches.requesters()


def test_what_is_not_answered_by_the_deadline_is_a_timeout_of_its_own() -> None:
    asker = Asker(world_with(echo(400)))
    final = asker.finish(asker.ask([f"p{index}" for index in range(12)], deadline_ms=500))
    assert [answer.text for answer in final.answers[:4]] == ["P0", "P1", "P2", "P3"]
    late = [answer.failure for answer in final.answers[4:]]
    assert len(late) == 8
    assert all(failure is not None and failure.category is Category.TIMEOUT for failure in late)


def test_a_prompt_whose_worker_dies_runs_again() -> None:
    world = world_with(echo(1_000))
    asker = Asker(world)
    ident = asker.ask([f"p{index}" for index in range(6)])
    world.run_for(300)
    world.peers["inference-worker"].kill()
    world.run_for(300)
    world.peers["inference-worker"].start()
    final = asker.finish(ident)
    assert [answer.text for answer in final.answers] == [f"P{index}" for index in range(6)]
    assert [answer.losses for answer in final.answers] == [1, 1, 1, 1, 0, 0]


def test_a_prompt_whose_engine_dies_every_time_is_poisoned_and_no_other() -> None:
    asker = Asker(world_with())
    final = asker.finish(asker.ask(["a", "fail PEER", "b"]))
    assert [answer.text for answer in final.answers] == ["A", None, "B"]
    bad = final.answers[1]
    assert bad.failure is not None
    assert bad.failure.category is Category.PEER
    assert bad.losses == asker.world.registry.failures.caps.worker_deaths


def test_what_waits_for_a_model_that_nobody_serves_goes_to_the_lateral_one_and_comes_back_at_most_once() -> None:
    world = lateral_world(infer=echo(2_000), registry=lateral_registry())  # type: ignore[arg-type]
    asker = Asker(world)
    own, spare = world.peers["inference-worker"], world.peers["inference-spare"]
    ident = asker.ask([f"p{index}" for index in range(12)], deadline_ms=240_000)
    world.run_for(3_000)
    own.kill()
    world.run_for(7_500)
    assert len(spare.started) >= 2, "those that ran on the lost worker, and those that had not begun"
    sideways = len(spare.started)
    spare.kill()
    own.start()
    world.run_for(20_000)
    own.kill()
    spare.start()
    world.run_for(20_000)
    own.start()
    final = asker.finish(ident, 300_000)
    assert [answer.text for answer in final.answers] == [f"P{index}" for index in range(12)]
    assert len(spare.started) == sideways, "two that take turns dying do not make it wander"


def ailing_worker(slow: Answer) -> World:
    """A model that fails all prompts for want of something, but for `slow`, which ends so; its circuit opens soon."""
    failed = 0

    def answer(header: Header, body: bytes) -> Answer:
        nonlocal failed
        if unpack_body(InferRequest, body).messages[-1].content == "slow":
            return slow
        failed += 1
        return 300 * failed, Failure(code="t.x", category=Category.RESOURCE, origin="t", message="no memory")

    models = {"worker": answer, "spare": echo()}
    return lateral_world(registry=lateral_registry(), models=models)  # type: ignore[arg-type]


@pytest.mark.parametrize("category", [Category.RESOURCE, Category.PEER])
def test_a_prompt_that_fails_on_the_old_model_after_a_move_is_asked_again_of_the_new_one(category: Category) -> None:
    failure = Failure(code="t.x", category=category, origin="t", message="no memory")
    world = ailing_worker((10_000, failure))
    asker = Asker(world)
    ident = asker.ask(["slow", *(f"p{index}" for index in range(7))])
    world.run_for(9_000)
    assert world.peers["inference-spare"].started, "the circuit of the first model is open"
    began = world.now
    final = asker.finish(ident, 60_000)
    assert [answer.text for answer in final.answers] == ["SLOW", *(f"P{index}" for index in range(7))]
    assert final.model == "spare"
    assert world.now - began < 5_000


def test_a_prompt_that_is_lost_on_the_old_model_after_a_move_goes_to_the_new_one() -> None:
    world = ailing_worker((50_000, final_of("never")))
    asker = Asker(world)
    ident = asker.ask(["slow", *(f"p{index}" for index in range(7))])
    world.run_for(9_000)
    assert world.peers["inference-spare"].started, "the circuit of the first model is open"
    world.peers["inference-worker"].kill()
    began = world.now
    final = asker.finish(ident, 60_000)
    assert [answer.text for answer in final.answers] == ["SLOW", *(f"P{index}" for index in range(7))]
    assert final.answers[0].losses == 1
    assert world.now - began < 20_000, "no longer than it takes to see that nobody serves the first one"


def test_a_batch_ends_at_its_deadline_whatever_has_become_of_its_calls() -> None:
    machine = batches.Batches(lambda: REGISTRY, lambda target: 2)
    header = Header(kind="batch.request", id="b1", key="K", deadline=1_000)
    machine.ask(b"C", header, pack_body(BatchRequest(role="worker", prompts=["a", "b", "c"])), "c", 0)
    asked = [effect.call for effect in machine.take() if isinstance(effect, Ask)]
    final = InferFinal(text="A", finish_reason="stop", model="m", engine="e", prompt_tokens=1, generated_tokens=1)
    machine.on_ended(asked[0], "infer.final", pack_body(final), "w", 500)
    machine.take()
    machine.on_tick(1_000)
    effects = machine.take()
    assert len([effect for effect in effects if isinstance(effect, Drop)]) == 2
    (told,) = [effect.body for effect in effects if isinstance(effect, batches.Tell)]
    assert isinstance(told, BatchFinal)
    assert [answer.text for answer in told.answers] == ["A", None, None]
    assert {answer.failure.category for answer in told.answers if answer.failure is not None} == {Category.TIMEOUT}
    machine.check_invariants([])
    assert not machine.requesters()


def test_a_lack_of_resources_is_waited_out_as_often_as_the_table_says() -> None:
    asker = Asker(world_with())
    final = asker.finish(asker.ask(["fail RESOURCE"]))
    failure = final.answers[0].failure
    assert failure is not None
    assert failure.category is Category.RESOURCE
    rule = asker.world.registry.failures.rules[Category.RESOURCE]
    assert len(asker.world.peers["inference-worker"].started) == rule.same_role + 1


def test_a_hub_that_was_restarted_does_not_compute_again_what_workers_have() -> None:
    world = world_with(echo(100))
    asker = Asker(world)
    asker.ask([f"p{index}" for index in range(8)])
    world.run_for(150)
    before = list(world.peers["inference-worker"].started)
    world.kill_hub()
    world.boot_hub()
    world.run_for(5_000)
    later = Asker(world)
    final = later.finish(later.ask([f"p{index}" for index in range(8)]))
    assert [answer.text for answer in final.answers] == [f"P{index}" for index in range(8)]
    started = world.peers["inference-worker"].started
    assert not set(before[:4]) & set(started[len(before) :]), "the first four had been finished"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"role": "nobody"}, "role.unknown"),
        ({"prompts": []}, "body.invalid"),
        ({"prompts": ["x"] * 1_001}, "body.invalid"),
        ({"grammar": 'root ::= "x"', "json_schema": {}}, "body.invalid"),
        ({"grammar": "x" * 70_000}, "body.invalid"),
    ],
)
def test_what_cannot_be_a_batch_is_an_error_with_its_reason(fields: dict[str, object], code: str) -> None:
    asker = Asker(world_with())
    raw = BatchRequest.model_construct(**({"role": "worker", "prompts": ["x"]} | fields))
    (error,) = asker.said(asker._send("batch.request", raw, key="K"))
    assert isinstance(error, ErrorReply)
    assert (error.failure.code, error.failure.category) == (code, Category.POLICY)


def test_more_batches_than_one_client_may_have_are_refused_with_a_time() -> None:
    asker = Asker(world_with(echo(1_000)))
    for number in range(batches.MAX_BATCHES_PER_CLIENT):
        asker.ask(["a"], key=f"k{number}")
    (refused,) = asker.said(asker.ask(["a"], key="one-more"))
    assert isinstance(refused, Refused)
    assert refused.retry_after_ms > 0


def test_answers_that_no_message_could_hold_fail_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_ANSWER_BYTES", 10)
    asker = Asker(world_with(say("sixteen bytes..."), slots=1))
    failure = asker.finish(asker.ask(["a"])).answers[0].failure
    assert failure is not None
    assert failure.code == "batch.too_large"


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(
        st.sampled_from(["a", "slow b", "fail CODE", "fail PEER", "fail RESOURCE"]), min_size=1, max_size=12
    ),
    kills=st.lists(st.integers(0, 1_500), max_size=3),
    slots=st.integers(1, 4),
    concurrency=st.none() | st.integers(1, 6),
)
def test_every_prompt_has_exactly_one_end_whatever_dies(
    prompts: list[str], kills: list[int], slots: int, concurrency: int | None
) -> None:
    world = world_with(slots=slots)
    asker = Asker(world)
    worker = world.peers["inference-worker"]
    for at_ms in kills:
        world.later(at_ms, lambda: (worker.kill(), worker.start()))
    final = asker.finish(asker.ask(prompts, deadline_ms=15_000, concurrency=concurrency))
    assert len(final.answers) == len(prompts)
    for prompt, answer in zip(prompts, final.answers, strict=True):
        assert (answer.text is None) is not (answer.failure is None)
        if not prompt.startswith("fail") and answer.failure is not None:
            # a model that fails prompt after prompt is left alone for longer and longer, maybe until the deadline
            assert answer.failure.code in ("item.poisoned", "batch.deadline", "call.expired", "call.deadline")
    assert final.widest <= slots * (1 + len(kills))
    assert world.hub is not None
    assert not world.hub.broker.calls
