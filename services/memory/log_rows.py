"""Tables of the log, and the checksum that closes every row.

SQLite checks how its pages hang together, not what stands in them: a flipped byte in a number or a text would be read
as if it had been written. So each row ends with a CRC-32 over its table and all its other columns, and whoever reads a
row to answer or to learn from it takes it through `opened`. What happens to a damaged row is not decided here
(`log_restore.py`).
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final

LAYOUT: Final = 2
"""Layout 1 had no checksums; such a log gets them when it is opened."""

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "meta": ("key", "value"),
    "decisions": ("decision_id", "seq", "task_id", "subject", "task_type", "choice", "record"),
    "outcomes": ("decision_id", "seq", "failure_code", "record"),
    "episodes": ("task_id", "seq", "task_type", "record", "vector"),
    "choice_values": ("subject", "task_type", "choice", "q", "count", "mean_seconds"),
    "contexts": ("task_id", "text", "vector"),
}
"""Table -> its columns; `crc` follows them."""

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decisions (
    decision_id TEXT PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, task_id TEXT NOT NULL, subject TEXT NOT NULL,
    task_type TEXT NOT NULL, choice TEXT NOT NULL, record TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS decisions_of_task ON decisions (task_id);
CREATE TABLE IF NOT EXISTS outcomes (
    decision_id TEXT PRIMARY KEY REFERENCES decisions, seq INTEGER NOT NULL UNIQUE, failure_code TEXT,
    record TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
    task_id TEXT PRIMARY KEY, seq INTEGER NOT NULL UNIQUE, task_type TEXT NOT NULL, record TEXT NOT NULL,
    vector BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS episodes_of_type ON episodes (task_type);
CREATE TABLE IF NOT EXISTS choice_values (
    subject TEXT, task_type TEXT, choice TEXT, q REAL NOT NULL, count INTEGER NOT NULL, mean_seconds REAL NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (subject, task_type, choice)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contexts (
    task_id TEXT PRIMARY KEY, text TEXT NOT NULL, vector BLOB NOT NULL, crc INTEGER NOT NULL);
"""


class LogDamaged(Exception):
    """The log is not what was written to it; the message says what is wrong, or what to do."""


class RowDamaged(LogDamaged):
    """One row is not what was written. It must not be served: end, and let the next start restore the log."""


def sealed(table: str, *values: Any) -> tuple[Any, ...]:
    """The values of a row with their checksum behind them, to be stored. A REAL column takes a float, not an int."""
    return (*values, _crc(table, values))


def opened(table: str, row: Sequence[Any]) -> tuple[Any, ...]:
    """The values of a stored row without its checksum. Raises RowDamaged unless it is the one they were sealed with."""
    values = tuple(row[:-1])
    if _crc(table, values) != row[-1]:
        raise RowDamaged(f"the row {values[0]!r} of {table} is not what was written to it")
    return values


@cache
def selected(table: str, alias: str = "") -> str:
    """All columns of a table for a SELECT, in the order that `opened` takes."""
    prefix = f"{alias}." if alias else ""
    return ", ".join(f"{prefix}{column}" for column in (*COLUMNS[table], "crc"))


def find(db: sqlite3.Connection, table: str, rest: str = "", *parameters: Any) -> Iterator[tuple[Any, ...]]:
    """The rows of one table without their checksums; `rest` follows the table's name. Raises RowDamaged."""
    for row in fetched(db, f"SELECT {selected(table)} FROM {table} {rest}", *parameters):  # noqa: S608  all literals
        yield opened(table, row)


def fetched(db: sqlite3.Connection, query: str, *parameters: Any) -> Iterator[tuple[Any, ...]]:
    """What a query finds. Raises LogDamaged where SQLite meets a broken page or text on its way."""
    try:
        yield from db.execute(query, parameters)
    except sqlite3.Error as err:
        if is_damage(err):
            raise LogDamaged(f"the log cannot be read: {err}") from err
        raise


def parts(row: Sequence[Any], *tables: str) -> list[tuple[Any, ...] | None]:
    """The rows that a joined one was made of, in the order of `selected`; None where a side of it is empty."""
    found: list[tuple[Any, ...] | None] = []
    start = 0
    for table in tables:
        stop = start + len(COLUMNS[table]) + 1
        found.append(None if row[stop - 1] is None else opened(table, row[start:stop]))
        start = stop
    return found


def put(db: sqlite3.Connection, table: str, *values: Any, verb: str = "INSERT") -> int:
    """Store one row; returns 1, or 0 where `verb` is `INSERT OR IGNORE` and it was there."""
    marks = ",?" * len(COLUMNS[table])
    return db.execute(f"{verb} INTO {table} VALUES (?{marks})", sealed(table, *values)).rowcount


def put_all(db: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]) -> None:
    """Store new rows."""
    marks = ",?" * len(COLUMNS[table])
    statement = f"INSERT INTO {table} VALUES (?{marks})"  # noqa: S608  names are literals above
    db.executemany(statement, [sealed(table, *row) for row in rows])


def damaged_rows(db: sqlite3.Connection) -> Iterator[str]:
    """What is wrong with the rows of all tables, a line for each."""
    for table in COLUMNS:
        for row in db.execute(f"SELECT {selected(table)} FROM {table}"):  # noqa: S608  names are literals above
            try:
                opened(table, row)
            except RowDamaged as err:
                yield str(err)


def give_checksums(db: sqlite3.Connection) -> int:
    """Bring a log of layout 1 to the present one, inside a transaction; returns how many rows it has."""
    rows = 0
    for table, columns in COLUMNS.items():
        db.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0")
        key = " AND ".join(f"{column} IS ?" for column in _KEYS.get(table, columns[:1]))
        found = db.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()  # noqa: S608  literals above
        size = len(_KEYS.get(table, columns[:1]))
        changes = [(_crc(table, row), *row[:size]) for row in found]
        db.executemany(f"UPDATE {table} SET crc = ? WHERE {key}", changes)  # noqa: S608  literals above
        rows += len(found)
    put(db, "meta", "layout", LAYOUT, verb="INSERT OR REPLACE")
    return rows


_KEYS: Final = {"choice_values": ("subject", "task_type", "choice")}
"""Primary keys of more than the first column."""


def is_damage(err: sqlite3.Error) -> bool:
    """Whether the file itself is broken, and not merely a disk full or a lock held."""
    if isinstance(err, sqlite3.ProgrammingError):
        return False
    code = getattr(err, "sqlite_errorcode", None)
    # Without a code the error is Python's own: a text that is no UTF-8, which only damage makes of it.
    return code is None or code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _crc(table: str, values: Sequence[Any]) -> int:
    blobs = b""
    texts = [table]
    for value in values:
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, bytes):
            blobs += value
        else:
            texts.append(repr(value))  # of numbers and None only: that of a text differs between versions of Python
    return zlib.crc32(blobs, zlib.crc32("\x1f".join(texts).encode()))
