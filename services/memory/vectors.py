"""Nearest episodes: an inner-product index (FAISS) over the objectives' vectors, a projection of the log.

Exact below 100,000 episodes. From there on an inverted file (IVF), since an exact search would take 10 ms and more.
Ids are the episodes' row numbers in the log, rows are only ever added, in that order, and the IVF is always trained on
the first 100,000; so an index rebuilt from the log gives bit for bit the answers of one that grew, which HNSW, whose
graph depends on more than the order, cannot promise as cheaply. What was forgotten goes by building the index anew.
On disk there is only a snapshot, written whole; the log makes up for whatever came after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from services.kit.threads import one_thread_each
from services.memory.embedding import DIMENSION, Vector, checked
from services.memory.log_reader import EpisodeAdded
from services.memory.machine import Found
from services.memory.manifest import Manifest, ProjectionDoubt, replace_file, sha256_of

_MANIFEST: Final = "vectors.manifest.json"
_SNAPSHOTS: Final = "vectors-*"  # with what a crash left of a temporary file
_SNAPSHOT_EVERY: Final = 256

EXACT_BELOW: Final = 100_000
"""Episodes from which on the search is approximate."""

_CELLS: Final = 256
_PROBES: Final = 24
"""Of 256 cells: a tenth of all vectors is compared. `tierline bench memory` prints the recall."""
_TRAINING_ROUNDS: Final = 8
_BYTES_AT_FIRST: Final = 1_024
_STRANGERS: Final = 256
"""Episodes whose pairs show how similar strangers are."""


class RowSet:
    """Row numbers as bits: an episode more costs nothing, and a search looks each one up at once."""

    def __init__(self) -> None:
        self.bits = np.zeros(_BYTES_AT_FIRST, dtype=np.uint8)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, row: int) -> None:
        """Take in a row that is not among them yet."""
        place = row >> 3
        if place >= len(self.bits):
            self.bits = np.concatenate([self.bits, np.zeros(max(place, len(self.bits)), dtype=np.uint8)])
        self.bits[place] |= 1 << (row & 7)
        self._size += 1


class VectorIndex:
    """The index in memory; belongs to one thread."""

    def __init__(self, folder: Path, log_id: str, *, exact_below: int = EXACT_BELOW) -> None:
        """An empty index that follows this log."""
        one_thread_each()
        self._folder = folder
        self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(DIMENSION))
        self._exact_below = exact_below
        self._saved_seq = 0
        self._saved_count = 0
        self.log_id = log_id
        self.applied_seq = 0

    @classmethod
    def load(cls, folder: Path) -> VectorIndex:
        """The last snapshot. Raises FileNotFoundError where there is none, ProjectionDoubt where it is damaged."""
        manifest = Manifest.load(folder / _MANIFEST)
        index = cls(folder, manifest.log_id)
        for name in manifest.files:
            data = manifest.read(folder, name)
            try:
                index._index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
            except RuntimeError as err:
                raise ProjectionDoubt(f"{name} is not an index of this FAISS version: {err}") from err
        index.applied_seq = index._saved_seq = manifest.applied_seq
        index._saved_count = len(index)
        return index

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def found(self) -> Found:
        """How far it follows which log."""
        return Found(self.log_id, self.applied_seq)

    @property
    def exact(self) -> bool:
        """True while every vector is compared."""
        return isinstance(self._inner(), faiss.IndexFlat)

    def ids(self) -> npt.NDArray[np.int64]:
        """Row numbers held, in the order of adding."""
        ids: npt.NDArray[np.int64] = faiss.vector_to_array(self._index.id_map)
        return ids

    def vectors(self) -> npt.NDArray[np.float32]:
        """All vectors, in the order of adding; shape (n, 256)."""
        inner = self._inner()
        if not self.exact:
            inner.make_direct_map()
        vectors: npt.NDArray[np.float32] = inner.reconstruct_n(0, len(self))
        return vectors

    def stranger_similarities(self) -> npt.NDArray[np.float32]:
        """Cosines of all pairs among 256 of the first episodes, evenly spaced; empty below 256 episodes.

        Which ones is a matter of the log alone: the sample is renewed each time the number of episodes has doubled.
        """
        size = _STRANGERS
        while size * 2 <= min(len(self), self._exact_below):
            size *= 2
        if len(self) < _STRANGERS:
            return np.zeros(0, dtype=np.float32)
        inner = self._inner()
        if not self.exact:
            inner.make_direct_map()
        chosen = range(0, size, size // _STRANGERS)
        sample = np.stack([inner.reconstruct(place) for place in chosen])
        upper: npt.NDArray[np.float32] = (sample @ sample.T)[np.triu_indices(len(sample), 1)]
        return upper

    def apply(self, upto: int, episodes: Sequence[EpisodeAdded]) -> None:
        """Add the episodes of the rows up to `upto`, leaving out those without a vector."""
        if episodes and episodes[0].seq <= self.applied_seq:
            raise ProjectionDoubt(f"row {episodes[0].seq} is in the index already")
        self.add(episodes)
        self.applied_seq = upto

    def add(self, episodes: Sequence[EpisodeAdded]) -> None:
        """Add rows without moving `applied_seq`. FAISS would accept NaN, so every vector is checked."""
        rows = [(episode.seq, checked(episode.vector)) for episode in episodes if episode.vector is not None]
        if not rows:
            return
        matrix = np.stack([vector for _, vector in rows])
        ids = np.array([seq for seq, _ in rows], dtype=np.int64)
        room = self._exact_below - len(self) if self.exact else len(ids)
        self._index.add_with_ids(matrix[:room], ids[:room])
        if self.exact and len(self) >= self._exact_below:
            self._index = _inverted(self.vectors(), self.ids())
        if room < len(ids):
            self._index.add_with_ids(matrix[room:], ids[room:])

    def _inner(self) -> Any:
        return faiss.downcast_index(self._index.index)

    def nearest(self, query: Vector, k: int, among: RowSet | None = None) -> list[tuple[int, float]]:
        """At most `k` pairs of (row number, cosine), best first; `among` restricts them to these rows."""
        if len(self) == 0 or (among is not None and len(among) == 0):
            return []
        options = self._options(among)
        similarities, rows = self._index.search(checked(query)[np.newaxis, :], min(k, len(self)), params=options)
        return [(int(row), float(near)) for row, near in zip(rows[0], similarities[0], strict=True) if row >= 0]

    def _options(self, among: RowSet | None) -> faiss.SearchParameters | None:
        if among is None:
            return None
        options: Any = faiss.SearchParameters() if self.exact else faiss.SearchParametersIVF()
        if not self.exact:
            options.nprobe = _PROBES
        selector: Any = faiss.IDSelectorBitmap  # FAISS takes an array in Python, its stubs have the C++ arguments
        options.sel = selector(among.bits)
        chosen: faiss.SearchParameters = options
        return chosen

    def snapshot_is_due(self) -> bool:
        """True when a quarter of the index, and at least 256 episodes, is not on disk: amortised constant work."""
        return len(self) - self._saved_count >= max(_SNAPSHOT_EVERY, len(self) // 4)

    def snapshot(self) -> None:
        """Write the index and then the manifest that makes it valid. Raises OSError; the old snapshot stays then."""
        if self._saved_seq == self.applied_seq:
            return
        name = f"vectors-{self.applied_seq}.faiss"
        replace_file(self._folder / name, faiss.serialize_index(self._index).tobytes())
        # Hashed from the disk, not from memory: what cannot be read back right must not be called good.
        Manifest(self.log_id, self.applied_seq, {name: sha256_of(self._folder / name)}).save(self._folder / _MANIFEST)
        self._saved_seq, self._saved_count = self.applied_seq, len(self)
        for old in self._folder.glob(_SNAPSHOTS):
            if old.name != name:
                old.unlink()


def _inverted(vectors: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> Any:
    """An IVF over these vectors, trained on all of them. FAISS seeds its k-means, so the same rows give the same."""
    cells = min(_CELLS, max(1, len(ids) // 39))  # FAISS warns below 39 rows a cell
    index: Any = faiss.index_factory(DIMENSION, f"IDMap2,IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    inverted: Any = faiss.downcast_index(index.index)
    inverted.cp.niter = _TRAINING_ROUNDS
    inverted.nprobe = _PROBES
    index.train(vectors)
    index.add_with_ids(vectors, ids)
    return index
