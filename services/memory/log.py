"""The truth of memory: decisions, outcomes, episodes and values in one SQLite file, written by one thread.

WAL with synchronous=FULL, so that what was acknowledged survives kill -9 and power loss. Every row carries a `seq` that
rises by one per row over all tables; projections (`vectors.py`, `graph.py`) follow it. Reading is `log_reader.py`.

Invariants: a decision is stored once per id; an outcome at most once per decision, in the same transaction as the value
it changes; an entry is stored whole or not at all; `seq` never names two rows, and has gaps only where rows were
forgotten.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.memory import (
    DecisionRecord,
    Episode,
    Forget,
    Import,
    MemoryFinal,
    Outcome,
    RecordDecisions,
    RecordOutcomes,
)
from services.kit.identity import boot_id
from services.memory.embedding import Vector, to_bytes
from services.memory.log_upkeep import delete, put_value, replay_values
from services.memory.machine import first_of_each, scored, unseen
from services.memory.staged import STAGING

LOG_FILE: Final = "log.sqlite"

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decisions (
    decision_id TEXT PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, task_id TEXT NOT NULL, subject TEXT NOT NULL,
    task_type TEXT NOT NULL, choice TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS decisions_of_task ON decisions (task_id);
CREATE TABLE IF NOT EXISTS outcomes (
    decision_id TEXT PRIMARY KEY REFERENCES decisions, seq INTEGER NOT NULL UNIQUE, failure_code TEXT,
    record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
    task_id TEXT PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, task_type TEXT NOT NULL, record TEXT NOT NULL,
    vector BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS episodes_of_type ON episodes (task_type);
CREATE TABLE IF NOT EXISTS choice_values (
    subject TEXT, task_type TEXT, choice TEXT, q REAL NOT NULL, count INTEGER NOT NULL, mean_seconds REAL NOT NULL,
    PRIMARY KEY (subject, task_type, choice)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contexts (task_id TEXT PRIMARY KEY, text TEXT NOT NULL, vector BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS stages (task_type TEXT PRIMARY KEY, credited INTEGER NOT NULL) WITHOUT ROWID;
"""
_LAYOUT: Final = 1
_IDS_AT_ONCE: Final = 500  # SQLite's bound on variables of one statement is 999 in old builds


class LogDamaged(Exception):
    """The log cannot be used as it is; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request to store, with the vector of its episode's objective or of the text its decisions are about."""

    request: RecordDecisions | RecordOutcomes | Import
    vector: Vector | None = None
    imported: tuple[Vector | None, ...] = ()
    """One per row of an Import: of the episode's objective, or of the text that a decision is about."""


