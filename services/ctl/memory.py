"""`memory …`: look after what a stack has learned: figures, a check, a rebuild, moving it elsewhere, removing parts.

All of it goes over the bus to the running memory service, which keeps answering meanwhile. An export is JSON lines: a
header `{"format", "version"}`, then one row a line in the order in which the log has them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from pydantic import ValidationError

from protocol.codec import pack_body
from protocol.messages.memory import (
    Export,
    Forget,
    Import,
    MemoryFinal,
    MemoryRequest,
    Rebuild,
    Row,
    Stats,
    Values,
    Verify,
)
from services.ctl.commands import Commands, Context
from services.ctl.hub import connect
from services.ctl.outcomes import BadInput, ExitCode
from services.memory.width_report import LAST

FORMAT: Final = "tierline-memory"
VERSION: Final = 1

_SHORT_S: Final = 30.0
_LONG_S: Final = 1_800.0
_ROWS_AT_ONCE: Final = 500
_IMPORT_BYTES: Final = 2 * 1024 * 1024
_DAY_S: Final = 86_400.0


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    group = commands.group("memory", "look after what this stack has learned")
    group.add(
        "stats", _stats, "how much is remembered, how far the projections are, serial collapse and spurious parallelism"
    )
    parser = group.add("values", _values, "what every choice about a subject has turned out to be worth")
    parser.add_argument("subject", metavar="SUBJECT", help="role, persona or decomposition")
    group.add("verify", _verify, "compare values, vectors and graph with the log; exit 1 where they differ")
    group.add("rebuild", _rebuild, "make values, vectors and graph anew from the log; questions are answered meanwhile")
    parser = group.add("export", _export, "write everything as JSON lines")
    parser.add_argument("file", metavar="FILE", help="where to; - = standard output")
    parser = group.add("import", _import, "take in an export; what is known already is left as it is")
    parser.add_argument("file", metavar="FILE", help="an export; - = standard input")
    parser = group.add("forget", _forget, "remove for good, from the log and everything made of it")
    parser.add_argument("--task", metavar="ID", action="append", default=[], help="everything about this task")
    parser.add_argument("--older-than-days", metavar="N", type=_days, help="tasks that ended longer ago")
    parser.add_argument("--choice", metavar="NAME", help="every decision for this choice, and its value")
    parser.add_argument("--subject", metavar="NAME", help="limits --choice: role, persona, decomposition")


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError as err:
        raise ArgumentTypeError(f"{text!r} is not a number of days") from err
    if not 0 <= days < 100_000:
        raise ArgumentTypeError(f"{text}: expected 0 to 99999 days")
    return days


def _stats(_: Namespace, context: Context) -> ExitCode:
    final = asyncio.run(_ask(context, Stats(), _SHORT_S))
    width = final.width
    if context.screen.json:
        context.screen.document(final.stats | {"width": None if width is None else width.model_dump()})
        return ExitCode.OK
    _figures(context, final.stats)
    if width is not None:
        context.screen.heading(f"the last {width.tasks} decisions whether to split a task (at most {LAST})")
        figures = width.model_dump(exclude={"tasks"}).items()
        rows = [(name, f"{value:.3f}" if isinstance(value, float) else str(value)) for name, value in figures]
        context.screen.table(("figure", "value"), rows)
    return ExitCode.OK


def _values(args: Namespace, context: Context) -> ExitCode:
    values = asyncio.run(_ask(context, Values(subject=args.subject), _SHORT_S)).values
    if context.screen.json:
        context.screen.document([value.model_dump() for value in values])
    elif not values:
        context.screen.line(f"no choice about {args.subject} has an outcome yet")
    else:
        rows = [(v.task_type, v.choice, f"{v.q:.2f}", str(v.count), f"{v.mean_seconds:.1f}") for v in values]
        context.screen.table(("task type", args.subject, "Q", "outcomes", "mean s"), rows)
    return ExitCode.OK


def _verify(_: Namespace, context: Context) -> ExitCode:
    found = asyncio.run(_ask(context, Verify(), _LONG_S)).differences
    screen = context.screen
    if screen.json:
        screen.document({"ok": not found, "differences": [each.model_dump() for each in found]})
    elif not found:
        screen.line("values, vectors and graph say what the log says", style="green")
    else:
        screen.table(("part", "difference"), [(each.part, each.what) for each in found])
        screen.line("make them anew with: tierline memory rebuild")
    return ExitCode.FAILED if found else ExitCode.OK


def _rebuild(_: Namespace, context: Context) -> ExitCode:
    _figures(context, asyncio.run(_ask(context, Rebuild(), _LONG_S)).stats)
    return ExitCode.OK


def _figures(context: Context, stats: dict[str, int]) -> None:
    if context.screen.json:
        context.screen.document(stats)
    else:
        context.screen.table(("figure", "value"), [(name, str(value)) for name, value in stats.items()])


def _export(args: Namespace, context: Context) -> ExitCode:
    if args.file == "-":
        written = asyncio.run(_write_rows(context, sys.stdout))
        return ExitCode.OK
    path = Path(args.file)
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("w", encoding="utf-8") as file:
            written = asyncio.run(_write_rows(context, file))
        draft.replace(path)  # a broken export is never taken for a whole one
    except OSError as err:
        raise BadInput(f"{path} cannot be written: {err}") from err
    finally:
        draft.unlink(missing_ok=True)
    if context.screen.json:
        context.screen.document({"file": str(path), "rows": written})
    else:
        context.screen.line(f"{written} rows written to {path}")
    return ExitCode.OK


async def _write_rows(context: Context, file: TextIO) -> int:
    written = after = 0
    async with connect(context.home) as client:
        file.write(json.dumps({"format": FORMAT, "version": VERSION}) + "\n")
        while True:
            request = MemoryRequest(ask=Export(after=after, limit=_ROWS_AT_ONCE))
            rows = (await client.memory(request, timeout_s=_SHORT_S)).rows
            for row in rows:
                file.write(row.model_dump_json(exclude_none=True) + "\n")
            if not rows:
                return written
            written, after = written + len(rows), rows[-1].seq


def _import(args: Namespace, context: Context) -> ExitCode:
    if args.file == "-":
        total = asyncio.run(_send_rows(context, "standard input", sys.stdin))
    else:
        try:
            with Path(args.file).open(encoding="utf-8") as file:
                total = asyncio.run(_send_rows(context, args.file, file))
        except (OSError, UnicodeDecodeError) as err:
            raise BadInput(f"{args.file} cannot be read: {err}") from err
    if context.screen.json:
        context.screen.document(total)
    else:
        context.screen.line(f"{total['stored']} rows taken in, {total['duplicates']} were known already")
    return ExitCode.OK


async def _send_rows(context: Context, name: str, file: TextIO) -> dict[str, int]:
    total = {"stored": 0, "duplicates": 0}
    async with connect(context.home) as client:
        for rows in _groups(name, file):
            answer = await client.memory(MemoryRequest(ask=Import(rows=rows)), timeout_s=_SHORT_S)
            total["stored"] += answer.stored
            total["duplicates"] += answer.duplicates
    return total


def _groups(name: str, file: TextIO) -> Iterator[list[Row]]:
    """Rows in requests of a size that the bus takes. Raises BadInput that names the line."""
    group: list[Row] = []
    size = 0
    for number, row in _rows(name, file):
        bytes_of_row = len(pack_body(row))
        if bytes_of_row > _IMPORT_BYTES:
            raise BadInput(f"{name}:{number}: this row has {bytes_of_row} bytes, at most {_IMPORT_BYTES} are taken")
        if group and (len(group) == _ROWS_AT_ONCE or size + bytes_of_row > _IMPORT_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += bytes_of_row
    if group:
        yield group


def _rows(name: str, file: TextIO) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise BadInput(f"{name}:{number}: not JSON: {err}") from err
        if number == 1:
            _check_header(name, value)
            continue
        try:
            yield number, Row.model_validate(value)
        except ValidationError as err:
            first = err.errors()[0]
            field = ".".join(map(str, first["loc"])) or "row"
            raise BadInput(f"{name}:{number}: {field}: {first['msg']}") from err


def _check_header(name: str, header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise BadInput(f'{name}:1: expected {{"format": "{FORMAT}", "version": {VERSION}}}; is it an export of memory?')
    if header.get("version") != VERSION:
        raise BadInput(f"{name}:1: version {header.get('version')!r}, this Tierline reads {VERSION}")


def _forget(args: Namespace, context: Context) -> ExitCode:
    before_ms = None
    if args.older_than_days is not None:
        before_ms = max(0, int((time.time() - args.older_than_days * _DAY_S) * 1000))
    try:
        ask = Forget(task_ids=args.task, before_ms=before_ms, choice=args.choice, subject=args.subject)
    except ValidationError as err:
        raise BadInput("say what to forget: --task, --older-than-days, or --choice (with --subject)") from err
    rows = asyncio.run(_ask(context, ask, _LONG_S)).forgotten
    if context.screen.json:
        context.screen.document({"forgotten": rows})
    else:
        context.screen.line(f"{rows} rows forgotten" if rows else "nothing of that was remembered")
    return ExitCode.OK


async def _ask(context: Context, ask: Stats | Values | Verify | Rebuild | Forget, timeout_s: float) -> MemoryFinal:
    async with connect(context.home) as client:
        return await client.memory(MemoryRequest(ask=ask), timeout_s=timeout_s)
