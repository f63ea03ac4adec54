"""The journal's file: its tables, how it is opened, and the step from version 1.

Everything that is read at start or while the hub serves goes through an index whose size does not depend on the
tasks that are over. Facts are appended to a plain table with a narrow index: as a table without rowid they lay inside
their own key, a search compared against whole plans, and an insert cost four times as much after 30 large tasks. Who
writes what is in `journal.py` and `retention.py`.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

VERSION: Final = 3
"""Since 3 a row of `facts` may hold several; what version 2 has written is read as it is."""
_BUSY_S: Final = 30.0
"""How long a writer waits for another one. Ours hold the lock for milliseconds; a frozen one must not fail the hub."""
_WAL_PAGES: Final = 4_000
_WAL_KEPT_BYTES: Final = 64 * 1024 * 1024

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS facts (
    task TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL, seal INTEGER
);
CREATE TABLE IF NOT EXISTS tasks (
    task TEXT PRIMARY KEY, state TEXT NOT NULL, settled INTEGER NOT NULL DEFAULT 0, task_type TEXT NOT NULL,
    objective TEXT NOT NULL, created_ms INTEGER NOT NULL, ended_ms INTEGER,
    steps_done INTEGER NOT NULL DEFAULT 0, steps_total INTEGER NOT NULL DEFAULT 0,
    compacted INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tallies (state TEXT PRIMARY KEY, tasks INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS snapshots (
    task TEXT PRIMARY KEY, seq INTEGER NOT NULL, fold TEXT NOT NULL, data BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS views (task TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS removed (
    task TEXT PRIMARY KEY, state TEXT NOT NULL, ended_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS learned (name TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS personas (name TEXT PRIMARY KEY, data BLOB NOT NULL);
"""
_INDEXES: Final = """
CREATE UNIQUE INDEX IF NOT EXISTS facts_in_order ON facts (task, seq);
CREATE INDEX IF NOT EXISTS tasks_unfinished ON tasks (created_ms) WHERE ended_ms IS NULL;
CREATE INDEX IF NOT EXISTS tasks_unsettled ON tasks (created_ms) WHERE ended_ms IS NOT NULL AND settled = 0;
CREATE INDEX IF NOT EXISTS tasks_whole ON tasks (ended_ms) WHERE settled = 1 AND compacted = 0;
CREATE INDEX IF NOT EXISTS tasks_compacted ON tasks (ended_ms) WHERE compacted = 1;
CREATE INDEX IF NOT EXISTS tasks_by_state ON tasks (state, created_ms);
CREATE INDEX IF NOT EXISTS removed_by_age ON removed (ended_ms);
"""
_FROM_1: Final = """
ALTER TABLE facts RENAME TO facts_of_1;
CREATE TABLE facts (
    task TEXT NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, data BLOB NOT NULL, seal INTEGER
);
INSERT INTO facts (task, seq, kind, data) SELECT task, seq, kind, data FROM facts_of_1;
DROP TABLE facts_of_1;
ALTER TABLE tasks ADD COLUMN compacted INTEGER NOT NULL DEFAULT 0;
DROP INDEX IF EXISTS tasks_open;
DROP INDEX IF EXISTS tasks_newest;
"""


class JournalVersionError(Exception):
    """The file was written by a newer version."""


def open_journal(path: Path) -> sqlite3.Connection:
    """Open the journal for writing, making or upgrading it. Raises JournalVersionError, sqlite3.Error."""
    database = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
    # Text that is no longer UTF-8 is damage of one task, to be found by its seal; as an error it would stop the hub.
    database.text_factory = _lenient
    try:
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # takes effect in a new file only
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        database.execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")
        database.execute("BEGIN IMMEDIATE")
        found = check_version(database, path)
        if found == 1:
            _run(database, _FROM_1)
        _run(database, _TABLES)
        _run(database, _INDEXES)
        if found == 1:
            database.execute("INSERT INTO tallies SELECT state, COUNT(*) FROM tasks GROUP BY state")
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")
        path.chmod(0o600)
    except BaseException:
        database.close()
        raise
    return database


def check_version(database: sqlite3.Connection, path: Path) -> int:
    """Version of the file, 0 = empty. Raises JournalVersionError for one that this build cannot read."""
    found = int(database.execute("PRAGMA user_version").fetchone()[0])
    if found > VERSION:
        raise JournalVersionError(f"{path} has journal version {found}, this build reads {VERSION}: use a newer one")
    return found


def _lenient(text: bytes) -> str:
    return text.decode("utf-8", "replace")


def _run(database: sqlite3.Connection, script: str) -> None:
    """Run statements inside the open transaction, which `executescript` would commit first."""
    for statement in script.split(";"):
        if statement.strip():
            database.execute(statement)
