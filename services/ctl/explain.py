"""`explain`: why a task ran the way it did, each choice with what it was chosen from and what has come of it since.

The task's result says what was decided; memory, where it answers, says what it has learned about these choices.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Final

from protocol.client import AsyncClient
from protocol.errors import BusError
from protocol.messages.memory import Explain, Explained, MemoryRequest
from protocol.messages.result import TaskView
from services.ctl.commands import Commands, Context
from services.ctl.failure_story import is_troubled, print_step_story, print_task_story
from services.ctl.hub import connect
from services.ctl.outcomes import CommandError, ExitCode
from services.ctl.result_view import print_plan_choices
from services.ctl.screen import STYLES, Screen, one_line, seconds

_MEMORY_TIMEOUT_S: Final = 5.0


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add("explain", _explain, "say why roles, personas and width were chosen, and what came of it")
    parser.add_argument("task", metavar="TASK")


def _explain(args: Namespace, context: Context) -> ExitCode:
    view, explained, why_not = asyncio.run(_ask(args.task, context))
    if view.plan is None and not view.setbacks:
        later = "it never had a plan" if view.state.final else "it has no plan yet, ask again later"
        raise CommandError(f"{view.task_id} is {view.state.value}: {later}")
    if context.screen.json:
        context.screen.document(
            {
                "task_id": view.task_id,
                "state": view.state,
                "plan": view.plan,
                "attempts": {
                    step.id: [attempt.model_dump(mode="json") for attempt in step.attempts] for step in view.steps
                },
                "setbacks": view.setbacks or [],
                "failure": view.failure,
                "memory": explained,
                "memory_unavailable": why_not,
            }
        )
        return ExitCode.OK
    _print(context.screen, view, explained, why_not)
    return ExitCode.OK


async def _ask(task_id: str, context: Context) -> tuple[TaskView, list[Explained], str | None]:
    """The task, what memory knows about its decisions, and why it knows nothing."""
    async with connect(context.home) as client:
        view = await client.show(task_id)
        ids = [decision.decision_id for decision in view.plan.decisions] if view.plan is not None else []
        if not ids:
            return view, [], None
        try:
            return view, await _remembered(client, ids), None
        except BusError as err:
            return view, [], str(err)


async def _remembered(client: AsyncClient, ids: list[str]) -> list[Explained]:
    request = MemoryRequest(ask=Explain(decision_ids=ids))
    return (await client.memory(request, timeout_s=_MEMORY_TIMEOUT_S)).explained


def _print(screen: Screen, view: TaskView, explained: list[Explained], why_not: str | None) -> None:
    plan = view.plan
    screen.line(f"{view.task_id}: {view.state.value}", style=STYLES.get(view.state.value))
    screen.line(f"objective: {one_line(view.objective, 200)}")
    if plan is not None:
        print_plan_choices(screen, plan)
    if plan is not None and plan.similar:
        screen.heading("earlier tasks that informed the plan")
        screen.table(
            ("task", "similarity", "Q", "ended", "steps", "took", "objective"),
            [
                (
                    episode.task_id,
                    f"{episode.similarity:.2f}" if episode.similarity is not None else "",
                    f"{episode.q:.2f}" if episode.q is not None else "",
                    "succeeded" if episode.succeeded else "failed",
                    str(episode.steps),
                    seconds(episode.seconds * 1000),
                    one_line(episode.objective, 60),
                )
                for episode in plan.similar
            ],
        )
    troubled = [step for step in view.steps if is_troubled(step)]
    if troubled or view.setbacks:
        screen.heading("failures, and what followed")
    print_task_story(screen, view)
    for step in troubled:
        print_step_story(screen, step, told=True)
    _print_memory(screen, explained, why_not)


def _print_memory(screen: Screen, explained: list[Explained], why_not: str | None) -> None:
    screen.heading("what memory has learned")
    if why_not is not None:
        screen.line(f"memory does not answer: {why_not}", style="yellow")
        return
    if not explained:
        screen.line("nothing about these decisions")
        return
    rows = []
    for item in explained:
        decision, outcome = item.decision, item.outcome
        known = ", ".join(f"{value.choice} Q={value.q:.2f} n={value.count}" for value in item.values)
        reward = f"{outcome.reward:.2f} in {outcome.seconds:.1f} s, {outcome.attempts} tries" if outcome else ""
        rows.append((decision.step or "task", decision.subject, decision.choice, reward, known))
    screen.table(("step", "subject", "choice", "outcome", "values"), rows)
