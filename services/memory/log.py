"""The truth of memory: decisions, outcomes, episodes and values in one SQLite file, written by one thread.

WAL with synchronous=FULL, so that what was acknowledged survives kill -9 and power loss. Every row carries a `seq` that
rises by one per row over all tables; projections (`vectors.py`, `graph.py`) follow it. Reading is `log_reader.py`.

Invariants: a decision is stored once per id; an outcome at most once per decision, in the same transaction as the value
it changes; an entry is stored whole or not at all; `seq` never names two rows, and has gaps only where rows were
forgotten.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
    Value,
)
from services.kit.identity import boot_id
from services.kit.logs import LogEvent
from services.memory.embedding import Vector, to_bytes
from services.memory.log_copy import COPY_FILE, LogCopy, as_row, damaged_lines
from services.memory.log_rows import (
    LAYOUT,
    SCHEMA,
    LogDamaged,
    damaged_rows,
    find,
    give_checksums,
    is_damage,
    put,
    put_all,
)
from services.memory.log_upkeep import delete, put_value, replay_values, stage_key, stored_value
from services.memory.machine import first_of_each, scored, unseen
from services.memory.manifest import Manifest, ProjectionDoubt, sha256_of, sync_folder
from services.memory.staged import STAGING
from services.memory.telling import Tell, tell_nobody

LOG_FILE: Final = "log.sqlite"

LOG_MIGRATED: Final = LogEvent("memory.log_migrated", "layout rows")
COPY_BEHIND: Final = LogEvent("memory.copy_behind", "reason", "warning")
COPY_RENEWED: Final = LogEvent("memory.copy_renewed", "reason", "warning")

_MANIFEST: Final = "log.manifest.json"
_WHAT_TO_DO: Final = "check the disk; restore the file from a backup or move it away"
_IDS_AT_ONCE: Final = 500  # SQLite's bound on variables of one statement is 999 in old builds


class LogTooNew(Exception):
    """A later version has written it; the message says so."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One request to store, with the vector of its episode's objective or of the text its decisions are about."""

    request: RecordDecisions | RecordOutcomes | Import
    vector: Vector | None = None
    context: Vector | None = None
    """Of the text that the decisions of outcomes are about."""
    imported: tuple[Vector | None, ...] = ()
    """One per row of an Import: of the episode's objective, or of the text that a decision is about."""


