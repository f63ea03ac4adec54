"""`replay`: steps the fold of the scheduler over a copy of a journal, one fact at a time.

What the hub would know after each fact is what this prints: both apply the same function. Which facts there are is
`services/scheduler/facts.py`, what a journal must not contain `services/scheduler/audit.py`.
"""

from __future__ import annotations

import sqlite3
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from services.ctl.commands import Commands, Context
from services.ctl.journal_copy import DamagedFileError, copy_of
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.screen import Screen
from services.scheduler.audit import Contradiction, audit_file, audit_task, task_ids
from services.scheduler.fact_rows import COUNTED, DamagedTask, advance, read_rows
from services.scheduler.facts import Fact
from services.scheduler.tasks import TaskRecord

_REPAIR = "restore the journal from a backup, or stop the stack and move the file away: a new one is begun"


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add(
        "replay",
        _replay,
        "step the scheduler's state over a copy of a journal; the file itself is not touched",
        epilog="With --check: exit 1 if anything in the journal contradicts itself.",
    )
    parser.add_argument(
        "journal", nargs="?", type=Path, metavar="JOURNAL", help="file or folder; default: this stack's"
    )
    parser.add_argument("--task", metavar="ID", help="only this task")
    parser.add_argument("--until", type=int, metavar="SEQ", help="stop after this fact of each task")
    parser.add_argument("--check", action="store_true", help="print only what is wrong, with task and fact")


@dataclass(frozen=True, slots=True)
class Stepped:
    """One fact and what it changed."""

    task: str
    seq: int
    at_ms: int
    fact: str
    step: str | None
    attempt: int | None
    effect: str


def _replay(args: Namespace, context: Context) -> ExitCode:
    if args.until is not None and args.until < 1:
        raise BadInput(f"--until {args.until}: facts are numbered from 1")
    path = args.journal or context.home.journal
    try:
        with copy_of(path) as copy:
            tasks = task_ids(copy)
            if args.task is not None:
                if args.task not in tasks:
                    raise BadInput(f"the journal has no task {args.task!r}; `tierline list` shows them")
                tasks = [args.task]
            if args.check:
                return _check(copy, tasks, context.screen, whole=args.task is None)
            return _print(copy, tasks, args.until, context.screen)
    except DamagedFileError as err:
        raise CommandError(f"SQLite cannot read the journal: {err}; {_REPAIR}") from err


def _check(copy: sqlite3.Connection, tasks: list[str], screen: Screen, *, whole: bool) -> ExitCode:
    found: list[Contradiction] = [one for task in tasks for one in audit_task(copy, task)]
    found += audit_file(copy) if whole else []
    facts = int(copy.execute(COUNTED).fetchone()[0])
    if screen.json:
        screen.document({"tasks": len(tasks), "facts": facts, "contradictions": [asdict(one) for one in found]})
    else:
        for one in found:
            place = f"task {one.task}" + ("" if one.seq is None else f", fact {one.seq}")
            screen.line(f"{place}: {one.message}", style="red")
        verdict = f"{len(found)} contradictions" if found else "no contradiction"
        screen.line(f"{len(tasks)} tasks in a journal of {facts} facts: {verdict}")
    return ExitCode.FAILED if found else ExitCode.OK


def _print(copy: sqlite3.Connection, tasks: list[str], until: int | None, screen: Screen) -> ExitCode:
    without = 0
    for task in tasks:
        told = False
        try:
            for stepped in _steps(copy, task, until):
                told = True
                if screen.json:
                    screen.record(asdict(stepped))
                else:
                    screen.line(_line(stepped))
        except DamagedTask as err:
            raise CommandError(f"{err}; `tierline replay --check` looks at all tasks; {_REPAIR}") from err
        without += not told
    if without:
        screen.note(
            f"{without} of {len(tasks)} tasks are compacted: no facts to step through; `tierline show TASK` tells"
        )
    return ExitCode.OK


def _line(one: Stepped) -> str:
    where = "" if one.step is None else f" {one.step}" + ("" if one.attempt is None else f"#{one.attempt}")
    return f"{one.task} {one.seq:>5} {one.at_ms} {one.fact}{where}: {one.effect}"


def _steps(copy: sqlite3.Connection, task: str, until: int | None) -> Iterator[Stepped]:
    rows = copy.execute("SELECT seq, kind, data, seal FROM facts WHERE task = ? ORDER BY seq", (task,))
    record: TaskRecord | None = None
    for seq, fact in read_rows(task, rows):
        if until is not None and seq > until:
            return
        before = _shown(record, fact)
        record = advance(record, seq, fact)
        effect = _effect(before, _shown(record, fact))
        yield Stepped(task, seq, fact.at_ms, type(fact).__name__, fact.step, fact.number, effect)


def _shown(task: TaskRecord | None, fact: Fact) -> dict[str, object]:
    """What a fact can change, as words and numbers."""
    if task is None:
        return {}
    shown: dict[str, object] = {
        "task": task.state.value,
        "steps": len(task.steps),
        "unfinished": task.unfinished,
        "artefacts": len(task.artefacts),
        "tokens": task.generated_tokens,
        "learned": task.settled,
    }
    step = task.steps.get(fact.step or "")
    if step is not None:
        shown |= {"step": step.state.value, "attempts": len(step.attempts), "losses": step.losses}
        ready = [name for name in task.dependents[step.spec.id] if not task.steps[name].waiting_for]
        shown["unblocked"] = len(ready)
    return shown


def _effect(before: dict[str, object], after: dict[str, object]) -> str:
    changes = [
        f"{name} {after[name]}" if name not in before else f"{name} {before[name]} -> {after[name]}"
        for name in after
        if before.get(name) != after[name]
    ]
    return ", ".join(changes) or "no effect"
