"""A task as one page that needs nothing else: no network, no other file, and its script only for the hover.

Pure: a TaskView in, HTML out. Everything in a task may have been written by a model that was told to attack whoever
reads it: text is escaped here and in `chart.py`, and the page's policy forbids any script but its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from protocol.messages.artefact import Artefact
from protocol.messages.failure import Failure
from protocol.messages.gate import GateResult, Verdict
from protocol.messages.result import AttemptView, CriticalPath, StepState, StepView, TaskView
from services.ctl.chart import chart, safe, safe_block
from services.ctl.page_style import SCRIPT, STYLE, policy
from services.ctl.screen import seconds
from services.ctl.timetable import achieved_ms, path_steps

_MAX_ARTEFACT_CHARS: Final = 200_000
_STATES: Final = {"succeeded": "good", "done": "good", "failed": "bad", "cancelled": "doubt", "skipped": "doubt"}
_VERDICTS: Final = {Verdict.PASS: "good", Verdict.FAIL: "bad"}


def page(view: TaskView, now_ms: int) -> str:
    """The whole document; a task that still runs is drawn as it stands at `now_ms` (unix ms)."""
    parts = [_head(view), _cards(view)]
    if view.failure is not None:
        parts.append(f"<h2>Failure</h2>{_failure(view.failure)}")
    if view.critical_path is not None:
        parts.append(_paths(view.critical_path))
    if view.steps:
        parts.append(f"<h2>Timetable</h2>{chart(view, now_ms)}<h2>Attempts</h2>{_attempts(view)}")
    parts += [_plan(view), _gates(view.gates), _artefacts(view.artefacts)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(view.task_id)}: {safe(view.objective, 80)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(view: TaskView) -> str:
    created = datetime.fromtimestamp(view.created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f'<p class="soft"><span class="id">{safe(view.task_id)}</span> · {safe(view.task_type)} · '
        f"{safe(view.priority)} · {created}</p><h1>{safe(view.objective, 600)}</h1>"
        f"<p>{_chip(view.state.value, _STATES.get(view.state.value, ''))}</p>"
    )


def _cards(view: TaskView) -> str:
    usage = view.usage
    done = sum(step.state is StepState.DONE for step in view.steps)
    cards = [
        (f"{done} of {len(view.steps)}", f"steps done, {usage.attempts:,} attempts"),
        (f"{usage.generated_tokens:,}", f"tokens written, {usage.prompt_tokens:,} read"),
    ]
    critical = view.critical_path
    if critical is not None:
        why = "the longest chain" if critical.bound_by == "chain" else f"slots of {critical.bound_by}"
        cards = [
            (seconds(critical.wall_ms), "wall clock"),
            (seconds(critical.work_ms), f"of work, parallelism {critical.parallelism:.2f}"),
            *([(seconds(critical.lower_bound_ms), f"lower bound: {why}")] if critical.bound_by else []),
            (f"{critical.critical_steps} of {critical.total_steps}", "CriticalSteps, of all steps"),
            *cards,
        ]
    return "".join(
        [
            '<div class="cards">',
            *(f'<div class="card"><b>{safe(value)}</b><span>{safe(what)}</span></div>' for value, what in cards),
            "</div>",
        ]
    )


def _paths(critical: CriticalPath) -> str:
    achieved = path_steps(critical)
    rows = [("achieved", achieved, achieved_ms(critical))]
    if critical.predicted is not None:
        rows.insert(0, ("predicted", critical.predicted.steps, critical.predicted.length_ms))
    both = set(achieved) & set(critical.predicted.steps if critical.predicted is not None else ())
    cells = "".join(
        f'<span class="soft">{name}<br>{seconds(took)} of inference</span>'
        f'<span class="steps">{_steps(steps, both)}</span>'
        for name, steps, took in rows
    )
    note = "Predicted when the plan was adopted, from what was learned before; steps on both paths are marked."
    return f'<h2>Critical path</h2><div class="paths">{cells}</div><p class="soft">{note}</p>'


def _steps(steps: Sequence[str], both: set[str]) -> str:
    marked = (f'<span class="step{" both" if one in both else ""}">{safe(one, 64)}</span>' for one in steps)
    return " → ".join(marked) or "no step"


def _attempts(view: TaskView) -> str:
    slack = view.critical_path.slack_ms if view.critical_path is not None else {}
    titles = ("step", "try", "role, model", "waited", "worked", "gates", "read", "written", "slack")
    head = "".join(
        f"<th{' class=number' if title in titles[3:] or title == 'try' else ''}>{title}</th>" for title in titles
    )
    rows = []
    for step in view.steps:
        for attempt in step.attempts or (None,):
            first = attempt is None or attempt is step.attempts[0]
            late = slack.get(step.id) if attempt is None or attempt is step.attempts[-1] else None
            rows.append(f"<tr>{_step_cell(step) if first else '<td></td>'}{_attempt(step, attempt, late)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}<th>verdicts, failures, what followed</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _step_cell(step: StepView) -> str:
    needs = f'<p class="soft">needs {safe(", ".join(step.needs), 200)}</p>' if step.needs else ""
    agent = f'<p class="soft">sub-agent {safe(step.agent, 64)}</p>' if step.agent else ""
    return f'<td class="wide"><b>{safe(step.id, 64)}</b> {safe(step.action, 200)}{agent}{needs}</td>'


def _attempt(step: StepView, attempt: AttemptView | None, slack_ms: int | None) -> str:
    if attempt is None:
        chip = _chip(step.state.value, _STATES.get(step.state.value, ""))
        return f'<td class="number"></td><td>{safe(step.actor)}</td>{"<td></td>" * 6}<td>{chip}</td>'
    worker = f'<p class="soft">{safe(attempt.worker, 80)}</p>' if attempt.worker else ""
    numbers = [
        _spent(attempt, "queueing", "loading", "backoff"),
        _spent(attempt, "inference", "retry"),
        _spent(attempt, "gates"),
        f"{attempt.prompt_tokens:,}" + (f" ({attempt.cached_tokens:,} cached)" if attempt.cached_tokens else ""),
        f"{attempt.generated_tokens:,}"
        + (f" ({attempt.accepted_tokens:,} guessed)" if attempt.accepted_tokens else ""),
        seconds(slack_ms),
    ]
    return (
        f'<td class="number">{attempt.number}</td>'
        f'<td class="who">{safe(attempt.role)}, {safe(attempt.model)}{worker}</td>'
        + "".join(f'<td class="number">{number}</td>' for number in numbers)
        + f'<td class="wide">{_outcome(step, attempt)}</td>'
    )


def _spent(attempt: AttemptView, *kinds: str) -> str:
    took = sum(one.end_ms - one.start_ms for one in attempt.segments if one.what in kinds)
    return seconds(took) if took else ""


def _outcome(step: StepView, attempt: AttemptView) -> str:
    parts = [" ".join(_verdict(result) for result in attempt.gates)] if attempt.gates else []
    if attempt.failure is not None:
        parts.append(_failure(attempt.failure))
    if attempt.action is not None:
        parts.append(f"<p>then: {safe(attempt.action)}</p>")
    if attempt is step.attempts[-1]:
        if step.losses:
            parts.append(f'<p class="doubt">{step.losses} workers died with this step</p>')
        if attempt.failure is None and not parts:
            parts.append(_chip(step.state.value, _STATES.get(step.state.value, "")))
    return "".join(parts)


def _verdict(result: GateResult) -> str:
    tip = f"{result.gate}: {result.message}" if result.message else result.gate
    kind = _VERDICTS.get(result.verdict, "doubt")
    return f'<span class="chip {kind}" title="{safe(tip)}">{safe(result.gate)} {result.verdict.value}</span>'


def _chip(text: str, kind: str) -> str:
    return f'<span class="chip {kind}">{safe(text)}</span>'


def _failure(failure: Failure) -> str:
    findings = "".join(
        f"<p><code>{safe(':'.join(str(part) for part in (one.file, one.line, one.column) if part is not None))}</code> "
        f"{safe(one.rule or '')} {safe(one.message)}</p>"
        for one in failure.findings[:20]
    )
    where = f"{failure.category.value} {failure.code} ({failure.origin})"
    return f'<p><span class="bad">{safe(where)}</span>: {safe(failure.message, 600)}</p>{findings}'


def _plan(view: TaskView) -> str:
    if view.plan is None:
        return ""
    edges = "".join(
        f"<p>{safe(edge.step)} does not wait for {safe(edge.depends_on)}: {safe(edge.reason)}</p>"
        for edge in view.plan.removed_edges
    )
    edges += "".join(
        f"<p>{safe(edge.step)} waits for {safe(edge.depends_on)}: {safe(edge.reason)}</p>"
        for edge in view.plan.added_edges or ()
    )
    edges += "".join(
        f"<p>version {one.version} ({safe(one.trigger)}): {safe(one.reason, 300)}; kept {_names(one.kept)}, "
        f"dropped {_names(one.dropped)}, added {_names(one.added)}</p>"
        for one in view.plan.versions or ()
        if one.version > 1
    )
    return f"<h2>Plan</h2><p>by {safe(view.plan.source)}: {safe(view.plan.reason, 600)}</p>{edges}"


def _names(steps: Sequence[str]) -> str:
    return safe(", ".join(steps) or "nothing", 300)


def _gates(results: Sequence[GateResult]) -> str:
    if not results:
        return ""
    rows = "".join(f"<p>{_verdict(one)} {safe(one.message, 600)}</p>" for one in results)
    return f"<h2>Checks of the result</h2>{rows}"


def _artefacts(artefacts: Sequence[Artefact]) -> str:
    if not artefacts:
        return ""
    opened = " open" if len(artefacts) == 1 else ""
    folds = "".join(
        f"<details{opened}><summary><b>{safe(one.name)}</b> "
        f'<span class="soft">{safe(one.kind.value)}, {len(one.text()):,} characters</span></summary>'
        f"<pre>{safe_block(one.text(), _MAX_ARTEFACT_CHARS)}</pre></details>"
        for one in artefacts
    )
    return f"<h2>Artefacts</h2>{folds}"
