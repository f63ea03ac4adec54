"""How often the ranks of a running task are made anew: by the real hub in virtual time."""

from __future__ import annotations

from protocol.messages.result import TaskState
from protocol.messages.task import TaskIR
from services.scheduler.durations import Job, TokenSpeed
from services.scheduler.simulation.run import run_tasks, tiers_of
from tests.unit.planner_tasks import SHIPPED

STEPS = 200
TOKENS = 10


class Asked(TokenSpeed):
    """Counts how often it is asked for one step, the last of a task: once each time that ranks are made."""

    last = ""
    times = 0

    def expected_s(self, job: Job) -> float:
        self.times += job.step == self.last
        return super().expected_s(job)


def times_ranked(step_ms: int, count: int = STEPS) -> int:
    """For a chain of so many steps that take so long."""
    steps = [
        {
            "id": f"S{number}",
            "actor": "worker",
            "action": "work",
            "gates": [],
            "max_tokens": TOKENS,
            "inputs": [f"o{number - 1}"] if number else [],
            "outputs": [{"name": f"o{number}"}],
        }
        for number in range(count)
    ]
    task = TaskIR.model_validate({"objective": "rank", "plan": {"steps": steps}})
    speed = 1000 * TOKENS / step_ms
    known = Asked(speed)
    known.last = f"S{count - 1}"
    (record,) = run_tasks([task], SHIPPED, tiers_of(SHIPPED), known, TokenSpeed(speed)).tasks
    assert record.state is TaskState.SUCCEEDED
    return known.times


def test_ranks_are_made_anew_while_a_task_runs_but_not_many_times_a_second() -> None:
    slow, quick = times_ranked(step_ms=100), times_ranked(step_ms=1)
    assert slow >= 2 + STEPS // 50, "after each quarter of what is left, once known durations may have changed"
    assert 2 <= quick <= 3, "the whole task takes 200 ms: when it is planned, and once or twice more"


def test_what_was_predicted_of_a_plan_is_not_estimated_again_when_it_begins() -> None:
    assert times_ranked(step_ms=1, count=20) == 1
