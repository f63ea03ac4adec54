"""The memory service as a real process behind a scripted hub: what it is told, it knows, also after its worst day."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.errors import StrandPeer
from protocol.messages.base import Message
from protocol.messages.memory import (
    Advise,
    DecisionRecord,
    Episode,
    Explain,
    Export,
    MemoryFinal,
    MemoryRequest,
    Option,
    Outcome,
    Question,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
    Stats,
)
from protocol.messages.reply import ErrorReply
from tests.fakes.hub import ScriptedHub

Ask = RecordDecisions | RecordOutcomes | Retrieve | Explain | Export | Stats | Advise

OBJECTIVES = [
    "Compare two contracts and list every clause that differs",
    "Compare the new contract with the old one, clause by clause",
    "Report which clauses of the contract have changed between two versions",
    "Write a Python function that parses ISO dates, with unit tests",
    "Implement a date parser in Python and cover it with pytest tests",
    "Plan a five-day trip through Portugal by train",
    "Optimise this SQL query, it takes forty seconds",
]
QUESTIONS = [
    Retrieve(text="Compare these two versions of the contract", k=3),
    Retrieve(text="Compare these two versions of the contract", k=2, task_type="doc"),
    Retrieve(text="Python code that parses a date, with tests", k=16),
    Retrieve(text="Bake a cake with chocolate"),
    Explain(decision_ids=[f"t{task}-{step}" for task in range(len(OBJECTIVES)) for step in range(3)]),
    Stats(),
]


class MemoryStand:
    """A home in a short folder, a hub, and the service as a child process."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="tm", dir="/tmp"))  # ipc paths are short
        (self.home / "run").mkdir(mode=0o700)
        (self.home / "nobody").mkdir()
        self.hub = ScriptedHub(f"ipc://{self.home}/run/hub.sock")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return self.home / "memory"

    def start(self) -> None:
        self._spawn()
        self.hub.await_peer("memory")

    def _spawn(self) -> None:
        self.hub.peers.pop("memory", None)  # pinging the dead one would fail
        self.hub.pongs.pop("memory", None)
        environment = os.environ | {"TIERLINE_HOME": str(self.home), "HOME": str(self.home / "nobody")}
        self.process = subprocess.Popen([sys.executable, "-m", "services.memory"], env=environment)

    def try_start(self) -> int | None:
        """Start it; the exit status where it ends instead of becoming ready."""
        self._spawn()
        assert self.process is not None
        while True:
            status = self.process.poll()
            if status is not None:
                self.process = None
                return status
            try:
                self.hub.await_peer("memory", timeout_s=0.2)
            except TimeoutError:
                continue
            except StrandPeer:  # it said hello and then ended
                self.hub.peers.pop("memory", None)
                continue
            return None

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout=90)
        self.process = None
        return status

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.end(number)
        self.start()

    def ask(self, body: Ask) -> Message:
        return self.hub.ask("memory", "memory.request", MemoryRequest(ask=body))

    def final(self, body: Ask) -> MemoryFinal:
        answer = self.ask(body)
        assert isinstance(answer, MemoryFinal), answer
        return answer

    def answers(self) -> list[bytes]:
        """The raw bodies that answer QUESTIONS."""
        bodies = []
        for question in QUESTIONS:
            self.final(question)
            bodies.append(self.hub.received[-1][2])
        return bodies

    def events(self, name: str) -> list[dict[str, object]]:
        lines = (self.home / "logs" / "memory.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == name]

    def close(self) -> None:
        if self.process is not None:
            self.end(signal.SIGKILL)
        self.hub.close()
        shutil.rmtree(self.home)


@contextmanager
def started_stand() -> Iterator[MemoryStand]:
    made = MemoryStand()
    try:
        made.start()
        yield made
    finally:
        made.close()


def decision(task: int, step: int) -> DecisionRecord:
    return DecisionRecord(
        decision_id=f"t{task}-{step}",
        task_id=f"t{task}",
        step=f"S{step + 1}",
        subject="role",
        choice=("worker", "coder", "architect")[step],
        alternatives=["worker", "coder"],
        propensity=0.5,
        rule="by task type",
        task_type="doc" if task < 3 else "code",
        features={"tokens": 120.5},
        registry_digest="abc",
    )


def outcomes(task: int, succeeded: bool) -> list[Outcome]:
    code = None if succeeded else ("gate.unit", "gate.lint")[task % 2]
    return [
        Outcome(
            decision_id=f"t{task}-{step}",
            reward=1.0 if succeeded or step else 0.0,
            seconds=1.5 + task,
            attempts=1,
            failure_code=None if step else code,
            at_ms=1_000 + task,
        )
        for step in range(2)  # the third decision of every task stays without outcome
    ]


def episode(task: int, succeeded: bool) -> Episode:
    return Episode(
        task_id=f"t{task}",
        task_type="doc" if task < 3 else "code",
        objective=OBJECTIVES[task],
        plan_source="rules",
        steps=3,
        succeeded=succeeded,
        failure_codes=[] if succeeded else ["step.failed"],
        seconds=4.0,
        at_ms=2_000 + task,
    )


def teach(stand: MemoryStand) -> None:
    for task in range(len(OBJECTIVES)):
        succeeded = task != 1
        assert stand.final(RecordDecisions(decisions=[decision(task, step) for step in range(3)])).stored == 3
        done = RecordOutcomes(outcomes=outcomes(task, succeeded), episode=episode(task, succeeded))
        assert stand.final(done).stored == 3


@pytest.fixture
def stand() -> Iterator[MemoryStand]:
    with started_stand() as made:
        yield made


@pytest.fixture(scope="module")
def untaught() -> Iterator[MemoryStand]:
    """One service for tests that leave nothing in it."""
    with started_stand() as made:
        yield made


def test_what_was_decided_scored_and_done_is_told_again(stand: MemoryStand) -> None:
    assert stand.hub.hellos["memory"].capabilities == ["memory"]
    assert stand.hub.credit["memory"] == 16
    teach(stand)

    found = stand.final(Retrieve(text="Compare these two versions of the contract", k=3)).episodes
    assert {each.task_id for each in found} == {"t0", "t1", "t2"}
    assert all(each.similarity is not None and each.similarity > 0.35 for each in found)
    assert all(each.q is not None and 0 <= each.q <= 1 for each in found)
    by_task = {each.task_id: each for each in found}
    assert by_task["t1"].failure_codes == ["step.failed", "gate.lint"]
    assert by_task["t0"].failure_codes == ["gate.lint"], "the graph knows how the same choice has failed elsewhere"

    assert stand.final(Retrieve(text="Bake a cake with chocolate")).episodes == []
    code = stand.final(Retrieve(text="Compare these two versions of the contract", task_type="code")).episodes
    assert all(each.task_type == "code" for each in code)

    scored, unscored = stand.final(Explain(decision_ids=["t0-0", "unknown", "t0-2"])).explained
    assert scored.decision == decision(0, 0)
    assert scored.outcome == outcomes(0, True)[0]
    assert {value.choice: value.count for value in scored.values} == {"worker": 3, "coder": 3}
    assert next(value.q for value in scored.values if value.choice == "coder") == pytest.approx(1 - 0.5 * 0.7**3)
    assert unscored.outcome is None

    stats = stand.final(Stats()).stats
    rows = {name: stats[name] for name in ("decisions", "outcomes", "episodes", "duplicates")}
    assert rows == {"decisions": 21, "outcomes": 14, "episodes": 7, "duplicates": 0}
    assert stats["log_seq"] == stats["vectors_seq"] == stats["graph_seq"] == 42


def test_advice_comes_with_what_resembles_the_text_where_both_are_asked_for(stand: MemoryStand) -> None:
    teach(stand)
    text = "Compare these two versions of the contract"
    options = [Option(choice="worker"), Option(choice="coder")]
    question = Question(key="role", subject="role", rules_choice="worker", options=options)
    alone = Advise(text=text, task_type="doc", questions=[question], seed=1)
    retrieve = Retrieve(text=text, k=3)
    both = stand.final(alone.model_copy(update={"retrieve": retrieve}))
    found = stand.final(retrieve)
    assert both.advice == stand.final(alone).advice
    assert len(both.episodes) == 3
    assert (both.episodes, both.lessons) == (found.episodes, found.lessons)
    wordless = stand.final(alone.model_copy(update={"text": "…", "retrieve": Retrieve(text="…")}))
    assert len(wordless.advice) == 1
    assert wordless.episodes == []


def test_decisions_may_come_with_their_outcomes_and_what_they_were_about(stand: MemoryStand) -> None:
    told = RecordOutcomes(
        decisions=[decision(0, step) for step in range(3)],
        text="Compare two contracts",
        outcomes=outcomes(0, True),
        episode=episode(0, True),
    )
    assert stand.final(told).stored == 6
    answer = stand.final(told)
    assert (answer.stored, answer.duplicates) == (0, 6)
    scored, *_ = stand.final(Explain(decision_ids=["t0-0"])).explained
    assert scored.decision == decision(0, 0)
    assert scored.outcome == outcomes(0, True)[0]
    rows = stand.final(Export()).rows
    assert {row.text for row in rows if row.decision is not None} == {"Compare two contracts"}


def test_duplicates_are_counted_and_change_no_value(stand: MemoryStand) -> None:
    teach(stand)
    before = stand.final(Explain(decision_ids=["t0-0", "t1-0"]))
    assert stand.final(RecordDecisions(decisions=[decision(0, 0), decision(0, 0)])).duplicates == 2
    again = RecordOutcomes(outcomes=[*outcomes(0, False), *outcomes(0, False)], episode=episode(0, False))
    answer = stand.final(again)
    assert (answer.stored, answer.duplicates) == (0, 5)
    assert stand.final(Explain(decision_ids=["t0-0", "t1-0"])) == before
    assert stand.final(Stats()).stats["duplicates"] == 7


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        (RecordOutcomes(outcomes=outcomes(5, True)), "memory.unknown_decision", "t5-0"),
        (RecordOutcomes(episode=episode(0, True).model_copy(update={"objective": "…"})), "memory.unembeddable", "obj"),
        (Retrieve(text="   "), "memory.unembeddable", "ask.text"),
        (
            RecordDecisions(decisions=[decision(0, 0).model_copy(update={"features": {"x": float("nan")}})]),
            "body.not_json",
            "NaN",
        ),
        (
            RecordOutcomes(outcomes=[outcomes(0, True)[0].model_copy(update={"seconds": float("inf")})]),
            "body.not_json",
            "inf",
        ),
    ],
    ids=["unknown decision", "objective without a word", "text without a word", "nan feature", "infinite seconds"],
)
def test_what_cannot_be_remembered_is_refused_by_name(untaught: MemoryStand, body: Ask, code: str, named: str) -> None:
    answer = untaught.ask(body)
    assert isinstance(answer, ErrorReply)
    assert answer.failure.code == code
    assert named in answer.failure.message
    assert untaught.final(Stats()).stats["log_seq"] == 0


