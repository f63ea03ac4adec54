"""`show`, `watch`, `list`, `cancel`: tasks that the hub knows, running or finished."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

from protocol.messages.result import Cancelled, Listing, TaskState, TaskView
from services.ctl.commands import Commands, Context
from services.ctl.following import follow
from services.ctl.hub import connect
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.page import page
from services.ctl.result_view import exit_code_of, print_listing, print_task
from services.kit.clock import SteadyClock


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    show = commands.add("show", _show, "show a task: steps, artefacts, gates, decisions, critical path")
    show.add_argument("task", metavar="TASK")
    instead = show.add_mutually_exclusive_group()
    instead.add_argument("--artefact", metavar="NAME", help="print this one artefact, of any step, and nothing else")
    instead.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with its timetable to FILE, readable without a network"
    )
    watch = commands.add("watch", _watch, "follow the events of a task until it ends; --json prints one a line")
    watch.add_argument("task", metavar="TASK")
    watch.add_argument("--after", type=int, default=0, metavar="SEQ", help="only events after this number")
    cancel = commands.add("cancel", _cancel, "cancel a task; a finished one stays what it was")
    cancel.add_argument("task", metavar="TASK")
    cancel.add_argument("--step", metavar="ID", help="only this step and what needs it; the rest goes on")
    cancel.add_argument("--reason", default="tierline cancel", help="goes into the journal")
    listing = commands.add("list", _list, "list tasks, newest first")
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="1 to 1000 (20)")
    listing.add_argument(
        "--state", dest="states", action="append", default=[], choices=[state.value for state in TaskState]
    )


def _show(args: Namespace, context: Context) -> ExitCode:
    if args.artefact is not None:
        return asyncio.run(_show_artefact(args, context))
    view = asyncio.run(fetch(context, args.task))
    if args.html is not None:
        _write_page(args.html, page(view, SteadyClock().now_ms()))
        if context.screen.json:
            context.screen.document({"html": str(args.html)})
        else:
            context.screen.line(f"written: {args.html}")
    elif context.screen.json:
        context.screen.document(view)
    else:
        print_task(context.screen, view)
    return exit_code_of(view.state)


def _write_page(path: Path, text: str) -> None:
    """Whole or not at all: whoever has the old page open never reads half of the new one. What is no file, such as
    /dev/stdout, is written to as it is, since putting a file in its place would take it away from everybody.
    """
    target = path.resolve()
    draft = target.with_name(f".{target.name}.tierline-draft")
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, "utf-8")
            return
        draft.write_text(text, "utf-8")
        draft.replace(target)
    except OSError as err:
        with suppress(OSError):
            draft.unlink()
        raise BadInput(f"--html {path}: {err.strerror}; name a file in a folder that can be written") from err


async def fetch(context: Context, task_id: str) -> TaskView:
    """The task as the hub has it now. Raises BadInput for one that it does not know."""
    async with connect(context.home) as client:
        return await client.show(task_id)


async def _show_artefact(args: Namespace, context: Context) -> ExitCode:
    async with connect(context.home) as client:
        artefact = await client.artefact(args.task, args.artefact)
    if context.screen.json:
        context.screen.document(artefact)
    else:
        context.screen.line(artefact.text())
    return ExitCode.OK


def _watch(args: Namespace, context: Context) -> ExitCode:
    return asyncio.run(_watch_task(args, context))


async def _watch_task(args: Namespace, context: Context) -> ExitCode:
    if args.after < 0:
        raise BadInput(f"--after {args.after}: must not be negative")
    screen = context.screen
    async with connect(context.home) as client:
        view = await follow(client, args.task, context, after_seq=args.after, cancels=False, records=screen.json)
    if screen.json:
        screen.record(view)
    else:
        screen.line()
        print_task(screen, view)
    return exit_code_of(view.state)


def _cancel(args: Namespace, context: Context) -> ExitCode:
    cancelled = asyncio.run(_cancel_task(args, context))
    if context.screen.json:
        context.screen.document(cancelled)
    else:
        context.screen.line(f"{cancelled.task_id}: {cancelled.state.value}")
    return ExitCode.OK


async def _cancel_task(args: Namespace, context: Context) -> Cancelled:
    async with connect(context.home) as client:
        return await client.cancel(args.task, step=args.step, reason=args.reason)


def _list(args: Namespace, context: Context) -> ExitCode:
    if not 1 <= args.limit <= 1_000:
        raise BadInput(f"--limit {args.limit}: must be between 1 and 1000")
    listing = asyncio.run(_list_tasks(args, context))
    if context.screen.json:
        context.screen.document(listing)
    elif listing.tasks:
        print_listing(context.screen, listing.tasks)
    else:
        context.screen.line("no tasks")
    return ExitCode.OK


async def _list_tasks(args: Namespace, context: Context) -> Listing:
    async with connect(context.home) as client:
        return await client.list(limit=args.limit, states=tuple(TaskState(state) for state in args.states))
