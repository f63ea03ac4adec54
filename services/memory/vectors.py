"""Nearest episodes: an exact inner-product index (FAISS) over the objectives' vectors, a projection of the log.

Ids are the episodes' row numbers in the log and rows are only ever added, in that order; so an index rebuilt from the
log gives bit for bit the answers of one that grew. Exact, not HNSW: it cannot lose a neighbour, and 100,000 episodes
are 100 MB. On disk there is only a snapshot, written whole; the log makes up for whatever came after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

from services.memory.embedding import DIMENSION, Vector, checked
from services.memory.log_reader import EpisodeAdded
from services.memory.machine import Found
from services.memory.manifest import Manifest, ProjectionDoubt, replace_file, sha256_of

_MANIFEST: Final = "vectors.manifest.json"
_SNAPSHOTS: Final = "vectors-*"  # with what a crash left of a temporary file
_SNAPSHOT_EVERY: Final = 256


class VectorIndex:
    """The index in memory; belongs to one thread."""

    def __init__(self, folder: Path, log_id: str) -> None:
        """An empty index that follows this log."""
        faiss.omp_set_num_threads(
            1
        )  # one thread was faster than two on these sizes, and leaves the cores to the models
        self._folder = folder
        self._index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(DIMENSION))
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

    def ids(self) -> npt.NDArray[np.int64]:
        """Row numbers held, in the order of adding."""
        ids: npt.NDArray[np.int64] = faiss.vector_to_array(self._index.id_map)
        return ids

    def apply(self, upto: int, episodes: Sequence[EpisodeAdded]) -> None:
        """Add the episodes of the rows up to `upto`; FAISS would accept duplicates and NaN, so both are checked."""
        if episodes:
            if episodes[0].seq <= self.applied_seq:
                raise ProjectionDoubt(f"row {episodes[0].seq} is in the index already")
            matrix = np.stack([checked(episode.vector) for episode in episodes])
            self._index.add_with_ids(matrix, np.array([episode.seq for episode in episodes], dtype=np.int64))
        self.applied_seq = upto

    def nearest(self, query: Vector, k: int, among: npt.NDArray[np.int64] | None = None) -> list[tuple[int, float]]:
        """At most `k` pairs of (row number, cosine), best first; `among` restricts them to these rows."""
        if len(self) == 0 or (among is not None and len(among) == 0):
            return []
        options = None if among is None else _restricted_to(among)
        similarities, rows = self._index.search(checked(query)[np.newaxis, :], min(k, len(self)), params=options)
        return [(int(row), float(near)) for row, near in zip(rows[0], similarities[0], strict=True) if row >= 0]

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


def _restricted_to(rows: npt.NDArray[np.int64]) -> faiss.SearchParameters:
    parameters = faiss.SearchParameters()
    parameters.sel = faiss.IDSelectorBatch(rows)
    return parameters
