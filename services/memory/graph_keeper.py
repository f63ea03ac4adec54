"""Keeps the graph in step with the log, in a thread of its own: opened where it can be trusted, else made anew.

Applying a few hundred tasks takes a fifth of a second, so no question may stand behind it that does not need the
graph; what rows beyond it say is known elsewhere (`lineage.py`). A graph that is missing, damaged, ahead of the log or
fails while it is used is rebuilt from the log, and the service's log file says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protocol.messages.memory import Difference
from services.memory.graph import LineageGraph, take_over
from services.memory.graph_build import RENEWED
from services.memory.graph_check import Checked
from services.memory.judging import PROJECTION_REBUILT, judge
from services.memory.log_reader import LogReader
from services.memory.machine import Found, Recovery, lineage_digest
from services.memory.manifest import ProjectionDoubt
from services.memory.telling import Tell
from services.memory.vectors import VectorIndex
from services.memory.verification import differences

T = TypeVar("T")


class GraphKeeper:
    """Owns the graph and a reader of the log; every method belongs to the thread that made it."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self._folder = folder
        self._tell = tell
        self._reader = LogReader(folder)
        self._graph: LineageGraph | None = None
        self._upto = self._reader.seq
        self.rebuilt = 0
        """How often it was built from the whole log by this process."""

    @property
    def applied_seq(self) -> int:
        """Last row of the log that is in the graph; 0 while there is none. Any thread may read it."""
        return 0 if self._graph is None else self._graph.applied_seq

    def start(self, vouched: Found | None, checked: Checked | None, doubt: str | None) -> None:
        """Open the graph and bring it up to the log.

        It was judged before, since that may need a child process: `vouched` is what its manifest says, `checked` what a
        child read in it, `doubt` why it has to be rebuilt.
        """
        found = vouched
        if checked is not None:
            found = checked.found
            if checked.digest != lineage_digest(self._reader.lineage(found.applied_seq)):
                found, doubt = None, "its content is not that of the log"
        verdict = judge("graph", found, doubt, self._reader, self._tell)
        if verdict is Recovery.REBUILD:
            self.rebuilt += self._reader.seq > 0
            self._renew()
        else:
            try:
                self._graph = LineageGraph(self._folder)
            except (RuntimeError, ProjectionDoubt) as err:
                self.rebuild(str(err))
        self.advance(self._upto)

    def advance(self, upto: int) -> None:
        """Apply the rows of the log up to `upto` and none beyond, so that who counts those knows which the graph has.

        Raises RuntimeError if even a rebuilt graph fails.
        """
        self._upto = max(self._upto, upto)
        self.ask(lambda _: self._follow())

    def ask(self, work: Callable[[LineageGraph], T]) -> T:
        """Ask the graph; if it fails at that, rebuild it from the log once and ask again."""
        try:
            return work(self._open())
        except (RuntimeError, ProjectionDoubt) as err:
            self.rebuild(str(err))
            return work(self._open())

    def rebuild(self, reason: str) -> None:
        """Make it anew from the log."""
        self.rebuilt += 1
        self._tell(PROJECTION_REBUILT, projection="graph", reason=reason, applied_seq=0)
        self._renew()
        self._follow()

    def adopt(self) -> None:
        """Replace it by the one that lies in the folder of renewed ones, and bring that up to the log."""
        if self._graph is not None:
            old, self._graph = self._graph, None
            old.abandon()
        take_over(self._folder / RENEWED, self._folder)
        self._graph = LineageGraph(self._folder)
        self.advance(max(self._reader.seq, self.applied_seq))

    def differences(self, vectors: VectorIndex) -> list[Difference]:
        """What is derived and not as the log says; see `verification.py`. The vectors' thread must be waiting."""
        return differences(self._reader, vectors, self._open())

    def close(self) -> None:
        """Leave it on disk such that the next start need not rebuild it."""
        if self._graph is not None:
            self._graph.close()
        self._reader.close()

    def _follow(self) -> None:
        stale = 0, self._upto  # needs no vectors
        for last, changes in self._reader.changes(self._open().applied_seq, self._upto, stale):
            self._open().apply(last, changes)

    def _open(self) -> LineageGraph:
        if self._graph is None:
            raise ProjectionDoubt("there is no open graph")
        return self._graph

    def _renew(self) -> None:
        if self._graph is not None:
            broken, self._graph = self._graph, None
            broken.abandon()
        self._graph = LineageGraph(self._folder, new_for=self._reader.log_id)
