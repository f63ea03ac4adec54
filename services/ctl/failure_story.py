"""The story of each failure for people: category, evidence, action, rule, and what the next attempt was given.

Used by `show` and `explain`; in JSON the same is part of every attempt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from protocol.messages.failure import Failure, Finding
from protocol.messages.result import AttemptView, Setback, StepView, TaskView
from services.ctl.screen import Screen, one_line, seconds

_MAX_EVIDENCE: Final = 8
_ARMS: Final = {"harder": " with a larger budget", "escalated": " after an escalation"}


def is_troubled(step: StepView) -> bool:
    """True for a step that did not go straight to its end."""
    repaired = any(attempt.repaired or attempt.setbacks for attempt in step.attempts)
    return bool(step.failure or len(step.attempts) > 1 or step.losses or repaired)


def failure_line(failure: Failure) -> str:
    """A failure in one line."""
    return one_line(f"{failure.category.value} {failure.code} ({failure.origin}): {failure.message}", 400)


def print_step_story(screen: Screen, step: StepView, *, told: bool) -> None:
    """Every attempt of a step; with `told`, word for word what each was told about the ones before it."""
    for attempt in step.attempts:
        what = (
            f"{step.id} attempt {attempt.number} by {attempt.role}{_ARMS.get(attempt.arm or '', '')} on {attempt.model}"
        )
        screen.line(f"{what}: {_outcome(step, attempt)}", style="yellow" if attempt.failure else None)
        for line in _given(attempt, told=told):
            screen.line(f"  {line}", style="dim")
        for line in setback_lines(attempt.setbacks or ()):
            screen.line(f"  {line}")
        if attempt.failure is not None:
            for line in evidence_lines(attempt.failure):
                screen.line(f"  evidence: {line}")
            screen.line(f"  then: {attempt.action or 'nothing more'}")
    if step.losses:
        screen.line(f"{step.id}: {step.losses} workers died while they had it; that counts against nobody")
    if step.failure is not None:
        screen.line(f"{step.id} failed: {failure_line(step.failure)}", style="red")


def print_task_story(screen: Screen, view: TaskView) -> None:
    """What came to nothing around the steps: planning, final checks, memory."""
    for line in setback_lines(view.setbacks or ()):
        screen.line(line, style="yellow")


def setback_lines(setbacks: Sequence[Setback]) -> Iterator[str]:
    """One line for each run that came to nothing."""
    for one in setbacks:
        pause = f" in {seconds(one.delay_ms)}" if one.delay_ms else ""
        why = one_line(f"{one.category} {one.code}: {one.message}", 200)
        yield f"{one.work} came to nothing: {why} -> {one.action}{pause} ({one.rule})"


def evidence_lines(failure: Failure) -> Iterator[str]:
    """Findings, and the values that support the message, a line each."""
    for finding in failure.findings[:_MAX_EVIDENCE]:
        yield one_line(f"{finding.gate} {_place(finding)} {finding.rule or ''} {finding.message}", 200)
    if len(failure.findings) > _MAX_EVIDENCE:
        yield f"and {len(failure.findings) - _MAX_EVIDENCE} more findings"
    for name, value in list(failure.evidence.items())[:_MAX_EVIDENCE]:
        yield one_line(f"{name} = {value}", 200)


def _outcome(step: StepView, attempt: AttemptView) -> str:
    if attempt.failure is not None:
        return failure_line(attempt.failure)
    if attempt is not step.attempts[-1] or step.state.value != "done":
        return step.state.value
    return "accepted after the model mended its JSON" if attempt.repaired else "accepted"


def _given(attempt: AttemptView, *, told: bool) -> Iterator[str]:
    if attempt.told is None:
        return
    points = sum(1 for line in attempt.told.splitlines() if line.startswith("- "))
    with_answers = ", and the earlier attempts with their answers" if "<earlier>" in attempt.told else ""
    yield f"was given {points} lines of findings{with_answers} ({len(attempt.told)} characters)"
    if told:
        yield from (f"| {line}" for line in attempt.told.splitlines())


def _place(finding: Finding) -> str:
    parts = (finding.artefact or finding.file, finding.line, finding.column)
    return ":".join(str(part) for part in parts if part is not None)
