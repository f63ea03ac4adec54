"""`tierline memory …` against real processes: each command does what it says, and the service answers meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.messages.memory import (
    DecisionRecord,
    Episode,
    Explain,
    MemoryFinal,
    MemoryRequest,
    Outcome,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
    Row,
)
from services.ctl.bench.bare_stack import BareStack
from services.memory.graph import LineageGraph
from tests.conftest import temporary_home

MODELS = {
    name: {"tier": tier, "engine": "noop", "context_tokens": 4096}
    for name, tier in (("front", "A"), ("specialist", "B"), ("worker", "C"))
}
TEXTS = ["Compare two contracts clause by clause", "Parse ISO dates in Python", "A zanzibarian journey by train"]


@pytest.fixture(scope="module")
def stack() -> Iterator[BareStack]:
    with temporary_home() as path, BareStack(path, models=MODELS, core=("scheduler", "planner", "memory")) as running:
        yield running


def tierline(stack: BareStack, *arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "services.ctl", *arguments],
        env=stack.environ,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def ask(stack: BareStack, body: Retrieve | RecordDecisions | RecordOutcomes | Explain) -> MemoryFinal:
    return stack.client.memory(MemoryRequest(ask=body), timeout_s=100)


def teach(stack: BareStack, prefix: str) -> None:
    for number, text in enumerate(TEXTS):
        task = f"{prefix}{number}"
        decisions = [
            DecisionRecord(
                decision_id=f"{task}-{choice}",
                task_id=task,
                subject="role",
                choice=choice,
                propensity=1.0,
                task_type="doc",
            )
            for choice in ("worker", f"only-{prefix}")
        ]
        outcomes = [
            Outcome(decision_id=each.decision_id, reward=float(number != 1), seconds=1.0, attempts=1, at_ms=1_000)
            for each in decisions
        ]
        episode = Episode(
            task_id=task, task_type="doc", objective=text, succeeded=number != 1, seconds=2.0, at_ms=1_000 + number
        )
        ask(stack, RecordDecisions(decisions=decisions, text=text))
        ask(stack, RecordOutcomes(outcomes=outcomes, episode=episode))


def found(stack: BareStack, text: str) -> set[str]:
    return {episode.task_id for episode in ask(stack, Retrieve(text=text, k=16)).episodes}


def figures(stack: BareStack) -> dict[str, int]:
    code, out, err = tierline(stack, "memory", "stats", "--json")
    assert code == 0, err
    figures: dict[str, int] = json.loads(out)
    return figures


def test_export_and_import_move_everything_and_only_once(stack: BareStack, tmp_path: Path) -> None:
    teach(stack, "move")
    file = tmp_path / "memory.jsonl"
    code, out, err = tierline(stack, "memory", "export", str(file), "--json")
    assert code == 0, err
    lines = file.read_text().splitlines()
    assert json.loads(out)["rows"] == len(lines) - 1 >= 15
    assert json.loads(lines[0]) == {"format": "tierline-memory", "version": 1}
    before = figures(stack)
    code, out, err = tierline(stack, "memory", "import", "-", "--json", stdin="\n".join(lines))
    assert (code, json.loads(out)) == (0, {"stored": 0, "duplicates": len(lines) - 1}), err
    assert figures(stack) | {"duplicates": 0} == before | {"duplicates": 0}

    with temporary_home() as path, BareStack(path, models=MODELS, core=("scheduler", "planner", "memory")) as other:
        code, out, err = tierline(other, "memory", "import", str(file), "--json")
        assert (code, json.loads(out)["stored"]) == (0, len(lines) - 1), err
        for text in TEXTS:
            assert ask(other, Retrieve(text=text, k=16)).episodes == ask(stack, Retrieve(text=text, k=16)).episodes
        ids = ["move0-worker", "move2-only-move"]
        assert ask(other, Explain(decision_ids=ids)) == ask(stack, Explain(decision_ids=ids))
        assert tierline(other, "memory", "verify")[0] == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}\n", "x.jsonl:1: expected"),
        ('{"format": "tierline-memory", "version": 9}\n', "version 9"),
        ('{"format": "tierline-memory", "version": 1}\n{"seq": 1, "episode": {"task_id": 7}}\n', "x.jsonl:2: episode"),
        ('{"format": "tierline-memory", "version": 1}\n{"seq"\n', "x.jsonl:2: not JSON"),
        ('{"format": "tierline-memory", "version": 1}\n{"seq": 1}\n', "exactly one of"),
    ],
)
def test_an_import_that_cannot_be_read_is_refused_by_file_and_line(
    stack: BareStack, tmp_path: Path, text: str, named: str
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    before = figures(stack)
    code, _, err = tierline(stack, "memory", "import", str(file))
    assert code == 2
    assert named in err
    assert figures(stack) == before


def test_outcomes_of_unknown_decisions_are_refused_as_a_whole(stack: BareStack, tmp_path: Path) -> None:
    outcome = Outcome(decision_id="nobody-knows", reward=1.0, seconds=1.0, attempts=1, at_ms=1)
    file = tmp_path / "x.jsonl"
    header = json.dumps({"format": "tierline-memory", "version": 1})
    file.write_text(f"{header}\n{Row(outcome=outcome).model_dump_json(exclude_none=True)}\n")
    code, _, err = tierline(stack, "memory", "import", str(file))
    assert code == 2
    assert "nobody-knows" in err


def test_verify_names_what_differs_and_rebuild_mends_it_while_questions_are_answered(stack: BareStack) -> None:
    teach(stack, "mend")
    assert found(stack, TEXTS[0]) >= {"mend0"}
    folder = stack.home.memory
    stack.kill("memory", signal.SIGTERM)
    stack.processes["memory"].wait(60)
    # A clean manifest over a graph that says something else: only a comparison with the log can tell.
    graph = LineageGraph(folder)
    graph._run("MATCH (:Decision {decision_id: 'mend0-worker'})-[r:OF_CHOICE]->() DELETE r")
    graph.close()
    stack.start("memory")
    stack.wait_ready()
    code, out, err = tierline(stack, "memory", "verify", "--json")
    assert code == 1, err
    (difference,) = json.loads(out)["differences"]
    assert difference["part"] == "graph"
    assert "mend0-worker" in difference["what"]

    stop, answered = threading.Event(), 0
    status: list[int] = []

    def rebuild() -> None:
        status.append(tierline(stack, "memory", "rebuild", "--json")[0])
        stop.set()

    worker = threading.Thread(target=rebuild)
    worker.start()
    while not stop.is_set():
        assert "mend0" in found(stack, TEXTS[0])
        answered += 1
    worker.join()
    assert status == [0]
    assert answered > 3
    assert tierline(stack, "memory", "verify")[0] == 0
    assert not (folder / "renewed").exists()


def test_forget_removes_a_task_a_choice_and_what_is_old(stack: BareStack) -> None:
    teach(stack, "gone")
    assert "gone2" in found(stack, TEXTS[2])
    before = figures(stack)
    code, out, err = tierline(stack, "memory", "forget", "--task", "gone2", "--task", "never", "--json")
    assert (code, json.loads(out)) == (0, {"forgotten": 5}), err
    assert "gone2" not in found(stack, TEXTS[2])
    assert figures(stack)["episodes"] == before["episodes"] - 1
    code, out, _ = tierline(stack, "memory", "forget", "--choice", "only-gone", "--subject", "role", "--json")
    assert (code, json.loads(out)) == (0, {"forgotten": 4})
    assert tierline(stack, "memory", "verify")[0] == 0
    code, out, _ = tierline(stack, "memory", "forget", "--older-than-days", "1", "--json")
    assert code == 0
    assert json.loads(out)["forgotten"] > 0
    left = figures(stack)
    assert (left["episodes"], left["decisions"], left["outcomes"], left["values"], left["vectors"]) == (0, 0, 0, 0, 0)
    assert found(stack, TEXTS[0]) == set()
    assert tierline(stack, "memory", "verify")[0] == 0
    texts = [path for path in stack.home.memory.rglob("*") if path.is_file() and b"zanzibarian" in path.read_bytes()]
    assert texts == []
    assert tierline(stack, "memory", "forget")[0] == 2
    assert json.loads(tierline(stack, "memory", "values", "role", "--json")[1]) == []
    teach(stack, "new")
    assert "new0" in found(stack, TEXTS[0]), "it goes on learning"
    values = json.loads(tierline(stack, "memory", "values", "role", "--json")[1])
    assert {value["choice"]: value["count"] for value in values} == {"worker": 3, "only-new": 3}
