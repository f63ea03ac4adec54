"""`plan`: what a task would become, without a hub, a model or anything executed.

The planner's own machine makes the plan; its questions to memory and to the front door are answered with silence, as
if both were down. So this is the rules' plan, or the client's own, after the discovery of parallelism: what a run would
do, except that a run may use a plan that the front door made.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Final

from protocol.messages.plan import PlanFinal
from protocol.messages.result import PlanView
from protocol.messages.task import TaskIR
from services.ctl.commands import Commands, Context
from services.ctl.forecast import Forecast, forecast
from services.ctl.learned import KnownDurations, add_duration_arguments, known_durations
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.result_view import print_plan_choices
from services.ctl.screen import Screen, mebibytes, one_line, seconds
from services.ctl.stack_files import checked_registry
from services.ctl.task_inputs import add_task_arguments, task_from
from services.ctl.trials import with_live_trials
from services.kit.plan_check import more_than, problems_in
from services.kit.plan_shape import as_written
from services.kit.registry import Registry
from services.planner.divide import Judge
from services.planner.labelled import BadRow, judge_of
from services.planner.machine import Finish, Planning, Refuse, Requested, Unanswered
from services.scheduler.simulation.peers import SimulationError

_BAR: Final = 50
"""Characters of the time axis."""


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    parser = commands.add(
        "plan", _plan, "dry run: the steps, what runs side by side, expected time, tokens and memory", elsewhere=True
    )
    add_task_arguments(parser)
    add_duration_arguments(parser)


def _plan(args: Namespace, context: Context) -> ExitCode:
    durations = known_durations(args, context.home)
    registry = with_live_trials(context.home, checked_registry(context.home, check_files=False))
    task = task_from(args, registry).task
    try:
        judge = judge_of(context.home.labelled_requests)
    except BadRow as err:
        raise BadInput(str(err)) from err
    final = dry_run(task, registry, judge)
    if final.task.plan is None:
        raise BadInput("the planner made no plan")
    try:
        expected = forecast(final.task, final.task.plan, registry, durations)
        written = as_written(final.task.plan, final.removed_edges, final.added_edges)
        changed = final.removed_edges or final.added_edges
        before = forecast(final.task, written, registry, durations) if changed else expected
    except SimulationError as err:
        raise BadInput(f"this plan cannot be run by this registry: {err}") from err
    if context.screen.json:
        context.screen.document(
            {
                **final.model_dump(mode="json"),
                "durations": durations.document(),
                "forecast": asdict(expected),
                "discovery": {"before": _in_short(before), "after": _in_short(expected)},
            }
        )
    else:
        _print(context.screen, final, before, expected, durations)
    return ExitCode.OK


def dry_run(task: TaskIR, registry: Registry, judge: Judge | None = None) -> PlanFinal:
    """The plan that the planner would make with memory and model away. Raises BadInput for a task that cannot run."""
    planning = Planning(registry, judge)
    # Without an id the planner records nothing: no outcome will ever come for these decisions.
    command = planning.handle(Requested(0, task.model_copy(update={"task_id": None}), None))
    while not isinstance(command, Finish):
        if isinstance(command, Refuse):
            problems = problems_in(command.failure.evidence)
            more = more_than(problems, command.failure.evidence)
            details = (*map(str, problems), *([f"and {more} more"] if more else ()))
            raise BadInput("the task cannot run as written", details=details)
        command = planning.handle(Unanswered(0, "dry run"))
    return command.final


def _in_short(expected: Forecast) -> dict[str, float | list[str]]:
    """What the discovery of parallelism changes: see Forecast."""
    return {
        "width": expected.width,
        "levels": expected.levels,
        "critical": list(expected.critical),
        "critical_s": expected.critical_s,
        "predicted_s": expected.makespan_s,
    }


def _print(screen: Screen, final: PlanFinal, before: Forecast, expected: Forecast, durations: KnownDurations) -> None:
    screen.line(f"dry run, nothing is executed: {one_line(final.task.objective, 200)}")
    screen.heading("steps")
    written = {step.id: step for step in final.task.plan.steps} if final.task.plan else {}
    screen.table(
        (
            "level",
            "step",
            "critical",
            "role",
            "model",
            "waits for",
            "group",
            "gates",
            "persona",
            "tokens",
            "expected",
            "action",
        ),
        [
            (
                str(step.level),
                step.id,
                "*" if step.critical else "",
                step.role,
                step.model,
                ", ".join(step.needs),
                written[step.id].parallel_group or "",
                ", ".join(step.gates),
                step.persona or "",
                str(step.max_tokens),
                seconds(step.expected_s * 1000),
                one_line(written[step.id].action, 50),
            )
            for step in sorted(expected.steps, key=lambda step: step.level)
        ],
    )
    screen.heading("discovery of parallelism")
    screen.table(
        ("", "width", "levels", "predicted", "critical path"),
        [
            (
                name,
                str(one.width),
                str(one.levels),
                seconds(one.makespan_s * 1000),
                f"{seconds(one.critical_s * 1000)}: {one_line(' -> '.join(one.critical), 100)}",
            )
            for name, one in (("as written", before), ("as it runs", expected))
        ],
    )
    screen.heading("expected")
    screen.line(f"{len(expected.steps)} steps on {expected.levels} levels, up to {expected.width} side by side")
    screen.line(durations.words())
    given = {artefact.name for artefact in final.task.inputs}
    lists = {step.id: step.map_over for step in written.values() if step.map_over not in {None, *given}}
    if lists:
        what = ", ".join(f"{step} over {name!r}" for step, name in lists.items())
        screen.line(f"mapped over a list that is not there yet, taken to have one item: {what}")
    screen.line(f"critical path {seconds(expected.critical_s * 1000)}: {' -> '.join(expected.critical)}")
    screen.line(
        f"makespan {seconds(expected.makespan_s * 1000)} for {seconds(expected.work_s * 1000)} of work, alone on this "
        f"stack; no schedule is faster than {seconds(expected.bound_s * 1000)}"
    )
    screen.line(f"bottleneck: {expected.bottleneck}")
    if expected.failure is not None:
        screen.line(f"it would fail: {expected.failure}", style="red")
    screen.line(f"tokens {expected.tokens} with one attempt each, never more than {expected.most_tokens}")
    screen.table(
        ("model", "steps", "slots", "busy", "file"),
        [
            (
                model.name,
                str(model.steps),
                str(model.slots),
                seconds(model.busy_s * 1000),
                mebibytes(model.file_bytes) if model.file_bytes is not None else "missing",
            )
            for model in expected.models
        ],
    )
    screen.heading("schedule")
    _print_schedule(screen, expected)
    hot = sum(model.need_bytes for model in expected.models if model.residency == "hot")
    guests = [model.need_bytes for model in expected.models if model.residency != "hot"]
    warm = f", and {mebibytes(max(guests))} to {mebibytes(sum(guests))} for those that are loaded" if guests else ""
    screen.line(f"memory: about {mebibytes(hot)} for the hot models involved{warm}")
    plan = PlanView(
        source=final.source,
        reason=final.reason,
        removed_edges=final.removed_edges,
        added_edges=final.added_edges or None,
        decisions=final.decisions,
        similar=final.similar,
    )
    print_plan_choices(screen, plan)


def _print_schedule(screen: Screen, expected: Forecast) -> None:
    """A bar per step, by model; a dot is a wait for a slot."""
    width_s = max(expected.makespan_s, 1e-3) / _BAR
    model_width = max(len(one.model) for one in expected.schedule) if expected.schedule else 0
    step_width = max(len(one.step) for one in expected.schedule) if expected.schedule else 0
    for one in expected.schedule:
        ready, start, end = (min(_BAR, round(at / width_s)) for at in (one.ready_s, one.start_s, one.end_s))
        bar = f"{' ' * ready}{'.' * (start - ready)}{'=' * max(1, end - start)}"[:_BAR]
        times = f"{seconds(one.start_s * 1000)} to {seconds(one.end_s * 1000)}"
        screen.line(f"{one.model:{model_width}}  {one.step:{step_width}}  |{bar:{_BAR}}|  {times}")
