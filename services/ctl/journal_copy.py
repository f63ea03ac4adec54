"""A private copy of a journal to look at: the live file is only ever read, by SQLite's own backup.

The hub may write meanwhile; the copy is one consistent state. It lies in a temporary folder and is gone afterwards.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from services.ctl.outcomes import BadInput
from services.scheduler.journal_file import JournalVersionError, check_version

FILE_NAME = "journal.sqlite"


class DamagedFileError(Exception):
    """SQLite itself cannot read the file any more."""


@contextmanager
def copy_of(path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the journal in this file, or in this folder.

    Raises BadInput where there is none or it has another version, DamagedFileError where SQLite cannot read it.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"there is no journal at {file}; name the file, such as $TIERLINE_HOME/journal/{FILE_NAME}")
    with tempfile.TemporaryDirectory(prefix="tl-replay-") as folder:
        try:
            with closing(sqlite3.connect(Path(folder) / FILE_NAME)) as copy:
                _back_up(file, copy)
                # Text that is no longer UTF-8 must reach the audit, which names its place.
                copy.text_factory = _lenient
                version = check_version(copy, file)
                if version < 2:
                    raise BadInput(f"{file} has journal version {version}: a hub of this version upgrades it at start")
                yield copy
        except JournalVersionError as err:
            raise BadInput(str(err)) from err
        except (sqlite3.DatabaseError, UnicodeDecodeError) as err:
            # The second where SQLite's own message quotes damaged bytes.
            raise DamagedFileError(f"{file}: {err}") from err


def _back_up(file: Path, copy: sqlite3.Connection) -> None:
    # Not immutable: the newest facts may still be in the WAL beside the file.
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as live:
            live.backup(copy)
    except sqlite3.OperationalError as err:
        raise BadInput(f"{file} cannot be opened: {err}") from err


def _lenient(text: bytes) -> str:
    return text.decode("utf-8", "replace")