class MemoryLog:
    """Opens or creates the log; all methods belong to the thread that made it."""

    def __init__(self, folder: Path) -> None:
        """Raises LogDamaged where SQLite finds the file broken or a newer Tierline has written it."""
        self.path = folder / LOG_FILE
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            verdict = str(self._db.execute("PRAGMA quick_check").fetchone()[0])
            if verdict == "ok":
                self._create()
        except sqlite3.DatabaseError as err:
            verdict = str(err)
        if verdict != "ok":
            self._db.close()
            raise LogDamaged(f"{self.path}: {verdict}; check the disk; restore the file from a backup or move it away")
        layout = self._meta("layout")
        if layout != _LAYOUT:
            self._db.close()
            raise LogDamaged(f"{self.path} has layout {layout}, this version reads {_LAYOUT}: install the newer one")
        self._seq = int(self._meta("seq"))

    @property
    def log_id(self) -> str:
        """Identity of this log; a projection made from another one is worthless."""
        return str(self._meta("log_id"))

    @property
    def seq(self) -> int:
        """Number of the last row that was committed."""
        return self._seq

    def adopt_embedder(self, name: str, embed: Callable[[str], Vector]) -> int:
        """From now on vectors are those of this embedder; returns how many stored ones have to be made anew.

        Vectors of two embedders must not be compared: the log gets a new identity, so that projections start again, and
        remembers which episodes are stale until `reembed_some` has done them all, also over restarts. Contexts, which
        routing learns from as a whole, are made anew at once.
        """
        if self._meta("embedder") != name:
            with self._transaction():
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'embedder'", (name,))
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'log_id'", (boot_id(),))
                self._set_stale(0, self._seq)
                for task_id, text in self._db.execute("SELECT task_id, text FROM contexts").fetchall():
                    vector = to_bytes(embed(text))
                    self._db.execute("UPDATE contexts SET vector = ? WHERE task_id = ?", (vector, task_id))
        done, until = self._stale()
        return int(
            self._db.execute("SELECT count(*) FROM episodes WHERE seq > ? AND seq <= ?", (done, until)).fetchone()[0]
        )

    def reembed_some(self, embed: Callable[[str], Vector], *, rows: int = 256) -> int:
        """Make the next few stale vectors anew, in one transaction; returns how many it made, 0 = all are done."""
        done, until = self._stale()
        if done == until:
            return 0
        found = self._db.execute(
            "SELECT seq, record FROM episodes WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?", (done, until, rows)
        ).fetchall()
        made = [(to_bytes(embed(Episode.model_validate_json(record).objective)), seq) for seq, record in found]
        with self._transaction():
            self._db.executemany("UPDATE episodes SET vector = ? WHERE seq = ?", made)
            self._set_stale(found[-1][0] if len(found) == rows else until, until)
        return len(found)

    def forget(self, ask: Forget) -> int:
        """Remove rows for good and learn the values of what is left anew; returns how many rows went.

        The log gets a new identity, so that no projection that still holds them is trusted at a start. The file keeps
        no trace: freed pages are overwritten and the WAL is emptied.
        """
        self._db.execute("PRAGMA secure_delete=ON")
        with self._transaction():
            removed = delete(self._db, ask)
            if removed:
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'log_id'", (boot_id(),))
                replay_values(self._db)
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def replay_values(self) -> int:
        """Learn all values anew from the outcomes, in their order; returns how many were not what they should be."""
        with self._transaction():
            return replay_values(self._db)

    def commit(self, entries: Sequence[Entry]) -> list[MemoryFinal | Failure]:
        """Store a group of entries in one transaction; the answers are in the order of the entries.

        An entry that is refused leaves nothing behind and does not touch the others. If the transaction cannot be
        written, all answers are failures of category RESOURCE and nothing is stored.
        """
        before = self._seq
        try:
            with self._transaction():
                answers = [self._store_or_refuse(entry) for entry in entries]
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (self._seq,))
        except sqlite3.Error as err:
            self._seq = before
            failure = Failure(
                code="memory.log_write",
                category=Category.RESOURCE,
                origin="memory",
                message=f"{self.path} could not be written: {err}; free disk space there and ask again",
            )
            return [failure] * len(entries)
        return answers

    def close(self) -> None:
        """Fold the WAL into the file and close it."""
        self._db.close()

    def _create(self) -> None:
        self._db.executescript(_SCHEMA)
        with self._transaction():
            for key, value in (
                ("layout", _LAYOUT),
                ("log_id", boot_id()),
                ("seq", 0),
                ("embedder", ""),
                ("duplicates", 0),
                ("stale_after", 0),
                ("stale_until", 0),
            ):
                self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, value))

    def _meta(self, key: str) -> str | int:
        value: str | int = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]
        return value

    def _stale(self) -> tuple[int, int]:
        """Episodes after the first and up to the second row have vectors of an earlier embedder."""
        return int(self._meta("stale_after")), int(self._meta("stale_until"))

    def _set_stale(self, after: int, until: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'stale_after'", (after,))
        self._db.execute("UPDATE meta SET value = ? WHERE key = 'stale_until'", (until,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite itself rolls back on a full disk
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _store_or_refuse(self, entry: Entry) -> MemoryFinal | Failure:
        before = self._seq
        self._db.execute("SAVEPOINT entry")
        try:
            if isinstance(entry.request, RecordDecisions):
                answer = self._store_decisions(entry.request, entry.vector)
            elif isinstance(entry.request, RecordOutcomes):
                answer = self._store_outcomes(entry.request, entry.vector)
            else:
                answer = self._store_rows(entry.request, entry.imported)
        except CallFailed as refused:
            self._db.execute("ROLLBACK TO entry")
            self._db.execute("RELEASE entry")
            self._seq = before
            return refused.failure
        self._db.execute("RELEASE entry")
        if answer.duplicates:
            self._db.execute("UPDATE meta SET value = value + ? WHERE key = 'duplicates'", (answer.duplicates,))
        return answer

    def _store_decisions(self, request: RecordDecisions, vector: Vector | None) -> MemoryFinal:
        decisions: Sequence[DecisionRecord] = request.decisions
        ids = [decision.decision_id for decision in decisions]
        new = [decisions[position] for position in first_of_each(ids, self._known("decisions", ids))]
        self._db.executemany(
            "INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (d.decision_id, self._next(), d.task_id, d.subject, d.task_type, d.choice, d.model_dump_json())
                for d in new
            ],
        )
        if vector is not None:  # the first text of a task counts, as the first of everything else
            self._db.executemany(
                "INSERT OR IGNORE INTO contexts VALUES (?, ?, ?)",
                [(task_id, request.text, to_bytes(vector)) for task_id in dict.fromkeys(d.task_id for d in new)],
            )
        return MemoryFinal(stored=len(new), duplicates=len(decisions) - len(new))

    def _store_outcomes(self, request: RecordOutcomes, vector: Vector | None, *, imported: bool = False) -> MemoryFinal:
        ids = [outcome.decision_id for outcome in request.outcomes]
        self._refuse_unknown(ids)
        new = [request.outcomes[position] for position in first_of_each(ids, self._known("outcomes", ids))]
        for sent in new:
            outcome = self._credited(sent, imported=imported)
            self._db.execute(
                "INSERT INTO outcomes VALUES (?, ?, ?, ?)",
                (outcome.decision_id, self._next(), outcome.failure_code, outcome.model_dump_json()),
            )
            self._learn(outcome)
        stored, duplicates = len(new), len(ids) - len(new)
        if request.episode is not None and vector is not None:
            added = self._store_episode(request.episode, vector)
            stored, duplicates = stored + added, duplicates + (1 - added)
        return MemoryFinal(stored=stored, duplicates=duplicates)

    def _store_rows(self, request: Import, vectors: Sequence[Vector | None]) -> MemoryFinal:
        stored = duplicates = 0
        for row, vector in zip(request.rows, vectors, strict=True):
            if row.decision is not None:
                answer = self._store_decisions(RecordDecisions(decisions=[row.decision], text=row.text), vector)
            elif row.outcome is not None:
                answer = self._store_outcomes(RecordOutcomes(outcomes=[row.outcome]), None, imported=True)
            else:
                answer = self._store_outcomes(RecordOutcomes(episode=row.episode), vector)
            stored, duplicates = stored + answer.stored, duplicates + answer.duplicates
        return MemoryFinal(stored=stored, duplicates=duplicates)

    def _refuse_unknown(self, ids: Sequence[str]) -> None:
        unknown = sorted(set(ids) - self._known("decisions", ids))
        if unknown:
            shown = ", ".join(unknown[:10])
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise CallFailed(
                Failure(
                    code="memory.unknown_decision",
                    category=Category.POLICY,
                    origin="memory",
                    message=f"ask.outcomes: no decision is known under {shown}{more}; nothing of this request was "
                    "stored. Record decisions with op `decide` first.",
                    evidence={"decision_ids": unknown[:100]},
                )
            )

    def _credited(self, outcome: Outcome, *, imported: bool) -> Outcome:
        """With its staged reward where it says how its steps were spread; that counts one stage of the type of task.

        An imported one keeps the reward that it was once given, and this log is as far as that afterwards.
        """
        if outcome.spread is None:
            return outcome if outcome.staged is None else outcome.model_copy(update={"staged": None})
        (task_type,) = self._db.execute(
            "SELECT task_type FROM decisions WHERE decision_id = ?", (outcome.decision_id,)
        ).fetchone()
        row = self._db.execute("SELECT credited FROM stages WHERE task_type = ?", (task_type,)).fetchone()
        stage = 0 if row is None else int(row[0])
        staged = outcome.staged
        if staged is None or not imported:
            staged = STAGING.credit(outcome.reward, outcome.spread, stage)
        credited = max(stage, staged.stage) + 1
        self._db.execute("INSERT OR REPLACE INTO stages VALUES (?, ?)", (task_type, credited))
        return outcome.model_copy(update={"staged": staged})

    def _learn(self, outcome: Outcome) -> None:
        key = self._db.execute(
            "SELECT subject, task_type, choice FROM decisions WHERE decision_id = ?", (outcome.decision_id,)
        ).fetchone()
        row = self._db.execute(
            "SELECT q, count, mean_seconds FROM choice_values WHERE subject = ? AND task_type = ? AND choice = ?", key
        ).fetchone()
        value = unseen(*key)
        if row is not None:
            value = value.model_copy(update={"q": row[0], "count": row[1], "mean_seconds": row[2]})
        put_value(self._db, scored(value, outcome.reward, outcome.seconds))

    def _store_episode(self, episode: Episode, vector: Vector) -> int:
        """1 if it is new. The first episode of a task counts, since projections only ever grow."""
        if self._known("episodes", [episode.task_id], column="task_id"):
            return 0
        record = episode.model_copy(update={"similarity": None, "q": None}).model_dump_json(exclude_none=True)
        self._db.execute(
            "INSERT INTO episodes VALUES (?, ?, ?, ?, ?)",
            (episode.task_id, self._next(), episode.task_type, record, to_bytes(vector)),
        )
        return 1

    def _known(self, table: str, ids: Sequence[str], column: str = "decision_id") -> set[str]:
        known: set[str] = set()
        for start in range(0, len(ids), _IDS_AT_ONCE):
            some = ids[start : start + _IDS_AT_ONCE]
            marks = ",".join("?" * len(some))
            rows = self._db.execute(f"SELECT {column} FROM {table} WHERE {column} IN ({marks})", some)  # noqa: S608  names are literals of this file
            known.update(row[0] for row in rows)
        return known

    def _next(self) -> int:
        self._seq += 1
        return self._seq
