"""Runs the graphs: which step is ready, what its answer means, what follows a failure, when a task has ended.

Pure: it takes what happened with its time and returns effects, in order (`orders.py`, where facts are applied). Calls
are the broker's; which facts exist is `facts.py`; what follows a failure is `failures.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from protocol.codec import pack_body, pack_map, unpack_body
from protocol.errors import BadFrame, CallFailed
from protocol.messages.failure import Category, Failure
from protocol.messages.gate import GateFinal
from protocol.messages.infer import InferFinal
from protocol.messages.plan import PlanPartial
from protocol.messages.reply import ErrorReply
from protocol.messages.result import StepState, TaskState
from protocol.messages.task import Plan, Step, TaskIR
from protocol.plan_graph import final_artefacts
from services.kit.identity import work_key
from services.kit.registry import Registry
from services.scheduler import attempts as a
from services.scheduler import facts as f
from services.scheduler.answers import cut_outputs
from services.scheduler.broker import REATTACH_MS
from services.scheduler.calls import Call
from services.scheduler.casting import Casting
from services.scheduler.checking import step_check_parts, step_checks, task_checks
from services.scheduler.effects import Effect, Record
from services.scheduler.effort import EffortRecord, at_home, learn_effort
from services.scheduler.ended import EndedTasks
from services.scheduler.failures import Action, Work, react, teaches
from services.scheduler.fold import begin
from services.scheduler.growth import reach_of
from services.scheduler.occupancy import Occupancy, steps_in
from services.scheduler.orders import Orders
from services.scheduler.own_calls import inference_call
from services.scheduler.personas import Personas
from services.scheduler.plans import PlanHands, Plans, planning_of, will_grow
from services.scheduler.ranks import Ranking
from services.scheduler.replanning import Hands, Replanning
from services.scheduler.requests import infer_request
from services.scheduler.setbacks import attempt_lost, poisoned, step_history, task_history, task_setback
from services.scheduler.settling import Settling
from services.scheduler.swarm import said_in
from services.scheduler.tasks import StepRecord, TaskRecord
from services.scheduler.unfolding import StepHands, Unfolding
from services.scheduler.verdicts import gate_failure
from services.scheduler.versions import contradiction, may_contradict, trigger_of

MAX_MOVES: Final = 2
"""Moves of one attempt to another model: there, and back when that one is gone as well. After that it waits."""
_WORK_OF: Final = {"infer.request": Work.INFERENCE, "gate.request": Work.GATES}
"""Kind of a step's call -> what fails with it."""
_WORK_OF_TASK: Final = {"gate.request": Work.CHECKS, "memory.request": Work.MEMORY}


