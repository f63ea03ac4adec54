"""Folds facts into the state of tasks: no decisions here, so a replay can do nothing but repeat what was.

`apply` is total for facts in the order in which the machine made them; anything else raises, because a journal
that contradicts itself must stop the hub rather than be guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel

from protocol.messages.artefact import Artefact
from protocol.messages.failure import Failure
from protocol.messages.gate import GateResult
from protocol.messages.memory import Lesson
from protocol.messages.persona import Persona
from protocol.messages.plan import PlanVersion
from protocol.messages.result import StepState, TaskState
from protocol.messages.task import Output, Plan, Step, TaskIR
from protocol.plan_graph import needs
from services.scheduler import facts as f
from services.scheduler.swarm_state import Agent, Swarm, ToolCall, turn_id
from services.scheduler.tasks import (
    Attempt,
    JournalError,
    PlanOrigin,
    Revising,
    Setback,
    StepRecord,
    TaskRecord,
)

M = TypeVar("M", bound=BaseModel)


def begin(fact: f.TaskAccepted) -> TaskRecord:
    """A task from its first fact."""
    ir = _message(TaskIR, fact.ir)
    record = TaskRecord(id=fact.task, ir=ir, client=fact.client, created_ms=fact.at_ms, seq=1)
    record.artefacts = {artefact.name: artefact for artefact in ir.inputs}
    return record


def fold(history: Iterable[f.Fact]) -> TaskRecord:
    """Rebuild one task from its facts, oldest first. Raises JournalError if they contradict each other."""
    record: TaskRecord | None = None
    for fact in history:
        if record is None:
            if not isinstance(fact, f.TaskAccepted):
                raise JournalError(f"task {fact.task} begins with {type(fact).__name__}")
            record = begin(fact)
        else:
            apply(record, fact)
    if record is None:
        raise JournalError("a task without facts")
    return record


def apply(task: TaskRecord, fact: f.Fact) -> None:
    """Take one fact into the state. Raises JournalError where it cannot follow what was before."""
    if task.state.final and not isinstance(fact, f.OutcomesSettled | f.DuplicateSeen | f.TaskSetback):
        raise JournalError(f"{type(fact).__name__} after the end of task {task.id}")
    task.seq += 1
    of_step = _OF_A_STEP.get(type(fact))
    if of_step is not None:
        step = task.steps.get(fact.step or "")
        if step is None or step.state.final:
            raise JournalError(f"{type(fact).__name__} for step {fact.step} of {task.id}, which cannot take it")
        of_step(task, step, fact)
        step.changed = task.seq
        return
    match fact:
        case f.TaskPlanned():
            _adopt_plan(task, fact)
        case f.PlanGrown():
            _grow_plan(task, fact)
        case f.ReplanAsked():
            _ask_replan(task, fact)
        case f.TaskReplanned():
            _replan(task, fact)
        case f.ReplanAbandoned():
            _end_revising(task, fact.version, abandoned=fact.reason[:1_000])
        case f.PersonasMade():
            task.personas |= {one.name: one for one in map(Persona.model_validate, fact.personas)}
        case f.StepsAdded():
            _add_steps(task, [Step.model_validate(value) for value in fact.steps])
        case f.TaskChecked():
            task.gates = [GateResult.model_validate(gate) for gate in fact.gates]
        case f.TaskEnded():
            task.state = TaskState(fact.state)
            task.ended_ms = fact.at_ms
            task.failure = _failure(fact.failure)
        case f.TaskSetback():
            _set_back(task, fact)
        case f.OutcomesSettled():
            task.settled = True
        case f.DuplicateSeen():
            pass  # recorded for people; it has no effect, which is the point
        case f.TaskAccepted():
            raise JournalError(f"task {task.id} was accepted twice")
        case _:
            raise JournalError(f"{type(fact).__name__} is no fact that this version knows")


def _message(model: type[M], values: Mapping[str, Any]) -> M:
    """A message of a fact: the very one that it was made from, or read back where it comes from the journal."""
    if isinstance(values, f.Dumped) and isinstance(values.message, model):
        return values.message
    return model.model_validate(values)


def _adopt_plan(task: TaskRecord, fact: f.TaskPlanned) -> None:
    task.ir = _message(TaskIR, fact.ir)
    for artefact in task.ir.inputs:  # the planner may have added some: the pieces of a long input
        task.artefacts.setdefault(artefact.name, artefact)
    lessons = tuple(Lesson.model_validate(one) for one in fact.lessons or ())
    task.plan = PlanOrigin(
        fact.source,
        fact.reason,
        fact.removed_edges,
        fact.decisions,
        fact.similar,
        lessons,
        fact.added_edges or [],
        fact.as_written,
        fact.as_run,
    )
    first = PlanVersion(version=1, at_ms=task.created_ms, trigger="planned", reason=fact.source, how=fact.reason)
    task.versions = [first.model_copy(update={"adopted_ms": fact.at_ms})]
    if not task.plan_open:
        task.planned_ms = fact.at_ms
    task.plan_open = False
    task.predicted_ms = fact.predicted_ms
    task.predicted_steps = fact.predicted_steps or []
    task.slots = fact.slots or {}
    task.state = TaskState.RUNNING
    task.generated_tokens += fact.generated_tokens
    plan = task.ir.plan
    if plan is None:
        raise JournalError(f"task {task.id} was planned without a plan")
    _begin_steps(task, plan, [spec for spec in plan.steps if spec.id not in task.steps])


def _grow_plan(task: TaskRecord, fact: f.PlanGrown) -> None:
    """The first steps make the task run, although its plan is not whole."""
    added = [Step.model_validate(value) for value in fact.steps]
    begun: list[Step] = []
    if task.ir.plan is None:
        task.state, task.planned_ms, task.plan_open = TaskState.RUNNING, fact.at_ms, True
    else:
        begun = task.ir.plan.steps
    plan = Plan(steps=[*begun, *added])
    task.ir = task.ir.model_copy(update={"plan": plan})
    _begin_steps(task, plan, added)  # what reads the result of a step that has failed waits for the next version


def _ask_replan(task: TaskRecord, fact: f.ReplanAsked) -> None:
    notes = Artefact(name=f"V{fact.version}.notes", value=fact.notes)
    task.artefacts[notes.name] = notes
    held = frozenset(fact.held)
    task.revising = Revising(fact.version, fact.trigger, fact.step, _failure(fact.failure), held, notes.name)
    asked = {"version": fact.version, "at_ms": fact.at_ms, "trigger": fact.trigger, "reason": fact.reason}
    task.versions.append(PlanVersion.model_validate(asked | {"rule": fact.rule}))


def _end_revising(task: TaskRecord, version: int, **changes: Any) -> None:
    if task.revising is None or task.revising.version != version:
        raise JournalError(f"version {version} of the plan of {task.id} ended without having been asked for")
    task.revising = None
    task.versions[-1] = task.versions[-1].model_copy(update=changes)


def _replan(task: TaskRecord, fact: f.TaskReplanned) -> None:
    """What was dropped leaves the plan, not the story: its record stays, skipped, and so does everything it made."""
    added = [Step.model_validate(value) for value in fact.added]
    ids = [step.id for step in added]
    how = f"{fact.source}: {fact.reason}"
    _end_revising(task, fact.version, adopted_ms=fact.at_ms, how=how, kept=fact.kept, dropped=fact.dropped, added=ids)
    if task.ir.plan is None:
        raise JournalError(f"task {task.id} was planned anew without a plan")
    for name in fact.dropped:
        if not task.steps[name].state.final:
            _end_step(task, task.steps[name], StepState.SKIPPED, fact.at_ms)
            task.steps[name].changed = task.seq
    alive = {*fact.kept, *ids}
    kept = [
        step.model_copy(update={"depends_on": [other for other in step.depends_on if other in alive]})
        for step in task.ir.plan.steps
        if step.id in alive
    ]
    plan = task.ir.plan.model_copy(update={"steps": [*kept, *added]})
    task.ir = task.ir.model_copy(update={"plan": plan})
    task.slots = fact.slots | task.slots
    task.generated_tokens += fact.generated_tokens
    if task.plan is not None:
        task.plan.decisions.extend(fact.decisions)
    waits = needs(plan)
    for spec in kept:
        record = task.steps[spec.id]
        if record.state is StepState.WAITING:
            record.spec, record.needs, record.waiting_for = spec, waits[spec.id], _missing(task, waits[spec.id], alive)
            record.changed = task.seq
    for spec in added:
        missing = _missing(task, waits[spec.id], alive)
        task.steps[spec.id] = StepRecord(spec=spec, needs=waits[spec.id], waiting_for=missing)
    task.unfinished += len(added)
    task.dependents = {name: [] for name in task.steps}
    for name, record in task.steps.items():
        for other in record.needs:
            task.dependents[other].append(name)


def _missing(task: TaskRecord, names: Iterable[str], coming: Iterable[str]) -> set[str]:
    return {name for name in names if name in coming and not _is_done(task, name)}


def _is_done(task: TaskRecord, name: str) -> bool:
    return name in task.steps and task.steps[name].state is StepState.DONE


def _begin_steps(task: TaskRecord, plan: Plan, specs: list[Step]) -> None:
    """Steps of a plan that has just been adopted, or grown."""
    waits = needs(plan)
    for spec in specs:
        missing = {other for other in waits[spec.id] if not _is_done(task, other)}
        task.steps[spec.id] = StepRecord(spec=spec, needs=waits[spec.id], waiting_for=missing)
        task.dependents[spec.id] = []
    for spec in specs:
        for other in waits[spec.id]:
            task.dependents[other].append(spec.id)
    task.unfinished += len(specs)


def _add_steps(task: TaskRecord, added: list[Step]) -> None:
    if task.ir.plan is None:
        raise JournalError(f"steps were added to {task.id} before it was planned")
    plan = task.ir.plan.model_copy(update={"steps": [*task.ir.plan.steps, *added]})
    task.ir = task.ir.model_copy(update={"plan": plan})
    waits = needs(plan)
    for spec in added:
        missing = {other for other in waits[spec.id] if other not in task.steps or not task.steps[other].state.final}
        task.steps[spec.id] = StepRecord(spec=spec, needs=waits[spec.id], waiting_for=missing)
        task.dependents.setdefault(spec.id, [])
    for spec in added:
        for other in waits[spec.id]:
            task.dependents[other].append(spec.id)
    task.unfinished += len(added)


def _expand(task: TaskRecord, step: StepRecord, fact: f.StepExpanded) -> None:
    """One sub-step per item; the mapped step itself waits for them and is made of nothing but their outputs."""
    items = [Artefact.model_validate(value) for value in fact.items]
    spec, output = step.spec, step.spec.outputs[0]
    for number, item in enumerate(items, 1):
        sub = spec.model_copy(
            update={
                "id": f"{spec.id}.{number}",
                "map_over": None,
                "depends_on": [],
                "inputs": [*(name for name in spec.inputs if name != spec.map_over), item.name],
                "outputs": [output.model_copy(update={"name": f"{output.name}.{number}"})],
            }
        )
        task.artefacts[item.name] = item
        task.steps[sub.id] = StepRecord(spec=sub, needs=step.needs, waiting_for=set())
        task.dependents[sub.id] = [spec.id]
        step.waiting_for.add(sub.id)
    step.needs |= step.waiting_for
    step.state = StepState.EXPANDED
    task.unfinished += len(items)


def _take_turn(task: TaskRecord, step: StepRecord, fact: f.SwarmTurned) -> None:
    """Sub-agents as the turn made them, one sub-step per assignment, and the next turn, which waits for all of those.

    An assignment waits for the turn that gave it, so that it starts when that one is over, and not before.
    """
    name = step.spec.id
    swarm = task.swarms.setdefault(name, Swarm())
    new = fact.turn == 0 or _is_new(task, swarm, fact)
    before = frozenset([turn_id(name, fact.turn)] if fact.turn else ())
    given: list[Step] = []
    for call in fact.calls:
        told = ToolCall(
            turn=fact.turn,
            tool=call["tool"],
            agent=call["agent"],
            step=call.get("step"),
            code=call.get("code"),
            message=call.get("message", ""),
        )
        swarm.calls.append(told)
        if told.code is None and told.step is None:
            made = Agent(told.agent, call["role"], call["system_prompt"], fact.turn, call["persona"])
            swarm.agents[told.agent] = made
        elif told.code is None and told.step is not None:
            agent = swarm.agents[told.agent]
            agent.steps.append(told.step)
            spec = Step(
                id=told.step,
                actor=agent.role,
                action=call["prompt"],
                outputs=[Output(name=told.step)],
                persona=agent.persona,
                gates=[],
                max_tokens=step.spec.spawns.max_tokens if step.spec.spawns is not None else None,
            )
            given.append(spec)
            task.steps[told.step] = StepRecord(spec, before, set(before), swarm=name, agent=told.agent)
    swarm.unread += fact.unread
    swarm.fruitless = 0 if new else swarm.fruitless + 1
    swarm.closed = fact.closing or swarm.closed
    swarm.turns = fact.turn + 1
    turn = step.spec.model_copy(update={"id": turn_id(name, swarm.turns), "depends_on": [], "spawns": None})
    waits = before | {spec.id for spec in given}
    needed = waits or step.needs
    task.steps[turn.id] = StepRecord(turn, needed, set(waits), swarm=name)
    for other in (*(spec.id for spec in given), turn.id):
        task.dependents[other] = [name]
        step.waiting_for.add(other)
        for need in task.steps[other].waiting_for:
            task.dependents[need].append(other)
    step.needs |= step.waiting_for
    step.state = StepState.EXPANDED
    task.unfinished += 1 + len(given)


def _is_new(task: TaskRecord, swarm: Swarm, fact: f.SwarmTurned) -> bool:
    """Whether a turn goes on to anything: work that no earlier turn gave to anybody, word for word, or sub-agents while
    all earlier ones have work. A model that is stuck makes and assigns the same again, or further ones for nothing.
    """
    kept = [call for call in fact.calls if "code" not in call]
    before = {task.steps[step].spec.action for agent in swarm.agents.values() for step in agent.steps}
    if any("step" in call and call["prompt"] not in before for call in kept):
        return True
    return any("step" not in call for call in kept) and all(agent.steps for agent in swarm.agents.values())


def _join(_task: TaskRecord, step: StepRecord, fact: f.StepJoined) -> None:
    step.joined = [Artefact.model_validate(fact.artefact)]
    step.ready_ms = fact.at_ms


def _queue(_task: TaskRecord, step: StepRecord, fact: f.AttemptQueued) -> None:
    step.state = StepState.READY
    if step.ready_ms is None:
        step.ready_ms = fact.at_ms
    attempt = Attempt(len(step.attempts) + 1, fact.role, fact.model, fact.key, fact.at_ms, fact.constrained)
    attempt.timeline.queued(fact.at_ms, fact.delay_ms or 0)
    attempt.arm = fact.arm
    attempt.told_chars = fact.told_chars or 0
    step.attempts.append(attempt)


def _start(_task: TaskRecord, step: StepRecord, fact: f.AttemptStarted) -> None:
    attempt = step.attempt
    if fact.reattached and step.state is StepState.READY and attempt.started_ms is not None:
        step.losses = max(0, step.losses - 1)  # the worker was silent, not dead
    if not fact.reattached or attempt.started_ms is None:
        attempt.started_ms = fact.at_ms
    step.state = StepState.INFERRING
    if fact.reattached:
        attempt.timeline.reattached(fact.at_ms, same_worker=attempt.worker == fact.worker)
    else:
        begin_end = fact.unserved_ms
        attempt.timeline.started(fact.at_ms, (begin_end[0], begin_end[1]) if begin_end else None)
    attempt.worker = fact.worker


def _lose(_task: TaskRecord, step: StepRecord, fact: f.AttemptLost) -> None:
    if step.state is StepState.INFERRING:
        step.state = StepState.READY
    step.losses += 1 if fact.blame else 0
    step.attempt.timeline.lost(fact.at_ms, fact.delay_ms or 0)
    step.attempt.setbacks.add(
        Setback(
            at_ms=fact.at_ms,
            work=fact.work,
            category=fact.category,
            code=fact.code,
            message=fact.message[:500],
            action=fact.action or "rerun",
            rule=fact.rule or "",
            delay_ms=fact.delay_ms or 0,
        )
    )


def _move(_task: TaskRecord, step: StepRecord, fact: f.AttemptMoved) -> None:
    step.attempt.model = fact.model
    step.attempt.moves += 1
    step.attempt.setbacks.add(
        Setback(
            at_ms=fact.at_ms,
            work="inference",
            category="PEER",
            code="model.unserved",
            message=fact.reason[:500],
            action="lateral",
            rule=f"to {fact.model}, the lateral model of {step.attempt.role}",
        )
    )


def _set_back(task: TaskRecord, fact: f.TaskSetback) -> None:
    failure = Failure.model_validate(fact.failure)
    if fact.blame:
        task.losses[fact.work] = task.losses.get(fact.work, 0) + 1
    task.setbacks.add(
        Setback(
            at_ms=fact.at_ms,
            work=fact.work,
            category=failure.category.value,
            code=failure.code,
            message=failure.message[:500],
            action=fact.action,
            rule=fact.rule,
            delay_ms=fact.delay_ms or 0,
        )
    )


def _take_answer(task: TaskRecord, step: StepRecord, fact: f.AttemptAnswered) -> None:
    attempt = step.attempt
    if attempt.inferred_ms is not None:
        raise JournalError(f"attempt {attempt.number} of {step.spec.id} in {task.id} was answered twice")
    step.state = StepState.CHECKING
    attempt.inferred_ms = fact.at_ms
    attempt.timeline.answered(fact.at_ms)
    attempt.artefacts = [_message(Artefact, value) for value in fact.artefacts]
    attempt.prompt_tokens = fact.prompt_tokens
    attempt.cached_tokens = fact.cached_tokens
    attempt.generated_tokens = fact.generated_tokens
    attempt.first_token_ms = fact.first_token_ms
    attempt.repaired = bool(fact.repaired)
    attempt.draft_tokens = fact.draft_tokens
    attempt.accepted_tokens = fact.accepted_tokens
    attempt.generate_ms = fact.generate_ms
    task.generated_tokens += fact.generated_tokens


def _check(_task: TaskRecord, step: StepRecord, fact: f.AttemptChecked) -> None:
    attempt = step.attempt
    attempt.gates = [GateResult.model_validate(gate) for gate in fact.gates]
    attempt.ended_ms = fact.at_ms
    begun_ms = min((gate.started_ms for gate in attempt.gates), default=0)
    attempt.timeline.checked(fact.at_ms, begun_ms)


def _fail_attempt(task: TaskRecord, step: StepRecord, fact: f.AttemptFailed) -> None:
    attempt = step.attempt
    attempt.failure = _failure(fact.failure)
    attempt.action = f"{fact.action} ({fact.rule})"
    attempt.ended_ms = fact.at_ms
    attempt.generated_tokens += fact.generated_tokens
    task.generated_tokens += fact.generated_tokens


def _finish(task: TaskRecord, step: StepRecord, fact: f.StepDone) -> None:
    _end_step(task, step, StepState.DONE, fact.at_ms)
    if step.attempts:
        step.attempt.ended_ms = fact.at_ms
    for artefact in step.joined or step.attempt.artefacts:
        task.artefacts[artefact.name] = artefact
    for other in task.dependents[step.spec.id]:
        task.steps[other].waiting_for.discard(step.spec.id)


def _fail(task: TaskRecord, step: StepRecord, fact: f.StepFailed) -> None:
    _end_step(task, step, StepState.FAILED, fact.at_ms)
    step.failure = _failure(fact.failure)
    if step.swarm is not None:
        _tell_parent(task, step)


def _drop(task: TaskRecord, step: StepRecord, fact: f.StepDropped) -> None:
    _end_step(task, step, StepState(fact.state), fact.at_ms)
    if step.agent is not None:
        _tell_parent(task, step)


def _tell_parent(task: TaskRecord, step: StepRecord) -> None:
    """An assignment that came to nothing holds up nobody: its end is what the next turn is told. Nor does a turn that
    failed: another one follows, or there is a text that stands for its answer, or the task ends.
    """
    for other in task.dependents[step.spec.id]:
        task.steps[other].waiting_for.discard(step.spec.id)


_OF_A_STEP: Final[Mapping[type[f.Fact], Callable[[TaskRecord, StepRecord, Any], None]]] = {
    f.StepExpanded: _expand,
    f.SwarmTurned: _take_turn,
    f.StepJoined: _join,
    f.AttemptQueued: _queue,
    f.AttemptStarted: _start,
    f.AttemptLost: _lose,
    f.AttemptMoved: _move,
    f.AttemptAnswered: _take_answer,
    f.AttemptChecked: _check,
    f.AttemptFailed: _fail_attempt,
    f.StepDone: _finish,
    f.StepFailed: _fail,
    f.StepDropped: _drop,
}
"""What each fact about a step changes: by type, since four of them make a step and a `match` would try them in turn."""


def _end_step(task: TaskRecord, step: StepRecord, state: StepState, at_ms: int) -> None:
    step.state = state
    step.ended_ms = at_ms
    task.unfinished -= 1


def _failure(value: dict[str, Any] | None) -> Failure | None:
    return None if value is None else Failure.model_validate(value)
