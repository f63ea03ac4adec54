"""Reads files of task graphs: one JSON object a line, with `name` and `tasks` of `id`, `seconds` and `depends_on`.

A line that cannot be used ends the command with `file:line: field: reason`, since figures over half a file would pass
for figures over the file. What is done with the graphs is up to the benchmarks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError
from pathlib import Path
from typing import Any, Final, TypeGuard

from protocol.limits import MAX_STEPS
from services.ctl.outcomes import BadInput
from services.scheduler.ranks import upward_rank

_MAX_LINE_BYTES: Final = 16 * 1024 * 1024
_MAX_SECONDS: Final = 1e9
_MIN_SECONDS: Final = 1e-9
"""Shorter is zero, or a mistake: the unit of a file is the user's, but no number of it may lose its meaning."""
_MAX_NAME: Final = 256
_MAX_SHOWN: Final = 60
_TOLERANCE: Final = 1e-3
"""Of a file's own figure for its longest path, which may have been rounded where the durations were not."""


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """One graph; `needs` names, for each task, those that must have finished before it."""

    name: str
    seconds: Mapping[str, float]
    needs: Mapping[str, tuple[str, ...]]
    critical_s: float
    """Length of the longest path."""

    @property
    def work_s(self) -> float:
        """Sum of all durations."""
        return sum(self.seconds.values())

    def bound_s(self, workers: int) -> float:
        """No schedule on so many workers is shorter: the longest path, or the work shared evenly."""
        return max(self.critical_s, self.work_s / workers)

    def followers(self) -> dict[str, list[str]]:
        """For each task, those that need it."""
        return _followers(self.needs)


def read_graphs(path: Path) -> list[TaskGraph]:
    """All graphs of a file; empty lines are skipped. Raises BadInput with file, line and field."""
    graphs = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(_MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > _MAX_LINE_BYTES:
                    raise BadInput(f"{path}:{number}: longer than {_MAX_LINE_BYTES} bytes")
                if line.strip():
                    graphs.append(_Line(f"{path}:{number}").graph(line))
    except OSError as err:
        raise BadInput(f"{path}: {err.strerror}; give a file of task graphs, one JSON object a line") from err
    if not graphs:
        raise BadInput(f"{path}: no graph in it")
    return graphs


class _Line:
    """One line; `where` is its place for messages."""

    def __init__(self, where: str) -> None:
        self._where = where

    def graph(self, line: bytes) -> TaskGraph:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise BadInput(f"{self._where}: not JSON: {err}") from err
        if not isinstance(value, dict):
            raise self._bad("", "expected an object")
        name = value.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
            raise self._bad("name", f"expected a text of at most {_MAX_NAME} characters")
        tasks = value.get("tasks")
        if not isinstance(tasks, list) or not tasks:
            raise self._bad("tasks", "expected a list with at least one task")
        if len(tasks) > MAX_STEPS:
            raise self._bad("tasks", f"{len(tasks)} tasks, a plan holds at most {MAX_STEPS}")
        seconds: dict[str, float] = {}
        needs: dict[str, tuple[str, ...]] = {}
        for index, task in enumerate(tasks):
            ident = self._id(index, task, seconds)
            seconds[ident] = self._seconds(index, task)
            needs[ident] = self._needs(index, task)
        self._check_needs(needs)
        try:
            critical_s = max(upward_rank(_followers(needs), seconds).values())
        except CycleError as err:
            raise self._bad("tasks", f"they wait for each other: {' -> '.join(map(str, err.args[1]))}") from err
        if critical_s <= 0:
            raise self._bad("tasks", "no task takes any time: there is nothing to compare with")
        told = value.get("critical_path")
        if told is not None and not (_is_number(told) and math.isclose(told, critical_s, rel_tol=_TOLERANCE)):
            raise self._bad(
                "critical_path", f"is {_shown(told)}, but the longest path of these tasks is {critical_s:g}"
            )
        return TaskGraph(name, seconds, needs, critical_s)

    def _id(self, index: int, task: Any, known: Mapping[str, float]) -> str:
        if not isinstance(task, dict):
            raise self._bad(f"tasks[{index}]", "expected an object")
        ident = task.get("id")
        if not isinstance(ident, str) or not ident:
            raise self._bad(f"tasks[{index}].id", "expected a text")
        if ident in known:
            raise self._bad(f"tasks[{index}].id", f"{ident!r} is the id of an earlier task too")
        return ident

    def _seconds(self, index: int, task: dict[str, Any]) -> float:
        seconds = task.get("seconds")
        if not _is_number(seconds) or not (seconds == 0 or _MIN_SECONDS <= seconds <= _MAX_SECONDS):
            wanted = f"expected 0, or a number from {_MIN_SECONDS:g} to {_MAX_SECONDS:g}"
            raise self._bad(f"tasks[{index}].seconds", f"{wanted}, got {_shown(seconds)}")
        return float(seconds)

    def _needs(self, index: int, task: dict[str, Any]) -> tuple[str, ...]:
        needs = task.get("depends_on")
        if not isinstance(needs, list) or not all(isinstance(other, str) for other in needs):
            raise self._bad(f"tasks[{index}].depends_on", "expected a list of ids")
        return tuple(dict.fromkeys(needs))

    def _check_needs(self, needs: Mapping[str, tuple[str, ...]]) -> None:
        for index, others in enumerate(needs.values()):
            for place, other in enumerate(others):
                if other not in needs:
                    raise self._bad(f"tasks[{index}].depends_on[{place}]", f"there is no task {other!r}")

    def _bad(self, field: str, reason: str) -> BadInput:
        return BadInput(f"{self._where}: {field}: {reason}" if field else f"{self._where}: {reason}")


def _is_number(value: Any) -> TypeGuard[float]:
    """A finite number that a float can hold: JSON's whole numbers have no end."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    """A value of the file in a message, whatever its length."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _followers(needs: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    after: dict[str, list[str]] = {ident: [] for ident in needs}
    for ident, others in needs.items():
        for other in others:
            after[other].append(ident)
    return after