@dataclass(slots=True)
class Engine:
    """All tasks that matter now. Methods named `on_…` take an event; all return effects through `take`."""

    registry: Registry
    ranking: Ranking
    personas: Personas
    """Made at run time; those that its steps use a task has for itself."""
    live: dict[str, TaskRecord] = field(default_factory=dict)
    """Tasks that are not final, or whose outcomes memory does not have yet."""
    occupancy: Occupancy = field(default_factory=Occupancy)
    """What these occupy, and whether there is a place for more."""
    ended: EndedTasks = field(default_factory=EndedTasks)
    """The newest of those that are over."""
    effort: EffortRecord = field(default_factory=EffortRecord)
    """What came of larger budgets, retries and escalations."""
    watched: set[str] = field(default_factory=set)
    """Tasks somebody watches: their answers are streamed."""
    casting: Casting = field(init=False)
    replanning: Replanning = field(init=False)
    plans: Plans = field(init=False)
    unfolding: Unfolding = field(init=False)
    settling: Settling = field(init=False)
    _orders: Orders = field(init=False)
    """What it has decided since the last `take`."""

    def __post_init__(self) -> None:
        """Lend hands to those that carry out a part of this."""
        self._orders = Orders(self.ranking, self.occupancy)
        emit, ask = self._orders.emit, self._orders.ask_for_task
        self.casting = Casting(self.personas, emit)
        self.replanning = Replanning(
            self.ranking,
            Hands(
                emit=emit,
                ask=ask,
                drop=self._orders.drop,
                proceed=lambda task, step, at_ms: self.unfolding.proceed(task, step, at_ms),
                finish=self._finish,
                fail=lambda task, failure, why, at_ms: self._end(task, TaskState.FAILED, failure, at_ms, why=why),
            ),
        )
        self.unfolding = Unfolding(
            self.ranking,
            self.casting,
            StepHands(
                emit=emit,
                attempt=self._begin_attempt,
                finish=self._finish_step,
                fail=self._fail_step,
                contradicted=self.replanning.result_contradicts,
            ),
        )
        self.plans = Plans(
            lambda: self.registry,
            self.ranking,
            self.casting,
            self.replanning,
            PlanHands(emit=emit, ask=ask, begin=self.unfolding.begin, failed=self._on_task_failure),
        )
        self.settling = Settling(
            self.personas,
            lambda: self.registry,
            emit,
            ask,
            lambda task, failure, at_ms: self._on_task_failure(task, Work.MEMORY, failure, at_ms),
            self._retire,
            self.occupancy.may_wait,
        )

    def take(self) -> list[Effect]:
        """Effects since the last call, in order."""
        effects, self._orders.effects = self._orders.effects, []
        if not effects:
            self.ended.evict()  # not before: whoever takes the effects may need the tasks that they end
        return effects

    def take_up(self, registry: Registry) -> None:
        """Work with this registry from now on. It must hold whatever `reloading.used_by` finds among `live`."""
        self.registry = registry
        self.ranking.take_up(registry)

    def find(self, task_id: str) -> TaskRecord | None:
        """A task that is in memory."""
        return self.live.get(task_id) or self.ended.get(task_id)

    # Tasks

    def submit(self, task_id: str, ir: TaskIR, client: str, sent_bytes: int, at_ms: int) -> None:
        """Accept a task whose IR has been checked; `ir` carries task_id and created_at, and came in so many bytes."""
        fact = f.TaskAccepted(task=task_id, at_ms=at_ms, ir=f.Dumped(ir), client=client)
        task = begin(fact)
        self.live[task_id] = task
        self.occupancy.took(task_id, client, sent_bytes, steps_in(ir))
        self._orders.effects.append(Record(fact, task.seq))
        self.plans.ask(task, at_ms)

    def restore(self, task: TaskRecord, at_ms: int) -> None:
        """Take up a task from the journal where it stood; work in flight may be brought back by its worker."""
        self._take_in(task)
        if task.state.final:
            self.occupancy.over(task.id)
            self.settling.begin(task, at_ms)
        elif task.state is TaskState.PLANNING:
            self.plans.ask(task, at_ms)
        elif task.state is TaskState.CHECKING or (task.unfinished == 0 and not will_grow(task)):
            self._finish(task, at_ms)
        else:
            if task.revising is not None:
                self.replanning.ask(task, at_ms)
            elif task.plan_open:
                self.plans.ask(task, at_ms)
            for step in task.steps.values():
                if step.state in (StepState.READY, StepState.INFERRING):
                    hold = at_ms + REATTACH_MS if step.state is StepState.INFERRING else 0
                    self._ask_inference(task, step, at_ms, hold_until_ms=hold)
                elif step.state is StepState.CHECKING:
                    self._ask_gates(task, step, at_ms)

    def give_up(self, task: TaskRecord, failure: Failure, at_ms: int) -> None:
        """Take up a task from the journal only to end it: what it needs is not there any more."""
        self._take_in(task)
        self._end(task, TaskState.FAILED, failure, at_ms, why=failure.message)

    def cancel(self, task_id: str, reason: str, at_ms: int) -> None:
        """Stop a task; finished steps stay, a finished task stays what it is."""
        task = self.live.get(task_id)
        if task is not None and not task.state.final:
            self._end(task, TaskState.CANCELLED, None, at_ms, why=reason or "cancelled by a client")

    def cancel_step(self, task_id: str, step_id: str, reason: str, at_ms: int) -> None:
        """Stop one step and everything that needs it; the rest of the task goes on. A finished step stays."""
        task = self.live.get(task_id)
        step = None if task is None else task.steps.get(step_id)
        if task is None or step is None or step.state.final or task.state.final:
            return
        for name in reach_of(task, step_id):
            for attempt in task.steps[name].attempts[-1:]:
                self._orders.drop(attempt.key)
                self._orders.drop(work_key(task.id, *step_check_parts(task.steps[name])))
            why = reason or "cancelled by a client"
            self._orders.emit(
                task, f.StepDropped(task=task.id, at_ms=at_ms, step=name, state="cancelled", reason=why[:500])
            )
        if step.agent is not None:
            self._release(task, step, at_ms)
        elif task.unfinished == 0 and not will_grow(task):
            self._finish(task, at_ms)

    def extend(self, task: TaskRecord, steps: Sequence[Step], client: str, at_ms: int) -> None:
        """Add steps that `growth.checked_extension` has let through."""
        self.casting.take_up_trials(task, Plan(steps=list(steps)), self.registry, at_ms)
        values = [step.model_dump(mode="json", exclude_none=True) for step in steps]
        self._orders.emit(task, f.StepsAdded(task=task.id, at_ms=at_ms, steps=values, client=client))
        self.ranking.forget(task.id)
        for step in steps:
            record = task.steps[step.id]
            if not record.waiting_for:
                self.unfolding.begin(task, record, at_ms)

    def on_tick(self, at_ms: int) -> None:
        """Fail the tasks whose deadline has passed; learn from what was observed."""
        self.ranking.learn()
        for task in list(self.live.values()):
            self._expire(task, at_ms)
            self.replanning.look(task, at_ms)

    def _expire(self, task: TaskRecord, at_ms: int) -> None:
        deadline = task.deadline_ms
        if deadline is not None and deadline <= at_ms and not task.state.final:
            message = f"the deadline of {task.ir.deadline_s:g} s has passed"
            failure = Failure(code="task.deadline", category=Category.TIMEOUT, origin="scheduler", message=message)
            self._end(task, TaskState.FAILED, failure, at_ms, why="task deadline")

    # Calls

    def on_started(
        self,
        call: Call,
        worker: str,
        at_ms: int,
        *,
        reattached: bool = False,
        unserved_ms: tuple[int, int] | None = None,
    ) -> None:
        """A worker has taken the call, or has brought it back; `unserved_ms` is `broker.Start.unserved_ms`."""
        task, step = self._locate(call)
        if task is None or step is None or call.kind != "infer.request":
            return
        if step.state in (StepState.READY, StepState.INFERRING):
            number = step.attempt.number
            self._orders.emit(
                task,
                f.AttemptStarted(
                    task=task.id,
                    at_ms=at_ms,
                    step=step.spec.id,
                    number=number,
                    worker=worker,
                    reattached=reattached,
                    unserved_ms=None if unserved_ms is None else list(unserved_ms),
                ),
            )

    def on_lost(self, call: Call, worker: str, at_ms: int) -> None:
        """The worker died with the call; the broker has queued it again, unless that is once too often."""
        task, step = self._locate(call)
        if task is None or (step is not None and step.state.final):
            return
        message = f"{worker} died or fell silent with it"
        failure = Failure(code="peer.lost", category=Category.PEER, origin="scheduler", message=message)
        if step is not None:
            self._on_failure(task, step, _WORK_OF[call.kind], failure, at_ms, queued_again=call.key)
        else:
            work = _WORK_OF_TASK.get(call.kind) or planning_of(task)
            self._on_task_failure(task, work, failure, at_ms, queued_again=call.key)

    def on_ended(self, call: Call, kind: str, body: bytes, worker: str, at_ms: int) -> None:
        """One of the hub's own calls has its ending."""
        self._orders.has_ended(call)
        task, step = self._locate(call)
        if task is None:
            return
        self._expire(task, at_ms)  # else the worker's word for it, just before the tick, would escalate the step
        try:
            failure = unpack_body(ErrorReply, body).failure if kind == "error" else None
            if call.kind == "memory.request":
                self.settling.on_answer(task, body, failure, at_ms)
            elif task.state.final:
                return
            elif call.kind == "plan.request":
                self.plans.on_answer(task, body, failure, at_ms)
            elif step is None:
                self._on_task_gates(task, body, failure, at_ms)
            elif step.state.final:
                return
            elif call.kind == "gate.request":
                self._on_gates(task, step, body, failure, at_ms)
            else:
                self._on_answer(task, step, body, failure, at_ms)
        except BadFrame as err:
            # A lying worker: its bytes say nothing about the work. Same path as a worker that died.
            lie = Failure(
                code="peer.bad_body",
                category=Category.PEER,
                origin=worker,
                message=f"{worker} sent a bad {kind}: {err}",
            )
            self.on_ended(call, "error", pack_body(ErrorReply(failure=lie)), worker, at_ms)

    def on_duplicate(self, task_id: str, step: str | None, key: str, worker: str, at_ms: int) -> None:
        """A second ending for a key of this task: recorded, without effect."""
        task = self.live.get(task_id)
        if task is not None:
            self._orders.emit(task, f.DuplicateSeen(task=task_id, at_ms=at_ms, step=step, key=key, worker=worker))

    def body_of(self, call: Call, at_ms: int) -> bytes:
        """Compose the body of one of the hub's own calls, when it starts."""
        task, step = self._locate(call)
        if task is not None and call.kind == "plan.request":
            return self.plans.body(task, at_ms)
        if task is None or step is None:
            raise KeyError(f"call {call.key} belongs to no step")
        return pack_map(infer_request(task, step, self.registry, stream=task.id in self.watched))

    # Steps

    def on_plan_partial(self, call: Call, partial: PlanPartial, at_ms: int) -> None:
        """Steps of a plan in the making, while its call runs."""
        task, _ = self._locate(call)
        if task is not None:
            self.plans.on_partial(task, partial, at_ms)

    def _begin_attempt(self, task: TaskRecord, step: StepRecord, action: Action, at_ms: int) -> None:
        if task.state.final or step.state.final:
            return
        if task.generated_tokens >= task.ir.budget.max_tokens:
            message = f"budget.max_tokens {task.ir.budget.max_tokens} is spent ({task.generated_tokens} generated)"
            failure = Failure(code="budget.tokens", category=Category.POLICY, origin="scheduler", message=message)
            self._fail_step(task, step, failure, at_ms)
            return
        self._orders.emit(task, a.queued(task, step, self.registry, action, at_ms))
        self._ask_inference(task, step, at_ms)

    def _ask_inference(self, task: TaskRecord, step: StepRecord, at_ms: int, hold_until_ms: int = 0) -> None:
        self._orders.ask(task, inference_call(task, step, self.registry, self.ranking, at_ms, hold_until_ms))

    def _on_answer(self, task: TaskRecord, step: StepRecord, body: bytes, failure: Failure | None, at_ms: int) -> None:
        if failure is not None:
            spent = failure.evidence.get("generated_tokens", 0)
            tokens = spent if isinstance(spent, int) else 0
            self._on_failure(task, step, Work.INFERENCE, failure, at_ms, generated_tokens=tokens)
            return
        final = unpack_body(InferFinal, body)
        started_ms = step.attempt.started_ms
        if started_ms is not None and at_home(step, self.registry):
            self.ranking.observe(task, step, (at_ms - started_ms) / 1000)
        tokens = final.generated_tokens
        against = contradiction(final.text)
        if against is not None and may_contradict(task, step, self.registry):
            self._on_failure(task, step, Work.RESULT, against, at_ms, generated_tokens=tokens)
            return
        try:
            said = said_in(task, step, final)
            made = cut_outputs(said.text, step.spec.outputs) if said.calls is None else []
        except CallFailed as err:
            self._on_failure(task, step, Work.INFERENCE, err.failure, at_ms, generated_tokens=tokens)
            return
        self._orders.emit(task, a.answered(task, step, final, made, at_ms))
        if said.calls is not None:
            self.unfolding.take_turn(task, step, said.calls, self.registry, at_ms)
            self._finish_step(task, step, at_ms)
        elif step.spec.gates:
            self._ask_gates(task, step, at_ms)
        else:
            self._finish_step(task, step, at_ms)

    def _ask_gates(self, task: TaskRecord, step: StepRecord, at_ms: int, hold_until_ms: int = 0) -> None:
        self._orders.ask_service(task, step, step_checks(task, step, self.registry), at_ms, hold_until_ms)

    def _on_gates(self, task: TaskRecord, step: StepRecord, body: bytes, failure: Failure | None, at_ms: int) -> None:
        if failure is None:
            results = unpack_body(GateFinal, body).results
            values = [result.model_dump(mode="json", exclude_none=True) for result in results]
            number = step.attempt.number
            self._orders.emit(
                task, f.AttemptChecked(task=task.id, at_ms=at_ms, step=step.spec.id, number=number, gates=values)
            )
            failure = gate_failure(step.spec.gates or [], results)
        if failure is None:
            self._finish_step(task, step, at_ms)
        else:
            self._on_failure(task, step, Work.GATES, failure, at_ms)

    # Failures

    def _on_failure(
        self,
        task: TaskRecord,
        step: StepRecord,
        work: Work,
        failure: Failure,
        at_ms: int,
        *,
        generated_tokens: int = 0,
        queued_again: str | None = None,
    ) -> None:
        """Work of a step's newest attempt has failed; `queued_again` is the key under which the broker has it still."""
        history = step_history(task, step, work, failure, self.registry, self.effort)
        action = react(self.registry, work, failure, step.attempt.role, history)
        paused = action.repeats and queued_again is None
        if action.repeats or action.blame:
            self._orders.emit(task, attempt_lost(task, step, work, failure, action, at_ms, paused=paused))
        if paused:
            ask = self._ask_gates if work is Work.GATES else self._ask_inference
            ask(task, step, at_ms, hold_until_ms=at_ms + action.delay_ms)
        elif not action.repeats:
            if queued_again is not None:
                self._orders.drop(queued_again)
            if action.blame:
                failure = poisoned(failure, step.losses, "step")
            self._fail_attempt(task, step, failure, action, at_ms, generated_tokens)

    def _on_task_failure(
        self, task: TaskRecord, work: Work, failure: Failure, at_ms: int, *, queued_again: str | None = None
    ) -> None:
        """The task's plan, its final checks, or what memory is told of it has failed."""
        history = task_history(task, work, failure, self.registry)
        action = react(self.registry, work, failure, work, history)
        paused = action.repeats and queued_again is None
        self._orders.emit(task, task_setback(task, work, failure, action, at_ms, paused=paused))
        if action.repeats and not paused:
            return
        if queued_again is not None:
            self._orders.drop(queued_again)
        if action.kind == "fail" and action.blame:
            failure = poisoned(failure, history.losses, work)
        self._after_setback(task, work, failure, action, at_ms)

    def _after_setback(self, task: TaskRecord, work: Work, failure: Failure, action: Action, at_ms: int) -> None:
        gone, hold_ms = action.kind == "fail", at_ms + action.delay_ms
        match work:
            case Work.PLAN if gone:
                self._end(task, TaskState.FAILED, failure, at_ms, why="planning failed")
            case Work.PLAN:
                self.plans.ask(task, at_ms, hold_until_ms=hold_ms)
            case Work.REPLAN if gone:
                self.replanning.abandon(task, failure, at_ms)
            case Work.REPLAN:
                self.replanning.ask(task, at_ms, hold_until_ms=hold_ms)
            case Work.CHECKS if action.kind == "replan":
                self.replanning.begin(task, "failed", None, failure, action.rule, at_ms)
            case Work.MEMORY if gone:
                self.settling.end(task, 0, f"{failure.code}: {failure.message}"[:1_000], at_ms)
            case Work.MEMORY:
                self.settling.begin(task, at_ms, hold_until_ms=hold_ms)
            case _ if gone:
                self._end(task, TaskState.FAILED, failure, at_ms, why="the final checks failed")
            case _:
                self._finish(task, at_ms, hold_until_ms=hold_ms)

    def move(self, call: Call, reason: str, is_served: Callable[[str], bool], at_ms: int) -> None:
        """The model of a waiting attempt is not served: let another one of its role do it, if that one is."""
        task, step = self._locate(call)
        if task is None or step is None or step.state is not StepState.READY or call.key != step.attempt.key:
            return
        attempt = step.attempt
        role = self.registry.roles[attempt.role]
        other = role.lateral if attempt.model == role.model else role.model
        if other is None or attempt.moves >= MAX_MOVES or not is_served(other):
            return
        self._orders.emit(task, a.moved(task, step, other, reason, at_ms))
        self._orders.drop(call.key)
        self._ask_inference(task, step, at_ms)

    def _fail_attempt(
        self,
        task: TaskRecord,
        step: StepRecord,
        failure: Failure,
        action: Action,
        at_ms: int,
        generated_tokens: int = 0,
    ) -> None:
        if teaches(self.registry, failure):
            learn_effort(self.effort, task, step, self.registry, at_ms, solved=False)
        self._orders.emit(task, a.failed(task, step, failure, action, at_ms, generated_tokens))
        if action.kind == "fail":
            self._fail_step(task, step, failure, at_ms)
        elif action.kind == "replan":
            value = failure.model_dump(mode="json", exclude_none=True)
            self._orders.emit(task, f.StepFailed(task=task.id, at_ms=at_ms, step=step.spec.id, failure=value))
            self.replanning.begin(task, trigger_of(failure), step.spec.id, failure, action.rule, at_ms)
        else:
            self._begin_attempt(task, step, action, at_ms)

    def _fail_step(self, task: TaskRecord, step: StepRecord, failure: Failure, at_ms: int) -> None:
        stuck = step.is_turn and teaches(self.registry, failure)  # a worker that dies says nothing about its model
        goes_on = step.agent is not None or (stuck and self.unfolding.lead_on(task, step, failure, at_ms))
        value = failure.model_dump(mode="json", exclude_none=True)
        self._orders.emit(task, f.StepFailed(task=task.id, at_ms=at_ms, step=step.spec.id, failure=value))
        if goes_on:
            self._release(task, step, at_ms)  # the model that gave the assignment is told; one that led must answer
            return
        told = failure.model_copy(update={"message": f"step {step.spec.id}: {failure.message}"[:8_000]})
        self._end(task, TaskState.FAILED, told, at_ms, why=f"step {step.spec.id} failed")

    def _finish_step(self, task: TaskRecord, step: StepRecord, at_ms: int) -> None:
        number = None
        if step.attempts:
            number = step.attempt.number
            learn_effort(self.effort, task, step, self.registry, at_ms, solved=True)
        self._orders.emit(task, f.StepDone(task=task.id, at_ms=at_ms, step=step.spec.id, number=number))
        self._release(task, step, at_ms)

    def _release(self, task: TaskRecord, step: StepRecord, at_ms: int) -> None:
        """A step is over: begin what waited for nothing else."""
        for other in task.dependents[step.spec.id]:
            follower = task.steps[other]
            if not follower.waiting_for and not task.state.final:
                self.unfolding.proceed(task, follower, at_ms)
        if task.unfinished == 0 and not task.state.final and not will_grow(task):
            self._finish(task, at_ms)

    # The end of a task

    def _finish(self, task: TaskRecord, at_ms: int, hold_until_ms: int = 0) -> None:
        """All steps are done: check what was made, or end."""
        plan = task.ir.plan
        names = [] if plan is None else [name for name in final_artefacts(plan) if name in task.artefacts]
        if not names:
            self._end(task, TaskState.CANCELLED, None, at_ms, why="every result was cancelled")
            return
        if not task.ir.gates:
            self._end(task, TaskState.SUCCEEDED, None, at_ms, why="")
            return
        artefacts = [task.artefacts[name] for name in names]
        self._orders.ask_for_task(task, task_checks(task, artefacts, self.registry), at_ms, hold_until_ms)

    def _on_task_gates(self, task: TaskRecord, body: bytes, failure: Failure | None, at_ms: int) -> None:
        if failure is None:
            results = unpack_body(GateFinal, body).results
            values = [result.model_dump(mode="json", exclude_none=True) for result in results]
            self._orders.emit(task, f.TaskChecked(task=task.id, at_ms=at_ms, gates=values))
            failure = gate_failure(task.ir.gates, results)
        if failure is None:
            self._end(task, TaskState.SUCCEEDED, None, at_ms, why="")
        else:
            self._on_task_failure(task, Work.CHECKS, failure, at_ms)

    def _end(self, task: TaskRecord, state: TaskState, failure: Failure | None, at_ms: int, *, why: str) -> None:
        self._orders.drop_all(task.id)
        dropped = "cancelled" if state is TaskState.CANCELLED else "skipped"
        for step in task.steps.values():
            if not step.state.final:
                self._orders.emit(
                    task, f.StepDropped(task=task.id, at_ms=at_ms, step=step.spec.id, state=dropped, reason=why[:500])
                )
        value = None if failure is None else failure.model_dump(mode="json", exclude_none=True)
        self._orders.emit(task, f.TaskEnded(task=task.id, at_ms=at_ms, state=state.value, failure=value))
        self.occupancy.over(task.id)
        self.ranking.forget(task.id)
        self.replanning.forget(task.id)
        self.settling.begin(task, at_ms)

    def _retire(self, task: TaskRecord) -> None:
        self.live.pop(task.id, None)
        self._orders.forget(task.id)
        self.ended.add(task, self.occupancy.gone(task.id))

    def forget_ended(self, task_id: str) -> None:
        """Drop an ended task from memory; the journal has it."""
        self.ended.pop(task_id)

    # Inside

    def _take_in(self, task: TaskRecord) -> None:
        self.live[task.id] = task
        self.ended.pop(task.id)
        self.occupancy.took(task.id, task.client, len(task.ir.model_dump_json()), len(task.steps))

    def _locate(self, call: Call) -> tuple[TaskRecord | None, StepRecord | None]:
        task = self.live.get(call.task or "")
        return task, None if task is None or call.step is None else task.steps.get(call.step)
