"""Deadlines that will be missed are seen early, and noise is taken for none: over many seeds, in virtual time."""

from __future__ import annotations

import math
import random

import pytest

from protocol.header import Header
from protocol.messages.result import TaskState
from services.scheduler import facts as f
from services.scheduler.durations import Job, LearnedDurations
from services.scheduler.lateness import own_speed
from tests.unit.simulation import Answer, World, final_of, task_of
from tests.unit.test_scheduler_replanning import chain_of, of_type, planned_stack, revisable

STEPS = 12
JOB = Job("worker", "doc", 1_000, 4_096)


def chain_with(took_ms: list[int], deadline_s: float, known_ms: list[int]) -> tuple[World, str]:
    """A chain whose steps take so long, after another task's steps took those other times."""
    told = dict(zip([f"S{n}" for n in range(1, STEPS + 1)], took_ms, strict=True))
    told |= {f"K{n}": ms for n, ms in enumerate(known_ms)}

    def answer(header: Header, _body: bytes) -> Answer:
        return told.get(header.step or "", 50), final_of(f"by {header.step}")

    world = planned_stack(answer)
    if known_ms:
        world.finish(world.submit(task_of([{"id": f"K{n}"} for n in range(len(known_ms))])))
    task = world.submit(revisable(chain_of(STEPS), deadline_s=deadline_s))
    world.finish(task)
    return world, task


@pytest.mark.parametrize("known", [0, 2, 20])
@pytest.mark.parametrize("seed", range(12))
def test_noise_asks_for_no_new_plan_and_a_hopeless_deadline_does(seed: int, known: int) -> None:
    rolled = random.Random(f"{seed} {known}")
    typical_ms = rolled.uniform(300, 5_000)
    elsewhere = math.exp(rolled.gauss(0, 0.5))  # other tasks of the role are faster or slower than this one
    took = [int(typical_ms * math.exp(rolled.gauss(0, 0.6))) for _ in range(STEPS)]
    known_ms = [int(typical_ms * elsewhere * math.exp(rolled.gauss(0, 0.6))) for _ in range(known)]
    in_time, task = chain_with(took, 1.3 * sum(took) / 1_000, known_ms)
    assert in_time.view(task).state is TaskState.SUCCEEDED
    assert not of_type(in_time, task, f.ReplanAsked)
    hopeless, task = chain_with(took, 0.4 * sum(took) / 1_000, known_ms)
    assert of_type(hopeless, task, f.ReplanAsked)
    assert hopeless.view(task).state is TaskState.SUCCEEDED


def test_what_was_seen_leaves_out_what_a_step_may_write() -> None:
    known = LearnedDurations()
    assert known.seen_s(JOB) == (0, 0)
    for _ in range(3):
        known.observe(JOB, 10.0)
    seconds, count = known.seen_s(JOB)
    assert (round(seconds, 6), count) == (10.0, 3)
    assert known.expected_s(JOB) > 12


def test_a_step_that_runs_counts_when_it_runs_longer_than_those_before() -> None:
    world = planned_stack(lambda header, _body: (4_000 if header.step == "S3" else 1_000, final_of("x")))
    task = world.submit(revisable(chain_of(4), deadline_s=1_000))
    world.run_for(2_500)
    record = world.recorded_tasks()[task]
    assert world.hub is not None
    ranking = world.hub.engine.ranking
    before = own_speed(record, ranking, record.created_ms + 2_500)["worker"]
    assert before.done == 2
    later = own_speed(record, ranking, record.created_ms + 5_500)["worker"]
    assert later.done == 2
    assert later.mean > before.mean
