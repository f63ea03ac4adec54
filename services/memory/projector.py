"""Answers which finished tasks resemble a text, from projections that follow the log.

A write is acknowledged after its commit, and a question that comes after the acknowledgement sees it: the vectors take
in new rows before each answer, and of what the graph has not taken in yet `lineage.py` keeps count. The graph itself
follows in a thread of its own, many rows at once. A projection that is missing, damaged, ahead of the log or fails
while it is used is rebuilt from the log, and the log file of the service says so. So deleting or damaging both changes
no answer, only how long the start takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import numpy as np

from protocol.messages.memory import Difference, Episode, Lesson, Retrieve
from services.kit.logs import LogEvent
from services.memory.background import step_back
from services.memory.embedding import BadVector, Embedder
from services.memory.graph import LineageGraph
from services.memory.graph_check import Checked
from services.memory.graph_keeper import GraphKeeper
from services.memory.judging import PROJECTION_REBUILT, judge
from services.memory.lineage import Lineage
from services.memory.log_reader import Choice, DecisionAdded, EpisodeAdded, LogReader, Past, Scored
from services.memory.machine import (
    Candidate,
    Found,
    Recovery,
    RetrievalPolicy,
    episode_value,
    ranked,
    similarity_floor,
)
from services.memory.manifest import ProjectionDoubt
from services.memory.telling import Tell
from services.memory.vectors import RowSet, VectorIndex

PROJECTION_RENEWED: Final = LogEvent("memory.projection_renewed", "log_id applied_seq")
SNAPSHOT_FAILED: Final = LogEvent("memory.snapshot_failed", "reason", "warning")

_PASTS: Final = 4_096
"""Finished tasks that are kept as they were read; the longest unused go first."""
_MAX_CODES: Final = 64  # bound of Episode.failure_codes
_MAX_LESSONS: Final = 16  # bound of MemoryFinal.lessons


T = TypeVar("T")


class Projector:
    """Owns the vectors, a reader of the log and, in a thread of its own, the graph.

    Every method belongs to one thread, but for the properties: those may be read from anywhere.
    """

    def __init__(self, folder: Path, embedder: Embedder, tell: Tell) -> None:
        self._folder = folder
        self._embedder = embedder
        self._tell = tell
        self._policy = RetrievalPolicy()
        self._reader = LogReader(folder)
        self._log_id = self._reader.log_id
        self._stale = self._reader.stale
        self._vectors = VectorIndex(folder, self._reader.log_id)
        self._vectors_rebuilt = 0
        self._floor: tuple[int, float] | None = None
        self._kinds: dict[str, RowSet] = {}
        """Task type -> its episodes."""
        self._pasts: OrderedDict[int, Past] = OrderedDict()
        self._rows_of: dict[str, int] = {}
        """Task -> its row among `_pasts`."""
        self._q: dict[Choice, float] = {}
        """Values as of the last row."""
        self._graph_thread = ThreadPoolExecutor(1, "memory-graph", initializer=step_back)
        self._keeper = self._graph_thread.submit(GraphKeeper, folder, tell).result()
        self._lineage = Lineage(self._ask_graph, 0)

    @property
    def vectors_seq(self) -> int:
        """Last row of the log that is in the vector index."""
        return self._vectors.applied_seq

    @property
    def graph_seq(self) -> int:
        """Last row of the log that is in the graph; 0 while there is none."""
        return self._keeper.applied_seq

    @property
    def rebuilt(self) -> dict[str, int]:
        """How often each projection was built from the whole log by this process, for the service's metrics."""
        return {"vectors": self._vectors_rebuilt, "graph": self._keeper.rebuilt}

    def start(self, vouched: Found | None, checked: Checked | None, doubt: str | None) -> None:
        """Open both projections and bring them up to the log; what is known of the graph is told in `GraphKeeper`."""
        graph = self._graph_thread.submit(self._keeper.start, vouched, checked, doubt)
        self._open_vectors()
        graph.result()
        self._begin_counting()
        self.advance()

    def follow(self) -> None:
        """Take in what the log holds beyond the vectors and the counts."""
        log_id, upto = self._reader.position()
        if log_id != self._log_id:  # rows were forgotten, and the index without them is being made
            self._log_id = log_id
            self._forget_read()
        after = min(self._vectors.applied_seq, self._lineage.noted_seq)
        for last, changes in self._reader.changes(after, upto, self._stale):
            episodes = []
            for one in changes:
                if isinstance(one, EpisodeAdded):
                    episodes.append(one)
                elif isinstance(one, DecisionAdded | Scored) and (row := self._rows_of.pop(one.task_id, None)):
                    del self._pasts[row]
            self._take_in(last, episodes)
            self._lineage.note(last, changes, self._keeper.applied_seq)
            self._q.clear()
        self._take_reembedded()

    def advance(self) -> None:
        """Bring everything up to the log. Raises RuntimeError if even a rebuilt projection fails."""
        self.follow()
        self.advance_graph().result()
        self.keep()

    def advance_graph(self) -> Future[None]:
        """Have the graph take in what was followed so far, without waiting for that."""
        return self._graph_thread.submit(self._keeper.advance, self._lineage.noted_seq)

    def keep(self) -> None:
        """Write the vectors to disk if much of them is not there."""
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
        self.follow()
        near = {past.episode.task_id: (past, similarity) for past, similarity in self._near(ask)}
        candidates = [
            Candidate(task_id, similarity, self._value_of(past)) for task_id, (past, similarity) in near.items()
        ]
        best = ranked(candidates, ask.k, self._policy)
        kinds = {past.episode.task_type for past, _ in near.values()}
        lessons = self._lineage.lessons(sorted(near), kinds)[:_MAX_LESSONS]
        episodes = []
        for each in best:
            past = near[each.task_id][0]
            episodes.append(_answer(past.episode, each, self._lineage.known_failures(past.choices)))
        return episodes, lessons

    def _near(self, ask: Retrieve) -> list[tuple[Past, float]]:
        """Phase A: episodes above δ with their cosines."""
        query = self._embedder.embed(ask.text)
        among = None if ask.task_type is None else self._kinds.get(ask.task_type, RowSet())
        if among is not None and len(among) == sum(map(len, self._kinds.values())):
            among = None  # all of them, which is found faster without looking each one up
        found = []
        for seq, similarity in self._vectors.nearest(query, self._policy.pool(ask.k), among):
            past = self._past(seq) if similarity > self.floor else None
            if past is not None:  # None: forgotten a moment ago, the index without it is being made
                found.append((past, similarity))
        return found

    def _past(self, seq: int) -> Past | None:
        known = self._pasts.get(seq)
        if known is not None:
            self._pasts.move_to_end(seq)
            return known
        past = self._reader.past(seq)
        if past is not None:
            self._pasts[seq], self._rows_of[past.episode.task_id] = past, seq
            if len(self._pasts) > _PASTS:
                _, oldest = self._pasts.popitem(last=False)
                del self._rows_of[oldest.episode.task_id]
        return past

    def _value_of(self, past: Past) -> float:
        for choice in past.scored:
            if choice not in self._q:
                self._q[choice] = self._reader.q_of(choice)
        return episode_value([self._q[choice] for choice in past.scored], past.episode.succeeded)

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
        return self._graph_thread.submit(self._keeper.differences, self._vectors).result()

    def adopt(self, vectors: VectorIndex) -> None:
        """Replace both projections: by `vectors`, and by the graph that lies in the folder of renewed ones."""
        self._graph_thread.submit(self._keeper.adopt).result()
        self._vectors, self._floor = vectors, None
        self._tell(PROJECTION_RENEWED, log_id=self._reader.log_id, applied_seq=self.graph_seq)
        self._begin_counting()
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
        if self._whole and self._keeper.applied_seq:
            self._vectors.snapshot()
        self._graph_thread.submit(self._keeper.close).result()
        self._graph_thread.shutdown()
        self._reader.close()

    # Opening, and making anew.

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
        if judge("vectors", found, why, self._reader, self._tell) is not Recovery.REBUILD:
            self._vectors = index
        else:
            self._vectors_rebuilt += self._reader.seq > 0

    def _begin_counting(self) -> None:
        """Nothing that was read before holds any more."""
        self._lineage = Lineage(self._ask_graph, self._keeper.applied_seq)
        self._forget_read()
        self._kinds.clear()
        for seq, task_type in self._reader.kinds(self._vectors.applied_seq):
            self._kinds.setdefault(task_type, RowSet()).add(seq)

    def _forget_read(self) -> None:
        self._pasts.clear()
        self._rows_of.clear()
        self._q.clear()

    def _ask_graph(self, work: Callable[[LineageGraph], T]) -> tuple[T, int]:
        def asked() -> tuple[T, int]:
            return self._keeper.ask(work), self._keeper.applied_seq

        return self._graph_thread.submit(asked).result()

    def _take_in(self, upto: int, episodes: list[EpisodeAdded]) -> None:
        """Add what the vectors do not have yet; if they fail at it, rebuild them from the log once."""
        new = [one for one in episodes if one.seq > self._vectors.applied_seq]
        for one in new:
            self._kinds.setdefault(one.task_type, RowSet()).add(one.seq)
        try:
            if upto > self._vectors.applied_seq:
                self._vectors.apply(upto, new)
        except (RuntimeError, ProjectionDoubt, BadVector) as err:
            self._rebuild_vectors(str(err), upto)

    def _rebuild_vectors(self, reason: str, upto: int) -> None:
        self._vectors_rebuilt += 1
        self._tell(PROJECTION_REBUILT, projection="vectors", reason=reason, applied_seq=0)
        self._vectors, self._floor = VectorIndex(self._folder, self._reader.log_id), None
        for last, changes in self._reader.changes(0, upto, self._stale):
            self._vectors.apply(last, [change for change in changes if isinstance(change, EpisodeAdded)])

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
            self._rebuild_vectors("every vector is now of the embedder in use", self._vectors.applied_seq)


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
