"""`tierline simulate --learning`: what each part of the staged reward is there for, and what is refused."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from services.ctl.__main__ import main
from services.ctl.learning.ablations import TASKS
from services.ctl.learning.course import VARIANTS, ground_of, run_course
from services.ctl.learning.families import SHIPPED, Family
from tests.unit.planner_tasks import SHIPPED as REGISTRY

Out = pytest.CaptureFixture[str]
BY_NAME = {family.name: family for family in SHIPPED}
SEEDS = (11, 12)
"""Others than those that the command begins with."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERLINE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TIERLINE_REGISTRY", raising=False)


def in_the_end(variant: str, family: Family) -> tuple[float, float]:
    """Share of the best width's quality and share of split tasks, means over the seeds."""
    ground = ground_of(family, REGISTRY)
    courses = [run_course(ground, VARIANTS[variant], TASKS, seed) for seed in SEEDS]
    return (
        statistics.fmean(course.share_of_best for course in courses),
        statistics.fmean(course.split_share for course in courses),
    )


@pytest.mark.parametrize("name", list(BY_NAME))
def test_with_all_parts_every_family_comes_within_five_percent_of_its_best_width(name: str) -> None:
    quality, _ = in_the_end("full", BY_NAME[name])
    assert quality >= 0.95


def test_without_the_parallel_term_all_stays_serial_although_width_pays() -> None:
    quality, split = in_the_end("no_parallel_term", BY_NAME["many"])
    assert quality < 0.9
    assert split < 0.6


def test_without_the_finish_term_tasks_are_split_although_nothing_comes_of_it() -> None:
    quality, split = in_the_end("no_finish_term", BY_NAME["whole"])
    guarded_quality, guarded_split = in_the_end("full", BY_NAME["whole"])
    assert split > guarded_split + 0.2
    assert quality < guarded_quality - 0.03


def test_without_annealing_the_end_is_worse() -> None:
    quality, split = in_the_end("no_annealing", BY_NAME["tight"])
    annealed_quality, annealed_split = in_the_end("full", BY_NAME["tight"])
    assert split > annealed_split + 0.2
    assert quality < annealed_quality - 0.03


def test_a_course_repeats_itself_with_its_seed_only() -> None:
    ground = ground_of(BY_NAME["pairs"], REGISTRY)
    one, same, other = (run_course(ground, VARIANTS["full"], 60, seed) for seed in (1, 1, 2))
    assert list(one.widths) == list(same.widths) != list(other.widths)


def test_ways_are_the_planners_plans_and_their_seconds_those_of_the_hub() -> None:
    ground = ground_of(BY_NAME["pairs"], REGISTRY)
    assert {way.choice: way.width for way in ground.ways.values()} == {
        "doc.single": 1,
        "doc.map-join-by4": 2,
        "doc.map-join-by2": 4,
        "doc.map-join": 8,
    }
    # A step takes 2 s and 2 s more for each of its inputs: 8 of them in one step, and by four with a join behind.
    seconds = {way.width: way.seconds for way in ground.ways.values()}
    assert (seconds[1], seconds[2]) == (18.0, 12.0)
    assert ground.question.rules_choice == "doc.map-join"
    assert {way.width: (way.spread.width, way.spread.assigned) for way in ground.ways.values()} == {
        1: (1, 0),
        2: (2, 2),
        4: (4, 4),
        8: (8, 8),
    }


def test_the_command_prints_the_four_figures_and_draws(tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "families.jsonl"
    file.write_text('{"name": "flat", "quality": {"1": 0.5, "3": 0.5}, "inputs": 3}\n', encoding="utf-8")
    picture = tmp_path / "curves.png"
    argv = ["simulate", "--learning", "--families", str(file), "--tasks", "20", "--courses", "2", "--seed", "7"]
    assert main([*argv, "--png", str(picture), "--json"]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {name: figures[name] for name in VARIANTS} == dict.fromkeys(VARIANTS, 1.0), "both widths are the best"
    assert figures["seeds"] == [7, 8]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(argv) == 0
    assert "no_finish_term" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ('{"name": "a", "quality": {"1": 2.0, "3": 1}}', "quality"),
        ('{"name": "a", "quality": {"1": 0.5, "3": 0.5}, "rules": 2}', "no entry for width 2"),
        ('{"name": "a", "quality": {"1": 0.5, "3": 0.5}, "speed": 2}', "speed"),
        ('{"name": "a", "quality": {"1": 0.5, "3": 0.5}, "inputs": 8}', "need a value for each of 1, 2, 4, 8"),
    ],
)
def test_a_bad_family_is_refused_by_line_and_field(line: str, says: str, tmp_path: Path, capsys: Out) -> None:
    file = tmp_path / "families.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    assert main(["simulate", "--learning", "--families", str(file), "--tasks", "20"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ("--learning", "--tasks", "5"),
        ("--learning", "--courses", "0"),
        ("--learning", "--seed", "-1"),
        ("--learning", "--workers", "worker=2"),
        ("--tasks", "5", "--png", "x.png"),
        ("--learning", "--png", "/no/such/folder/x.png", "--tasks", "10", "--courses", "1"),
    ],
)
def test_options_that_make_no_sense_are_refused(argv: tuple[str, ...]) -> None:
    assert main(["simulate", *argv]) == 2
