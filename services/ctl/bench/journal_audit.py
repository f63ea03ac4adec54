"""Reads a hub's journal after a run and says what was promised, what was kept, and what happened twice.

It looks at the raw facts and not at the fold, since the fold refuses exactly what is searched for here. It opens the
file read-only and after the hub has stopped; how facts are made is the scheduler's.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from services.scheduler import facts as f
from services.scheduler.fact_rows import every_fact


@dataclass(frozen=True, slots=True)
class Worked:
    """One answer of a capability: when its attempt was last handed out, and when it came, in unix ms."""

    started_ms: int
    ended_ms: int


@dataclass(slots=True)
class Audit:
    """What a journal says."""

    ended: dict[str, str] = field(default_factory=dict)
    """Task -> final state."""
    accepted: dict[str, int] = field(default_factory=dict)
    """Task -> when, in unix ms."""
    repeated: list[str] = field(default_factory=list)
    """Effects that happened more than once: each names task, step and what."""
    steps_done: int = 0
    lost_attempts: int = 0
    duplicates_refused: int = 0
    """Second endings that arrived and had no effect."""
    worked: dict[str, list[Worked]] = field(default_factory=dict)
    """Answers per model entry, and the plans under `planner`."""

    def unfinished(self) -> list[str]:
        """Tasks that were accepted and never ended."""
        return sorted(self.accepted.keys() - self.ended.keys())


def audit(path: Path) -> Audit:
    """Read the whole journal. Raises sqlite3.Error if it cannot be read, ValueError for facts of a newer version."""
    result = Audit()
    effects: Counter[str] = Counter()
    models: dict[tuple[str, str | None], str] = {}
    starts: dict[tuple[str, str | None], int] = {}
    for fact in _facts(path):
        at = (fact.task, fact.step)
        match fact:
            case f.TaskAccepted():
                effects[f"{fact.task}: accepted"] += 1
                result.accepted[fact.task] = fact.at_ms
            case f.TaskPlanned():
                effects[f"{fact.task}: planned"] += 1
                result.worked.setdefault("planner", []).append(Worked(result.accepted[fact.task], fact.at_ms))
            case f.AttemptQueued(model=model):
                models[at] = model
            case f.AttemptStarted():
                starts[at] = fact.at_ms
            case f.AttemptAnswered():
                effects[f"{fact.task} {fact.step}: answer to attempt {fact.number}"] += 1
                result.worked.setdefault(models[at], []).append(Worked(starts.get(at, 0), fact.at_ms))
            case f.AttemptLost():
                result.lost_attempts += 1
            case f.StepDone():
                effects[f"{fact.task} {fact.step}: done"] += 1
                result.steps_done += 1
            case f.TaskEnded(state=state):
                effects[f"{fact.task}: ended"] += 1
                result.ended[fact.task] = state
            case f.OutcomesSettled():
                effects[f"{fact.task}: learned"] += 1
            case f.DuplicateSeen():
                result.duplicates_refused += 1
            case _:
                continue
    result.repeated = [f"{effect}, {count} times" for effect, count in effects.items() if count > 1]
    return result


def _facts(path: Path) -> Iterator[f.Fact]:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as journal:
        yield from every_fact(journal)
