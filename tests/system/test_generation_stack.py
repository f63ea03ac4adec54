"""Early abort, repair and batches through the whole stack: what the hub makes of them, and what people are shown."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.client import AsyncClient
from protocol.errors import CallFailed
from protocol.messages.batch import BatchFinal, BatchPartial
from protocol.messages.failure import Category
from protocol.messages.result import TaskState
from services.kit.config import CHECKOUT
from tests.system.scripted_stack import ScriptedStack, scripted_stack
from tests.waiting import until

LOOP = {"text": "I will do what I can do. ", "repeat": 400, "token_s": 0.002}
SLOTS = 4


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedStack]:
    with scripted_stack(worker_slots=SLOTS) as running:
        yield running


def tierline(scripted: ScriptedStack, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.ctl", *words],
        cwd=CHECKOUT,
        env=scripted.stack.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )


def idle(scripted: ScriptedStack) -> Callable[[], bool]:
    def check() -> bool:
        peer = next(one for one in scripted.stack.client.status().peers if one.service == "inference-worker")
        free = peer.granted - peer.used
        return peer.metrics["requests_processing"] == 0 and not peer.in_flight and free == SLOTS

    return check


def await_idle(scripted: ScriptedStack) -> None:
    until(idle(scripted), "every slot of the worker is free")


def test_an_answer_that_loops_is_stopped_and_the_next_role_answers(scripted: ScriptedStack) -> None:
    scripted.say(
        {"match": "walnut", "model": "worker", "answers": [LOOP]},
        {"match": "walnut", "model": "specialist", "answers": ["a proper answer"]},
    )
    view = scripted.run({"id": "S1", "action": "walnut: say it", "outputs": [{"name": "a"}], "max_tokens": 1_500})
    assert view.state is TaskState.SUCCEEDED, view.failure
    first, second = view.steps[0].attempts
    assert (first.role, second.role) == ("worker", "coder")
    assert first.failure is not None
    assert first.failure.category is Category.EARLY_ABORT
    assert first.failure.evidence["repeated"]
    assert 100 < first.generated_tokens < 1_000, "counted, and not the 1500 it might have spent"
    assert view.usage.generated_tokens == first.generated_tokens + second.generated_tokens
    assert "I will do what I can do." in scripted.prompts_with("walnut")[-1], "the stronger role sees what went wrong"
    await_idle(scripted)
    until(lambda: scripted.figures("worker")["early_aborts"] == 1, "the abort is counted")
    told = tierline(scripted, "explain", view.task_id)
    assert told.returncode == 0, told.stderr
    assert "EARLY_ABORT decoding.repetition" in told.stdout
    assert "I will do what I can do." in told.stdout
    assert "from worker to coder" in told.stdout


def test_aborted_attempts_count_in_the_caps(scripted: ScriptedStack) -> None:
    scripted.say({"match": "pecan", "answers": [LOOP]})
    step = {"id": "S1", "action": "pecan: say it", "outputs": [{"name": "a"}], "max_tokens": 1_500}
    view = scripted.run(step, escalation={"max_level": 1})
    assert view.state is TaskState.FAILED
    assert view.failure is not None
    assert view.failure.category is Category.EARLY_ABORT
    assert [attempt.role for attempt in view.steps[0].attempts] == ["worker", "coder"]
    assert "max_level 1" in (view.steps[0].attempts[-1].action or "")


def test_a_mended_answer_is_one_attempt_and_is_told(scripted: ScriptedStack) -> None:
    scripted.say(
        {"match": "was not accepted", "answers": ['{"n": 3}']},
        {"match": "almond", "answers": ['{"n": "three"}']},
    )
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    output = {"name": "a", "kind": "json"}
    view = scripted.run({"id": "S1", "action": "almond: count", "outputs": [output], "json_schema": schema})
    assert view.state is TaskState.SUCCEEDED, view.failure
    (attempt,) = view.steps[0].attempts
    assert attempt.repaired
    assert view.artefacts[0].value == {"n": 3}
    assert "after the model mended its JSON" in tierline(scripted, "explain", view.task_id).stdout


def test_a_batch_is_spread_over_the_slots_and_answered_in_order(scripted: ScriptedStack) -> None:
    words = [f"quince-{number:02}" for number in range(12)]
    rules = [{"match": word, "answers": [{"text": f"saw {word}", "token_s": 0.15}]} for word in words]
    scripted.say(*rules)
    told: list[BatchPartial] = []
    final = scripted.stack.client.llm_batch("worker", words, timeout_s=150, on_progress=told.append)
    assert [answer.text for answer in final.answers] == [f"saw {word}" for word in words]
    assert final.widest == SLOTS
    spans = [(answer.started_ms or 0, answer.ended_ms) for answer in final.answers]
    most = max(sum(1 for other in spans if other[0] <= begin < other[1]) for begin, _ in spans)
    assert 2 <= most <= SLOTS, "by their own clocks too"
    assert told
    assert told[-1].total == 12
    assert all(piece.running <= SLOTS for piece in told)


def test_faults_of_single_prompts_stay_with_them(scripted: ScriptedStack) -> None:
    schema = {"type": "object", "required": ["n"]}
    good = '{"n": 1}'
    scripted.say(
        {"match": "fig-bad", "answers": ["no JSON"]},
        {"match": "fig-500", "answers": [{"text": "x", "fault": "500"}]},
        {"match": "fig-loop", "answers": [LOOP | {"token_s": 0.0005}]},
        {"match": "fig-long", "answers": [good]},
        {"match": "fig", "answers": [good]},
    )
    prompts = ["fig 1", "fig-bad", "fig-500", "fig-loop", "fig-long " * 3_000, "fig 2"]
    final = scripted.stack.client.llm_batch("worker", prompts, timeout_s=150, json_schema=schema, max_tokens=1_800)
    assert [answer.text for answer in final.answers] == [good, None, None, None, None, good]
    failures = [answer.failure for answer in final.answers]
    codes = [failure.code if failure else None for failure in failures]
    assert codes == [None, "answer.schema", "engine.faulty", "decoding.repetition", "prompt.too_long", None]
    assert final.answers[1].generated_tokens == 4, "the answer and its repair"
    assert final.answers[2].losses == 3
    await_idle(scripted)


def test_a_batch_survives_the_death_of_its_engine_and_of_its_service(scripted: ScriptedStack) -> None:
    words = [f"plum-{number:02}" for number in range(8)]
    slow = [{"match": word, "answers": [{"text": f"saw {word}", "token_s": 0.2}]} for word in words[1:]]
    die_once = {"match": words[0], "answers": [{"text": "a b c d", "fault": "die"}, f"saw {words[0]}"]}
    scripted.say(die_once, *slow, persist=True)
    killed: list[bool] = []

    def kill_once(progress: BatchPartial) -> None:
        if progress.done >= 4 and not killed:
            killed.append(True)
            scripted.stack.processes["inference-worker"].send_signal(signal.SIGKILL)
            scripted.stack.processes["inference-worker"].wait(60)
            scripted.stack.start("inference-worker")

    final = scripted.stack.client.llm_batch("worker", words, timeout_s=150, on_progress=kill_once)
    assert not [answer.failure for answer in final.answers if answer.failure is not None]
    assert [answer.text for answer in final.answers] == [f"saw {word}" for word in words]
    assert killed
    assert final.answers[0].losses >= 1
    scripted.stack.wait_ready()


def test_a_cancelled_batch_frees_every_slot(scripted: ScriptedStack) -> None:
    scripted.say({"match": "medlar", "answers": [{"text": "w " * 500, "token_s": 0.05}]})

    async def ask_and_leave() -> None:
        async with AsyncClient(scripted.stack.home.hub_address) as client:
            asked = asyncio.create_task(client.llm_batch("worker", ["medlar"] * 40, timeout_s=150, max_tokens=600))
            at_work = "the batch is at work on every slot"
            await asyncio.to_thread(until, lambda: len(scripted.prompts_with("medlar")) == SLOTS, at_work)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(ask_and_leave())
    await_idle(scripted)
    assert len(scripted.prompts_with("medlar")) == SLOTS, "no further prompt was begun"


def test_of_two_that_ask_for_one_batch_under_one_key_the_newer_has_it_and_the_older_is_told(
    scripted: ScriptedStack,
) -> None:
    scripted.say({"match": "damson", "answers": [{"text": "w " * 20, "token_s": 0.05}]})

    async def ask_twice() -> tuple[BatchFinal | BaseException, ...]:
        async with AsyncClient(scripted.stack.home.hub_address) as client:
            batches = (client.llm_batch("worker", ["damson"] * 6, timeout_s=150, key="nightly") for _ in range(2))
            return tuple(await asyncio.gather(*batches, return_exceptions=True))

    older, newer = asyncio.run(ask_twice())
    assert isinstance(older, CallFailed)
    assert older.failure.code == "call.superseded"
    assert isinstance(newer, BatchFinal), newer
    assert [answer.failure for answer in newer.answers] == [None] * 6
    assert len(scripted.prompts_with("damson")) == 6
    await_idle(scripted)


VANISHING = """
from protocol.client import Client
from protocol.messages.infer import ChatMessage, InferRequest
with Client() as client:
    if {batch}:
        client.llm_batch("worker", ["{word}"] * 9, timeout_s=150, max_tokens=900)
    else:
        ask = InferRequest(role="t", messages=[ChatMessage(role="user", content="{word}")], max_tokens=900)
        client.infer("worker", ask, timeout_s=150)
