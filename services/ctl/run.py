"""`run` and `submit`: hand a task to the hub, and for `run` show it until its artefacts are there."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path

from protocol.messages.result import TaskView
from protocol.messages.task import Accepted, TaskIR
from services.ctl.artefact_files import check_folder, write_artefacts
from services.ctl.commands import Commands, Context
from services.ctl.following import follow
from services.ctl.hub import connect
from services.ctl.outcomes import ExitCode
from services.ctl.result_view import exit_code_of, print_task
from services.ctl.task_inputs import add_task_arguments, task_from

_EXAMPLES = """examples:
  tierline run "compare these two files" --input a.md --input b.md --output out/
  tierline run --file deploy/example.yaml --json | jq .state
"""


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    run = commands.add("run", _run, "run a task and show its progress and result; Ctrl-C cancels it", epilog=_EXAMPLES)
    add_task_arguments(run)
    run.add_argument("--output", type=Path, metavar="DIR", help="write the artefacts there as files")
    submit = commands.add("submit", _submit, "submit a task, print its id and return")
    add_task_arguments(submit)


def _run(args: Namespace, context: Context) -> ExitCode:
    task = task_from(args)
    if args.output is not None:
        check_folder(args.output)
    view = asyncio.run(_run_task(task, context))
    files = write_artefacts(args.output, view.artefacts) if args.output is not None else []
    if context.screen.json:
        context.screen.document({**view.model_dump(mode="json"), "files": [str(path) for path in files]})
    else:
        print_task(context.screen, view, files)
    return exit_code_of(view.state)


async def _run_task(task: TaskIR, context: Context) -> TaskView:
    async with connect(context.home) as client:
        accepted = await client.submit(task)
        if accepted.duplicate:
            context.screen.note(f"this idempotency key is known: {accepted.task_id} is the earlier task")
        return await follow(client, accepted.task_id, context, cancels=True)


async def _submit_task(task: TaskIR, context: Context) -> Accepted:
    async with connect(context.home) as client:
        return await client.submit(task)


def _submit(args: Namespace, context: Context) -> ExitCode:
    accepted = asyncio.run(_submit_task(task_from(args), context))
    if context.screen.json:
        context.screen.document(accepted)
    else:
        context.screen.line(accepted.task_id)
    return ExitCode.OK
