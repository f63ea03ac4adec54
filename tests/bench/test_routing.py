"""`bench routing` in short, on made-up outcomes: its figures mean what they say, and bad files are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.kit.config import CHECKOUT

TOPICS = {
    "algebra": "Solve the equation for x",
    "history": "Which king ruled in the year",
    "law": "Is the contract void",
}


def bench(file: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.ctl", "bench", "routing", str(file), *argv]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False)


def outcomes(folder: Path, rows: int, weak: dict[str, float], strong: dict[str, float], *, domain: bool = True) -> Path:
    random = np.random.default_rng(4)
    file = folder / "outcomes.jsonl"
    lines = []
    for number in range(rows):
        topic = list(TOPICS)[number % len(TOPICS)]
        row: dict[str, Any] = {
            "prompt": f"{TOPICS[topic]} {number}?",
            "weak_correct": bool(random.random() < weak[topic]),
            "strong_correct": bool(random.random() < strong[topic]),
        }
        lines.append(json.dumps(row | ({"domain": topic} if domain else {})))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.mark.parametrize("domain", [True, False])
def test_it_beats_both_fixed_arms_where_each_is_better_somewhere(tmp_path: Path, domain: bool) -> None:
    weak, strong = {"algebra": 0.1, "history": 0.9, "law": 0.9}, {"algebra": 0.95, "history": 0.9, "law": 0.4}
    done = bench(outcomes(tmp_path, 360, weak, strong, domain=domain), "--seeds", "2", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["rows"] == 360
    assert figures["second_half"] > figures["second_half_best_fixed"] + 0.05
    assert figures["mean_reward"] > figures["greedy"]
    assert figures["oracle"] > figures["mean_reward"]
    assert figures["apgr"] > 0.6
    assert 0 < figures["exploration_share"] < 0.5
    assert len(figures["curve"]) == 10


def test_it_recovers_from_a_swap_and_loses_little_where_one_arm_is_better_everywhere(tmp_path: Path) -> None:
    weak, strong = dict.fromkeys(TOPICS, 0.3), dict.fromkeys(TOPICS, 0.95)
    done = bench(outcomes(tmp_path, 500, weak, strong), "--seeds", "2", "--json")
    figures = json.loads(done.stdout)
    assert figures["mean_reward"] > figures["best_fixed"] - 0.02
    assert figures["rules"] == figures["best_fixed"]
    assert figures["recovered"] == 2
    assert figures["recovery_steps"] < 240


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "x", "weak_correct": 1, "strong_correct": true}', ":1: weak_correct: "),
        ('{"weak_correct": true, "strong_correct": true}', ":1: prompt: "),
        ("[", ":1: it is not JSON"),
        ('{"prompt": "x", "weak_correct": true, "strong_correct": true}', "1 rows, at least 20"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_line_and_field(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(line, encoding="utf-8")
    done = bench(file)
    assert done.returncode == 2
    assert says in done.stderr
