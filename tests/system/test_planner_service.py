"""The planner as a real process; the test is its hub, its front door and its memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.kinds import BODIES, ENDINGS
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal, InferRequest
from protocol.messages.memory import Advise, Episode, MemoryFinal, MemoryRequest, Retrieve
from protocol.messages.plan import PlanFinal, PlanRequest
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.task import TaskIR
from services.kit.config import CHECKOUT, load_home
from tests.fakes.hub import ScriptedHub
from tests.unit.planner_tasks import advice_for
from tests.waiting import WITHIN_S

EPISODE = Episode(task_id="old", task_type="doc", objective="Contrast two memos", succeeded=True, seconds=3)
GOOD = json.dumps(
    {
        "steps": [
            {"role": "extractor", "action": "List the claims of the first", "reads": ["a.md"]},
            {"role": "worker", "action": "List the claims of the second", "reads": ["b.md"]},
            {"role": "writer", "action": "Compare both lists", "reads": ["step1", "step2"]},
        ]
    }
)
INPUTS = [{"name": "a.md", "value": "alpha"}, {"name": "b.md", "value": "beta"}]
DOC = TaskIR.model_validate(
    {"task_id": "t1", "task_type": "doc", "objective": "Compare both reports", "inputs": INPUTS}
)
HELLO = TaskIR(task_id="t2", objective="Say hello")


class World:
    """A hub that answers the planner's questions as a front door and a memory would, or stays silent."""

    def __init__(self, hub: ScriptedHub, process: subprocess.Popen[bytes], logs: Path) -> None:
        self.hub = hub
        self.process = process
        self.logs = logs
        self.front_door: Message | None = None
        self.memory = True
        self.prefers_last = False
        self.questions: list[tuple[Header, Message]] = []
        self._seen = 0

    def plan(self, ir: TaskIR, within_s: float = WITHIN_S, **fields: object) -> Message:
        """Ask for a plan, answering what the planner asks meanwhile; the ending."""
        ident = self.hub.request("planner", "plan.request", PlanRequest(task=ir), **fields)
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            self.hub.pump(20)
            for identity, header, data in self.hub.received[self._seen :]:
                self._seen += 1
                if header.corr == ident and header.kind in ENDINGS:
                    return unpack_body(BODIES[header.kind], data)
                if header.kind.endswith(".request"):
                    self._answer(identity, header, unpack_body(BODIES[header.kind], data))
        raise TimeoutError(f"no plan within {within_s} s")

    def good_plan(self, ir: TaskIR, **fields: object) -> PlanFinal:
        final = self.plan(ir, **fields)  # type: ignore[arg-type]  # fields are header fields, `within_s` is not among them
        assert isinstance(final, PlanFinal), final
        return final

    def asked(self, kind: type[Message]) -> list[Message]:
        return [body for _, body in self.questions if isinstance(body, kind)]

    def _answer(self, identity: bytes, header: Header, body: Message) -> None:
        self.questions.append((header, body))
        reply: Message | None = None
        if isinstance(body, InferRequest):
            reply = self.front_door
        elif isinstance(body, MemoryRequest) and self.memory:
            match body.ask:
                case Retrieve():
                    reply = MemoryFinal(episodes=[EPISODE])
                case Advise():
                    reply = MemoryFinal(advice=advice_for(body.ask, last=self.prefers_last))
        if reply is not None:
            kinds = {ErrorReply: "error", Refused: "refused"}
            kind = kinds.get(type(reply)) or f"{header.kind.partition('.')[0]}.final"
            self.hub.send(identity, kind, reply, corr=header.id)


@pytest.fixture
def world() -> Iterator[World]:
    with a_world() as running:
        yield running


@contextmanager
def a_world(labelled: Sequence[tuple[str, bool]] = ()) -> Iterator[World]:
    """A planner of its own, with requests that its operator has labelled."""
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp") as folder:
        env = {**os.environ, "TIERLINE_HOME": folder, "PYTHONPATH": str(CHECKOUT)}
        env.pop("TIERLINE_REGISTRY", None)
        home = load_home(env).make()
        if labelled:
            home.labelled_requests.parent.mkdir()
            rows = [json.dumps({"request": text, "decomposable": divides}) for text, divides in labelled]
            home.labelled_requests.write_text("\n".join(rows), "utf-8")
        hub = ScriptedHub(home.hub_address)
        process = subprocess.Popen([sys.executable, "-m", "services.planner"], env=env, cwd=CHECKOUT)
        try:
            hello = hub.await_peer("planner")
            assert hello.capabilities == ["planner"]
            assert hub.credit["planner"] == 4
            yield World(hub, process, home.logs)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            hub.close()