def test_the_loop_answers_while_a_large_batch_is_written_and_projected(stand: MemoryStand) -> None:
    batch = [
        decision(0, 0).model_copy(update={"decision_id": f"b{number}", "task_id": f"B{number // 50}"})
        for number in range(6_000)
    ]
    for body in (RecordDecisions(decisions=batch), Stats()):
        asked = stand.hub.request("memory", "memory.request", MemoryRequest(ask=body))
        assert stand.hub.newest_pong("memory").in_flight == 1, "the ping was answered before the work was done"
        _, answer, _ = stand.hub.collect(asked)
        assert isinstance(answer, MemoryFinal)
        assert 6_000 in (answer.stored, answer.stats.get("graph_seq"))
    pong = stand.hub.newest_pong("memory")
    assert pong.metrics["log_seq"] == 6_000
    assert pong.metrics["commit_groups"] > 0


def test_projections_follow_although_nobody_asks(stand: MemoryStand) -> None:
    teach(stand)

    def seqs() -> set[object]:
        metrics = stand.hub.pongs["memory"].metrics
        return {metrics.get(f"{name}_seq") for name in ("vectors", "graph", "routing")}

    stand.hub.until(lambda: seqs() == {42}, "all projections have followed")


def test_projections_are_made_by_a_thread_that_lets_others_go_first(stand: MemoryStand) -> None:
    teach(stand)
    assert stand.process is not None
    pid = stand.process.pid
    nice = {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}
    assert {os.getpriority(os.PRIO_PROCESS, pid), 5} <= nice, "the loop keeps its priority, the projector does not"