class MemoryLog:
    """Opens or creates the log; all methods belong to the thread that made it."""

    def __init__(self, folder: Path, tell: Tell = tell_nobody) -> None:
        """Raises LogDamaged where the log is not what was written to it, LogTooNew.

        After a clean stop its hash vouches for it. Otherwise SQLite goes through all pages and indexes, every row is
        held against its checksum, and the number of the last row against the copy's: a damaged write-ahead log loses
        its last commits without a word.
        """
        self.path = folder / LOG_FILE
        self._tell = tell
        self._sound = True
        self._lines: list[str] = []
        """What the copy gets of the rows of the transaction under way."""
        self._copy_behind = False
        self._closed = False
        if not self.path.exists() and (folder / COPY_FILE).exists():
            raise LogDamaged(f"{self.path} is gone, and its copy is there")
        vouched = _take_manifest(folder)
        self._db = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            if not vouched:
                self._refuse("integrity_check", (str(row[0]) for row in self._db.execute("PRAGMA integrity_check")))
            self._create_or_migrate()
            if not vouched:
                self._refuse("checksums", damaged_rows(self._db))
            self._seq = int(self._meta("seq"))
            self._copy = LogCopy(folder, str(self._meta("copy")))
            if self._copy.last_seq > self._seq:
                raise LogDamaged(f"{self.path} ends with row {self._seq}, its copy with {self._copy.last_seq}")
            if not vouched and damaged_lines(folder):
                self._copy.begin(str(self._meta("copy")))
                tell(COPY_RENEWED, reason="lines of it were damaged")
            self._follow_with_copy()
        except sqlite3.DatabaseError as err:
            self._db.close()
            raise LogDamaged(f"{self.path}: {err}; {_WHAT_TO_DO}") from err
        except (LogDamaged, LogTooNew):
            self._db.close()
            raise

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
                self._set_meta("embedder", name)
                self._set_meta("log_id", boot_id())
                self._set_stale(0, self._seq)
                for task_id, text, _ in list(find(self._db, "contexts")):
                    put(self._db, "contexts", task_id, text, to_bytes(embed(text)), verb="INSERT OR REPLACE")
        done, until = self._stale()
        return int(
            self._db.execute("SELECT count(*) FROM episodes WHERE seq > ? AND seq <= ?", (done, until)).fetchone()[0]
        )

    def reembed_some(self, embed: Callable[[str], Vector], *, rows: int = 256) -> int:
        """Make the next few stale vectors anew, in one transaction; returns how many it made, 0 = all are done."""
        done, until = self._stale()
        if done == until:
            return 0
        found = list(find(self._db, "episodes", "WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?", done, until, rows))
        made = [(*row[:-1], to_bytes(embed(Episode.model_validate_json(row[3]).objective))) for row in found]
        with self._transaction():
            for values in made:
                put(self._db, "episodes", *values, verb="INSERT OR REPLACE")
            self._set_stale(found[-1][1] if len(found) == rows else until, until)
        return len(found)

    def forget(self, ask: Forget) -> int:
        """Remove rows for good and learn the values of what is left anew; returns how many rows went.

        The log gets a new identity, so that no projection that still holds them is trusted at a start. The file keeps
        no trace: freed pages are overwritten, the WAL is emptied, and the copy is written anew.
        """
        self._db.execute("PRAGMA secure_delete=ON")
        with self._transaction():
            removed = delete(self._db, ask)
            if removed:
                self._set_meta("log_id", boot_id())
                self._set_meta("copy", boot_id())
                replay_values(self._db)
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if removed:
            self._copy.begin(str(self._meta("copy")))
            self._follow_with_copy()
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
        self._lines.clear()
        try:
            with self._transaction():
                answers = [self._store_or_refuse(entry) for entry in entries]
                self._set_meta("seq", self._seq)
        except sqlite3.Error as err:
            self._seq = before
            if is_damage(err):
                raise LogDamaged(f"{self.path}: {err}") from err
            failure = Failure(
                code="memory.log_write",
                category=Category.RESOURCE,
                origin="memory",
                message=f"{self.path} could not be written: {err}; free disk space there and ask again",
            )
            return [failure] * len(entries)
        except BaseException:
            self._seq = before
            raise
        self._follow_with_copy(before)
        return answers

    def distrust(self) -> None:
        """Something was read that was never written: the next start must not take the log as it is."""
        self._sound = False

    def close(self) -> None:
        """Fold the WAL into the file, close it, and vouch for both files: the next start need not check them then."""
        if self._closed:
            return
        self._closed = True
        self._copy.close()
        name = str(self._meta("log_id"))
        self._db.close()
        if self._sound and not _has_wal(self.path):
            files = {path.name: sha256_of(path) for path in (self.path, self.path.with_name(COPY_FILE))}
            Manifest(name, self._seq, files).save(self.path.with_name(_MANIFEST))

    def _refuse(self, check: str, told: Iterable[str]) -> None:
        """Raise LogDamaged with the first thing that a check has to tell; `ok` is nothing."""
        for text in told:
            if text != "ok":
                raise LogDamaged(f"{self.path}: {text} ({check}); {_WHAT_TO_DO}")

    def _create_or_migrate(self) -> None:
        if self._db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone() is None:
            self._db.executescript(SCHEMA)
            with self._transaction():
                for key, value in fresh_meta().items():
                    put(self._db, "meta", key, value)
            return
        found = self._db.execute("SELECT value FROM meta WHERE key = 'layout'").fetchone()
        layout = None if found is None else found[0]
        if layout == 1:
            with self._transaction():
                rows = give_checksums(self._db)
                put(self._db, "meta", "copy", boot_id())
            self._tell(LOG_MIGRATED, layout=LAYOUT, rows=rows)
        elif isinstance(layout, int) and layout > LAYOUT:
            raise LogTooNew(f"{self.path} has layout {layout}, this version reads {LAYOUT}: install the newer one")
        elif layout != LAYOUT:
            raise LogDamaged(f"{self.path}: its layout reads {layout!r}; {_WHAT_TO_DO}")

    def _follow_with_copy(self, before: int | None = None) -> None:
        """The log holds everything, so that a copy which has no room only means that a damaged log could not be
        restored; it catches up as soon as there is some. A copy that held all rows up to `before` gets the new ones
        as they were written."""
        try:
            if before == self._copy.last_seq:
                self._copy.add(self._lines, self._seq)
            else:
                self._copy.follow(self._db, self._seq)
        except OSError as err:
            if not self._copy_behind:
                self._tell(COPY_BEHIND, reason=str(err))
            self._copy_behind = True
        else:
            self._copy_behind = False

    def _meta(self, key: str) -> str | int:
        return read_meta(self._db, key)

    def _set_meta(self, key: str, value: str | int) -> None:
        put(self._db, "meta", key, value, verb="INSERT OR REPLACE")

    def _stale(self) -> tuple[int, int]:
        """Episodes after the first and up to the second row have vectors of an earlier embedder."""
        return int(self._meta("stale_after")), int(self._meta("stale_until"))

    def _set_stale(self, after: int, until: int) -> None:
        self._set_meta("stale_after", after)
        self._set_meta("stale_until", until)

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
        before, lines = self._seq, len(self._lines)
        self._db.execute("SAVEPOINT entry")
        try:
            if isinstance(entry.request, RecordDecisions):
                answer = self._store_decisions(entry.request.decisions, entry.request.text, entry.vector)
            elif isinstance(entry.request, RecordOutcomes):
                answer = self._store_outcomes(entry.request, entry.vector, entry.context)
            else:
                answer = self._store_rows(entry.request, entry.imported)
        except CallFailed as refused:
            self._db.execute("ROLLBACK TO entry")
            self._db.execute("RELEASE entry")
            self._seq = before
            del self._lines[lines:]
            return refused.failure
        self._db.execute("RELEASE entry")
        if answer.duplicates:
            self._set_meta("duplicates", int(self._meta("duplicates")) + answer.duplicates)
        return answer

    def _store_decisions(self, decisions: Sequence[DecisionRecord], text: str, vector: Vector | None) -> MemoryFinal:
        ids = [decision.decision_id for decision in decisions]
        new = [decisions[position] for position in first_of_each(ids, self._known("decisions", ids))]
        told: set[str] = set()
        if vector is not None:  # the first text of a task counts, as the first of everything else
            for task_id in dict.fromkeys(each.task_id for each in new):
                if put(self._db, "contexts", task_id, text, to_bytes(vector), verb="INSERT OR IGNORE"):
                    told.add(task_id)
        rows = []
        for each in new:
            seq, record = self._next(), each.model_dump_json()
            rows.append((each.decision_id, seq, each.task_id, each.subject, each.task_type, each.choice, record))
            self._lines.append(as_row(seq, "decision", record, text if each.task_id in told else ""))
            told.discard(each.task_id)
        put_all(self._db, "decisions", rows)
        return MemoryFinal(stored=len(new), duplicates=len(decisions) - len(new))

    def _store_outcomes(
        self,
        request: RecordOutcomes,
        vector: Vector | None,
        context: Vector | None = None,
        *,
        imported: bool = False,
    ) -> MemoryFinal:
        taken = self._store_decisions(request.decisions, request.text, context)
        ids = [outcome.decision_id for outcome in request.outcomes]
        decisions = self._decisions(ids)
        _refuse_unknown(ids, decisions)
        new = [request.outcomes[position] for position in first_of_each(ids, self._known("outcomes", ids))]
        rows = []
        values: dict[tuple[str, str, str], Value] = {}
        for sent in new:
            decision = decisions[sent.decision_id]
            outcome = self._credited(sent, decision, imported=imported)
            seq, record = self._next(), outcome.model_dump_json()
            rows.append((outcome.decision_id, seq, outcome.failure_code, record))
            self._lines.append(as_row(seq, "outcome", record))
            name = decision[3], decision[4], decision[5]
            value = values.get(name) or stored_value(self._db, *name) or unseen(*name)
            values[name] = scored(value, outcome.reward, outcome.seconds)
        put_all(self._db, "outcomes", rows)
        for value in values.values():
            put_value(self._db, value)
        stored, duplicates = len(new) + taken.stored, len(ids) - len(new) + taken.duplicates
        if request.episode is not None and vector is not None:
            added = self._store_episode(request.episode, vector)
            stored, duplicates = stored + added, duplicates + (1 - added)
        return MemoryFinal(stored=stored, duplicates=duplicates)

    def _store_rows(self, request: Import, vectors: Sequence[Vector | None]) -> MemoryFinal:
        stored = duplicates = 0
        for row, vector in zip(request.rows, vectors, strict=True):
            if row.decision is not None:
                answer = self._store_decisions([row.decision], row.text, vector)
            elif row.outcome is not None:
                answer = self._store_outcomes(RecordOutcomes(outcomes=[row.outcome]), None, imported=True)
            else:
                answer = self._store_outcomes(RecordOutcomes(episode=row.episode), vector)
            stored, duplicates = stored + answer.stored, duplicates + answer.duplicates
        return MemoryFinal(stored=stored, duplicates=duplicates)

    def _credited(self, outcome: Outcome, decision: Sequence[Any], *, imported: bool) -> Outcome:
        """With its staged reward where it says how its steps were spread; that counts one stage of its kind.

        An imported one keeps the reward that it was once given, and this log is as far as that afterwards.
        """
        if outcome.spread is None:
            return outcome if outcome.staged is None else outcome.model_copy(update={"staged": None})
        key = stage_key(decision)
        row = next(find(self._db, "meta", "WHERE key = ?", key), None)
        stage = 0 if row is None else int(row[1])
        staged = outcome.staged
        if staged is None or not imported:
            staged = STAGING.credit(outcome.reward, outcome.spread, stage)
        self._set_meta(key, max(stage, staged.stage) + 1)
        return outcome.model_copy(update={"staged": staged})

    def _store_episode(self, episode: Episode, vector: Vector) -> int:
        """1 if it is new. The first episode of a task counts, since projections only ever grow."""
        if self._known("episodes", [episode.task_id], column="task_id"):
            return 0
        record = episode.model_copy(update={"similarity": None, "q": None}).model_dump_json(exclude_none=True)
        seq = self._next()
        put(self._db, "episodes", episode.task_id, seq, episode.task_type, record, to_bytes(vector))
        self._lines.append(as_row(seq, "episode", record))
        return 1

    def _decisions(self, ids: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """The rows of those that are known."""
        return {row[0]: row for some in _parts(ids) for row in find(self._db, "decisions", _among(some), *some)}

    def _known(self, table: str, ids: Sequence[str], column: str = "decision_id") -> set[str]:
        known: set[str] = set()
        for some in _parts(ids):
            rows = self._db.execute(f"SELECT {column} FROM {table} {_among(some, column)}", some)  # noqa: S608  names are literals of this file
            known.update(row[0] for row in rows)
        return known

    def _next(self) -> int:
        self._seq += 1
        return self._seq


def _parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """So few at a time that one statement takes them."""
    return (ids[start : start + _IDS_AT_ONCE] for start in range(0, len(ids), _IDS_AT_ONCE))


def _among(ids: Sequence[str], column: str = "decision_id") -> str:
    return f"WHERE {column} IN ({','.join('?' * len(ids))})"


def _refuse_unknown(ids: Sequence[str], known: Collection[str]) -> None:
    unknown = sorted(set(ids).difference(known))
    if unknown:
        shown = ", ".join(unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise CallFailed(
            Failure(
                code="memory.unknown_decision",
                category=Category.POLICY,
                origin="memory",
                message=f"ask.outcomes: no decision is known under {shown}{more}; nothing of this request was "
                "stored. Send decisions with their outcomes, or record them with op `decide` first.",
                evidence={"decision_ids": unknown[:100]},
            )
        )


def fresh_meta() -> dict[str, str | int]:
    """What stands in `meta` of a log without rows."""
    return {
        "layout": LAYOUT,
        "log_id": boot_id(),
        "copy": boot_id(),
        "seq": 0,
        "embedder": "",
        "duplicates": 0,
        "stale_after": 0,
        "stale_until": 0,
    }


def read_meta(db: sqlite3.Connection, key: str) -> str | int:
    """One entry of `meta`. Raises LogDamaged where it is not there or not what was written."""
    row = next(find(db, "meta", "WHERE key = ?", key), None)
    if row is None:
        raise LogDamaged(f"meta has no {key!r}")
    value: str | int = row[1]
    return value


def _take_manifest(folder: Path) -> bool:
    """Whether a clean stop vouches for log and copy as they are. From here on they change, so the manifest goes."""
    path = folder / _MANIFEST
    try:
        manifest = Manifest.load(path)
        sound = not _has_wal(folder / LOG_FILE) and all(
            sha256_of(folder / name) == expected for name, expected in manifest.files.items()
        )
    except FileNotFoundError:
        return False
    except (ProjectionDoubt, OSError):
        sound = False
    path.unlink()
    sync_folder(folder)
    return sound


def _has_wal(path: Path) -> bool:
    wal = path.with_name(f"{path.name}-wal")
    return wal.exists() and wal.stat().st_size > 0
