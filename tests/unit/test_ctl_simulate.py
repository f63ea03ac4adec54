"""`simulate` and `bench makespan` through the entry point, and what bad graph files are told."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from services.ctl.__main__ import main
from services.ctl.bench.graph_file import TaskGraph, read_graphs
from services.ctl.bench.makespan import measure
from services.ctl.outcomes import BadInput
from services.kit.config import CHECKOUT, load_home
from services.scheduler.durations import Job, LearnedDurations
from services.scheduler.journal import Journal

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TIERLINE_REGISTRY", raising=False)
    monkeypatch.delenv("TIERLINE_MODELS", raising=False)


def told(out: Out, *argv: str, code: int = 0) -> dict[str, Any]:
    assert main([*argv, "--json"]) == code
    document: dict[str, Any] = json.loads(out.readouterr().out)
    return document


def test_more_slots_are_worth_something_where_slots_are_waited_for(capsys: Out) -> None:
    argv = ("simulate", "--tasks", "10", "--shape", "fanout", "--slots", "specialist=8", "--workers", "worker=2")
    told_both = told(capsys, *argv, "--tokens-per-s", "30")
    base, other = told_both["base"], told_both["what_if"]
    assert base["tasks"] == other["tasks"] == 10
    assert base["failed"] == other["failed"] == 0
    assert base["makespan_s"] >= base["bound_s"]
    assert other["makespan_s"] < base["makespan_s"]
    assert told_both["speedup"] > 1
    assert {tier["model"]: tier["slots"] for tier in other["tiers"]} == {"front": 2, "specialist": 8, "worker": 8}
    for tier in base["tiers"]:
        assert 0 < tier["utilisation"] <= 1


def test_a_task_file_takes_what_its_critical_path_takes(capsys: Out) -> None:
    base = told(capsys, "simulate", str(CHECKOUT / "deploy" / "example.yaml"), "--tokens-per-s", "10")["base"]
    assert base["makespan_s"] == pytest.approx(28.0)
    assert base["bottleneck"] == "critical path"


def test_it_comes_to_its_end_where_models_wait_for_cores(capsys: Out) -> None:
    """Three models on two cores close the door to each other: whoever was shut out must be tried when it opens."""
    argv = ("simulate", "--tasks", "5", "--shape", "fanout", "--steps", "10", "--seed", "2", "--tokens-per-s", "30")
    told_all = told(capsys, *argv)
    assert told_all["base"]["steps"] == 50
    assert told_all["base"]["failed"] == 0
    assert told_all["simulated_tasks_per_s"] > 0
    assert told_all["simulated_steps_per_s"] == pytest.approx(10 * told_all["simulated_tasks_per_s"], rel=0.01)


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """A task of three steps of the worker, one after the other."""
    steps = [
        {"id": "S1", "outputs": [{"name": "a"}]},
        {"id": "S2", "inputs": ["a"], "outputs": [{"name": "b"}]},
        {"id": "S3", "inputs": ["b"], "outputs": [{"name": "c"}]},
    ]
    filled = [{"actor": "worker", "action": "do it", "gates": [], "max_tokens": 300} | step for step in steps]
    path = tmp_path / "chain.json"
    path.write_text(json.dumps({"objective": "a chain", "task_type": "doc", "plan": {"steps": filled}}))
    return str(path)


def a_journal(folder: Path, seconds: float) -> Path:
    """A journal of a hub that has seen the worker take so long, a hundred times."""
    folder.mkdir(parents=True, exist_ok=True)
    learned = LearnedDurations()
    for _ in range(100):
        learned.observe(Job("worker", "doc", 500, 300), seconds)
    journal = Journal(folder / "journal.sqlite")
    journal.keep_learned(learned.state(), [])
    journal.close()
    return folder / "journal.sqlite"


def test_what_a_journal_has_learned_decides_the_predicted_makespan(capsys: Out, chain: str, tmp_path: Path) -> None:
    untaught = told(capsys, "plan", "--file", chain)
    assert untaught["durations"]["source"] == "prior"
    assert untaught["forecast"]["makespan_s"] == pytest.approx(30.0)  # three times 300 tokens at 30 a second
    for folder, seconds in (("slow", 50.0), ("fast", 2.0)):
        journal = str(a_journal(tmp_path / folder, seconds))
        taught = told(capsys, "plan", "--file", chain, "--journal", journal)
        assert taught["durations"]["source"] == "learned"
        assert taught["durations"]["observations"] == {"worker": 64}
        assert taught["forecast"]["makespan_s"] == pytest.approx(3 * seconds, rel=0.1)
        assert taught["forecast"]["critical_s"] == pytest.approx(taught["forecast"]["makespan_s"], rel=0.01)
        simulated = told(capsys, "simulate", chain, "--journal", journal)
        assert simulated["durations"] == taught["durations"]
        assert simulated["base"]["makespan_s"] == pytest.approx(3 * seconds, rel=0.1)


def test_the_journal_of_this_stack_is_read_unasked_and_never_written(capsys: Out, chain: str) -> None:
    journal = a_journal(load_home().journal, 2.0)
    before = journal.read_bytes()
    assert main(["plan", "--file", chain]) == 0
    assert "durations: learned from 64 observations (worker 64)" in capsys.readouterr().out
    assert told(capsys, "plan", "--file", chain)["forecast"]["makespan_s"] == pytest.approx(6.0, rel=0.1)
    assert journal.read_bytes() == before


def test_the_plan_has_a_schedule_per_model_and_names_the_bottleneck(capsys: Out) -> None:
    forecast = told(capsys, "plan", "--file", str(CHECKOUT / "deploy" / "example.yaml"))["forecast"]
    assert forecast["makespan_s"] == pytest.approx(forecast["critical_s"], abs=0.01)
    assert "critical path" in forecast["bottleneck"]
    assert forecast["failure"] is None
    at = {one["step"]: one for one in forecast["schedule"]}
    assert at["S6"]["start_s"] >= max(at[name]["end_s"] for name in ("S2", "S3", "S4"))


def test_a_plan_that_maps_a_step_over_what_another_one_writes_is_not_told_to_fail(capsys: Out, tmp_path: Path) -> None:
    """However long the list will be: it is taken to have one item, and the dry run says so."""
    steps = [
        {"id": "S1", "outputs": [{"name": "title"}, {"name": "points", "kind": "json"}]},
        {"id": "S2", "map_over": "points", "outputs": [{"name": "texts"}]},
        {"id": "S3", "inputs": ["texts"], "outputs": [{"name": "whole"}]},
    ]
    common = {"actor": "worker", "action": "write", "max_tokens": 300, "gates": []}
    path = tmp_path / "mapped.json"
    path.write_text(json.dumps({"objective": "map", "plan": {"steps": [common | step for step in steps]}}))
    forecast = told(capsys, "plan", "--file", str(path), "--tokens-per-s", "30")["forecast"]
    assert forecast["failure"] is None
    assert forecast["makespan_s"] == pytest.approx(30.0) == forecast["critical_s"]
    base = told(capsys, "simulate", str(path), "--tokens-per-s", "30")["base"]
    assert base["failed"] == 0
    assert base["bound_s"] == base["makespan_s"] == pytest.approx(30.0)
    assert main(["plan", "--file", str(path)]) == 0
    assert "taken to have one item: S2 over 'points'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give either task files or --tasks"),
        (["--tasks", "0"], "--tasks 0"),
        (["--tasks", "1", "--workers", "wroker=2"], "there is no model 'wroker'"),
        (["--tasks", "1", "--slots", "worker=none"], "MODEL=N"),
        (["--tasks", "1", "--tokens-per-s", "0"], "--tokens-per-s"),
        (["--tasks", "1", "--tokens-per-s", "9", "--journal", "x"], "give one of them"),
        (["--tasks", "1", "--journal", "/nonexistent"], "--journal /nonexistent"),
        (["--tasks", "1", "--journal", __file__], "no durations can be read"),
    ],
)
def test_bad_arguments_are_named(capsys: Out, argv: list[str], words: str) -> None:
    assert words in told(capsys, "simulate", *argv, code=2)["error"]["message"]


def graphs(count: int, tasks: int = 40) -> list[dict[str, Any]]:
    draw = random.Random(4)
    made = []
    for number in range(count):
        nodes = [
            {
                "id": str(index),
                "seconds": draw.randint(1, 9),
                "depends_on": [str(one) for one in draw.sample(range(index), min(index, draw.randint(0, 2)))],
            }
            for index in range(tasks)
        ]
        made.append({"name": f"g{number}", "tasks": nodes})
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "graphs.jsonl"
    path.write_text("\n".join(map(json.dumps, graphs(6))) + "\n")
    return path


def test_the_scheduler_beats_arrival_order_and_that_beats_waves(capsys: Out, file: Path) -> None:
    ratio = {}
    for policy in ("upward-rank", "fifo", "waves"):
        figures = told(capsys, "bench", "makespan", str(file), "--workers", "3", "--policy", policy)
        assert list(figures) == ["graphs", "workers", "policy", "sigma", "mean_ratio", "max_ratio"]
        assert figures["graphs"] == 6
        ratio[policy] = figures["mean_ratio"]
    assert 1 <= ratio["upward-rank"] < ratio["fifo"] < ratio["waves"]
    assert ratio["upward-rank"] < 1.05
    noisy = told(capsys, "bench", "makespan", str(file), "--workers", "3", "--sigma", "0.5", "--seed", "2")
    assert noisy["mean_ratio"] >= ratio["upward-rank"]


@pytest.mark.parametrize("factor", [0.001, 1e6])
def test_the_unit_of_a_file_changes_no_ratio(file: Path, factor: float) -> None:
    plain = read_graphs(file)
    scaled = [
        TaskGraph(one.name, {name: s * factor for name, s in one.seconds.items()}, one.needs, one.critical_s * factor)
        for one in plain
    ]
    assert measure(scaled, 3)["mean_ratio"] == pytest.approx(measure(plain, 3)["mean_ratio"], abs=1e-4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: expected an object"),
        ('{"name":"g","tasks":[]}', ":2: tasks: "),
        ('{"name":"g","tasks":[{"id":"a","seconds":-1,"depends_on":[]}]}', ":2: tasks[0].seconds: "),
        ('{"name":"g","tasks":[{"id":"a","seconds":true,"depends_on":[]}]}', ":2: tasks[0].seconds: "),
        ('{"name":"g","tasks":[{"id":"a","seconds":1,"depends_on":["b"]}]}', ":2: tasks[0].depends_on[0]: "),
        ('{"name":"g","tasks":[{"id":"a","seconds":1,"depends_on":["a"]}]}', "they wait for each other: a -> a"),
        ('{"name":"g","critical_path":3,"tasks":[{"id":"a","seconds":1,"depends_on":[]}]}', ":2: critical_path: is 3"),
        ('{"name":"g","tasks":[{"id":"a","seconds":1,"depends_on":[]},{"id":"a"}]}', ":2: tasks[1].id: "),
        (f'{{"name":"g","tasks":[{{"id":"a","seconds":1{"0" * 400},"depends_on":[]}}]}}', ":2: tasks[0].seconds: "),
        ('{"name":"g","tasks":[{"id":"a","seconds":5e-324,"depends_on":[]}]}', ":2: tasks[0].seconds: "),
        (
            f'{{"name":"g","critical_path":1{"0" * 400},"tasks":[{{"id":"a","seconds":1,"depends_on":[]}}]}}',
            ":2: critical_path: is 1000",
        ),
        (f'{{"name":"{"g" * 300}","tasks":[{{"id":"a","seconds":1,"depends_on":[]}}]}}', ":2: name: "),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_field(file: Path, line: str, words: str) -> None:
    file.write_text(json.dumps(graphs(1)[0]) + "\n" + line + "\n")
    with pytest.raises(BadInput) as caught:
        read_graphs(file)
    assert f"{file}" in str(caught.value)
    assert words in str(caught.value)


def test_what_a_file_may_hold_is_measured_or_refused_in_words(capsys: Out, tmp_path: Path) -> None:
    """Names that no text may hold, a rounded figure for the longest path, and levels for more barriers than fit."""
    odd = {
        "name": "g\ud800",
        "critical_path": 0.476,
        "tasks": tasks_of({"\ud800": [], "b": ["\ud800"]}, [1 / 3, 1 / 7]),
    }
    long = {"name": "long", "tasks": tasks_of({f"{i}": [f"{i - 1}"] if i else [] for i in range(2_600)}, [1])}
    for name, graph in (("odd", odd), ("long", long)):
        (tmp_path / name).write_text(json.dumps(graph))
    assert told(capsys, "bench", "makespan", str(tmp_path / "odd"))["mean_ratio"] == pytest.approx(1, abs=1e-5)
    argv = ("bench", "makespan", str(tmp_path / "long"), "--policy", "waves")
    assert "graph 'long' is more than a plan holds: steps: " in told(capsys, *argv, code=2)["error"]["message"]


def test_a_dense_graph_is_scheduled_as_the_same_order_in_fewer_words(capsys: Out, tmp_path: Path) -> None:
    """A plan takes 20,000 control dependencies, and 300 tasks that wait for all before them name 44,850."""
    first = {f"{i}": [f"{j}" for j in range(i)] for i in range(300)}
    last = {f"x{i}": ["298"] for i in range(4)}
    path = tmp_path / "dense"
    path.write_text(json.dumps({"name": "dense", "tasks": tasks_of(first | last, [1, 2])}))
    figures = told(capsys, "bench", "makespan", str(path), "--workers", "4")
    assert figures["mean_ratio"] == pytest.approx(1, abs=1e-4)


def tasks_of(needs: dict[str, list[str]], seconds: list[float]) -> list[dict[str, Any]]:
    return [
        {"id": task, "seconds": seconds[index % len(seconds)], "depends_on": others}
        for index, (task, others) in enumerate(needs.items())
    ]


def test_the_bars_on_the_development_graphs() -> None:
    places = [folder / "shared" / "data" / "dags" / "stg100_dev.jsonl" for folder in CHECKOUT.parents]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        pytest.skip("no shared/data/dags/stg100_dev.jsonl above the checkout: these graphs are not part of the project")
    graphs = read_graphs(path)
    assert measure(graphs, 4)["mean_ratio"] <= 1.0085
    assert measure(graphs, 4, sigma=0.5)["mean_ratio"] <= 1.017