def test_nothing_is_written_outside_the_stack_s_home(stand: MemoryStand) -> None:
    teach(stand)
    assert list((stand.home / "nobody").iterdir()) == []


def test_a_clean_stop_leaves_projections_that_are_kept(stand: MemoryStand) -> None:
    teach(stand)
    before = stand.answers()
    assert stand.end() == 0
    stand.start()
    assert stand.answers() == before
    verdicts = [line["verdict"] for line in stand.events("memory.projection_opened")][-2:]
    assert verdicts == ["keep", "keep"]
    assert stand.events("memory.projection_rebuilt") == []


def delete(path: Path) -> None:
    path.unlink()


def flip_in_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_near_the_start(path: Path) -> None:
    flip(path, 9)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x04
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [delete, flip_in_the_middle, flip_near_the_start])
def test_harm_to_any_file_of_the_projections_changes_no_answer(
    stand: MemoryStand, harm: Callable[[Path], None]
) -> None:
    teach(stand)
    before = stand.answers()
    for pattern, projection in [
        ("graph.kuzu", "graph"),
        ("vectors-*.faiss", "vectors"),
        ("graph.manifest.json", "graph"),
        ("vectors.manifest.json", "vectors"),
    ]:
        stand.end()
        told = len(stand.events("memory.projection_rebuilt"))
        (path,) = stand.folder.glob(pattern)
        harm(path)
        stand.start()
        assert stand.answers() == before, path.name
        rebuilt = [line["projection"] for line in stand.events("memory.projection_rebuilt")[told:]]
        # Without its manifest an intact graph is that of an unclean stop: a child reads it, and it may be kept.
        assert rebuilt == ([] if (pattern, harm) == ("graph.manifest.json", delete) else [projection]), path.name


