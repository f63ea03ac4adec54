"""Projections one by one: what grew equals what was rebuilt, and a flipped byte is noticed before it is believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.memory import graph
from services.memory.embedding import DIMENSION, BadVector, Vector
from services.memory.graph import LineageGraph, choice_id
from services.memory.graph_check import check_in_child
from services.memory.log_reader import Change, ChoiceFailed, DecisionAdded, EpisodeAdded
from services.memory.machine import Found, lineage_digest
from services.memory.manifest import Manifest, ProjectionDoubt, replace_file
from services.memory.vectors import RowSet, VectorIndex


def some_vectors(count: int) -> list[Vector]:
    raw = np.random.default_rng(7).normal(size=(count, DIMENSION)).astype(np.float32)
    return list(raw / np.linalg.norm(raw, axis=1, keepdims=True))


def episodes(count: int) -> list[EpisodeAdded]:
    return [EpisodeAdded(seq, f"t{seq}", "doc", vector) for seq, vector in enumerate(some_vectors(count), start=1)]


def rows_among(rows: range) -> RowSet:
    found = RowSet()
    for row in rows:
        found.add(row)
    return found


def changes(tasks: int, start: int = 1) -> list[Change]:
    """Per task two decisions, a failure of the first, and the episode."""
    rows: list[Change] = []
    for task in range(start, start + tasks):
        seq = 4 * (task - 1)
        name, choice = f"t{task}", f"c{task % 3}"
        rows += [
            DecisionAdded(seq + 1, f"{name}-a", name, "role", "doc", choice),
            DecisionAdded(seq + 2, f"{name}-b", name, "role", "doc", 'it\'s "odd" \x00 ñ'),
            ChoiceFailed(seq + 3, f"{name}-a", "role", "doc", choice, f"gate.{task % 2}"),
            EpisodeAdded(seq + 4, name, "doc", some_vectors(1)[0]),
        ]
    return rows


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(bytes(data))


def test_an_index_that_grew_answers_bit_for_bit_like_one_rebuilt_or_read_back(tmp_path: Path) -> None:
    rows = episodes(300)
    grown, whole = VectorIndex(tmp_path, "log"), VectorIndex(tmp_path, "log")
    for row in rows:
        grown.apply(row.seq, [row])
    whole.apply(300, rows)
    whole.snapshot()
    read = VectorIndex.load(tmp_path)
    assert read.found == Found("log", 300)
    some = rows_among(range(10, 50))
    for query in some_vectors(20):
        assert grown.nearest(query, 10) == whole.nearest(query, 10) == read.nearest(query, 10)
        restricted = grown.nearest(query, 10, some)
        assert restricted == whole.nearest(query, 10, some) == read.nearest(query, 10, some)
        assert len(restricted) == 10
        assert {row for row, _ in restricted} <= set(range(10, 50))


def test_an_empty_index_and_an_empty_selection_find_nothing(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, "log")
    assert index.nearest(some_vectors(1)[0], 5) == []
    index.apply(1, episodes(1))
    assert index.nearest(some_vectors(1)[0], 5, RowSet()) == []


def test_the_index_takes_neither_a_row_twice_nor_a_broken_vector(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, "log")
    index.apply(2, episodes(2))
    with pytest.raises(ProjectionDoubt, match="row 1"):
        index.apply(3, episodes(1))
    with pytest.raises(BadVector):
        index.apply(3, [EpisodeAdded(3, "t3", "doc", np.full(DIMENSION, np.nan, np.float32))])
    assert len(index) == 2


def test_a_snapshot_replaces_the_one_before(tmp_path: Path) -> None:
    index = VectorIndex(tmp_path, "log")
    rows = episodes(2)
    index.apply(1, rows[:1])
    index.snapshot()
    index.apply(2, rows[1:])
    index.snapshot()
    assert [path.name for path in tmp_path.glob("*.faiss")] == ["vectors-2.faiss"]


@pytest.mark.parametrize("name", ["vectors-50.faiss", "vectors.manifest.json"])
@pytest.mark.parametrize("position", [3, 60, 30_001])
def test_a_flipped_byte_in_a_snapshot_is_a_doubt(tmp_path: Path, name: str, position: int) -> None:
    index = VectorIndex(tmp_path, "log")
    index.apply(50, episodes(50))
    index.snapshot()
    flip(tmp_path / name, position)
    with pytest.raises(ProjectionDoubt):
        VectorIndex.load(tmp_path)


def test_a_manifest_survives_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest("log", 7, {"file": "00ff"})
    manifest.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json") == manifest
    replace_file(tmp_path / "m.json", b'{"content": 3}')
    with pytest.raises(ProjectionDoubt):
        Manifest.load(tmp_path / "m.json")
    with pytest.raises(FileNotFoundError):
        Manifest.load(tmp_path / "none.json")


def test_a_graph_that_grew_row_by_row_holds_what_one_loaded_at_once_holds(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rows = changes(80)  # 160 decisions: the whole takes the road of large batches, single rows the other
    grown, whole = LineageGraph(tmp_path / "a", new_for="log"), LineageGraph(tmp_path / "b", new_for="log")
    for start in range(0, len(rows), 4):
        grown.apply(start + 4, rows[start : start + 4])
    whole.apply(len(rows), rows)
    assert grown.found == whole.found == Found("log", 320)
    assert lineage_digest(grown.lineage()) == lineage_digest(whole.lineage())
    asked = [choice_id("role", "doc", name) for name in ("c0", "c1", "c2", "unknown")]
    assert grown.failures_of(asked) == whole.failures_of(asked)
    assert whole.failures_of(asked[1:2]) == {asked[1]: {"gate.1": 14, "gate.0": 13}}
    assert whole.failures_of(asked[3:]) == {asked[3]: {}}
    grown.close()
    whole.close()


def test_a_graph_does_not_take_a_decision_twice(tmp_path: Path) -> None:
    opened = LineageGraph(tmp_path, new_for="log")
    opened.apply(4, changes(1))
    with pytest.raises(RuntimeError):
        opened.apply(8, changes(1))
    opened.abandon()
    again = LineageGraph(tmp_path)
    assert again.applied_seq == 4
    again.abandon()


def test_a_closed_graph_is_vouched_for_until_a_byte_changes(tmp_path: Path) -> None:
    opened = LineageGraph(tmp_path, new_for="log")
    opened.apply(40, changes(10))
    opened.close()
    assert graph.vouched(tmp_path) == Found("log", 40)
    flip(tmp_path / graph.GRAPH_FILE, 40_000)
    with pytest.raises(ProjectionDoubt, match="sha256"):
        graph.vouched(tmp_path)


def test_nothing_vouches_for_a_graph_once_it_is_opened(tmp_path: Path) -> None:
    opened = LineageGraph(tmp_path, new_for="log")
    opened.close()
    LineageGraph(tmp_path).abandon()
    with pytest.raises(FileNotFoundError):
        graph.vouched(tmp_path)


async def test_a_child_reads_what_is_in_an_unvouched_graph(tmp_path: Path) -> None:
    opened = LineageGraph(tmp_path, new_for="log")
    opened.apply(40, changes(10))
    digest = lineage_digest(opened.lineage())
    opened.abandon()
    checked = await check_in_child(tmp_path)
    assert (checked.found, checked.digest) == (Found("log", 40), digest)


async def test_a_graph_that_cannot_be_opened_is_a_doubt_and_not_our_end(tmp_path: Path) -> None:
    (tmp_path / graph.GRAPH_FILE).write_bytes(b"\xff" * 9_000)
    with pytest.raises(ProjectionDoubt):
        await check_in_child(tmp_path)
