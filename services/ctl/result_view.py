"""A task for people: its result with artefacts, gates, routing, critical path and usage; a list of tasks.

Takes what the hub said and prints it; asks nothing and decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from protocol.messages.artefact import Artefact
from protocol.messages.failure import Failure
from protocol.messages.gate import GateResult, Verdict
from protocol.messages.result import PlanView, StepView, TaskState, TaskSummary, TaskView
from services.ctl.failure_story import (
    evidence_lines,
    failure_line,
    is_troubled,
    print_step_story,
    print_task_story,
)
from services.ctl.gantt import MAX_ROWS, gantt, path_rows, path_summary
from services.ctl.outcomes import ExitCode
from services.ctl.screen import STYLES, Screen, one_line, seconds
from services.ctl.swarm_view import print_swarms
from services.ctl.timetable import notable
from services.kit.clock import SteadyClock

_MAX_LINES = 200
_PIPE_COLUMNS = 100
_NAMED_STEPS = 3


def exit_code_of(state: TaskState) -> ExitCode:
    """0 for a success, 1 for a failed or cancelled task; a task that still runs has not failed."""
    return ExitCode.FAILED if state in (TaskState.FAILED, TaskState.CANCELLED) else ExitCode.OK


def print_task(screen: Screen, view: TaskView, files: Sequence[Path] = ()) -> None:
    """Everything about a task, the most wanted first; `files` says where artefacts were written."""
    screen.line(f"{view.task_id}: {view.state.value}", style=STYLES.get(view.state.value))
    screen.line(f"objective: {one_line(view.objective, 200)}")
    for reason in view.waiting:
        screen.line(f"waiting: {reason}", style="yellow")
    if view.failure is not None:
        _print_failure(screen, view.failure)
    if view.steps:
        screen.heading("steps")
        shown = notable(view, MAX_ROWS)
        columns = ("step", "state", "role", "model", "tries", "read", "cached", "tokens", "took", "action")
        screen.table(columns, _step_rows(shown))
        if len(shown) < len(view.steps):
            states = Counter(step.state.value for step in view.steps)
            counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
            screen.line(
                f"the {len(shown)} most notable of {len(view.steps)} steps ({counts}); all: --html FILE or --json"
            )
        for step in shown:
            if is_troubled(step):
                print_step_story(screen, step, told=False)
    print_task_story(screen, view)
    print_swarms(screen, view, told=False)
    for index, artefact in enumerate(view.artefacts):
        _print_artefact(screen, artefact, files[index] if index < len(files) else None)
    _print_gates(screen, view)
    if view.plan is not None:
        print_plan_choices(screen, view.plan)
    _print_time(screen, view)
    screen.heading("usage")
    usage = view.usage
    screen.line(
        f"{usage.generated_tokens} tokens generated, {usage.prompt_tokens} read ({usage.cached_tokens} from cache), "
        f"{usage.attempts} attempts"
    )


def _print_time(screen: Screen, view: TaskView) -> None:
    critical = view.critical_path
    if critical is None and not view.steps:
        return
    screen.heading("time so far" if critical is None else "critical path")
    for line in path_summary(critical) if critical is not None else ():
        screen.line(line)
    columns = _PIPE_COLUMNS if screen.rich is None else screen.rich.width
    for bar in gantt(view, columns, SteadyClock().now_ms()):
        screen.line(bar.text, style="bold" if bar.critical else None)
    if critical is not None:
        screen.table(("step", "what", "took", "share"), path_rows(critical))


def print_plan_choices(screen: Screen, plan: PlanView) -> None:
    """Who planned, what was chosen, which edges went."""
    screen.heading("routing decisions")
    screen.line(f"plan by {plan.source}: {plan.reason}")
    if plan.decisions:
        screen.table(
            ("step", "subject", "choice", "instead of", "chance", "why"),
            [
                (
                    told_steps(item.ids),
                    item.subject,
                    item.choice,
                    ", ".join(other for other in item.alternatives if other != item.choice),
                    f"{item.propensity:.2f}",
                    one_line(item.rule, 100),
                )
                for item in plan.decisions
            ],
        )
    for edge in plan.removed_edges:
        screen.line(f"dropped: {edge.step} does not wait for {edge.depends_on}: {edge.reason}")
    for new in plan.added_edges or ():
        screen.line(f"added: {new.step} waits for {new.depends_on}: {new.reason}")
    _print_shapes(screen, plan)
    print_versions(screen, plan)


def told_steps(names: Iterable[str]) -> str:
    """What a decision is about: the task, or steps, of which the first few are named."""
    first, *more = [name or "task" for name in names]
    return f"{first} and {len(more)} more" if len(more) >= _NAMED_STEPS else ", ".join((first, *more))


def _print_shapes(screen: Screen, plan: PlanView) -> None:
    """The plan before and after the discovery of parallelism."""
    if plan.as_written is None or plan.as_run is None:
        return
    screen.table(
        ("plan", "width", "levels", "predicted", "critical path"),
        [
            (
                name,
                str(one.width),
                str(one.levels),
                seconds(one.predicted_ms),
                f"{seconds(one.critical_ms)}: {one_line(' -> '.join(one.critical), 100)}",
            )
            for name, one in (("as written", plan.as_written), ("as it runs", plan.as_run))
        ],
    )


def print_versions(screen: Screen, plan: PlanView) -> None:
    """Every version of a plan that was made anew: what asked for it, and what was kept, dropped and added."""
    if plan.versions is None:
        return
    screen.heading("versions of the plan")
    for one in plan.versions:
        if one.version == 1:
            screen.line("version 1: as planned")
            continue
        became = "in the making" if one.adopted_ms is None else "in force"
        became = f"given up: {one.abandoned}" if one.abandoned is not None else became
        style = "yellow" if one.abandoned is not None else None
        screen.line(f"version {one.version}, {one.trigger}, {one_line(became, 200)}", style=style)
        screen.line(f"  asked for by {one_line(one.reason, 300)} ({one_line(one.rule, 200)})")
        for name, steps in (("kept", one.kept), ("dropped", one.dropped), ("added", one.added)):
            if steps:
                screen.line(f"  {name}: {one_line(', '.join(steps), 200)}")
        if one.how:
            screen.line(f"  {one_line(one.how, 300)}")


def print_listing(screen: Screen, tasks: Sequence[TaskSummary]) -> None:
    """Tasks, newest first."""
    screen.table(
        ("task", "state", "type", "steps", "created", "took", "objective"),
        [
            (
                task.task_id,
                task.state.value,
                task.task_type,
                f"{task.steps_done}/{task.steps_total}",
                datetime.fromtimestamp(task.created_ms / 1000, UTC).astimezone().strftime("%m-%d %H:%M:%S"),
                seconds(task.ended_ms - task.created_ms) if task.ended_ms is not None else "",
                one_line(task.objective, 60),
            )
            for task in tasks
        ],
    )


def _step_rows(steps: Sequence[StepView]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for step in steps:
        last = step.attempts[-1] if step.attempts else None
        took = step.ended_ms - step.attempts[0].queued_ms if step.ended_ms is not None and step.attempts else None
        rows.append(
            (
                step.id,
                step.state.value,
                last.role if last else step.actor,
                last.model if last else "",
                str(len(step.attempts)),
                str(sum(attempt.prompt_tokens for attempt in step.attempts)),
                str(sum(attempt.cached_tokens for attempt in step.attempts)),
                _tokens(step),
                seconds(took),
                one_line(step.action, 60),
            )
        )
    return rows


def _tokens(step: StepView) -> str:
    """Tokens generated, and how many of them a guess had right."""
    generated = sum(attempt.generated_tokens for attempt in step.attempts)
    guessed = sum(attempt.accepted_tokens for attempt in step.attempts)
    return f"{generated} ({guessed} guessed)" if guessed else str(generated)


def _print_failure(screen: Screen, failure: Failure) -> None:
    screen.line(f"failure: {failure_line(failure)}", style="red")
    for line in evidence_lines(failure):
        screen.line(f"  {line}")


def _print_artefact(screen: Screen, artefact: Artefact, file: Path | None) -> None:
    screen.heading(f"artefact {artefact.name} ({artefact.kind.value}){f' -> {file}' if file else ''}")
    lines = artefact.text().splitlines()
    for line in lines[:_MAX_LINES]:
        screen.line(line)
    if len(lines) > _MAX_LINES:
        screen.line(f"… {len(lines) - _MAX_LINES} more lines; the whole text: --output DIR", style="dim")


def _print_gates(screen: Screen, view: TaskView) -> None:
    results: list[tuple[str, GateResult]] = [
        (step.id if len(step.attempts) == 1 else f"{step.id}#{attempt.number}", result)
        for step in view.steps
        for attempt in step.attempts
        for result in attempt.gates
    ]
    results += [("task", result) for result in view.gates]
    if not results:
        return
    # What did not pass comes first where there is more than anybody reads.
    ordered = sorted(results, key=lambda one: one[1].verdict is Verdict.PASS) if len(results) > MAX_ROWS else results
    screen.heading("gates")
    screen.table(
        ("of", "gate", "verdict", "took", "message"),
        [
            (
                where,
                result.gate,
                result.verdict.value,
                seconds(result.ended_ms - result.started_ms),
                one_line(result.message, 120),
            )
            for where, result in ordered[:MAX_ROWS]
        ],
    )
    if len(ordered) > MAX_ROWS:
        verdicts = Counter(result.verdict.value for _, result in ordered)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        screen.line(f"{MAX_ROWS} of {len(ordered)} results ({counts}); all: --html FILE or --json")