def test_without_any_projection_every_answer_is_the_same_byte_for_byte(stand: MemoryStand) -> None:
    teach(stand)
    before = stand.answers()
    stand.end()
    for path in [*stand.folder.glob("graph*"), *stand.folder.glob("vectors*")]:
        path.unlink()
    stand.start()
    assert stand.answers() == before
    assert {line["projection"] for line in stand.events("memory.projection_rebuilt")} == {"graph", "vectors"}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a_byte_flipped_after_kill_9_changes_no_answer(stand: MemoryStand, share: float) -> None:
    teach(stand)
    before = stand.answers()
    stand.end(signal.SIGKILL)
    files = list(stand.folder.glob("graph.kuzu*"))
    assert len(files) > 1, "Kuzu's write-ahead log is part of this test"
    for path in files:
        if path.stat().st_size:
            flip(path, int(path.stat().st_size * share))
    stand.start()
    assert stand.answers() == before


def test_a_second_memory_on_the_same_folder_stays_out(stand: MemoryStand) -> None:
    teach(stand)
    environment = os.environ | {"TIERLINE_HOME": str(stand.home)}
    second = subprocess.Popen([sys.executable, "-m", "services.memory"], env=environment, stderr=subprocess.PIPE)
    try:
        _, stderr = second.communicate(timeout=200)
    finally:
        second.kill()
    assert second.returncode == 1
    assert b"is held by another memory service" in stderr
