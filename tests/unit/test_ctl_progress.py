from __future__ import annotations

from typing import Any

from protocol.messages.result import TaskEvent
from services.ctl.progress import Progress, event_line


def event(seq: int, name: str, step: str | None = None, attempt: int | None = None, **fields: Any) -> TaskEvent:
    return TaskEvent(task_id="t-1", seq=seq, at_ms=1_000 * seq, event=name, step=step, attempt=attempt, fields=fields)


STORY = [
    event(1, "task.accepted"),
    event(2, "task.planned", source="rules", steps=[{"id": "S1", "actor": "worker"}]),
    event(3, "step.ready", "S1", 1, role="worker", model="small"),
    event(4, "step.started", "S1", 1, worker="inference-small"),
    event(4, "step.tokens", "S1", 1, generated_tokens=12),
    event(6, "step.answered", "S1", 1, generated_tokens=40),
    event(7, "step.retried", "S1", 1, code="gate.schema", category="SCHEMA", action="retry", rule="SCHEMA 1/2"),
    event(8, "step.started", "S1", 2, worker="inference-small"),
    event(9, "step.done", "S1"),
    event(10, "task.ended", state="succeeded"),
]


def after(count: int) -> Progress:
    progress = Progress()
    for item in STORY[:count]:
        progress.apply(item)
    return progress


def test_a_step_is_shown_with_role_model_tokens_and_elapsed_time() -> None:
    assert after(5).rows(9_000) == [("S1", "inferring", "worker", "small", "12", "5.00 s", "")]


def test_a_retry_says_why_and_the_next_attempt_its_number() -> None:
    assert after(7).rows(9_000)[0][-1] == "SCHEMA: retry by SCHEMA 1/2"
    assert after(8).rows(9_000)[0][-1] == "attempt 2"


def test_a_finished_step_stops_its_clock_and_stays_finished() -> None:
    progress = after(10)
    assert progress.rows(99_000)[0][5] == "5.00 s"
    progress.apply(STORY[4])
    assert progress.rows(99_000)[0][1] == "done"
    assert progress.summary(10_000) == "t-1  succeeded  1/1 steps  40 tokens  9.00 s"


def test_events_seen_twice_change_nothing() -> None:
    once, twice = after(10), after(10)
    for item in STORY:
        twice.apply(item)
    assert (once.rows(0), once.state, once.last_seq) == (twice.rows(0), twice.state, twice.last_seq)


def test_an_event_of_a_later_version_is_shown_and_changes_nothing() -> None:
    progress = after(5)
    before = progress.rows(0)
    progress.apply(event(11, "step.pondered", "S1", depth=3))
    assert progress.rows(0) == before
    assert event_line(event(11, "step.pondered", "S1", depth=3), 1_000) == "   10.00s step.pondered S1 depth=3"


def test_an_event_is_one_line_without_control_characters() -> None:
    line = event_line(event(2, "step.answered", "S1", 2, outputs=["a", "b"], text="x\x1b[31m\ny"), 1_000)
    assert line == "    1.00s step.answered S1 attempt=2 outputs=a,b text=x[31m y"


def test_sub_agents_are_lines_of_their_own_from_the_turn_that_gives_them_work() -> None:
    progress = after(4)
    given = [f"S1.ann.{number}" for number in range(1, 31)]
    turned = event(5, "swarm.turned", "S1", turn=1, agents=["ann"], assigned=given, refused=[])
    progress.apply(turned)
    rows = {row[0]: row for row in progress.rows(9_000)}
    assert rows["S1"][1] == "leading"
    assert rows["S1"][-1] == "turn 2, 1 sub-agent, 30 assignments"
    assert rows["S1.ann.30"][1:] == ("waiting", "", "", "", "", "assigned by S1")
    line = event_line(turned, 1_000)
    assert line.startswith("    4.00s swarm.turned S1 turn=1 agents=ann assigned=S1.ann.1,")
    assert line.endswith("S1.ann.20,…(30) refused=-")


def test_a_leading_step_says_which_turn_it_is_and_what_became_of_the_others() -> None:
    refused = [{"agent": "ann", "code": "agent.exists"}] * 17
    told = [
        event(5, "swarm.turned", "S1", turn=0, agents=[], assigned=[], refused=[]),
        event(6, "swarm.turned", "S1", turn=1, agents=["ann", "bob"], assigned=["S1.ann.1"], refused=refused),
        event(7, "swarm.turned", "S1", turn=2, agents=[], assigned=[], refused=[], closing="turn 2 failed (x)"),
    ]
    progress = after(2)
    notes = []
    for item in [*told, told[1]]:
        progress.apply(item)
        notes.append({row[0]: row[-1] for row in progress.rows(9_000)}["S1"])
    assert {row[0]: row[-1] for row in progress.rows(9_000)}["S1.turn3"] == "turn 3 of S1"
    assert notes[0] == "turn 1, 0 sub-agents, 0 assignments"
    assert notes[1] == "turn 2, 2 sub-agents, 1 assignment, 17 calls refused"
    assert progress.leading["S1"].words() == (
        "turn 3, 2 sub-agents, 1 assignment, 17 calls refused; must answer: turn 2 failed (x)"
    )
    assert event_line(told[1], 1_000).endswith(" refused=ann/agent.exists(17)")
