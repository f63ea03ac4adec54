"""Tasks that clients ask for and that only the journal has, folded a part at a time.

A task of a thousand steps takes a tenth of a second to fold, in which nobody else is served. So the loop folds some
facts of it in each turn (`go_on`), once for all that wait for the same task; one of few facts is there at once. Whether
a key is taken is known without a fold. What the answers mean is the machine's business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.scheduler.events import LookUp
from services.scheduler.journal import Journal
from services.scheduler.parts import Parts
from services.scheduler.past import Known, Past
from services.scheduler.tasks import TaskRecord

MOST_WAITING: Final = 64
"""Requests of one client that may wait for tasks from the journal."""

Found = TaskRecord | Past | Known | None


@dataclass(slots=True)
class _Fold:
    parts: Parts[TaskRecord | Past | None]
    askers: list[LookUp] = field(default_factory=list)


class Lookups:
    """See the module. Facts of the task that are still to be written must be written first."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._folds: dict[str, _Fold] = {}
        """By task, in the order in which they were asked for."""

    def __bool__(self) -> bool:
        """True while there is something to go on with."""
        return bool(self._folds)

    def objection(self, asked: LookUp) -> str | None:
        """Why this client may ask for nothing more now; None if it may."""
        waiting = sum(one.identity == asked.identity for fold in self._folds.values() for one in fold.askers)
        return f"you wait for {waiting} tasks from the journal" if waiting >= MOST_WAITING else None

    def is_long(self, asked: LookUp) -> bool:
        """True if finding it takes so long that it must wait for its turn: `begin`, else `at_once`."""
        return asked.whole and self._journal.is_long(asked.task_id)

    def at_once(self, asked: LookUp) -> Found:
        """What the journal knows."""
        if asked.whole:
            return self._journal.find(asked.task_id)
        return Known() if self._journal.knows(asked.task_id) else None

    def begin(self, asked: LookUp) -> None:
        """Wait for it."""
        fold = self._folds.get(asked.task_id)
        if fold is None:
            fold = self._folds[asked.task_id] = _Fold(self._journal.find_in_parts(asked.task_id))
        fold.askers.append(asked)

    def go_on(self) -> tuple[list[LookUp], TaskRecord | Past | None]:
        """Fold some facts of the first one; once it is whole, who has asked for it, and what there is."""
        task_id, fold = next(iter(self._folds.items()))
        try:
            next(fold.parts)
        except StopIteration as end:
            del self._folds[task_id]
            return fold.askers, end.value
        return [], None
