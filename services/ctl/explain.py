"""`explain`: why a task ran the way it did, each choice with what it was chosen from and what has come of it since.

The task's result says what was decided; memory, where it answers, says what it has learned about these choices. With
`--objective` nothing runs: the planner's own machine plans it, asks this stack's memory, and its decisions are shown
with the rules' choice, the learned one, and which of them would win.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Final

from protocol.client import AsyncClient
from protocol.errors import BusError
from protocol.messages.memory import Explain, Explained, MemoryRequest
from protocol.messages.plan import PlanFinal
from protocol.messages.result import PlanView, TaskView
from protocol.messages.task import TaskIR, TaskType
from services.ctl.commands import Commands, Context
from services.ctl.failure_story import is_troubled, print_step_story, print_task_story
from services.ctl.hub import connect
from services.ctl.outcomes import BadInput, CommandError, ExitCode
from services.ctl.result_view import print_plan_choices, told_steps
from services.ctl.screen import STYLES, Screen, one_line, seconds
from services.ctl.stack_files import checked_registry
from services.ctl.swarm_view import print_swarms
from services.ctl.task_inputs import task_from
from services.ctl.trials import with_trials_of
from services.kit.registry import Registry
from services.planner.machine import (
    AskAdvice,
    AskMemory,
    Finish,
    MemoryAnswered,
    Planning,
    Refuse,
    Requested,
    Unanswered,
)

_MEMORY_TIMEOUT_S: Final = 5.0


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add("explain", _explain, "say why roles, personas and width were chosen, and what came of it")
    parser.add_argument("task", nargs="?", metavar="TASK")
    parser.add_argument(
        "--objective", metavar="WORDS", help="instead of a task: what would be chosen for this, and why"
    )
    parser.add_argument("--type", dest="task_type", choices=[item.value for item in TaskType], help="kind of work")
    parser.add_argument("--input", dest="inputs", action="append", default=[], metavar="[NAME=]FILE", help="repeatable")


def _explain(args: Namespace, context: Context) -> ExitCode:
    if (args.task is None) == (args.objective is None):
        raise BadInput('give either the id of a task or --objective "…"')
    if args.objective is not None:
        return _explain_objective(args, context)
    if args.inputs or args.task_type is not None:
        raise BadInput("--type and --input belong to --objective; a task has its own")
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
                "swarms": view.swarms or [],
                "setbacks": view.setbacks or [],
                "failure": view.failure,
                "memory": explained,
                "memory_unavailable": why_not,
            }
        )
        return ExitCode.OK
    _print(context.screen, view, explained, why_not)
    return ExitCode.OK


def _explain_objective(args: Namespace, context: Context) -> ExitCode:
    others = {"file": None, "priority": None, "gates": None, "deadline": None, "max_tokens": None}
    task = task_from(Namespace(**{**others, **vars(args)})).task
    registry = checked_registry(context.home, check_files=False)
    final = asyncio.run(_planned(task, registry, context))
    plan = PlanView.model_validate(
        final.model_dump(include={"source", "reason", "removed_edges", "added_edges", "decisions", "similar"})
    )
    if context.screen.json:
        context.screen.document({"objective": task.objective, "learning": registry.learning.enabled, "plan": plan})
        return ExitCode.OK
    context.screen.line(f"objective: {one_line(task.objective, 200)}")
    print_plan_choices(context.screen, plan)
    _print_advice(context.screen, plan)
    return ExitCode.OK


async def _planned(task: TaskIR, registry: Registry, context: Context) -> PlanFinal:
    """The plan by rules and by memory's advice; the front door is not asked. Raises BadInput."""
    async with connect(context.home) as client:
        planning = Planning(await with_trials_of(client, registry))
        command = planning.handle(Requested(0, task.model_copy(update={"task_id": None}), None))
        while not isinstance(command, Finish):
            match command:
                case Refuse(failure=failure):
                    raise BadInput(failure.message)
                case AskMemory(retrieve=ask) | AskAdvice(request=ask):
                    try:
                        answer = await client.memory(MemoryRequest(ask=ask), timeout_s=_MEMORY_TIMEOUT_S)
                        command = planning.handle(MemoryAnswered(0, answer))
                    except BusError as err:
                        command = planning.handle(Unanswered(0, str(err)))
                case _:
                    command = planning.handle(Unanswered(0, "only memory is asked"))
    return command.final


async def _ask(task_id: str, context: Context) -> tuple[TaskView, list[Explained], str | None]:
    """The task, what memory knows about its decisions, and why it knows nothing."""
    async with connect(context.home) as client:
        view = await client.show(task_id)
        ids = [ident for one in view.plan.decisions for ident in one.ids.values()] if view.plan is not None else []
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
        _print_advice(screen, plan)
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
    print_swarms(screen, view, told=True)
    troubled = [step for step in view.steps if is_troubled(step)]
    if troubled or view.setbacks:
        screen.heading("failures, and what followed")
    print_task_story(screen, view)
    for step in troubled:
        print_step_story(screen, step, told=True)
    _print_memory(screen, explained, why_not)


def _print_advice(screen: Screen, plan: PlanView) -> None:
    """What the rules and what the outcomes say, and which of them won."""
    asked = [(item, item.advice) for item in plan.decisions if item.advice is not None]
    screen.heading("rules and what was learned")
    if not asked:
        screen.line("memory was not asked: the rules chose")
        return
    screen.table(
        ("step", "subject", "rules", "learned", "taken", "won", "confidence", "outcomes", "why"),
        [
            (
                told_steps(item.ids),
                item.subject,
                advice.rules_choice,
                advice.learned_choice,
                advice.choice,
                advice.won,
                f"{advice.confidence:.2f}",
                f"{advice.evidence:.0f}",
                one_line(advice.why, 160),
            )
            for item, advice in asked
        ],
    )
    screen.table(
        ("step", "subject", "option", "wide", "expected", "staged", "value", "chance", "outcomes", "alike", "seconds"),
        [
            (
                told_steps(item.ids),
                item.subject,
                arm.choice,
                str(arm.width or ""),
                f"{arm.expected_reward:.2f} ± {arm.deviation:.2f}",
                f"+{arm.staged:.2f}" if arm.staged else "",
                f"{arm.value:.2f}",
                f"{arm.chance:.2f}",
                f"{arm.outcomes:.0f}",
                str(arm.similar_outcomes),
                f"{arm.seconds:.1f}",
            )
            for item, advice in asked
            for arm in advice.arms
        ],
    )


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
        if outcome is not None and outcome.staged is not None and outcome.spread is not None:
            spread = outcome.spread
            reward += f"; {spread.width} wide, {spread.finished} of {spread.assigned} finished"
            reward += f"; shaped {outcome.staged.shaped:.2f}"
        rows.append((decision.step or "task", decision.subject, decision.choice, reward, known))
    screen.table(("step", "subject", "choice", "outcome", "values"), rows)
