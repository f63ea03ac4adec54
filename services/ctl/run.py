"""`run` and `submit`: hand a task to the hub, and for `run` show it until its artefacts are there."""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from protocol.async_client import AsyncClient
from protocol.errors import CallFailed
from protocol.messages.result import TaskView
from protocol.messages.task import Accepted
from services.ctl.artefact_files import check_folder, write_artefacts
from services.ctl.commands import Commands, Context
from services.ctl.following import follow
from services.ctl.hub import connect
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.result_view import exit_code_of, print_task
from services.ctl.stack_files import checked_registry
from services.ctl.task_file import refused_task
from services.ctl.task_inputs import GivenTask, add_task_arguments, task_from
from services.planner.leading import led

_EXAMPLES = """examples:
  tierline run "compare these two files" --input a.md --input b.md --output out/
  tierline run "find out what these reports disagree on" --swarm --input a.md --input b.md
  tierline run --file deploy/example.yaml --json | jq .state
"""


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    run = commands.add("run", _run, "run a task and show its progress and result; Ctrl-C cancels it", epilog=_EXAMPLES)
    add_task_arguments(run)
    _add_swarm(run)
    run.add_argument("--output", type=Path, metavar="DIR", help="write the artefacts there as files")
    submit = commands.add("submit", _submit, "submit a task, print its id and return")
    add_task_arguments(submit)
    _add_swarm(submit)


def _add_swarm(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--swarm", action="store_true", help="one model leads sub-agents that it makes as it needs them"
    )


def _task(args: Namespace, context: Context) -> GivenTask:
    """The task that the arguments describe, led by one model if they say so. Raises BadInput."""
    given = task_from(args)
    if not args.swarm:
        return given
    if given.task.plan is not None:
        raise BadInput("--swarm makes the plan: leave it out for a task that has one, or give its steps `spawns`")
    return replace(given, task=led(given.task, checked_registry(context.home, check_files=False).roles))


def _run(args: Namespace, context: Context) -> ExitCode:
    given = _task(args, context)
    if args.output is not None:
        check_folder(args.output)
    view = asyncio.run(_run_task(given, context))
    files = write_artefacts(args.output, view.artefacts) if args.output is not None else []
    if context.screen.json:
        context.screen.document({**view.model_dump(mode="json"), "files": [str(path) for path in files]})
    else:
        print_task(context.screen, view, files)
    return exit_code_of(view.state)


async def _run_task(given: GivenTask, context: Context) -> TaskView:
    async with connect(context.home) as client:
        accepted = await _accepted(client, given)
        if accepted.duplicate:
            context.screen.note(f"this idempotency key is known: {accepted.task_id} is the earlier task")
        return await follow(client, accepted.task_id, context, cancels=True)


async def _accepted(client: AsyncClient, given: GivenTask) -> Accepted:
    """Submit it. Raises BadInput with file and line where the hub finds something wrong with it."""
    try:
        return await client.submit(given.task)
    except CallFailed as err:
        refused = refused_task(given.document, given.task, err.failure)
        if refused is None:
            raise
        raise refused from err


async def _submit_task(given: GivenTask, context: Context) -> Accepted:
    async with connect(context.home) as client:
        return await _accepted(client, given)


def _submit(args: Namespace, context: Context) -> ExitCode:
    accepted = asyncio.run(_submit_task(_task(args, context), context))
    if context.screen.json:
        context.screen.document(accepted)
    else:
        context.screen.line(accepted.task_id)
    return ExitCode.OK
