"""`tierline bench planning` on small files of its own: the figures are there, and bad files are refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.ctl.__main__ import main
from services.ctl.bench.planning_graphs import Known, measure_discovery, random_plans

QUESTIONS = [
    ("Which is taller, the Eiffel Tower or Big Ben?", 2),
    ("What is the average height of Mount Fuji, K2 and Denali?", 3),
    ("What is the average height of Mount Fuji, K2 and Denali?", 4),
]


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["bench", "planning", *arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_widths_are_counted_by_gold_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "q.jsonl", [{"question": text, "branch": width} for text, width in QUESTIONS])
    rules = figures(capsys, "--width", file)["rules"]
    assert isinstance(rules, dict)
    assert (rules["rows"], rules["valid"], rules["width_exact"]) == (3, 1.0, 0.6667)
    assert rules["confusion"] == {"2": {"2": 1}, "3": {"3": 1}, "4": {"3": 1}}
    assert main(["bench", "planning", "--width", file]) == 0
    assert "gold" in capsys.readouterr().out


def test_a_judge_is_measured_in_folds_or_on_other_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"request": f"How to paint a boat in {n} days?", "decomposable": 1} for n in range(20)]
    rows += [{"request": f"Write a poem of {n} lines.", "decomposable": 0} for n in range(20)]
    file = lines(tmp_path / "r.jsonl", rows)
    folds = figures(capsys, "--decompose", file)
    assert (folds["rows"], folds["balanced_accuracy"]) == (40, 1.0)
    assert 0 < float(str(folds["ms_p50"])) <= float(str(folds["ms_max"]))
    turned = [{"request": row["request"], "decomposable": 1 - int(str(row["decomposable"]))} for row in rows]
    assert (
        figures(capsys, "--decompose", file, "--train", lines(tmp_path / "t.jsonl", turned))["balanced_accuracy"] == 0.0
    )


def test_all_parallelism_of_serial_plans_is_recovered_and_no_order_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--dags", "30", "--seed", "5")
    assert (found["dags"], found["recovered"], found["unsafe"]) == (30, 1.0, 0)
    assert int(str(found["removed_edges"])) > 100
    assert int(str(found["added_edges"])) > 10


def test_an_order_that_the_plan_does_not_show_counts_as_unsafe() -> None:
    one = random_plans(1, 3)[0]
    ids = [step.id for step in one.plan.steps]
    invented = {step: frozenset(ids[:place]) for place, step in enumerate(ids)}
    assert measure_discovery([Known(one.plan, invented)])["unsafe"] > 0


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("--width", '{"question": "a"}', ":1: branch"),
        ("--width", "", "no question"),
        ("--decompose", '{"request": 1}', ":1: request"),
        ("--decompose", '{"request": "a", "decomposable": 1}', "one label"),
    ],
)
def test_bad_files_are_refused_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, text: str, says: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text, "utf-8")
    assert main(["bench", "planning", option, str(file)]) == 2
    assert says in capsys.readouterr().err


def test_a_small_swarm_is_killed_resumed_and_joined_once(capsys: pytest.CaptureFixture[str]) -> None:
    swarm = figures(capsys, "--swarm", "--agents", "10", "--baseline", "2", "--threads", "1")["swarm"]
    assert isinstance(swarm, dict)
    assert swarm["exactly_once"] is True
    assert (swarm["agents"], swarm["compared_agents"]) == (10, 2)
    assert swarm["killed_and_resumed"]["turns"] == 2
    assert swarm["killed_and_resumed"]["tokens"] > 10
    assert (swarm["serial"]["turns"], swarm["serial"]["most_at_once"]) == (3, 1)
    assert swarm["at_once"]["most_at_once"] == 2
    assert swarm["tokens_differ_by"] < 0.5, "the runs that are compared do the same work"
    assert swarm["led_by_demo_model"]["turns"] >= 1


@pytest.mark.parametrize(("option", "value"), [("--agents", "101"), ("--threads", "0")])
def test_a_swarm_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert main(["bench", "planning", "--swarm", option, value]) == 2
    assert option in capsys.readouterr().err


def test_learning_is_a_part_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    parts = figures(capsys, "--learning", "--courses", "1", "--dags", "5")
    assert list(parts) == ["discovery", "learning"]
    learning = parts["learning"]
    assert isinstance(learning, dict)
    assert learning["full"] > max(learning[name] for name in ("no_parallel_term", "no_finish_term", "no_annealing"))
