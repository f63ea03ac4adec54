from __future__ import annotations

import io

from protocol.messages.result import RefusedCall, SubAgentView, SwarmView, TaskState, TaskView
from services.ctl.screen import Screen
from services.ctl.swarm_view import print_swarms


def agent(number: int, failed: int = 0) -> SubAgentView:
    return SubAgentView(
        name=f"a{number}",
        role="worker",
        system_prompt=f"You are number {number}.",
        persona=f"a{number}-1f2e",
        turn=1,
        steps=[f"L.a{number}.1"],
        done=1 - failed,
        failed=failed,
        generated_tokens=7,
        result=f"result {number}\x1b[31m",
    )


def printed(*swarms: SwarmView, told: bool) -> str:
    out = io.StringIO()
    task = TaskView(
        task_id="t",
        state=TaskState.RUNNING,
        objective="o",
        task_type="chat",
        priority="batch",
        created_ms=0,
        last_seq=1,
        swarms=list(swarms) or None,
    )
    print_swarms(Screen(out, io.StringIO(), as_json=False), task, told=told)
    return out.getvalue()


def swarm(*agents: SubAgentView) -> SwarmView:
    refused = [
        RefusedCall(turn=turn, tool="run_shell", agent="", code="tool.unknown", message=f"no. {turn}")
        for turn in range(1, 9)
    ]
    return SwarmView(step="L", turns=9, tool_calls=20, agents=list(agents), refused=refused, generated_tokens=99)


def test_a_task_without_sub_agents_says_nothing_of_them() -> None:
    assert printed(told=True) == ""


def test_show_has_a_line_for_each_sub_agent_and_the_newest_refusals() -> None:
    text = printed(swarm(agent(1), agent(2, failed=1)), told=False)
    assert "2 sub-agents, 2 assignments (1 done, 1 failed), 9 turns, 20 tool calls, 99 tokens" in text
    assert "result 1" in text
    assert "\x1b" not in text
    assert "L.turn1" in text
    assert "refused in turn 4: run_shell: tool.unknown: no. 4" in text
    assert "no. 3" not in text
    assert "You are number" not in text


def test_explain_has_what_each_one_was_told_and_every_refusal() -> None:
    text = printed(swarm(agent(1)), told=True)
    assert "a1-1f2e: You are number 1." in text
    assert "no. 1\n" in text


def test_of_a_large_swarm_those_that_failed_come_first() -> None:
    text = printed(swarm(*(agent(number) for number in range(99)), agent(99, failed=1)), told=False)
    rows = [line for line in text.splitlines() if line.startswith("a") and "worker" in line]
    assert len(rows) == 40
    assert rows[0].startswith("a99")
    assert "40 of 100 sub-agents" in text


def test_why_a_model_was_made_to_answer_is_said() -> None:
    made = swarm(agent(1)).model_copy(update={"ending": "turn 9 is the last one"})
    assert "its model was made to answer: turn 9 is the last one" in printed(made, told=False)
    assert "made to answer" not in printed(swarm(agent(1)), told=False)
