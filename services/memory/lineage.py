"""What similar tasks have failed with and what cured it, as of the last acknowledged row (counts kept in memory).

The graph answers how things stood when it last took rows in; the rows since then are added here. What was asked once is
kept and counted on, so that under load neither a question waits for the graph nor the graph is asked the same again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

from protocol.messages.memory import Lesson
from services.memory.graph import Cure, LineageGraph, choice_id
from services.memory.log_reader import Change, Choice, ChoiceFailed, Cured

_KEPT: Final = 4_096
"""Choices, tasks with cures, and cures whose counts are kept; the longest unused go first."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Ask(Protocol):
    """Has the graph's thread do something and waits for it: the answer, and the last row that the graph had then."""

    def __call__(self, work: Callable[[LineageGraph], V]) -> tuple[V, int]:
        """Raises RuntimeError where even a rebuilt graph does not answer."""
        ...


class Lineage:
    """Counts as of the last row that was noted; belongs to one thread."""

    def __init__(self, ask: Ask, noted_seq: int) -> None:
        """`noted_seq` is the last row that the graph has."""
        self._ask = ask
        self.noted_seq = noted_seq
        self._beyond: list[ChoiceFailed | Cured] = []
        """Rows that the graph may not have."""
        self._failures: OrderedDict[str, Counter[str]] = OrderedDict()
        self._cures: OrderedDict[str, dict[Cure, str]] = OrderedDict()
        """Task -> what was cured in it -> the least of the findings."""
        self._help: OrderedDict[Cure, Counter[str]] = OrderedDict()
        self._cured: set[str] | None = None
        """Tasks in which something was cured; None until somebody asks."""

    def note(self, upto: int, changes: Iterable[Change], applied_seq: int) -> None:
        """Take in the rows up to `upto`; those up to `applied_seq` are in the graph by now."""
        new = [one for one in changes if isinstance(one, ChoiceFailed | Cured) and one.seq > self.noted_seq]
        self._beyond = [one for one in self._beyond if one.seq > applied_seq] + new
        for one in new:
            if isinstance(one, ChoiceFailed):
                failures = self._failures.get(_choice_of(one))
                if failures is not None:
                    failures[one.code] += 1
                continue
            if self._cured is not None:
                self._cured.add(one.task_id)
            if one.task_id in self._cures:
                _add(self._cures[one.task_id], _cure_of(one), one.finding)
            helped = self._help.get(_cure_of(one))
            if helped is not None:
                helped[one.task_type] += 1
        self.noted_seq = max(self.noted_seq, upto)

    def known_failures(self, choices: Collection[Choice]) -> list[str]:
        """Failure codes that these choices are known for, most frequent first."""
        known = self._failures_of([choice_id(*choice) for choice in choices])
        times = sum(known, Counter[str]())
        return [code for _, code in sorted((-count, code) for code, count in times.items())]

    def lessons(self, task_ids: Sequence[str], clusters: Collection[str]) -> list[Lesson]:
        """What cured the failures of these tasks, with how often it has helped in these clusters; most first."""
        findings: dict[Cure, str] = {}
        for cures in self._cures_of(self._with_cures(task_ids)):
            for cure, finding in cures.items():
                _add(findings, cure, finding)
        order = list(findings)
        lessons = [
            Lesson(failure_code=cure[0], action=cure[1], role=cure[2], finding=findings[cure], times=times)
            for cure, helped in zip(order, self._help_of(order), strict=True)
            if (times := sum(helped[cluster] for cluster in clusters))
        ]
        return sorted(lessons, key=lambda each: (-each.times, each.failure_code, each.action, each.role))

    def _with_cures(self, task_ids: Sequence[str]) -> list[str]:
        if self._cured is None:
            cured, seq = self._ask(lambda graph: graph.cured_tasks())
            self._cured = cured | {one.task_id for one in self._beyond if isinstance(one, Cured) and one.seq > seq}
        return [task_id for task_id in task_ids if task_id in self._cured]

    def _failures_of(self, ids: Sequence[str]) -> list[Counter[str]]:
        if missing := [ident for ident in ids if ident not in self._failures]:
            found, seq = self._ask(lambda graph: graph.failures_of(missing))
            for one in self._beyond:
                if isinstance(one, ChoiceFailed) and one.seq > seq and (ident := _choice_of(one)) in found:
                    found[ident][one.code] += 1
            self._failures |= found
        return _taken(self._failures, ids)

    def _cures_of(self, task_ids: Sequence[str]) -> list[dict[Cure, str]]:
        if missing := [task_id for task_id in task_ids if task_id not in self._cures]:
            found, seq = self._ask(lambda graph: graph.cures_of(missing))
            for task_id, cures in found.items():
                own = self._cures[task_id] = {}
                for cure, finding in cures:
                    _add(own, cure, finding)
                for one in self._beyond:
                    if isinstance(one, Cured) and one.seq > seq and one.task_id == task_id:
                        _add(own, _cure_of(one), one.finding)
        return _taken(self._cures, task_ids)

    def _help_of(self, cures: Sequence[Cure]) -> list[Counter[str]]:
        if missing := [cure for cure in cures if cure not in self._help]:
            found, seq = self._ask(lambda graph: graph.help_of(missing))
            for one in self._beyond:
                if isinstance(one, Cured) and one.seq > seq and (cure := _cure_of(one)) in found:
                    found[cure][one.task_type] += 1
            self._help |= found
        return _taken(self._help, cures)


def _taken(kept: OrderedDict[K, V], keys: Sequence[K]) -> list[V]:
    """The values of these keys, which become the last to go when there are too many."""
    found = []
    for key in keys:
        kept.move_to_end(key)
        found.append(kept[key])
    while len(kept) > max(_KEPT, len(keys)):
        kept.popitem(last=False)
    return found


def _add(findings: dict[Cure, str], cure: Cure, finding: str) -> None:
    findings[cure] = min(finding, findings.get(cure, finding))


def _choice_of(one: ChoiceFailed) -> str:
    return choice_id(one.subject, one.task_type, one.choice)


def _cure_of(one: Cured) -> Cure:
    return one.code, one.action, one.role