"""


@pytest.mark.parametrize(("word", "batch", "calls"), [("rowan", True, SLOTS), ("hawthorn", False, 1)])
def test_a_client_that_is_killed_frees_the_slots_of_its_calls(
    scripted: ScriptedStack, word: str, batch: bool, calls: int
) -> None:
    scripted.say({"match": word, "answers": [{"text": "w " * 800, "token_s": 0.05}]})
    program = VANISHING.format(word=word, batch=batch)
    client = subprocess.Popen([sys.executable, "-c", program], cwd=CHECKOUT, env=scripted.stack.environ)
    try:
        until(lambda: len(scripted.prompts_with(word)) == calls, "its calls are at work")
    finally:
        client.kill()
        client.wait(60)
    await_idle(scripted)
    assert len(scripted.prompts_with(word)) == calls, "the rest of the batch went with its client"


def test_the_command_answers_a_file_of_prompts_line_by_line(scripted: ScriptedStack, tmp_path: Path) -> None:
    scripted.say(
        {"match": "sloe-bad", "answers": [{"text": "x", "fault": "500"}]}, {"match": "sloe", "answers": ["tart"]}
    )
    file = tmp_path / "prompts.jsonl"
    file.write_text('"sloe one"\n\n{"prompt": "sloe-bad"}\n"sloe two"\n', "utf-8")
    done = tierline(scripted, "batch", "worker", "--file", str(file))
    assert done.returncode == 1, done.stderr
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["sloe one", "sloe-bad", "sloe two"]
    assert [answer.get("text") for answer in answers] == ["tart", None, "tart"]
    assert answers[1]["failure"]["category"] == "PEER"
    assert "2 answered, 1 failed" in done.stderr
    scripted.say({"match": "azarole", "answers": ['{"n": 1}']})
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "required": ["n"]}', "utf-8")
    file.write_text('"azarole"\n' * 4, "utf-8")
    options = ["--schema", str(schema), "--max-tokens", "7", "--concurrency", "1"]
    one_by_one = tierline(scripted, "batch", "worker", "--file", str(file), *options)
    assert one_by_one.returncode == 0, one_by_one.stderr
    assert "up to 1 at once" in one_by_one.stderr
    asked = scripted.requests_with("azarole")
    assert {body["max_tokens"] for body in asked} == {7}
    assert {body["response_format"]["json_schema"]["schema"]["required"][0] for body in asked} == {"n"}
    scripted.say({"match": "sloe", "answers": ["tart"]})
    file.write_text('"sloe"\n' * 1_001, "utf-8")
    many = tierline(scripted, "batch", "worker", "--file", str(file))
    assert many.returncode == 0, many.stderr
    assert len(many.stdout.splitlines()) == 1_001, "more than one batch may have"
    file.write_text('"fine"\nnot JSON\n', "utf-8")
    refused = tierline(scripted, "batch", "worker", "--file", str(file))
    assert refused.returncode == 2
    assert "prompts.jsonl:2" in refused.stderr
    file.write_text('"fine"\n', "utf-8")
    unknown = tierline(scripted, "batch", "nobody", "--file", str(file))
    assert unknown.returncode == 2
    assert "no role 'nobody'" in unknown.stderr


def test_a_model_that_went_bad_is_degraded_with_its_reason_in_the_status(scripted: ScriptedStack) -> None:
    whole = scripted.model.read_bytes()
    pid = scripted.figures("worker")["child_pid"]
    scripted.model.write_bytes(whole[:300])
    try:
        subprocess.run(["kill", "-9", str(pid)], check=True)
        until(lambda: "tiny.gguf" in tierline(scripted, "status").stdout, "the file is named in the status")
        report = json.loads(tierline(scripted, "status", "--json").stdout)
        (service,) = [one for one in report["services"] if one["name"] == "inference-worker"]
        assert service["state"] == "degraded"
        assert "tiny.gguf" in service["reason"]
    finally:
        scripted.model.write_bytes(whole)
    scripted.stack.wait_ready()
    scripted.say({"match": "elder", "answers": ["back"]})
    (answer,) = scripted.stack.client.llm_batch("worker", ["elder"], timeout_s=150).answers
    assert answer.text == "back"
    await_idle(scripted)
