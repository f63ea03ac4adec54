"""What is known about a running task, built from its events: one line per step, no clock, no I/O.

The same state feeds the live table of `run` and `watch` on a terminal; `event_line` says one event in plain words for
a pipe. Events of a kind this version does not know are shown by name and change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from protocol.messages.result import StepState, TaskEvent, TaskView
from services.ctl.screen import one_line, printable, seconds

#: Event of a step -> the word its state is shown as.
STATE_OF: Final[Mapping[str, str]] = {
    "step.ready": "ready",
    "step.started": "inferring",
    "step.tokens": "inferring",
    "step.answered": "checking",
    "step.checked": "checked",
    "step.retried": "retry",
    "step.done": "done",
    "step.failed": "failed",
    "step.skipped": "skipped",
    "step.lost": "again",
    "step.moved": "ready",
    "swarm.turned": "leading",
}

_MAX_ITEMS: Final = 20
"""Items of a list that one line of an event shows."""

_SETTLED: Final = frozenset({"done", "failed", "skipped", "cancelled", "dropped"})


@dataclass(slots=True)
class StepLine:
    """One step as it is shown."""

    id: str
    actor: str = ""
    action: str = ""
    state: str = "waiting"
    role: str = ""
    model: str = ""
    attempt: int = 0
    tokens: int = 0
    started_ms: int | None = None
    ended_ms: int | None = None
    note: str = ""

    def elapsed_ms(self, now_ms: int) -> int | None:
        """Milliseconds since its first attempt started, until its end."""
        if self.started_ms is None:
            return None
        return max(0, (self.ended_ms if self.ended_ms is not None else now_ms) - self.started_ms)


@dataclass(slots=True)
class Leading:
    """What a step that leads sub-agents has come to; repeated events change nothing."""

    turn: int = 1
    """The turn that its model is in, or waits for results to begin."""
    agents: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    refused: dict[int, int] = field(default_factory=dict)
    """Turn -> calls of it that were not carried out."""
    closing: str = ""

    def apply(self, fields: Mapping[str, Any]) -> None:
        """Take one `swarm.turned`."""
        turn = int(fields.get("turn", 0))
        self.turn = max(self.turn, turn + 1)
        self.agents.update(map(str, fields.get("agents", ())))
        self.given.update(map(str, fields.get("assigned", ())))
        self.refused[turn] = len(fields.get("refused", ()))
        self.closing = str(fields.get("closing") or self.closing)

    def words(self) -> str:
        """Which turn it is, how many sub-agents there are, what they were given."""
        said = f"turn {self.turn}, {_count(len(self.agents), 'sub-agent')}, {_count(len(self.given), 'assignment')}"
        refused = sum(self.refused.values())
        said += f", {_count(refused, 'call')} refused" if refused else ""
        return f"{said}; must answer: {self.closing}" if self.closing else said


@dataclass(slots=True)
class Progress:
    """A task while it runs."""

    task_id: str = ""
    state: str = "planning"
    source: str = ""
    note: str = ""
    """What became of the plan since."""
    steps: dict[str, StepLine] = field(default_factory=dict)
    last_seq: int = 0
    began_ms: int | None = None
    leading: dict[str, Leading] = field(default_factory=dict)
    """By the step that leads."""
    waiting: list[str] = field(default_factory=list)
    """Why what could run does not, since the newest event."""

    def apply(self, event: TaskEvent) -> None:
        """Take one event; late and repeated ones do no harm, since each only overwrites."""
        self.task_id = event.task_id
        self.last_seq = max(self.last_seq, event.seq)
        self.began_ms = event.at_ms if self.began_ms is None else min(self.began_ms, event.at_ms)
        self.waiting = []
        if event.event == "task.planned":
            self.state, self.source = "running", str(event.fields.get("source", ""))
        elif event.event == "task.plan_grown":
            self.state = "running, plan in the making"
        elif event.event == "task.replanning":
            self.note = (
                f"version {event.fields.get('version')} of the plan in the making ({event.fields.get('trigger')})"
            )
        elif event.event == "task.replanned":
            fields = event.fields
            counts = [f"{len(fields.get(key, []))} {key}" for key in ("kept", "dropped")]
            counts.append(f"{len(fields.get('steps', []))} added")
            self.note = f"version {fields.get('version')} of the plan ({fields.get('trigger')}: {', '.join(counts)})"
            for name in fields.get("dropped", []):
                line = self.steps.setdefault(str(name), StepLine(str(name)))
                line.state = "dropped" if line.state not in _SETTLED else line.state
        elif event.event == "task.replan_abandoned":
            self.note = f"version {event.fields.get('version')} of the plan was given up"
        elif event.event == "task.checked":
            self.state = "checking"
        elif event.event == "task.ended":
            self.state = str(event.fields.get("state", "ended"))
        elif event.event == "swarm.turned":
            for given in event.fields.get("assigned", ()):
                self.steps.setdefault(str(given), StepLine(str(given), action=f"assigned by {event.step}"))
            led = self.leading.setdefault(str(event.step), Leading())
            led.apply(event.fields)
            self.steps.setdefault(str(event.step), StepLine(str(event.step))).note = led.words()
            turn = f"{event.step}.turn{led.turn}"
            self.steps.setdefault(turn, StepLine(turn, action=f"turn {led.turn} of {event.step}"))
        if event.step is not None:
            self._apply_to_step(self.steps.setdefault(event.step, StepLine(event.step)), event)

    def learn(self, view: TaskView) -> None:
        """Take over what a `show` says about the plan: steps that have not begun, their roles and words."""
        for step in view.steps:
            line = self.steps.setdefault(step.id, StepLine(step.id))
            line.actor, line.action = step.actor, step.action
            line.role = line.role or step.actor
            if step.state is StepState.CANCELLED:
                line.state = "cancelled"

    def rows(self, now_ms: int) -> list[tuple[str, ...]]:
        """Cells for the table, in the order of the plan: step, state, role, model, tokens, elapsed, words."""
        return [
            (
                line.id,
                line.state,
                line.role or line.actor,
                line.model,
                str(line.tokens) if line.tokens else "",
                seconds(line.elapsed_ms(now_ms)),
                one_line(line.note or line.action, 60),
            )
            for line in self.steps.values()
        ]

    def summary(self, now_ms: int) -> str:
        """One line about the whole."""
        settled = sum(line.state in _SETTLED for line in self.steps.values())
        tokens = sum(line.tokens for line in self.steps.values())
        elapsed = seconds(max(0, now_ms - self.began_ms)) if self.began_ms is not None else ""
        line = f"{self.task_id}  {self.state}  {settled}/{len(self.steps)} steps  {tokens} tokens  {elapsed}".rstrip()
        return f"{line}  {self.note}" if self.note else line

    def _apply_to_step(self, line: StepLine, event: TaskEvent) -> None:
        if line.state in _SETTLED:
            return
        fields = event.fields
        line.state = STATE_OF.get(event.event, line.state)
        # The attempt's role and model come with whichever event first knows them.
        line.role = str(fields.get("role", line.role))
        line.model = str(fields.get("model", line.model))
        if event.event == "step.started":
            line.attempt = event.attempt or line.attempt
            line.started_ms = line.started_ms if line.started_ms is not None else event.at_ms
            line.note = f"attempt {line.attempt}" if line.attempt > 1 else ""
        tokens = fields.get("generated_tokens")
        if isinstance(tokens, int) and event.event in ("step.tokens", "step.answered"):
            line.tokens = tokens
        if event.event == "step.retried":
            line.note = f"{fields.get('category', '')}: {fields.get('action', '')} by {fields.get('rule', 'rule')}"
        elif event.event == "step.lost":
            again = "gates again" if fields.get("work") == "gates" else "runs again"
            line.note = f"{fields.get('category', 'PEER')}: {again}, no attempt is counted"
        elif event.event == "step.moved":
            line.note = f"moved to {line.model}: its own model is not served"
        if line.state in _SETTLED:
            line.ended_ms = event.at_ms


COLUMNS: Final = ("step", "state", "role", "model", "tokens", "elapsed", "")


def event_line(event: TaskEvent, began_ms: int) -> str:
    """One event as one plain line: seconds since the task began, what, where, and its fields."""
    since = (event.at_ms - began_ms) / 1000
    where = f" {event.step}" if event.step else ""
    attempt = f" attempt={event.attempt}" if event.attempt and event.attempt > 1 else ""
    fields = "".join(f" {name}={_value(value)}" for name, value in event.fields.items() if value is not None)
    return printable(f"{since:8.2f}s {event.event}{where}{attempt}{fields}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > _MAX_ITEMS:
        return f"{_value(value[:_MAX_ITEMS])},…({len(value)})"
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{one_line(str(item), 40)}" for name, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        parts = ["/".join(map(str, item.values())) if isinstance(item, Mapping) else str(item) for item in value]
        counts = Counter(one_line(part, 40) for part in parts)  # a model that is stuck has the same refused many times
        return ",".join(part if times == 1 else f"{part}({times})" for part, times in counts.items()) or "-"
    return one_line(str(value), 80) or "-"
