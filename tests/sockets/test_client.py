"""The client's promises to a program, on real sockets against a hub that answers by script."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import pytest

from protocol.client import AsyncClient, Client, default_address
from protocol.codec import unpack_body
from protocol.errors import CallFailed, CallRefused, DeadlineExceeded, HubUnreachable
from protocol.header import Header
from protocol.kinds import STEP_TOKENS
from protocol.messages.artefact import Artefact
from protocol.messages.base import Message
from protocol.messages.batch import BatchAnswer, BatchFinal, BatchPartial, BatchRequest
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import ChatMessage, InferFinal, InferPartial, InferRequest
from protocol.messages.memory import MemoryFinal, MemoryRequest, Stats
from protocol.messages.plan import PlanFinal
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.result import (
    ArtefactReply,
    Cancelled,
    Listing,
    TaskEvent,
    TaskState,
    TaskView,
    Watch,
)
from protocol.messages.session import StatusReport
from protocol.messages.task import Accepted, Submit, TaskIR
from services.kit.config import load_home
from tests.fakes.hub import Script, ScriptedHub
from tests.waiting import WITHIN_S

TASK = TaskIR(objective="Say hello")


def view(state: TaskState = TaskState.SUCCEEDED, last_seq: int = 0) -> TaskView:
    return TaskView(
        task_id="T1",
        state=state,
        objective="Say hello",
        task_type="chat",
        priority="interactive",
        created_ms=1,
        last_seq=last_seq,
    )


def event(seq: int, name: str = "step.done") -> TaskEvent:
    return TaskEvent(task_id="T1", seq=seq, at_ms=seq, event=name)


def always(*answers: tuple[str, Message]) -> Script:
    return lambda header, body: answers


def failing(code: str) -> tuple[str, Message]:
    return "error", ErrorReply(failure=Failure(code=code, category=Category.SCHEMA, origin="test", message="no"))


async def until(reached: object) -> None:
    """Wait until the callable `reached` gives something true."""
    async with asyncio.timeout(WITHIN_S):
        while not reached():  # type: ignore[operator]  # noqa: ASYNC110  the hub is in a thread, without our loop
            await asyncio.sleep(0.01)


async def test_submit_returns_once_the_hub_has_accepted(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("task.submit", always(("task.accepted", Accepted(task_id="T1"))))
    with hub.serving():
        async with AsyncClient(address, "probe") as client:
            assert await client.submit(TASK) == Accepted(task_id="T1")
        header, body = hub.seen("task.submit")[0]
    sent = unpack_body(Submit, body).task
    assert sent["objective"] == "Say hello"
    assert sent["idempotency_key"]
    assert header.src is not None
    assert header.src.startswith("probe-")
    assert header.deadline is not None
    assert header.deadline > time.time() * 1000


async def test_a_client_that_closes_says_goodbye(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("session.status", always(failing("never.mind")))
    with hub.serving():
        async with AsyncClient(address) as client:
            with pytest.raises(CallFailed):
                await client.status()
        await until(lambda: hub.seen("session.goodbye"))


async def test_a_client_may_be_there_before_its_hub(address: str) -> None:
    async with AsyncClient(address) as client:
        asked = asyncio.create_task(client.submit(TASK))
        await asyncio.sleep(0.3)
        hub = ScriptedHub(address)
        hub.answer("task.submit", always(("task.accepted", Accepted(task_id="T1"))))
        with hub.serving():
            assert (await asked).task_id == "T1"


async def test_without_a_hub_a_call_ends_at_its_deadline_and_says_what_to_do(address: str) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(HubUnreachable, match="tierline up"):
            await client.show("T1", timeout_s=0.3)


async def test_a_silent_hub_is_a_deadline_exceeded_and_not_an_unreachable_one(address: str) -> None:
    with ScriptedHub(address).serving() as hub:
        async with AsyncClient(address) as client:
            await until(lambda: hub.known)
            with pytest.raises(DeadlineExceeded) as ended:
                await client.show("T1", timeout_s=2)
    assert not isinstance(ended.value, HubUnreachable)


async def test_a_typed_failure_arrives_as_it_was_sent(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("task.submit", always(failing("task.invalid")))
    with hub.serving():
        async with AsyncClient(address) as client:
            with pytest.raises(CallFailed) as failed:
                await client.submit({"objective": ""})
    assert failed.value.failure.code == "task.invalid"
    assert failed.value.failure.category is Category.SCHEMA


async def test_a_batch_gives_its_answers_in_order_and_tells_its_progress(address: str) -> None:
    final = BatchFinal(
        role="worker", model="m", answers=[BatchAnswer(text="a"), BatchAnswer(text="b")], widest=2, wall_ms=5
    )
    progress = BatchPartial(done=1, failed=0, running=1, total=2, generated_tokens=3)
    hub = ScriptedHub(address)
    hub.answer("batch.request", always(("batch.partial", progress), ("batch.final", final)))
    seen: list[BatchPartial] = []
    with hub.serving():
        async with AsyncClient(address) as client:
            got = await client.llm_batch("worker", ["x", "y"], timeout_s=20, max_tokens=7, on_progress=seen.append)
            with pytest.raises(ValueError, match="at most 1000"):
                await client.llm_batch("worker", ["x"] * 1_001, timeout_s=WITHIN_S)
        header, body = hub.seen("batch.request")[0]
    assert got == final
    assert seen == [progress]
    assert unpack_body(BatchRequest, body) == BatchRequest(role="worker", prompts=["x", "y"], max_tokens=7)
    assert header.prio == "batch"
    assert header.key
    assert header.deadline is not None
    assert header.deadline <= time.time() * 1000 + 20_000, "the hub is told the deadline itself, not our grace"


async def test_every_option_of_a_batch_reaches_the_hub(address: str) -> None:
    hub = ScriptedHub(address)
    final = BatchFinal(role="worker", model="m", answers=[BatchAnswer(text="a")], widest=1, wall_ms=5)
    hub.answer("batch.request", always(("batch.final", final)))
    asked: list[dict[str, Any]] = [
        {"max_tokens": 7, "json_schema": {"type": "object"}, "concurrency": 3},
        {"grammar": "root ::= [0-9]"},
    ]
    with hub.serving():
        async with AsyncClient(address) as client:
            for options in asked:
                await client.llm_batch("worker", ["x"], timeout_s=20, interactive=True, key="mine", **options)
        seen = hub.seen("batch.request")
    assert [(header.prio, header.key) for header, _ in seen] == [("interactive", "mine")] * 2
    wanted = [BatchRequest(role="worker", prompts=["x"], **options) for options in asked]
    assert [unpack_body(BatchRequest, body) for _, body in seen] == wanted


async def test_a_batch_nobody_waits_for_is_cancelled(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("batch.request", always())
    with hub.serving():
        async with AsyncClient(address) as client:
            asked = asyncio.create_task(client.llm_batch("worker", ["x"], timeout_s=WITHIN_S, key="K"))
            await until(lambda: hub.seen("batch.request"))
            asked.cancel()
            await until(lambda: hub.seen("batch.cancel"))
    header, _ = hub.seen("batch.cancel")[0]
    assert header.key == "K"


async def test_a_refusal_carries_the_time_to_wait(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("task.submit", always(("refused", Refused(reason="full", retry_after_ms=25_000))))
    with hub.serving():
        async with AsyncClient(address) as client:
            with pytest.raises(CallRefused) as refused:
                await client.submit(TASK)
            assert refused.value.retry_after_ms == 25_000
            with pytest.raises(CallRefused):  # the next try would come after the deadline
                await client.submit(TASK, timeout_s=20, wait_if_refused=True)


async def test_a_patient_submit_asks_again_with_the_same_key(address: str) -> None:
    tries = count()

    def script(header: Header, body: bytes) -> Iterable[tuple[str, Message]]:
        if next(tries) < 2:
            return [("refused", Refused(reason="full", retry_after_ms=50))]
        return [("task.accepted", Accepted(task_id="T1"))]

    hub = ScriptedHub(address)
    hub.answer("task.submit", script)
    with hub.serving():
        async with AsyncClient(address) as client:
            assert (await client.submit(TASK, wait_if_refused=True)).task_id == "T1"
        keys = [unpack_body(Submit, body).task["idempotency_key"] for _, body in hub.seen("task.submit")]
    assert len(keys) == 3
    assert len(set(keys)) == 1


async def test_a_submit_outlives_its_hub_and_stays_one_task(address: str) -> None:
    """The first hub takes the request and dies silent; the second gets the same request again."""
    with ScriptedHub(address, "first").serving() as first:
        client = await AsyncClient(address).__aenter__()
        asked = asyncio.create_task(client.submit(TASK, timeout_s=WITHIN_S))
        await until(lambda: first.seen("task.submit"))
    second = ScriptedHub(address, "second")
    second.answer("task.submit", always(("task.accepted", Accepted(task_id="T1", duplicate=True))))
    with second.serving():
        assert (await asked).duplicate
        await client.close()
    (before, body), (after, body_after) = first.seen("task.submit")[0], second.seen("task.submit")[0]
    assert before.id == after.id
    assert body == body_after
    assert (before.seq or 0) < (after.seq or 0)  # a repeat with an old seq would be dropped as a duplicate


async def test_a_watch_goes_on_after_a_restart_of_the_hub_and_shows_each_event_once(address: str) -> None:
    got: list[TaskEvent | TaskView] = []

    async def read(client: AsyncClient) -> None:
        async for piece in client.watch("T1", timeout_s=WITHIN_S):
            got.append(piece)  # noqa: PERF401  the test reads the list while it grows

    first = ScriptedHub(address, "first")
    first.answer("task.watch", always(("task.event", event(1)), ("task.event", event(2))))
    with first.serving():
        client = await AsyncClient(address).__aenter__()
        reading = asyncio.create_task(read(client))
        await until(lambda: len(got) == 2)
    second = ScriptedHub(address, "second")
    ending = (("task.event", event(2)), ("task.event", event(3)), ("task.result", view(last_seq=3)))
    second.answer("task.watch", always(*ending))
    with second.serving():
        await asyncio.wait_for(reading, WITHIN_S)
        await client.close()
    assert [piece.seq for piece in got if isinstance(piece, TaskEvent)] == [1, 2, 3]
    assert isinstance(got[-1], TaskView)
    assert unpack_body(Watch, second.seen("task.watch")[0][1]).after_seq == 2


async def test_an_answer_lost_by_a_living_hub_is_asked_for_again(address: str) -> None:
    tries = count()

    def forgetful(header: Header, body: bytes) -> Iterable[tuple[str, Message]]:
        return [] if next(tries) == 0 else [("task.detail", view())]

    hub = ScriptedHub(address)
    hub.answer("task.show", forgetful)
    hub.answer("session.status", always(("session.report", EMPTY_REPORT)))
    with hub.serving():
        async with AsyncClient(address) as client:
            assert (await client.show("T1", timeout_s=WITHIN_S)).state is TaskState.SUCCEEDED


async def test_a_call_of_a_worker_is_not_repeated_to_a_hub_that_lives(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("session.status", always(("session.report", EMPTY_REPORT)))
    with hub.serving():
        async with AsyncClient(address) as client:
            with pytest.raises(DeadlineExceeded):
                await client.infer("worker", ASK, timeout_s=3.5)
        assert len(hub.seen("infer.request")) == 1
        await until(lambda: hub.seen("infer.cancel"))
    assert hub.seen("infer.cancel")[0][0].key == hub.seen("infer.request")[0][0].key


async def test_tokens_repeat_the_last_number_and_are_shown(address: str) -> None:
    hub = ScriptedHub(address)
    tokens = [
        ("task.event", event(1, STEP_TOKENS).model_copy(update={"fields": {"text": text}})) for text in ("a", "b")
    ]
    hub.answer("task.watch", always(("task.event", event(1)), *tokens, ("task.result", view())))
    with hub.serving():
        async with AsyncClient(address) as client:
            got = [piece async for piece in client.watch("T1", timeout_s=WITHIN_S)]
    first, *told, last = got
    assert (first, last) == (event(1), view())
    assert "".join(one.fields["text"] for one in told if isinstance(one, TaskEvent)) == "ab", "in one piece or in two"


async def test_an_answer_that_cannot_be_read_ends_the_call_with_a_typed_failure(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("task.show", always(("task.detail", Accepted(task_id="T1"))))
    hub.answer("task.list", always(("task.detail", view())))
    with hub.serving():
        async with AsyncClient(address) as client:
            for call in (client.show("T1"), client.list()):
                with pytest.raises(CallFailed) as failed:
                    await call
                assert failed.value.failure.code == "answer.invalid"


async def test_what_cannot_be_sent_is_refused_before_it_is_sent(address: str) -> None:
    async with AsyncClient(address) as client:
        for task in ({"objective": object()}, {"objective": "x" * 9_000_000}, {"objective": 2**70}):
            with pytest.raises(CallFailed) as failed:
                await client.submit(task)
            assert failed.value.failure.origin == "client"


async def test_a_header_that_no_hub_could_read_is_refused_instead_of_waiting_in_vain(address: str) -> None:
    for name in ("my importer", "größe", "a" * 116):
        with pytest.raises(ValueError, match="at most 115"):
            AsyncClient(address, name)
    async with AsyncClient(address) as client:
        with pytest.raises(CallFailed, match=r"\$\.key") as failed:
            await client.llm_batch("worker", ["one"], timeout_s=60, key="my key")
        assert failed.value.failure.category is Category.POLICY
        with pytest.raises(CallFailed, match=r"\$\.dst"):
            await client.ask("memory.request", MemoryRequest(ask=Stats()), MemoryFinal, timeout_s=60, dst="my memory")
        with pytest.raises(ValueError, match="not a number"):
            await client.status(timeout_s=float("nan"))


async def test_who_waits_for_ever_gets_an_answer_too(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("task.submit", always(("task.accepted", Accepted(task_id="T1"))))
    with hub.serving():
        async with AsyncClient(address) as client:
            for timeout_s in (float("inf"), 1e300):
                async with asyncio.timeout(WITHIN_S):
                    assert (await client.submit(TASK, timeout_s=timeout_s)).task_id == "T1"
        assert all(header.deadline is not None for header, _ in hub.seen("task.submit"))


async def test_one_text_is_not_a_batch_of_its_characters(address: str) -> None:
    async with AsyncClient(address) as client:
        with pytest.raises(ValueError, match="put it into a list"):
            await client.llm_batch("worker", "hello", timeout_s=60)


async def test_every_call_has_its_value(address: str) -> None:
    final = InferFinal(
        text="hi", finish_reason="stop", model="worker", engine="noop", prompt_tokens=1, generated_tokens=1
    )
    hub = ScriptedHub(address)
    hub.answer("task.submit", always(("task.accepted", Accepted(task_id="T1"))))
    hub.answer("task.show", always(("task.detail", view(TaskState.RUNNING, last_seq=4))))
    hub.answer("task.watch", always(("task.event", event(5)), ("task.result", view())))
    hub.answer("task.list", always(("task.listing", Listing(tasks=[]))))
    hub.answer("task.cancel", always(("task.cancelled", Cancelled(task_id="T1", state=TaskState.CANCELLED))))
    hub.answer("task.artefact", always(("task.content", ArtefactReply(artefact=Artefact(name="a", value="b")))))
    hub.answer("session.status", always(("session.report", EMPTY_REPORT)))
    piece = InferPartial(text="h", generated_tokens=1)
    hub.answer("infer.request", always(("infer.partial", piece), ("infer.final", final)))
    hub.answer("plan.request", always(("plan.final", PlanFinal(task=TASK, source="rules", reason="test"))))
    hub.answer("memory.request", always(("memory.final", MemoryFinal(stored=1))))
    pieces: list[InferPartial] = []
    with hub.serving():
        async with AsyncClient(address) as client:
            assert (await client.run(TASK, timeout_s=WITHIN_S)).state is TaskState.SUCCEEDED
            assert (await client.list()).tasks == []
            assert (await client.cancel("T1", reason="test")).state is TaskState.CANCELLED
            assert (await client.artefact("T1", "a")).value == "b"
            assert (await client.status()).hub_epoch == "scripted"
            assert await client.infer("worker", ASK, WITHIN_S, key="K1", on_partial=pieces.append) == final
            assert (await client.plan(TASK, timeout_s=WITHIN_S)).source == "rules"
            assert (await client.memory(MemoryRequest(ask=Stats()))).stored == 1
    assert pieces == [piece]
    assert (hub.seen("infer.request")[0][0].dst, hub.seen("infer.request")[0][0].key) == ("infer.worker", "K1")
    assert unpack_body(Watch, hub.seen("task.watch")[0][1]).after_seq == 4


def test_the_blocking_client_makes_the_same_calls_from_several_threads(address: str) -> None:
    hub = ScriptedHub(address)
    hub.answer("task.submit", always(("task.accepted", Accepted(task_id="T1"))))
    hub.answer("task.show", always(("task.detail", view())))
    hub.answer("task.watch", always(("task.event", event(1)), ("task.result", view())))
    with hub.serving(), Client(address) as client:
        assert client.run(TASK, WITHIN_S).state is TaskState.SUCCEEDED
        assert [type(piece) for piece in client.watch("T1", timeout_s=WITHIN_S)] == [TaskEvent, TaskView]
        for piece in client.watch("T1", timeout_s=WITHIN_S):
            assert isinstance(piece, TaskEvent)
            break  # leaving early must not leave the request behind
        shown: list[TaskView] = []
        threads = [threading.Thread(target=lambda: shown.append(client.show("T1"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WITHIN_S)
        assert len(shown) == 8


def test_the_blocking_client_hands_every_argument_on(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            async def call(*args: Any, **named: Any) -> dict[str, Any]:
                return inspect.signature(getattr(AsyncClient, name)).bind(self, *args, **named).arguments

            return call

    calls = {name: one for name, one in vars(Client).items() if not name.startswith("_") and name != "close"}
    assert calls.keys() >= {"submit", "run", "infer", "llm_batch", "memory"}
    with Client(address) as client:
        monkeypatch.setattr(client, "_client", recorder := Recorder())
        for name, call in calls.items():
            if name == "watch":
                continue  # an iterator: the test above goes through it
            given = {one: object() for one in list(inspect.signature(call).parameters)[1:]}
            assert call(client, **given) == {"self": recorder, **given}, name
        monkeypatch.undo()


def test_a_callback_that_calls_its_own_client_is_told_so_and_nothing_waits_for_ever(address: str) -> None:
    hub = ScriptedHub(address)
    told = BatchPartial(done=0, failed=0, running=1, total=1, generated_tokens=0)
    final = BatchFinal(role="worker", model="m", answers=[BatchAnswer(text="ok")], widest=1, wall_ms=1)
    hub.answer("batch.request", always(("batch.partial", told), ("batch.final", final)))
    with hub.serving(), Client(address) as client:
        for call in (client.status, client.close):
            with pytest.raises(RuntimeError, match="its own client"):
                client.llm_batch("worker", ["one"], timeout_s=WITHIN_S, on_progress=lambda _, call=call: call())
        assert client.llm_batch("worker", ["one"], timeout_s=WITHIN_S).answers[0].text == "ok"


def test_closing_the_blocking_client_is_bounded_and_wakes_who_waits(address: str) -> None:
    client = Client(address)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            client.result("T1", 300)
        except BaseException as err:  # noqa: BLE001  the test looks at what it was
            ended.append(err)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)  # it may wait already, or come to a client that is closed: both have to end
    client.close()
    client.close()
    thread.join(30)
    assert len(ended) == 1, "long before the minutes that it would have waited"
    with pytest.raises(RuntimeError, match="closed"):
        client.status()


def test_the_address_is_that_of_the_services() -> None:
    for env in (
        {"TIERLINE_HOME": "/x"},
        {"XDG_STATE_HOME": "/s"},
        {"HOME": "/h"},
        {"HOME": "/h", "XDG_STATE_HOME": ""},
    ):
        assert default_address(env) == load_home(env).hub_address


ASK = InferRequest(role="worker", messages=[ChatMessage(role="user", content="hi")], max_tokens=8)
EMPTY_REPORT = StatusReport(hub_epoch="scripted", hub_pid=1, uptime_ms=1, peers=[], queued={}, tasks={}, counters={})
