"""The whole main job on real processes and real models: what users are promised first."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
import yaml
import zmq

from protocol.errors import CallFailed
from protocol.messages.failure import Category
from protocol.messages.gate import Verdict
from protocol.messages.infer import ChatMessage, InferRequest
from protocol.messages.memory import Explain, MemoryRequest
from protocol.messages.result import TaskEvent, TaskState, TaskView
from services.ctl.bench.bare_stack import BareStack
from services.kit.config import CHECKOUT
from services.scheduler.residency import TRUST_MS
from tests.waiting import until


def example() -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load((CHECKOUT / "deploy" / "example.yaml").read_text(encoding="utf-8"))
    return task


def test_the_example_runs_through_every_service(stack: BareStack) -> None:
    view = stack.client.run(example(), timeout_s=400)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.usage.generated_tokens > 0
    assert view.critical_path is not None
    assert view.critical_path.overlapping_steps >= 2
    assert {artefact.name for artefact in view.artefacts} == {"facts", "comparison"}
    by_id = {step.id: step for step in view.steps}
    assert [gate.verdict for gate in by_id["S5"].attempts[-1].gates] == [Verdict.PASS]
    assert {attempt.worker for step in view.steps for attempt in step.attempts} == {
        "inference-front",
        "inference-worker",
    }
    assert view.plan is not None
    assert [(edge.step, edge.depends_on) for edge in view.plan.removed_edges] == [("S6", "S5")]
    assert view.plan.as_written is not None
    assert view.plan.as_run is not None
    assert (view.plan.as_written.levels, view.plan.as_run.levels, view.plan.as_run.width) == (3, 3, 3)
    assert view.plan.as_run.critical_ms <= view.plan.as_run.predicted_ms
    path = view.critical_path.path
    assert path[0].start_ms == view.created_ms
    assert path[-1].end_ms == view.ended_ms
    assert all(one.end_ms == two.start_ms for one, two in itertools.pairwise(path)), "no gap in the path"


def test_a_model_that_nobody_has_is_named_at_once_with_those_that_there_are(stack: BareStack) -> None:
    request = InferRequest(role="test", messages=[ChatMessage(role="user", content="Hi")], max_tokens=4)
    until(lambda: stack.client.status().uptime_ms > TRUST_MS, "whoever was there before the hub started is back")
    with pytest.raises(CallFailed, match="no entry 'nosuch'; it has: front, specialist, worker") as raised:
        stack.client.infer("nosuch", request, timeout_s=100)
    assert raised.value.failure.code == "model.unknown"


def test_decisions_of_a_task_are_scored_in_memory_exactly_once(stack: BareStack) -> None:
    for _ in range(5):
        view = stack.client.run({"objective": "Say good morning.", "task_type": "chat"}, timeout_s=300)
        if view.failure is None or view.failure.category is not Category.EARLY_ABORT:
            break  # else the small model repeated itself, as it does now and then
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert view.plan is not None
    ids = [ident for decision in view.plan.decisions for ident in decision.ids.values()]
    assert ids, "a planned task has decisions"

    def scored() -> list[str]:
        answer = stack.client.memory(MemoryRequest(ask=Explain(decision_ids=ids)))
        return sorted(one.decision.decision_id for one in answer.explained if one.outcome is not None)

    until(lambda: len(scored()) >= len(ids), "its decisions are scored")
    assert scored() == sorted(ids)
    again = stack.client.run({"objective": "Say good morning!", "task_type": "chat"}, timeout_s=300)
    assert again.plan is not None
    assert view.task_id in [episode.task_id for episode in again.plan.similar], "the earlier task is remembered"


@pytest.mark.parametrize("task_type", ["chat", "doc", "code", "ingest", "manage"])
def test_an_objective_of_every_type_is_planned_and_ends(stack: BareStack, task_type: str) -> None:
    task = {
        "objective": "Describe the harbour in one sentence.",
        "task_type": task_type,
        "inputs": [{"name": "notes.md", "value": "A small harbour with three boats and a lighthouse."}],
        "budget": {"max_tokens": 1_200},
        "deadline_s": 300,
    }
    view = stack.client.run(task, timeout_s=350)
    assert view.state.final
    assert view.plan is not None
    assert view.plan.source in ("rules", "model")
    assert view.plan.reason
    assert view.usage.generated_tokens > 0
    # A model of 135 million parameters may fail at code; then the checks of its work say so, and nothing else does.
    if view.state is not TaskState.SUCCEEDED:
        assert view.failure is not None
        assert view.failure.code.startswith(("gate.", "answer.", "budget.", "decoding.")), view.failure


def test_a_graph_grows_over_a_list_that_a_model_made_and_by_steps_that_a_client_adds(stack: BareStack) -> None:
    boats = {
        "type": "array",
        "items": {"type": "string", "enum": ["ketch", "sloop", "yawl"]},
        "minItems": 3,
        "maxItems": 3,
    }
    short = {"gates": [], "max_tokens": 16}
    steps = [
        {"id": "L", "actor": "extractor", "action": "List three boats.", "max_tokens": 60, "json_schema": boats}
        | {"outputs": [{"name": "boats", "kind": "json"}], "gates": ["schema"]},
        {
            "id": "M",
            "actor": "worker",
            "action": "Describe this boat.",
            "map_over": "boats",
            "outputs": [{"name": "all"}],
        }
        | short,
    ]
    accepted = stack.client.submit({"objective": "Boats.", "plan": {"steps": steps}})
    for event in stack.client.watch(accepted.task_id, timeout_s=200):
        if isinstance(event, TaskEvent) and event.event == "step.expanded":
            break
    added = {"id": "J", "actor": "writer", "action": "Join.", "inputs": ["all"], "outputs": [{"name": "end"}]} | short
    assert stack.client.extend(accepted.task_id, [added]).steps_total == 6
    view = stack.client.result(accepted.task_id, timeout_s=300)
    assert view.state is TaskState.SUCCEEDED, view.failure
    assert [step.id for step in view.steps] == ["L", "M", "M.1", "M.2", "M.3", "J"]
    assert [artefact.name for artefact in view.artefacts] == ["end"]
    assert view.usage.generated_tokens > 0


def _counting() -> dict[str, Any]:
    """Whoever watches has the tokens of steps that start from then on: the second starts when the first has ended."""
    first = {"id": "S1", "actor": "worker", "action": "Count to a hundred.", "max_tokens": 64, "gates": []}
    second = {"id": "S2", "actor": "worker", "action": "Count to fifty.", "max_tokens": 48, "gates": []}
    steps = [first | {"outputs": [{"name": "many"}]}, second | {"inputs": ["many"], "outputs": [{"name": "few"}]}]
    return {"objective": "Count.", "task_type": "chat", "plan": {"steps": steps}}


def test_watching_shows_every_event_once_and_ends_with_the_result(stack: BareStack) -> None:
    accepted = stack.client.submit(_counting())
    seen: list[TaskEvent | TaskView] = list(stack.client.watch(accepted.task_id, timeout_s=300))
    *events, result = seen
    assert isinstance(result, TaskView)
    journalled = [one.seq for one in events if isinstance(one, TaskEvent) and one.event != "step.tokens"]
    assert journalled == list(range(1, len(journalled) + 1))
    names = [one.event for one in events if isinstance(one, TaskEvent)]
    assert names[0] == "task.accepted"
    assert names[-1] == "task.ended"
    assert "step.tokens" in names, "tokens are streamed to whoever watches"


def test_cancel_frees_the_slot(stack: BareStack) -> None:
    task = {"objective": "Write a very long story about the sea.", "task_type": "chat"}
    step = {"id": "S1", "actor": "worker", "action": "Write a very long story.", "max_tokens": 1500}
    plan = {"steps": [step | {"outputs": [{"name": "story"}], "gates": []}]}
    accepted = stack.client.submit(task | {"plan": plan})
    for event in stack.client.watch(accepted.task_id, timeout_s=200):
        if isinstance(event, TaskEvent) and event.event == "step.started":
            break
    assert stack.client.cancel(accepted.task_id).state is TaskState.CANCELLED

    def all_free() -> bool:
        worker = next(peer for peer in stack.client.status().peers if peer.service == "inference-worker")
        return worker.granted - worker.used == 4 and not worker.in_flight

    until(all_free, "its slot is back")


def test_a_model_that_repeats_itself_is_stopped_and_the_role_above_takes_over(stack: BareStack) -> None:
    step = {
        "id": "S1",
        "actor": "extractor",  # decodes at temperature 0, where a small model soon repeats itself
        "action": "Write an endless story.",
        "outputs": [{"name": "story"}],
        "gates": [],
        "max_tokens": 700,
        "grammar": "root ::= [a-z ] root",
    }
    view = stack.client.run({"objective": "Tell a story", "plan": {"steps": [step]}}, timeout_s=300)
    first, second = view.steps[0].attempts[:2]
    assert first.failure is not None
    assert (first.failure.category, first.failure.code) == (Category.EARLY_ABORT, "decoding.repetition")
    assert first.failure.evidence["times"] >= 4
    assert 0 < first.generated_tokens < 700
    assert (first.role, second.role) == ("extractor", "architect")
    figures = {peer.service: peer.metrics for peer in stack.client.status().peers}["inference-worker"]
    assert figures["early_aborts"] >= 1
    assert figures["respawns"] == 0


def test_a_batch_of_prompts_is_decoded_on_several_slots_at_once(stack: BareStack) -> None:
    prompts = [f"Write one sentence about the number {number}." for number in range(8)]
    final = stack.client.llm_batch("worker", prompts, timeout_s=300, max_tokens=24)
    assert [answer.failure for answer in final.answers] == [None] * 8
    assert all(answer.text and 0 < answer.generated_tokens <= 24 for answer in final.answers)
    assert final.widest == 4, "the worker's slots"
    spans = [(answer.started_ms or 0, answer.ended_ms) for answer in final.answers]
    assert max(sum(1 for other in spans if other[0] <= begin < other[1]) for begin, _ in spans) > 1
    assert sum(end - begin for begin, end in spans) > 1.5 * final.wall_ms, "they shared the time"
    assert any(answer.cached_tokens > 0 for answer in final.answers), "the role's prompt was read once per slot"


def test_one_input_of_a_task_may_be_used_from_a_client_of_sixty_lines(stack: BareStack) -> None:
    path = CHECKOUT / "tests" / "contract" / "minimal_client.py"
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    assert "protocol" not in [line.split()[1].partition(".")[0] for line in source.splitlines() if "import" in line[:6]]
    address = stack.home.hub_address
    done = subprocess.run(
        [sys.executable, str(path), address, "Say hello."], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stdout


# Bad input on the real socket


def raw_dealer(stack: BareStack) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(stack.home.hub_address)
    return socket


def answer_to(socket: zmq.Socket[bytes], *frames: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    socket.send_multipart(frames)
    assert socket.poll(90_000), "the hub answers everything"
    header, body = socket.recv_multipart()
    return msgpack.unpackb(header), msgpack.unpackb(body)


def head(**fields: Any) -> bytes:
    return bytes(msgpack.packb({"v": 1, "id": "x1"} | fields))


HELLO = {"service": "client-raw", "protocol_min": 1, "protocol_max": 1}


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b"\xc1\xff garbage", b"\x80"], "header.not_msgpack"),
        ([b"\x93\x01\x02\x03", b"\x80"], "header.not_a_map"),
        ([head(kind="task.list"), b"\x80", b"third"], "frame.count"),
        ([head(kind="task.list")], "frame.count"),
        ([head(kind="task.explode"), b"\x80"], "kind.unknown"),
        ([head(kind="task.list", v=99), b"\x80"], "header.version"),
        ([head(kind="task.list", deadline="soon"), b"\x80"], "header.field"),
        ([head(kind="task.submit"), b"\x00" * (9 * 1024 * 1024)], "body.too_large"),
        ([head(kind="task.submit"), b"\xc1 not msgpack"], "body.not_msgpack"),
        ([head(kind="task.submit"), msgpack.packb({"task": {"objective": 7}})], "task.invalid"),
        ([head(kind="task.show"), msgpack.packb({"task_id": "t-nothing"})], "task.unknown"),
        ([head(kind="infer.request"), b"\x80"], "call.incomplete"),
        ([head(kind="session.welcome"), b"\x80"], "kind.direction"),
        ([head(kind="task.submit"), msgpack.packb({"task": {"a": [[[[[[[]]]]]]] * 3}})[:5]], "body.not_msgpack"),
    ],
)
def test_bad_frames_get_a_clear_error_and_harm_nobody(stack: BareStack, frames: list[bytes], code: str) -> None:
    socket = raw_dealer(stack)
    try:
        header, body = answer_to(socket, head(kind="session.hello"), msgpack.packb(HELLO))
        assert header["kind"] == "session.welcome"
        header, body = answer_to(socket, *frames)
        assert header["kind"] == "error"
        assert body["failure"]["code"] == code
        assert body["failure"]["message"]
        header, body = answer_to(socket, head(kind="task.list"), b"\x80")
        assert header["kind"] == "task.listing", "the connection is as good as before"
    finally:
        socket.close()
    assert stack.client.status().peers, "and so are the others"


def test_a_peer_that_never_said_hello_is_told_to(stack: BareStack) -> None:
    socket = raw_dealer(stack)
    header, body = answer_to(socket, head(kind="task.list"), b"\x80")
    assert (header["kind"], body["failure"]["code"]) == ("error", "peer.unknown")
    socket.close()


def test_a_version_nobody_speaks_is_rejected_with_the_reason(stack: BareStack) -> None:
    socket = raw_dealer(stack)
    future = HELLO | {"protocol_min": 7, "protocol_max": 9}
    header, body = answer_to(socket, head(kind="session.hello"), msgpack.packb(future))
    assert (header["kind"], body["code"]) == ("session.reject", "version")
    assert "7-9" in body["message"]
    socket.close()


def ten_thousand() -> list[dict[str, Any]]:
    return [{"id": f"S{i}", "actor": "worker", "action": "x", "outputs": [{"name": f"o{i}"}]} for i in range(10_000)]


def two_steps(**changes: Any) -> list[dict[str, Any]]:
    first = {"id": "S1", "actor": "worker", "action": "x", "outputs": [{"name": "a"}], "inputs": ["b"]}
    second = {"id": "S2", "actor": "worker", "action": "x", "outputs": [{"name": "b"}]}
    return [first, second | changes]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (two_steps(inputs=["a"]), ["S1", "S2", "wait for each other"]),
        (two_steps(inputs=["nowhere"]), ["plan.steps[S2].inputs", "nowhere"]),
        (two_steps(id="S1"), ["plan.steps[S1].id"]),
        (two_steps(outputs=[{"name": "b"}, {"name": "a"}]), ["plan.steps[S2].outputs", "'a'"]),
        (ten_thousand(), ["plan.steps"]),
        ([{"id": "../../etc", "actor": "worker", "action": "x", "outputs": [{"name": "a"}]}], ["plan.steps.0.id"]),
    ],
    ids=["cycle", "unknown artefact", "duplicate id", "duplicate output", "10,000 steps", "path as id"],
)
def test_a_task_that_cannot_run_is_refused_naming_step_and_field(
    stack: BareStack, steps: list[dict[str, Any]], words: list[str]
) -> None:
    with pytest.raises(CallFailed) as refused:
        stack.client.submit({"objective": "x", "plan": {"steps": steps}})
    assert all(word in refused.value.failure.message for word in words), refused.value.failure.message


def test_a_client_that_vanishes_mid_stream_harms_nobody(stack: BareStack) -> None:
    socket = raw_dealer(stack)
    answer_to(socket, head(kind="session.hello"), msgpack.packb(HELLO))
    header, accepted = answer_to(socket, head(kind="task.submit", id="s1"), msgpack.packb({"task": _counting()}))
    assert header["kind"] == "task.accepted"
    socket.send_multipart([head(kind="task.watch", id="w1"), msgpack.packb({"task_id": accepted["task_id"]})])
    while True:
        assert socket.poll(90_000)
        _, body = socket.recv_multipart()
        if msgpack.unpackb(body).get("event") == "step.tokens":
            break
    socket.close()
    assert stack.client.result(accepted["task_id"], timeout_s=300).state is TaskState.SUCCEEDED


def test_a_second_hub_on_the_same_home_refuses_to_steal_the_address(stack: BareStack) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "services.scheduler"],
        cwd=CHECKOUT,
        env=stack.environ,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert second.returncode == 2
    assert str(stack.processes["scheduler"].pid) in second.stderr
    assert stack.client.status().hub_pid == stack.processes["scheduler"].pid


def test_sockets_and_journal_are_private_to_the_user(stack: BareStack) -> None:
    assert stack.home.run.stat().st_mode & 0o077 == 0
    journal = stack.home.journal / "journal.sqlite"
    assert journal.stat().st_mode & 0o077 == 0
    assert os.stat(stack.home.logs / "scheduler.jsonl").st_mode & 0o077 == 0


def test_the_path_of_the_folder_with_the_stack_stays_private(stack: BareStack) -> None:
    assert Path(stack.home.root).stat().st_mode & 0o077 == 0
