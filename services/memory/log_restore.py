"""Opens the log; where it is damaged, makes it anew from its copy and from what can still be read of it.

Everything that speaks against a log has the same cure, so there is one way back and it is tested: a broken page, an
index that lacks a row, a row that is not what was written, rows that a damaged write-ahead log has swallowed, a deleted
file.
What the copy does not have and the log cannot show is lost, and said to be. Projections start again from the new log.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from services.kit.logs import LogEvent
from services.memory.embedding import Unembeddable, Vector, to_bytes
from services.memory.log import LOG_FILE, MemoryLog, fresh_meta
from services.memory.log_copy import Copied, as_row, read_copy
from services.memory.log_rows import COLUMNS, SCHEMA, LogDamaged, opened, put, selected
from services.memory.log_upkeep import replay_values, restore_stages
from services.memory.manifest import sync_file, sync_folder
from services.memory.telling import Tell

LOG_RESTORED: Final = LogEvent("memory.log_restored", "reason rows salvaged damaged_lines", "warning")

_NEW: Final = "log.new.sqlite"


class NamedEmbedder(Protocol):
    """Text to vector, and which weights do it."""

    name: str

    def embed(self, text: str) -> Vector:
        """Unit vector of a text; raises Unembeddable."""
        ...


@dataclass(slots=True)
class Salvaged:
    """Sound rows of a damaged log."""

    rows: dict[int, str] = field(default_factory=dict)
    """In the shape of `Copied.rows`."""
    meta: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Task -> what its decisions were about."""
    vectors: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """(table, task) -> vector."""


def open_log(folder: Path, embedder: NamedEmbedder, tell: Tell) -> MemoryLog:
    """The log, restored if it must be. Raises LogDamaged where nothing is left to restore it from, LogTooNew."""
    (folder / _NEW).unlink(missing_ok=True)
    try:
        return MemoryLog(folder, tell)
    except LogDamaged as damaged:
        try:
            copied = read_copy(folder)
        except OSError:
            raise damaged from None
        _restore(folder, embedder, copied, damaged, tell)
    return MemoryLog(folder, tell)


def _restore(folder: Path, embedder: NamedEmbedder, copied: Copied, damaged: LogDamaged, tell: Tell) -> None:
    salvaged = _salvage(folder / LOG_FILE)
    name = salvaged.meta.get("copy", copied.name)
    if copied.name and name != copied.name:  # rows were forgotten, and the copy that lacks them was never finished
        raise damaged
    if not copied.rows and not salvaged.rows:
        raise damaged
    rows = salvaged.rows | copied.rows
    same_weights = salvaged.meta.get("embedder") == embedder.name
    whole = salvaged.meta.get("stale_after") == salvaged.meta.get("stale_until")
    vectors = salvaged.vectors if same_weights and whole else {}
    _write(folder / _NEW, rows, salvaged, _Vectors(embedder.embed, vectors), embedder.name)
    _swap(folder)
    tell(
        LOG_RESTORED,
        reason=str(damaged),
        rows=len(rows),
        salvaged=len(salvaged.rows.keys() - copied.rows.keys()),
        damaged_lines=copied.damaged_lines,
    )


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Vectors that were saved, and new ones for the others."""

    embed: Callable[[str], Vector]
    saved: dict[tuple[str, str], bytes]

    def of(self, table: str, task_id: str, text: str) -> bytes:
        return self.saved.get((table, task_id)) or to_bytes(self.embed(text))


def _write(path: Path, rows: dict[int, str], salvaged: Salvaged, vectors: _Vectors, embedder: str) -> None:
    """A log that holds these rows under their old numbers."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA foreign_keys=OFF")  # an outcome whose decision is lost is lost with it, below
    db.execute("PRAGMA synchronous=OFF")  # synced as a whole, before it takes its place
    db.executescript(SCHEMA)
    db.execute("BEGIN")
    last = max(max(rows, default=0), int(salvaged.meta.get("seq", 0)))
    known = {"seq": last, "embedder": embedder, "duplicates": int(salvaged.meta.get("duplicates", 0))}
    for key, value in (fresh_meta() | known).items():
        put(db, "meta", key, value)
    for seq in sorted(rows):
        _put_row(db, seq, json.loads(rows[seq]), salvaged.texts, vectors)
    db.execute("DELETE FROM outcomes WHERE decision_id NOT IN (SELECT decision_id FROM decisions)")
    replay_values(db)
    restore_stages(db, salvaged.meta)
    db.execute("COMMIT")
    db.close()
    sync_file(path)


def _put_row(db: sqlite3.Connection, seq: int, row: dict[str, Any], texts: dict[str, str], vectors: _Vectors) -> None:
    if (decision := row.get("decision")) is not None:
        fields = [decision[name] for name in ("task_id", "subject", "task_type", "choice")]
        put(db, "decisions", decision["decision_id"], seq, *fields, _text(decision), verb="INSERT OR IGNORE")
        task_id = decision["task_id"]
        if text := row.get("text") or texts.get(task_id, ""):
            try:
                vector = vectors.of("contexts", task_id, text)
            except Unembeddable:  # so it was when it was written, too
                return
            put(db, "contexts", task_id, text, vector, verb="INSERT OR IGNORE")
    elif (outcome := row.get("outcome")) is not None:
        fields = [outcome["decision_id"], seq, outcome.get("failure_code"), _text(outcome)]
        put(db, "outcomes", *fields, verb="INSERT OR IGNORE")
    elif (episode := row.get("episode")) is not None:
        vector = vectors.of("episodes", episode["task_id"], episode["objective"])
        fields = [episode["task_id"], seq, episode["task_type"], _text(episode), vector]
        put(db, "episodes", *fields, verb="INSERT OR IGNORE")


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def _salvage(path: Path) -> Salvaged:
    """Whatever still has its checksum."""
    found = Salvaged()
    if not path.exists():
        return found
    db = sqlite3.connect(path, isolation_level=None, timeout=10)
    db.text_factory = lambda data: data.decode("utf-8", "replace")  # a broken text costs its row, not all that follow
    for table in COLUMNS:
        try:
            for row in db.execute(f"SELECT {selected(table)} FROM {table}"):  # noqa: S608  literals of log_rows
                _keep(found, table, row)
        except sqlite3.DatabaseError:  # the rest of this table cannot be reached; the copy has it
            continue
    db.close()
    return found


def _keep(found: Salvaged, table: str, row: tuple[Any, ...]) -> None:
    try:
        values = opened(table, row)
    except LogDamaged:
        return
    if table == "meta":
        found.meta[values[0]] = values[1]
    elif table == "contexts":
        found.texts[values[0]] = values[1]
        found.vectors[table, values[0]] = values[2]
    elif table == "episodes":
        found.rows[values[1]] = as_row(values[1], "episode", values[3])
        found.vectors[table, values[0]] = values[4]
    elif table in ("decisions", "outcomes"):
        found.rows[values[1]] = as_row(values[1], table.removesuffix("s"), values[-1])


def _swap(folder: Path) -> None:
    """The new log takes the old one's place. The old write-ahead log goes first: it must not be applied to the new one;
    what was in it is in the new log, and in the copy."""
    for beside in ("-wal", "-shm"):
        (folder / f"{LOG_FILE}{beside}").unlink(missing_ok=True)
    sync_folder(folder)
    (folder / _NEW).replace(folder / LOG_FILE)
    sync_folder(folder)
