"""Keeps both projections in step with the log, and answers from them.

All of it runs in one thread, in order: a write is acknowledged after its commit, its projection follows, and a question
that comes after the acknowledgement is answered after that. A projection that is missing, damaged, ahead of the log or
fails while it is used is rebuilt from the log, and the log file of the service says so. So deleting or damaging both
changes no answer, only how long the start takes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from protocol.messages.memory import Difference, Episode, Lesson, Retrieve
from services.kit.logs import LogEvent
from services.memory.embedding import BadVector, Embedder
from services.memory.graph import LineageGraph, take_over
from services.memory.graph_build import RENEWED
from services.memory.graph_check import Checked
from services.memory.log_reader import EpisodeAdded, LogReader
from services.memory.machine import (
    Candidate,
    Found,
    Recovery,
    RetrievalPolicy,
    lineage_digest,
    ranked,
    recovery,
    similarity_floor,
)
from services.memory.manifest import ProjectionDoubt
from services.memory.telling import Tell
from services.memory.vectors import VectorIndex
from services.memory.verification import differences

PROJECTION_OPENED: Final = LogEvent("memory.projection_opened", "projection verdict reason applied_seq log_seq")
PROJECTION_REBUILT: Final = LogEvent("memory.projection_rebuilt", "projection reason applied_seq", "warning")
PROJECTION_RENEWED: Final = LogEvent("memory.projection_renewed", "log_id applied_seq")
SNAPSHOT_FAILED: Final = LogEvent("memory.snapshot_failed", "reason", "warning")

_MAX_CODES: Final = 64  # bound of Episode.failure_codes
_MAX_LESSONS: Final = 16  # bound of MemoryFinal.lessons


class Projector:
    """Owns the reader, the vectors and the graph. Every method belongs to one thread."""

    def __init__(self, folder: Path, embedder: Embedder, tell: Tell) -> None:
        self._folder = folder
        self._embedder = embedder
        self._tell = tell
        self._policy = RetrievalPolicy()
        self._reader = LogReader(folder)
        self._stale = self._reader.stale
        self._vectors = VectorIndex(folder, self._reader.log_id)
        self._floor: tuple[int, float] | None = None
        self._graph: LineageGraph | None = None
        self.rebuilt = {"vectors": 0, "graph": 0}
        """How often each projection was built from the whole log by this process, for the service's metrics."""

    @property
    def vectors_seq(self) -> int:
        """Last row of the log that is in the vector index."""
        return self._vectors.applied_seq

    @property
    def graph_seq(self) -> int:
        """Last row of the log that is in the graph; 0 while there is none."""
        return 0 if self._graph is None else self._graph.applied_seq

    def start(self, vouched: Found | None, checked: Checked | None, doubt: str | None) -> None:
        """Open both projections and bring them up to the log.

        The graph was judged before, since that may need a child process: `vouched` is what its manifest says,
        `checked` what a child read in it, `doubt` why it has to be rebuilt.
        """
        self._open_vectors()
        self._open_graph(vouched, checked, doubt)
        self.advance()

    def advance(self) -> None:
        """Apply what the log holds beyond the projections. Raises RuntimeError if even a rebuilt graph fails."""
        upto = self._reader.seq
        self._guarded("vectors", lambda: self._advance_vectors(upto), self._new_vectors)
        self._guarded("graph", lambda: self._advance_graph(upto), self._new_graph)
        self._take_reembedded()
        if self._whole and self._vectors.snapshot_is_due():
            try:
                self._vectors.snapshot()
            except OSError as err:  # the log holds everything; only the next start takes longer
                self._tell(SNAPSHOT_FAILED, reason=str(err))

    def retrieve(self, ask: Retrieve) -> tuple[list[Episode], list[Lesson]]:
        """Finished tasks that resemble the text, best first, and what cured their failures. Raises Unembeddable.

        See `machine.ranked`. `failure_codes` of an episode are its own, then those its choices are known for in tasks
        of its type.
        """
        self.advance()
        near = self._near(ask)
        episodes = {episode.task_id: (episode, similarity) for episode, similarity in near}
        candidates = [Candidate(episode.task_id, similarity, episode.q or 0.0) for episode, similarity in near]
        best = ranked(candidates, ask.k, self._policy)
        known: dict[str, list[str]] = {}
        lessons: list[Lesson] = []

        def look_up() -> None:
            known.update(self._open().known_failures([each.task_id for each in best]))
            kinds = sorted({episode.task_type for episode, _ in near})
            lessons[:] = self._open().lessons(sorted(episodes), kinds)[:_MAX_LESSONS]

        self._guarded("graph", look_up, self._new_graph)
        return [_answer(episodes[each.task_id][0], each, known[each.task_id]) for each in best], lessons

    def _near(self, ask: Retrieve) -> list[tuple[Episode, float]]:
        """Phase A: episodes above δ with their cosines."""
        query = self._embedder.embed(ask.text)
        among = None if ask.task_type is None else self._reader.episode_seqs_of(ask.task_type)
        found = []
        for seq, similarity in self._vectors.nearest(query, self._policy.pool(ask.k), among):
            episode = self._reader.episode(seq) if similarity > self.floor else None
            if episode is not None:  # None: forgotten a moment ago, the index without it is being made
                found.append((episode, similarity))
        return found

    @property
    def floor(self) -> float:
        """δ: cosines up to here are those of strangers."""
        doubled = len(self._vectors).bit_length()
        if self._floor is None or self._floor[0] != doubled:
            self._floor = doubled, similarity_floor(self._vectors.stranger_similarities().tolist())
        return self._floor[1]

    def verify(self) -> list[Difference]:
        """What is derived and not as the log says; see `verification.py`."""
        self.advance()
        return differences(self._reader, self._vectors, self._open())

    def adopt(self, vectors: VectorIndex) -> None:
        """Replace both projections: by `vectors`, and by the graph that lies in the folder of renewed ones."""
        self._vectors, self._floor = vectors, None
        if self._graph is not None:
            old, self._graph = self._graph, None
            old.abandon()
        take_over(self._folder / RENEWED, self._folder)
        self._graph = LineageGraph(self._folder)
        self._tell(PROJECTION_RENEWED, log_id=self._reader.log_id, applied_seq=self.graph_seq)
        self.advance()
        self._vectors.snapshot()

    def stats(self) -> dict[str, int]:
        """Rows of the log, and how far each projection has followed it. The service's metrics tell how far before."""
        self.advance()
        applied = {"vectors": len(self._vectors), "vectors_seq": self.vectors_seq, "graph_seq": self.graph_seq}
        applied["stale_vectors"] = self._reader.stale_episodes()
        return self._reader.counts() | applied

    @property
    def index(self) -> VectorIndex:
        """The vectors as they stand."""
        return self._vectors

    @property
    def reader(self) -> LogReader:
        """The log as this thread reads it."""
        return self._reader

    def close(self) -> None:
        """Leave both projections on disk such that the next start need not rebuild them."""
        if self._graph is not None:
            if self._whole:
                self._vectors.snapshot()
            self._graph.close()
        self._reader.close()

    # Opening.

    def _open_vectors(self) -> None:
        found, why = None, None
        try:
            index = VectorIndex.load(self._folder)
            found = index.found
            if not np.array_equal(index.ids(), self._reader.episode_seqs(found.applied_seq)):
                found, why = None, "its rows are not those of the log"
        except FileNotFoundError:
            why = "there is no snapshot"
        except ProjectionDoubt as err:
            why = str(err)
        if self._judge("vectors", found, why) is not Recovery.REBUILD:
            self._vectors = index

    def _open_graph(self, vouched: Found | None, checked: Checked | None, doubt: str | None) -> None:
        found = vouched
        if checked is not None:
            found = checked.found
            if checked.digest != lineage_digest(self._reader.lineage(found.applied_seq)):
                found, doubt = None, "its content is not that of the log"
        if self._judge("graph", found, doubt) is Recovery.REBUILD:
            self._new_graph()
            return
        try:
            self._graph = LineageGraph(self._folder)
        except (RuntimeError, ProjectionDoubt) as err:
            self._rebuild("graph", str(err), self._new_graph)

    def _judge(self, projection: str, found: Found | None, why: str | None) -> Recovery:
        log_seq = self._reader.seq
        verdict, reason = recovery(found, self._reader.log_id, log_seq)
        if verdict is Recovery.REBUILD and log_seq > 0:
            self.rebuilt[projection] += 1
            self._tell(PROJECTION_REBUILT, projection=projection, reason=why or reason, applied_seq=0)
        else:
            applied = 0 if found is None else found.applied_seq
            self._tell(
                PROJECTION_OPENED,
                projection=projection,
                verdict=verdict.value,
                reason=why or reason,
                applied_seq=applied,
                log_seq=log_seq,
            )
        return verdict

    # Following the log.

    def _guarded(self, projection: str, work: Callable[[], None], renew: Callable[[], None]) -> None:
        """Do the work; if the projection fails at it, rebuild it from the log once and do the work again."""
        try:
            work()
        except (RuntimeError, ProjectionDoubt, BadVector) as err:
            self._rebuild(projection, str(err), renew)
            work()

    def _rebuild(self, projection: str, reason: str, renew: Callable[[], None]) -> None:
        self.rebuilt[projection] += 1
        self._tell(PROJECTION_REBUILT, projection=projection, reason=reason, applied_seq=0)
        renew()
        upto = self._reader.seq
        if projection == "vectors":
            self._advance_vectors(upto)
        else:
            self._advance_graph(upto)

    def _advance_vectors(self, upto: int) -> None:
        for last, changes in self._reader.changes(self._vectors.applied_seq, upto, self._stale):
            self._vectors.apply(last, [change for change in changes if isinstance(change, EpisodeAdded)])

    def _advance_graph(self, upto: int) -> None:
        opened = self._open()
        for last, changes in self._reader.changes(opened.applied_seq, upto, (0, upto)):  # needs no vectors
            opened.apply(last, changes)

    def _open(self) -> LineageGraph:
        if self._graph is None:
            raise ProjectionDoubt("there is no open graph")
        return self._graph

    @property
    def _whole(self) -> bool:
        """False while episodes wait for a vector of the embedder in use; such an index is not kept on disk."""
        return self._stale[0] == self._stale[1]

    def _take_reembedded(self) -> None:
        """Add the episodes whose vectors were made anew since the last time; once all are, put the rows in order."""
        if self._whole:
            return
        after, until = self._reader.stale
        self._vectors.add(list(self._reader.vectors(self._stale[0], after)))
        self._stale = after, until
        if self._whole:
            self._rebuild("vectors", "every vector is now of the embedder in use", self._new_vectors)

    def _new_vectors(self) -> None:
        self._vectors, self._floor = VectorIndex(self._folder, self._reader.log_id), None

    def _new_graph(self) -> None:
        if self._graph is not None:
            broken, self._graph = self._graph, None
            broken.abandon()
        self._graph = LineageGraph(self._folder, new_for=self._reader.log_id)


def _answer(episode: Episode, candidate: Candidate, known: list[str]) -> Episode:
    codes = list(dict.fromkeys([*episode.failure_codes, *known]))[:_MAX_CODES]
    return episode.model_copy(update={"similarity": candidate.similarity, "q": candidate.q, "failure_codes": codes})


def fresh_vectors(folder: Path) -> VectorIndex:
    """A second index, built from the log in a thread of its own while the first one answers."""
    reader = LogReader(folder)
    try:
        index = VectorIndex(folder, reader.log_id)
        for last, changes in reader.changes(0, reader.seq):
            index.apply(last, [change for change in changes if isinstance(change, EpisodeAdded)])
        return index
    finally:
        reader.close()
