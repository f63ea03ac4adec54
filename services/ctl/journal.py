"""`journal stats` and `journal compact`: how large the scheduler's journal is, and making it smaller.

Both are safe while the hub runs: stats reads, compact is the retention that the hub starts by itself every hour, with
other limits (`services/scheduler/retention.py`).
"""

from __future__ import annotations

import sqlite3
import time
from argparse import Namespace
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from services.ctl.commands import Commands, Context
from services.ctl.journal_copy import FILE_NAME
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.screen import mebibytes
from services.scheduler.fact_rows import COUNTED
from services.scheduler.journal_file import JournalVersionError, check_version, open_journal
from services.scheduler.retention import Policy, keep


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    group = commands.group("journal", "the scheduler's journal: its size, and retention")
    group.add("stats", _stats, "how many tasks and facts the journal holds, and what they occupy")
    compact = group.add(
        "compact",
        _compact,
        "apply retention now: old tasks keep their final view, older ones their id only",
        epilog="Tasks that run, or that memory has not learned from yet, are never touched.",
    )
    compact.add_argument(
        "--keep-days",
        type=float,
        default=Policy().whole_days,
        metavar="N",
        help=f"keep all events and artefacts of tasks that ended within N days (default {Policy().whole_days:g})",
    )


def _stats(_: Namespace, context: Context) -> ExitCode:
    path = _file(context)
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            if check_version(database, path) < 2:
                raise BadInput(f"{path} is of an older version: a hub of this version upgrades it at start")
            figures = _figures(database, path)
    except (sqlite3.Error, JournalVersionError) as err:
        raise CommandError(f"{path}: {err}; `tierline replay --check` says more") from err
    if context.screen.json:
        context.screen.document(figures)
    else:
        shown = {name: mebibytes(value) if name.endswith("_bytes") else str(value) for name, value in figures.items()}
        context.screen.table(("figure", "value"), list(shown.items()))
    return ExitCode.OK


def _figures(database: sqlite3.Connection, path: Path) -> dict[str, Any]:
    def one(query: str) -> int:
        return int(database.execute(query).fetchone()[0] or 0)

    wal = path.with_name(path.name + "-wal")
    page_bytes = one("PRAGMA page_size")
    return {
        "tasks": one("SELECT COUNT(*) FROM tasks"),
        "unfinished": one("SELECT COUNT(*) FROM tasks WHERE ended_ms IS NULL"),
        "unsettled": one("SELECT COUNT(*) FROM tasks WHERE ended_ms IS NOT NULL AND settled = 0"),
        "compacted": one("SELECT COUNT(*) FROM tasks WHERE compacted = 1"),
        "removed": one("SELECT COUNT(*) FROM removed"),
        "facts": one(COUNTED),
        "snapshots": one("SELECT COUNT(*) FROM snapshots"),
        "file_bytes": path.stat().st_size,
        "free_bytes": one("PRAGMA freelist_count") * page_bytes,
        "wal_bytes": wal.stat().st_size if wal.exists() else 0,
    }


def _compact(args: Namespace, context: Context) -> ExitCode:
    if not 0 <= args.keep_days <= Policy().view_days:
        raise BadInput(f"--keep-days {args.keep_days:g}: from 0 to {Policy().view_days:g} days can be kept")
    path = _file(context)
    try:
        with closing(open_journal(path)) as database:
            done = keep(database, replace(Policy(), whole_days=args.keep_days), time.time_ns() // 1_000_000)
    except (sqlite3.Error, JournalVersionError) as err:
        raise CommandError(f"{path}: {err}; what was done until then is kept") from err
    if context.screen.json:
        context.screen.document(asdict(done))
    else:
        context.screen.table(("done", "count"), [(one.name, str(getattr(done, one.name))) for one in fields(done)])
    return ExitCode.FAILED if done.damaged else ExitCode.OK


def _file(context: Context) -> Path:
    path = context.home.journal / FILE_NAME
    if not path.is_file():
        raise BadInput(f"there is no journal at {path}; it is made when the scheduler first starts")
    return path