def test_requests_that_the_operator_has_labelled_decide_what_is_split(world: World) -> None:
    request = TaskIR(task_id="t9", objective="Sing about a green boat")
    assert world.good_plan(request).decisions[0].choice == "chat.single/1"
    rows = [
        (f"Sing about a {colour} {thing}", True) for colour in ("red", "green", "blue") for thing in ("boat", "cat")
    ]
    rows += [
        (f"Count the {colour} {thing}s", False) for colour in ("red", "green", "blue") for thing in ("boat", "cat")
    ]
    with a_world(rows) as taught:
        final = taught.good_plan(request)
    assert final.decisions[0].choice == "chat.outline-map-join/8"
    assert "by the trained judge" in final.reason


def test_a_file_of_labels_that_cannot_be_used_refuses_the_launch_with_file_and_line(tmp_path: Path) -> None:
    home = load_home({"TIERLINE_HOME": str(tmp_path)}).make()
    home.labelled_requests.parent.mkdir()
    home.labelled_requests.write_text('{"request": "a"}', "utf-8")
    env = {**os.environ, "TIERLINE_HOME": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(
        [sys.executable, "-m", "services.planner"], env=env, cwd=CHECKOUT, capture_output=True, timeout=90
    )
    assert done.returncode == 1
    assert b"divides.jsonl:1: decomposable" in done.stderr


def said(text: str, finish: str = "stop") -> InferFinal:
    return InferFinal.model_validate(
        {
            "text": text,
            "finish_reason": finish,
            "model": "front",
            "engine": "noop",
            "prompt_tokens": 9,
            "generated_tokens": 7,
        }
    )


def steps_of(final: PlanFinal) -> list[str]:
    assert final.task.plan is not None
    return [step.actor for step in final.task.plan.steps]


def test_a_good_plan_of_the_front_door_is_used_and_its_decisions_go_with_it(world: World) -> None:
    world.front_door = said(GOOD)
    final = world.good_plan(DOC, task="t1")
    assert (final.source, final.generated_tokens) == ("model", 7)
    assert steps_of(final) == ["extractor", "worker", "writer"]
    assert final.similar == [EPISODE]
    header, request = next((h, b) for h, b in world.questions if isinstance(b, InferRequest))
    assert header.dst == "infer.front"
    assert header.task == "t1"
    assert header.deadline is not None
    assert header.parent
    assert request.json_schema is not None
    assert "Contrast two memos" in request.messages[1].content
    assert {item.subject for item in final.decisions} == {"role", "persona", "decomposition"}


def test_verdicts_on_the_names_of_a_question_become_a_look_up_for_each(world: World) -> None:
    names = ["Eiffel Tower", "Big Ben", "Burj Khalifa"]
    asking = TaskIR(objective="Which is taller, the Eiffel Tower, Big Ben or the Burj Khalifa?")
    asked_before = len(world.questions)
    world.front_door = said(json.dumps({"parts": dict.fromkeys(names, True)}))
    final = world.good_plan(asking)
    assert final.source == "model", final.reason
    request = next(body for _, body in world.questions[asked_before:] if isinstance(body, InferRequest))
    assert request.json_schema is not None
    assert request.json_schema["properties"]["parts"]["required"] == names
    assert final.task.plan is not None
    *look_ups, join = final.task.plan.steps
    assert [name for name, step in zip(names, look_ups, strict=True) if name in step.action] == names
    assert len(join.inputs) == 3
    world.front_door = said(json.dumps({"parts": dict.fromkeys(names, True) | {"Big Ben": False}}))
    assert world.good_plan(asking).source == "rules", "it does less side by side than the objective names"


def test_whatever_the_front_door_says_or_fails_to_say_the_rules_have_a_plan(world: World) -> None:
    failure = Failure(code="engine.broken", category=Category.RESOURCE, origin="inference-front", message="broken")
    cases: list[tuple[Message, str]] = [
        (said("Sure! First, we compare."), "not JSON"),
        (said(GOOD[:40], "length"), "token limit"),
        (
            said(
                json.dumps(
                    {"steps": [{"role": "worker", "action": f"Do part {n} of it", "reads": []} for n in range(40)]}
                )
            ),
            "at most 8",
        ),
        (said("[" * 2_000_000), "at most 16384 are read"),
        (said("[" * 16_000), "not JSON"),
        (ErrorReply(failure=failure), "engine.broken"),
        (Refused(reason="the queue is full", retry_after_ms=100), "refused by the hub"),
    ]
    for reply, why in cases:
        world.front_door = reply
        final = world.good_plan(DOC)
        assert final.source == "rules", why
        assert why in final.reason
        assert steps_of(final) == ["worker", "worker", "writer"]
        assert final.decisions
    world.front_door = said(GOOD)
    over = world.good_plan(DOC.model_copy(update={"budget": DOC.budget.model_copy(update={"max_steps": 2})}))
    assert (over.source, len(steps_of(over))) == ("rules", 1)


def test_mistakes_of_the_front_door_that_have_a_cure_are_repaired_and_told(world: World) -> None:
    cycle = GOOD.replace('["a.md"]', '["a.md", "step2"]').replace('["b.md"]', '["b.md", "step1"]')
    cases: list[tuple[Message, str]] = [
        (said(GOOD[:-30], "length"), "a join of step1, step2 was added"),
        (said(cycle), "closes a circle"),
        (said(GOOD.replace("extractor", "wizard")), "for the role 'wizard'"),
    ]
    for reply, why in cases:
        world.front_door = reply
        final = world.good_plan(DOC)
        assert final.source == "model", why
        assert why in final.reason


def test_a_silent_front_door_costs_a_share_of_the_deadline_only(world: World) -> None:
    deadline = int(time.time() * 1000) + 6_000
    final = world.good_plan(DOC, deadline=deadline)
    assert time.time() * 1000 < deadline
    assert final.source == "rules"
    assert "the model gave no answer (deadline)" in final.reason


def test_without_memory_a_plan_comes_all_the_same_and_the_rules_choose(world: World) -> None:
    world.memory = False
    world.front_door = said(GOOD)
    final = world.good_plan(DOC)
    assert (final.source, final.similar) == ("model", [])
    assert {one.advice for one in final.decisions} == {None}
    assert "memory did not answer (deadline)" in final.reason


def test_the_useless_edges_of_a_client_plan_are_dropped_and_reported(world: World) -> None:
    steps = [
        {"id": "S1", "actor": "worker", "action": "one", "outputs": [{"name": "a"}]},
        {"id": "S2", "actor": "worker", "action": "two", "outputs": [{"name": "b"}], "depends_on": ["S1"]},
        {
            "id": "S3",
            "actor": "writer",
            "action": "join",
            "inputs": ["a", "b"],
            "outputs": [{"name": "c"}],
            "depends_on": ["S2"],
        },
    ]
    final = world.good_plan(TaskIR.model_validate({"task_id": "t3", "objective": "x", "plan": {"steps": steps}}))
    assert final.source == "client"
    assert [(edge.step, edge.depends_on) for edge in final.removed_edges] == [("S2", "S1")]
    assert final.task.plan is not None
    assert [step.depends_on for step in final.task.plan.steps] == [[], [], ["S2"]]
    assert world.asked(InferRequest) == []


def test_a_plan_that_cannot_run_is_refused_by_step_and_field_and_the_planner_goes_on(world: World) -> None:
    steps = [{"id": "S1", "actor": "wizard", "action": "one", "inputs": ["ghost"], "outputs": [{"name": "a"}]}]
    reply = world.plan(TaskIR.model_validate({"task_id": "t4", "objective": "x", "plan": {"steps": steps}}))
    assert isinstance(reply, ErrorReply)
    assert (reply.failure.code, reply.failure.category) == ("plan.invalid", Category.POLICY)
    assert "plan.steps[S1].inputs" in reply.failure.message
    assert "plan.steps[S1].actor" in reply.failure.message
    final = world.good_plan(HELLO)
    assert steps_of(final) == ["frontdoor"]
    assert "the model was not asked: one step does it" in final.reason


def test_figures_and_log_tell_what_was_planned(world: World) -> None:
    world.front_door = said(GOOD)
    world.good_plan(DOC)
    world.good_plan(HELLO)
    metrics = world.hub.newest_pong("planner").metrics
    assert (metrics["plans_model"], metrics["model_used"], metrics["plans_rules"]) == (1, 1, 1)
    lines = [json.loads(line) for line in (world.logs / "planner.jsonl").read_text().splitlines()]
    made = [line for line in lines if line["event"] == "plan.made"]
    assert [(line["source"], line["template"]) for line in made] == [
        ("model", "doc.model/3"),
        ("rules", "chat.single/1"),
    ]
    assert "Compare both" not in json.dumps(lines)  # objectives and answers stay out of logs


def test_a_registry_that_cannot_be_used_refuses_the_launch_with_file_and_line(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "TIERLINE_HOME": str(tmp_path / "h"),
        "TIERLINE_REGISTRY": str(tmp_path),
        "PYTHONPATH": str(CHECKOUT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.planner"], env=env, cwd=CHECKOUT, capture_output=True, timeout=90
    )
    assert done.returncode == 1
    assert b"models.yaml:1" in done.stderr


def test_memory_decides_who_works_and_the_decision_says_with_which_chance(world: World) -> None:
    world.prefers_last = True
    final = world.good_plan(HELLO)
    (role,) = (item for item in final.decisions if item.subject == "role")
    assert role.advice is not None
    assert role.choice == role.advice.choice != role.advice.rules_choice
    assert final.task.plan is not None
    assert final.task.plan.steps[0].actor == role.choice
    assert role.propensity == 0.9
    asks = [body.ask for body in world.asked(MemoryRequest) if isinstance(body, MemoryRequest)]
    assert [ask.text for ask in asks if isinstance(ask, Advise)] == [HELLO.objective]
