"""One example message per kind, each written to `golden/v1/<kind>.<n>.hex` as the bytes of its two frames.

The files are the memory of the wire: what once was on it must be readable for ever, so a file is added and never
edited. `python -m tests.contract.golden_messages` writes the files that are missing. When a body grows a field with a
default, its bytes change while the old ones stay readable: append a second example here and keep the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from protocol.codec import pack_body
from protocol.header import Header, pack_header
from protocol.kinds import BODIES, Empty
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.base import Message
from protocol.messages.batch import BatchAnswer, BatchFinal, BatchPartial, BatchRequest
from protocol.messages.failure import Category, Failure, Finding
from protocol.messages.gate import GateFinal, GateRequest, GateResult, Verdict
from protocol.messages.infer import AbortLimits, ChatMessage, InferFinal, InferPartial, InferRequest, Sampling
from protocol.messages.memory import (
    Advise,
    Advised,
    Arms,
    ArmValue,
    ArmView,
    Cure,
    DecisionRecord,
    Difference,
    Episode,
    Explained,
    Forget,
    Import,
    Lesson,
    MemoryFinal,
    MemoryRequest,
    Option,
    Outcome,
    Question,
    RecordDecisions,
    RecordOutcomes,
    Retrieve,
    Row,
    Spread,
    Staged,
    Value,
    WidthReport,
)
from protocol.messages.persona import (
    MakePersona,
    Persona,
    PersonaListing,
    PersonaMade,
    PersonaQuery,
    PersonasOnTrial,
    PersonaView,
)
from protocol.messages.plan import (
    AddedEdge,
    PlanFinal,
    PlanPartial,
    PlanRequest,
    PlanShape,
    PlanVersion,
    RemovedEdge,
    Revision,
    RoutingDecision,
)
from protocol.messages.registry import EntryChange, RegistryChanged, Reload, Reloaded
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.result import (
    ArtefactQuery,
    ArtefactReply,
    AttemptView,
    Cancelled,
    CancelQuery,
    CriticalPath,
    Listing,
    ListQuery,
    PlanView,
    PredictedPath,
    RefusedCall,
    Segment,
    Setback,
    StepState,
    StepView,
    SubAgentView,
    SwarmView,
    TaskEvent,
    TaskQuery,
    TaskState,
    TaskSummary,
    TaskView,
    Usage,
    Watch,
)
from protocol.messages.session import (
    Goodbye,
    Hello,
    MemoryBudget,
    ModelQuery,
    ModelReport,
    PeerReport,
    PeerState,
    Ping,
    Pong,
    Reject,
    Reside,
    StatusReport,
    StatusRequest,
    Welcome,
)
from protocol.messages.task import (
    Accepted,
    Budget,
    Escalation,
    Extend,
    Extended,
    Output,
    Plan,
    Priority,
    Spawns,
    Step,
    Submit,
    TaskIR,
    TaskType,
)

FOLDER: Final = Path(__file__).parent / "golden" / "v1"

_DIGEST = "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
_FAILURE = Failure(
    code="gate.unit",
    category=Category.CODE,
    origin="gates",
    message="1 test failed: naïve.py",
    evidence={"exit_status": 1},
    findings=[Finding(gate="unit", category=Category.CODE, message="assert 3 == 4", file="test_sum.py", line=7)],
)
_GATE = GateResult(
    gate="unit",
    verdict=Verdict.FAIL,
    category=Category.CODE,
    message="1 failed",
    findings=_FAILURE.findings,
    started_ms=1_700_000_000_500,
    ended_ms=1_700_000_000_900,
)
_ADVISORY = _GATE.model_copy(update={"gate": "markdown", "required": False, "cached": True})
_TASK = TaskIR(
    task_id="T-1",
    created_at=1_700_000_000_000,
    idempotency_key="order-42",
    task_type=TaskType.CODE,
    priority=Priority.BATCH,
    deadline_s=600,
    objective="Write sum.py and test it",
    context="A small library",
    constraints=["no dependencies"],
    assumptions=["Python 3.11"],
    definition_of_done=["the tests pass"],
    inputs=[Artefact(name="spec", kind=ArtefactKind.JSON, value={"args": [1, 2.5, None], "ok": True})],
    plan=Plan(
        steps=[
            Step(
                id="S1",
                actor="coder",
                action="Write it",
                inputs=["spec"],
                outputs=[Output(name="sum.py", kind=ArtefactKind.CODE, content_type="text/x-python")],
                gates=["format", "unit"],
                persona="terse",
                timeout_s=30,
                max_tokens=512,
            ),
            Step(
                id="S2",
                actor="worker",
                action="Say what it does",
                inputs=["sum.py"],
                outputs=[Output(name="facts", kind=ArtefactKind.JSON)],
                depends_on=["S1"],
                ordered=True,
                json_schema={"type": "object"},
            ),
        ]
    ),
    gates=["schema"],
    escalation=Escalation(max_level=1),
    budget=Budget(max_tokens=10_000, max_steps=10),
)
_SPAWNING = TaskIR(
    task_id="T-1",
    objective="Lead others",
    plan=Plan(
        steps=[
            Step(
                id="S1",
                actor="architect",
                action="Lead",
                outputs=[Output(name="report")],
                spawns=Spawns(roles=["worker", "coder"], max_tokens=64),
            )
        ]
    ),
    budget=Budget(max_subagents=10, max_tool_calls=50),
)
_FEW_TURNS = TaskIR(
    task_id="T-1",
    objective="Lead others",
    plan=Plan(
        steps=[
            Step(
                id="S1",
                actor="architect",
                action="Lead",
                outputs=[Output(name="report")],
                spawns=Spawns(roles=["worker"], max_turns=4),
            )
        ]
    ),
)
_EPISODE = Episode(
    task_id="T-0",
    task_type="code",
    objective="Write product.py",
    plan_source="rules",
    steps=2,
    succeeded=True,
    failure_codes=["gate.unit"],
    seconds=12.5,
    at_ms=1_690_000_000_000,
    similarity=0.75,
    q=0.5,
)
_DECISION = RoutingDecision(
    ids={"S1": "D-1"},
    subject="persona",
    choice="terse",
    alternatives=["terse", "careful"],
    propensity=0.5,
    rule="code prefers terse",
    task_type="code",
    features={"inputs": 1.0},
)
_ADVISED = Advised(
    key="persona:coder",
    subject="persona",
    rules_choice="terse",
    learned_choice="careful",
    choice="careful",
    won="learned",
    propensity=0.75,
    confidence=0.875,
    evidence=12.0,
    cluster="coder",
    arms=[
        ArmView(
            choice="careful",
            expected_reward=0.75,
            deviation=0.125,
            value=0.5,
            chance=0.75,
            outcomes=12.0,
            similar_outcomes=7,
            seconds=4.5,
        )
    ],
    why="learned: careful 0.75±0.12 after 12",
)
_WIDE_ARM = _ADVISED.arms[0].model_copy(update={"width": 4, "staged": 0.0625})
_ADVISED_DECISION = _DECISION.model_copy(update={"choice": "careful", "cluster": "coder", "advice": _ADVISED})
_VERSIONED_DECISION = _DECISION.model_copy(
    update={"registry_digest": "abc123", "model": "0123abcd", "prompt": "89ef4567"}
)
_SHARED_DECISION = _VERSIONED_DECISION.model_copy(update={"ids": {"S1": "D-1", "S2": "D-2"}})
_RECORD = DecisionRecord(
    decision_id="D-1",
    task_id="T-1",
    step="S1",
    subject="persona",
    choice="terse",
    alternatives=["terse", "careful"],
    propensity=0.5,
    rule="code prefers terse",
    task_type="code",
    features={"inputs": 1.0},
    registry_digest="abc123",
)
_VERSIONED_RECORD = _RECORD.model_copy(update={"cluster": "coder", "model": "0123abcd", "prompt": "89ef4567"})
_OUTCOME = Outcome(decision_id="D-1", reward=1.0, seconds=4.5, attempts=2, at_ms=1_700_000_005_000)
_SPREAD = _OUTCOME.model_copy(
    update={
        "spread": Spread(width=4, assigned=4, finished=3, useful=2),
        "staged": Staged(stage=100, weight=0.0625, parallel=0.75, finish=0.75, shaped=1.09375),
    }
)
_CURED = _OUTCOME.model_copy(
    update={"cures": [Cure(failure_code="gate.lint", finding="undefined name 'os'", action="retry", role="coder")]}
)
_LESSON = Lesson(failure_code="gate.lint", finding="undefined name 'os'", action="retry", role="coder", times=3)
_VALUE = Value(subject="role", task_type="code", choice="coder", q=0.75, count=8, mean_seconds=4.5)
_EDGE = RemovedEdge(step="S2", depends_on="S1", reason="no data flows along it")
_VIEW = TaskView(
    task_id="T-1",
    state=TaskState.SUCCEEDED,
    objective="Write sum.py and test it",
    task_type="code",
    priority="batch",
    created_ms=1_700_000_000_000,
    ended_ms=1_700_000_002_000,
    last_seq=9,
    plan=PlanView(source="rules", reason="no model", removed_edges=[_EDGE], decisions=[_DECISION], similar=[_EPISODE]),
    steps=[
        StepView(
            id="S1",
            actor="coder",
            action="Write it",
            state=StepState.DONE,
            persona="terse",
            needs=[],
            ready_ms=1_700_000_000_100,
            ended_ms=1_700_000_001_000,
            attempts=[
                AttemptView(
                    number=1,
                    role="coder",
                    model="coder",
                    key="0123456789abcdef0123456789abcdef",
                    queued_ms=1_700_000_000_100,
                    started_ms=1_700_000_000_110,
                    inferred_ms=1_700_000_000_500,
                    ended_ms=1_700_000_000_900,
                    worker="inference-coder",
                    prompt_tokens=20,
                    cached_tokens=4,
                    generated_tokens=30,
                    first_token_ms=12.5,
                    gates=[_GATE],
                    failure=_FAILURE,
                    action="retry: CODE",
                )
            ],
        )
    ],
    artefacts=[Artefact(name="sum.py", kind=ArtefactKind.CODE, value="sum\n", content_type="text/x-python")],
    gates=[_GATE],
    usage=Usage(prompt_tokens=20, cached_tokens=4, generated_tokens=30, attempts=1),
    critical_path=CriticalPath(
        wall_ms=2_000,
        work_ms=2_000,
        parallelism=1.0,
        path=[Segment(step="S1", what="inference", start_ms=1_700_000_000_000, end_ms=1_700_000_002_000)],
        slack_ms={"S1": 0},
        overlapping_steps=0,
    ),
)

_SEGMENTS = [
    Segment(what="backoff", start_ms=1_700_000_000_100, end_ms=1_700_000_000_110),
    Segment(what="loading", start_ms=1_700_000_000_110, end_ms=1_700_000_000_200),
    Segment(what="queueing", start_ms=1_700_000_000_200, end_ms=1_700_000_000_300),
    Segment(what="retry", start_ms=1_700_000_000_300, end_ms=1_700_000_000_900),
]
_REPORTED = _VIEW.model_copy(
    update={
        "steps": [
            step.model_copy(
                update={"attempts": [one.model_copy(update={"segments": _SEGMENTS}) for one in step.attempts]}
            )
            for step in _VIEW.steps
        ],
        "critical_path": CriticalPath(
            wall_ms=2_000,
            work_ms=1_500,
            parallelism=0.75,
            path=[Segment(step="S1", what="loading", start_ms=1_700_000_000_000, end_ms=1_700_000_002_000)],
            slack_ms={"S1": 0},
            overlapping_steps=0,
            predicted=PredictedPath(length_ms=900, steps=["S1"]),
            critical_steps=2,
            total_steps=3,
            lower_bound_ms=600,
            bound_by="chain",
        ),
    }
)

_PERSONA: Final = Persona(
    name="fact-checker",
    description="For claims.",
    prompt="Check every claim.\nName its source.",
    roles=["reviewer"],
    task_types=[TaskType.DOC],
)

_MODEL: Final = ModelReport(
    model="architect",
    residency="warm",
    pinned=False,
    state="loading",
    need_bytes=9_000_000_000,
    held_bytes=9_000_000_000,
    measured_bytes=8_500_000_000,
    used_ms=1_700_000_000_000,
    loads=2,
    waiting="it loads since 3.0 s",
)
_LARGE_MODEL = _MODEL.model_copy(update={"too_large": "was measured to need 9.0 GiB, more than the budget holds"})
_MENDED = _REPORTED.model_copy(
    update={
        "steps": [
            step.model_copy(update={"attempts": [one.model_copy(update={"repaired": True}) for one in step.attempts]})
            for step in _REPORTED.steps
        ]
    }
)

_SETBACK = Setback(
    at_ms=1_700_000_000_300,
    work="gates",
    category="RESOURCE",
    code="gate.lint.error",
    message="gate lint could not judge",
    action="backoff",
    rule="failures.yaml:35 RESOURCE: the same again after a pause, 1 of 3",
    delay_ms=1_000,
)
_TOLD = _REPORTED.model_copy(
    update={
        "setbacks": [_SETBACK.model_copy(update={"work": "plan"})],
        "steps": [
            step.model_copy(
                update={
                    "attempts": [
                        one.model_copy(update={"arm": "harder", "told": "This is attempt 2.", "setbacks": [_SETBACK]})
                        for one in step.attempts
                    ]
                }
            )
            for step in _REPORTED.steps
        ],
    }
)
_GUESSED = _VIEW.model_copy(
    update={
        "steps": [
            step.model_copy(
                update={
                    "attempts": [
                        one.model_copy(update={"draft_tokens": 24, "accepted_tokens": 20, "tokens_per_s": 107.5})
                        for one in step.attempts
                    ]
                }
            )
            for step in _VIEW.steps
        ]
    }
)
_TAUGHT = _VIEW.model_copy(
    update={
        "plan": PlanView(
            source="rules", reason="no model", removed_edges=[], decisions=[], similar=[_EPISODE], lessons=[_LESSON]
        )
    }
)

_LEARNED = _VIEW.model_copy(
    update={
        "plan": PlanView(source="rules", reason="advised", removed_edges=[], decisions=[_ADVISED_DECISION], similar=[])
    }
)

_SWARMED = _VIEW.model_copy(
    update={
        "steps": [_VIEW.steps[0].model_copy(update={"id": "S1.ann.1", "agent": "ann"})],
        "swarms": [
            SwarmView(
                step="S1",
                turns=2,
                tool_calls=3,
                agents=[
                    SubAgentView(
                        name="ann",
                        role="worker",
                        system_prompt="You count.",
                        persona="terse",
                        turn=1,
                        steps=["S1.ann.1"],
                        done=1,
                        generated_tokens=7,
                        result="three",
                    )
                ],
                refused=[RefusedCall(turn=1, tool="run_shell", agent="", code="tool.unknown", message="there is none")],
                generated_tokens=30,
            )
        ],
    }
)
_MADE_TO_ANSWER = _VIEW.model_copy(
    update={"swarms": [_SWARMED.swarms[0].model_copy(update={"ending": "turn 2 is the last one"})]}
    if _SWARMED.swarms
    else {}
)
_ADDED_EDGE = AddedEdge(step="S2", depends_on="S1", reason="both write one file")
_SHAPE = PlanShape(width=2, levels=3, critical=["S1", "S2"], critical_ms=900, predicted_ms=1_200)
_STEP = Step(
    id="S1",
    actor="coder",
    action="Write it",
    outputs=[Output(name="sum.py", kind=ArtefactKind.CODE)],
    parallel_group="parts",
)
_REPLANNED = _VIEW.model_copy(
    update={
        "plan": PlanView(
            source="model",
            reason="cut",
            removed_edges=[_EDGE],
            decisions=[],
            similar=[],
            added_edges=[_ADDED_EDGE],
            as_written=_SHAPE.model_copy(update={"width": 1}),
            as_run=_SHAPE,
            versions=[
                PlanVersion(version=1, at_ms=1, trigger="planned", reason="model", adopted_ms=2),
                PlanVersion(
                    version=2,
                    at_ms=3,
                    trigger="contradicted",
                    reason="step S2: plan.contradicted",
                    rule="failures.yaml:26 LOGIC",
                    adopted_ms=4,
                    how="rules: one step does it",
                    kept=["S1"],
                    dropped=["S2"],
                    added=["V2S1"],
                ),
                PlanVersion(version=3, at_ms=5, trigger="late", reason="9 s", abandoned="plan.no_faster: 9 s"),
            ],
        )
    }
)

EXAMPLES: Final[Mapping[str, list[Message]]] = {
    "session.hello": [
        Hello(
            service="inference-worker",
            protocol_min=1,
            protocol_max=1,
            capabilities=["infer.worker"],
            state=PeerState.LOADING,
            pid=4242,
            in_flight=["0123456789abcdef0123456789abcdef"],
            finished=["fedcba9876543210fedcba9876543210"],
        ),
        # Until it was left out, the first one said how long loading may take; the hub had never asked.
        Hello(service="inference-worker", protocol_min=1, protocol_max=1, capabilities=["infer.worker"], pid=4242),
    ],
    "session.welcome": [
        Welcome(protocol=1, hub_epoch="a1b2c3d4e5f6", ping_ms=1_000, drop=["k1"], resend=["k2"]),
        Welcome(protocol=1, hub_epoch="a1b2c3d4e5f6", ping_ms=1_000, registry=_DIGEST),
    ],
    "session.reject": [Reject(code="version", message="this hub speaks version 1")],
    "session.ping": [Ping(at_ms=1_700_000_000_000)],
    "session.pong": [
        Pong(
            state=PeerState.DEGRADED,
            reason="child restarted",
            in_flight=1,
            loop_lag_ms=0.5,
            rss_bytes=123_456_789,
            metrics={"generated_tokens": 7},
        ),
        Pong(state=PeerState.READY, in_flight=0, loop_lag_ms=0.5, rss_bytes=1, registry=_DIGEST),
        Pong(
            state=PeerState.PARKED,
            in_flight=0,
            loop_lag_ms=0.5,
            rss_bytes=50_000_000,
            model_bytes=123_456_789,
            order=3,
        ),
        Pong(
            state=PeerState.PARKED,
            in_flight=0,
            loop_lag_ms=0.5,
            rss_bytes=50_000_000,
            needs_bytes=987_654_321,
        ),
    ],
    "session.goodbye": [Goodbye(reason="SIGTERM")],
    "session.reside": [Reside(loaded=True, order=3)],
    "model.load": [ModelQuery(model="architect")],
    "model.unload": [ModelQuery(model="architect")],
    "model.report": [_MODEL, _LARGE_MODEL],
    "session.status": [StatusRequest()],
    "session.report": [
        StatusReport(
            hub_epoch="a1b2c3d4e5f6",
            hub_pid=4241,
            uptime_ms=5_000,
            peers=[
                PeerReport(
                    service="inference-worker",
                    epoch="0a0b0c0d0e0f-1",
                    state="ready",
                    capabilities=["infer.worker"],
                    granted=3,
                    used=2,
                    in_flight=["k1"],
                    silent_ms=120,
                    pid=4242,
                    loop_lag_ms=0.5,
                    rss_bytes=123_456_789,
                    metrics={"generated_tokens": 7},
                )
            ],
            queued={"infer.worker": 1},
            tasks={"running": 1},
            counters={"duplicates": 0},
        ),
        StatusReport(
            hub_epoch="a1b2c3d4e5f6",
            hub_pid=4241,
            uptime_ms=5_000,
            peers=[
                PeerReport(
                    service="planner",
                    epoch="0a0b0c0d0e0f-1",
                    state="ready",
                    capabilities=["planner"],
                    granted=4,
                    used=0,
                    in_flight=[],
                    silent_ms=120,
                    pid=4243,
                    loop_lag_ms=0.5,
                    rss_bytes=1,
                    metrics={},
                    registry=_DIGEST,
                )
            ],
            queued={},
            tasks={},
            counters={},
            registry=_DIGEST,
        ),
        StatusReport(
            hub_epoch="a1b2c3d4e5f6",
            hub_pid=4241,
            uptime_ms=5_000,
            peers=[],
            queued={},
            tasks={},
            counters={"loads": 1},
            models=[_MODEL],
            memory=MemoryBudget(
                budget_bytes=16_000_000_000, held_bytes=9_000_000_000, available_bytes=4_000_000_000, low=False
            ),
        ),
        StatusReport(
            hub_epoch="a1b2c3d4e5f6",
            hub_pid=4241,
            uptime_ms=5_000,
            peers=[],
            queued={"infer.worker": 3},
            tasks={},
            counters={},
            circuits={"infer.worker": "circuit open: 3 failures within 60 s"},
        ),
    ],
    "registry.reload": [Reload(digest=_DIGEST)],
    "registry.reloaded": [
        Reloaded(
            digest=_DIGEST,
            previous="0" * 64,
            changes=[EntryChange(section="roles", name="translator", change="removed")],
            unchanged=12,
            draining=["worker"],
            kept=["roles.translator"],
        )
    ],
    "registry.changed": [RegistryChanged(digest=_DIGEST, needed=False)],
    "persona.make": [MakePersona(persona=_PERSONA, task_id="T-1", rename=True)],
    "persona.made": [PersonaMade(name="fact-checker-3f2a", state="trial", duplicate=True, why="as asked for")],
    "persona.list": [PersonaQuery()],
    "persona.listing": [
        PersonaListing(
            personas=[
                PersonaView(
                    name="fact-checker",
                    description="For claims.",
                    prompt="Check every claim.",
                    roles=["reviewer"],
                    task_types=["doc"],
                    state="adopted",
                    why="0.91 of 24",
                    made_by="client-1",
                    task_id="T-1",
                    made_ms=1_700_000_000_000,
                    changed_ms=1_700_000_060_000,
                )
            ]
        )
    ],
    "persona.trials": [PersonasOnTrial(personas=[_PERSONA])],
    "task.submit": [Submit(task={"objective": "Say hello", "idempotency_key": "order-42", "context": None})],
    "task.accepted": [Accepted(task_id="T-1", duplicate=True)],
    "task.watch": [Watch(task_id="T-1", after_seq=3), Watch(task_id="T-1", quiet=True)],
    "task.event": [
        TaskEvent(
            task_id="T-1",
            seq=4,
            at_ms=1_700_000_000_110,
            event="step.started",
            step="S1",
            attempt=1,
            fields={"model": "coder", "queued_ms": 10},
        )
    ],
    "task.result": [
        _VIEW,
        _REPORTED,
        _MENDED,
        _GUESSED,
        _GUESSED.model_copy(update={"gates": [_GATE, _ADVISORY]}),
        _TOLD,
        _LEARNED,
        _TAUGHT,
        _SWARMED,
        _REPLANNED,
        _MADE_TO_ANSWER,
    ],
    "task.show": [TaskQuery(task_id="T-1"), TaskQuery(task_id="T-2")],
    "task.detail": [
        TaskView(
            task_id="T-2",
            state=TaskState.FAILED,
            objective="?",
            task_type="chat",
            priority="interactive",
            created_ms=1,
            last_seq=2,
            failure=_FAILURE,
        ),
        _VIEW.model_copy(update={"waiting": ["planning waits for planner: 0 workers alive"]}),
        _MENDED,
        _GUESSED,
        _GUESSED.model_copy(update={"gates": [_ADVISORY]}),
        _LEARNED,
        _TAUGHT,
        _SWARMED,
        _REPLANNED,
        _VIEW.model_copy(
            update={
                "plan": PlanView(
                    source="rules", reason="as of", removed_edges=[], similar=[], decisions=[_VERSIONED_DECISION]
                )
            }
        ),
        _VIEW.model_copy(
            update={
                "plan": PlanView(
                    source="rules", reason="alike", removed_edges=[], similar=[], decisions=[_SHARED_DECISION]
                )
            }
        ),
        _MADE_TO_ANSWER,
    ],
    "task.artefact": [ArtefactQuery(task_id="T-1", name="sum.py")],
    "task.content": [ArtefactReply(artefact=Artefact(name="note", value="Grüße"))],
    "task.cancel": [
        CancelQuery(task_id="T-1", reason="changed my mind"),
        CancelQuery(task_id="T-1", step="S2", reason="not needed"),
    ],
    "task.extend": [Extend(task_id="T-1", steps=[{"id": "S9", "actor": "worker", "action": "x", "outputs": []}])],
    "task.extended": [Extended(task_id="T-1", steps_total=9)],
    "task.cancelled": [Cancelled(task_id="T-1", state=TaskState.CANCELLED)],
    "task.list": [ListQuery(limit=10, states=[TaskState.RUNNING])],
    "task.listing": [
        Listing(
            tasks=[
                TaskSummary(
                    task_id="T-1",
                    state=TaskState.RUNNING,
                    task_type="code",
                    objective="Write sum.py",
                    created_ms=1_700_000_000_000,
                    steps_done=1,
                    steps_total=2,
                )
            ]
        )
    ],
    "plan.request": [
        PlanRequest(task=_TASK),
        PlanRequest(task=_TASK, personas=[_PERSONA]),
        PlanRequest(task=_SPAWNING),
        PlanRequest(
            task=_TASK,
            revision=Revision(
                version=2,
                trigger="failed",
                failed="S1",
                failure=_FAILURE,
                open=["S2"],
                finished=[Output(name="notes")],
                notes="V2.notes",
                left_s=12.5,
                step_s={"worker": 1.5},
            ),
            begun=[_STEP],
        ),
        PlanRequest(task=_FEW_TURNS),
    ],
    "plan.partial": [PlanPartial(steps=[_STEP]), PlanPartial(steps=[_STEP], personas=[_PERSONA])],
    "plan.final": [
        PlanFinal(
            task=_TASK,
            source="model",
            reason="valid",
            removed_edges=[_EDGE],
            decisions=[_DECISION],
            similar=[_EPISODE],
            generated_tokens=40,
        ),
        PlanFinal(task=_TASK, source="rules", reason="advised", decisions=[_ADVISED_DECISION]),
        PlanFinal(task=_TASK, source="rules", reason="taught", similar=[_EPISODE], lessons=[_LESSON]),
        PlanFinal(task=_TASK, source="model", reason="with a persona of its own", personas=[_PERSONA]),
        PlanFinal(task=_SPAWNING, source="client", reason="as given"),
        PlanFinal(task=_TASK, source="model", reason="cut", added_edges=[_ADDED_EDGE], broke_off="call.expired"),
        PlanFinal(task=_TASK, source="rules", reason="as of a registry", decisions=[_VERSIONED_DECISION]),
        PlanFinal(task=_TASK, source="rules", reason="alike", decisions=[_SHARED_DECISION]),
        PlanFinal(task=_FEW_TURNS, source="client", reason="as given"),
    ],
    "plan.cancel": [Empty()],
    "infer.request": [
        InferRequest(
            role="coder",
            messages=[ChatMessage(role="system", content="Be terse."), ChatMessage(role="user", content="Say hi.")],
            max_tokens=64,
            sampling=Sampling(temperature=0, top_p=0.95, top_k=40, min_p=0.05, repeat_penalty=1.1, seed=7),
            json_schema={"type": "object"},
            stream=True,
        ),
        InferRequest(
            role="coder",
            messages=[ChatMessage(role="user", content="Say hi.")],
            max_tokens=64,
            grammar='root ::= "hi"',
            json_output=True,
            early_abort=AbortLimits(repeated_chars=500, runaway_tokens=50, entropy_nats=2),
        ),
        InferRequest(
            role="architect",
            messages=[ChatMessage(role="user", content="Lead.")],
            max_tokens=64,
            json_schema={"type": "object"},
            judged=False,
        ),
    ],
    "infer.partial": [
        InferPartial(text="h", generated_tokens=1),
        InferPartial(text="i", generated_tokens=2, start_chars=1),
    ],
    "infer.final": [
        InferFinal(
            text="hi",
            finish_reason="stop",
            model="coder",
            engine="llama-server",
            prompt_tokens=20,
            cached_tokens=4,
            generated_tokens=2,
            prompt_ms=10.5,
            generate_ms=20.25,
            first_token_ms=12.5,
        ),
        InferFinal(
            text="{}",
            finish_reason="stop",
            model="coder",
            engine="llama-server",
            prompt_tokens=30,
            generated_tokens=9,
            repaired=True,
        ),
        InferFinal(
            text="again",
            finish_reason="length",
            model="coder",
            engine="embedded",
            prompt_tokens=700,
            cached_tokens=640,
            generated_tokens=48,
            draft_tokens=72,
            accepted_tokens=40,
        ),
    ],
    "batch.request": [
        BatchRequest(
            role="worker", prompts=["one", "zwölf"], max_tokens=9, json_schema={"type": "object"}, concurrency=2
        )
    ],
    "batch.partial": [BatchPartial(done=1, failed=0, running=1, total=2, generated_tokens=5)],
    "batch.final": [
        BatchFinal(
            role="worker",
            model="small",
            answers=[
                BatchAnswer(
                    text="{}",
                    finish_reason="stop",
                    prompt_tokens=10,
                    cached_tokens=4,
                    generated_tokens=5,
                    first_token_ms=1.5,
                    started_ms=1_700_000_000_000,
                    ended_ms=1_700_000_000_100,
                    losses=1,
                ),
                BatchAnswer(failure=_FAILURE, ended_ms=1_700_000_000_200),
            ],
            widest=2,
            wall_ms=200,
        ),
        BatchFinal(
            role="worker",
            model="spare",
            answers=[BatchAnswer(text="{}", model="small"), BatchAnswer(text="[]", model="spare", losses=1)],
            widest=2,
            wall_ms=200,
        ),
    ],
    "batch.cancel": [Empty()],
    "infer.cancel": [Empty()],
    "gate.request": [
        GateRequest(
            gates=["unit"],
            artefacts=[Artefact(name="sum.py", kind=ArtefactKind.CODE, value="sum\n")],
            context=[Artefact(name="test_sum.py", kind=ArtefactKind.CODE, value="assert True\n")],
            json_schema={"type": "object"},
        ),
        GateRequest(
            gates=["integration", "definition_of_done"],
            artefacts=[Artefact(name="sum.py", kind=ArtefactKind.CODE, value="sum\n")],
            check_command=["bash", "check.sh", "{workspace}"],
            objective="Write sum.py",
            criteria=["it adds"],
        ),
    ],
    "gate.final": [GateFinal(results=[_GATE]), GateFinal(results=[_GATE, _ADVISORY])],
    "gate.cancel": [Empty()],
    "memory.request": [
        MemoryRequest(ask=RecordOutcomes(outcomes=[_OUTCOME], episode=_EPISODE)),
        MemoryRequest(ask=RecordDecisions(decisions=[_VERSIONED_RECORD], text="Write sum.py and test it")),
        MemoryRequest(
            ask=Advise(
                text="Write sum.py and test it",
                task_type="code",
                questions=[
                    Question(
                        key="persona:coder",
                        subject="persona",
                        cluster="coder",
                        rules_choice="terse",
                        options=[Option(choice="terse", prompt="89ef4567", cost=0.125), Option(choice="careful")],
                    )
                ],
                seed=7,
            )
        ),
        MemoryRequest(ask=Forget(task_ids=["T-1"], before_ms=5, choice="worker", subject="role")),
        MemoryRequest(ask=Import(rows=[Row(seq=4, outcome=_CURED), Row(seq=5, episode=_EPISODE)])),
        MemoryRequest(ask=Arms(subject="persona")),
        MemoryRequest(ask=RecordOutcomes(decisions=[_VERSIONED_RECORD], outcomes=[_OUTCOME])),
        MemoryRequest(
            ask=Advise(
                text="Write sum.py and test it",
                task_type="doc",
                questions=[
                    Question(
                        key="width",
                        subject="decomposition",
                        cluster="map-join/4/1024",
                        rules_choice="doc.map-join",
                        options=[Option(choice="doc.map-join", width=4), Option(choice="doc.single", width=1)],
                    )
                ],
                seed=7,
            )
        ),
        MemoryRequest(ask=Import(rows=[Row(seq=6, outcome=_SPREAD)])),
        MemoryRequest(
            ask=RecordOutcomes(
                decisions=[_VERSIONED_RECORD], text="Write sum.py and test it", outcomes=[_OUTCOME], episode=_EPISODE
            )
        ),
        MemoryRequest(
            ask=Advise(
                text="Write sum.py and test it",
                task_type="code",
                questions=[
                    Question(
                        key="persona:coder",
                        subject="persona",
                        cluster="coder",
                        rules_choice="terse",
                        options=[Option(choice="terse"), Option(choice="careful")],
                    )
                ],
                seed=7,
                retrieve=Retrieve(text="Write sum.py and test it", task_type="code", k=5),
            )
        ),
    ],
    "memory.final": [
        MemoryFinal(
            stored=1,
            duplicates=2,
            episodes=[_EPISODE],
            explained=[
                Explained(
                    decision=_RECORD,
                    outcome=_OUTCOME,
                    values=[
                        Value(subject="persona", task_type="code", choice="terse", q=0.5, count=3, mean_seconds=4.5)
                    ],
                )
            ],
            stats={"episodes": 1},
        ),
        MemoryFinal(explained=[Explained(decision=_VERSIONED_RECORD)], advice=[_ADVISED]),
        MemoryFinal(
            lessons=[_LESSON],
            values=[_VALUE],
            rows=[Row(seq=4, outcome=_CURED)],
            differences=[Difference(part="graph", what="lacks cluster T-1 doc")],
            forgotten=3,
        ),
        MemoryFinal(
            arms=[
                ArmValue(
                    task_type="code",
                    cluster="coder",
                    choice="terse",
                    prompt="89ef4567",
                    outcomes=3,
                    mean_reward=0.5,
                    deviation=0.25,
                    mean_seconds=4.5,
                )
            ]
        ),
        MemoryFinal(
            advice=[_ADVISED.model_copy(update={"arms": [_WIDE_ARM]})],
            stats={"episodes": 1},
            width=WidthReport(
                tasks=4,
                quality=0.75,
                shaped=0.875,
                stage=100,
                weight=0.0625,
                split=2,
                serial=2,
                width_pays=2,
                serial_though_width_pays=1,
                split_in_vain=1,
                serial_collapse=0.5,
                spurious_parallelism=0.5,
            ),
        ),
    ],
    "memory.cancel": [Empty()],
    "error": [ErrorReply(failure=_FAILURE)],
    "refused": [Refused(reason="10000 calls wait for infer.worker", retry_after_ms=500)],
}


def header_of(kind: str) -> Header:
    """The header of every example: all fields set, so that each is frozen too."""
    return Header(
        kind=kind,
        id="0a0b0c0d0e0f-7",
        corr="1a1b1c1d1e1f-3",
        src="inference-worker",
        dst="infer.worker",
        epoch="0a0b0c0d0e0f-1",
        seq=7,
        key="0123456789abcdef0123456789abcdef",
        attempt=1,
        deadline=1_700_000_060_000,
        task="T-1",
        step="S1",
        parent="fedcba9876543210fedcba9876543210",
        credit=3,
        prio="interactive",
        trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def path_of(kind: str, number: int) -> Path:
    """File of example `number` (from 1) of a kind."""
    return FOLDER / f"{kind}.{number}.hex"


def write_missing() -> list[Path]:
    """Write the files that are not there yet; returns them."""
    written = []
    for kind, examples in EXAMPLES.items():
        for number, message in enumerate(examples, 1):
            path = path_of(kind, number)
            if not path.exists():
                path.write_text(f"{pack_header(header_of(kind)).hex()}\n{pack_body(message).hex()}\n", "ascii")
                written.append(path)
    return written


if __name__ == "__main__":
    missing = sorted(BODIES.keys() - EXAMPLES.keys())
    if missing:
        raise SystemExit(f"no example for {', '.join(missing)}: add one to {__file__}")
    for new in write_missing():
        print(f"written: {new}")  # noqa: T201  a command-line tool
