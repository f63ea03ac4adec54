"""What has happened to tasks: the records of the journal, and nothing but them rebuilds the state.

A fact is past tense, holds plain values only (it must be readable by tools and by later versions), and is applied
by `services.scheduler.fold`. Decisions are taken before a fact is made, in `machine.py`; replaying facts decides
nothing again. Fields are added at the end with a default, never renamed: old journals stay readable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final

import msgspec
from pydantic import BaseModel


class Fact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base: which task, and when (unix ms)."""

    EVENT: ClassVar[str]
    """Name of the event that watchers see."""

    task: str
    at_ms: int
    step: str | None = None
    number: int | None = None
    """Attempt, from 1."""


class Dumped(dict[str, Any]):
    """A message as plain values, which still knows the message: whoever folds the new fact need not read it back.

    From a journal come plain dictionaries; both say the same.
    """

    def __init__(self, message: BaseModel) -> None:
        super().__init__(message.model_dump(mode="json", exclude_none=True))
        self.message: Final = message


class TaskAccepted(Fact, frozen=True, kw_only=True):
    """The hub has promised to finish this task."""

    EVENT: ClassVar[str] = "task.accepted"
    ir: dict[str, Any]
    client: str


class TaskPlanned(Fact, frozen=True, kw_only=True):
    """The plan is adopted; from here on the steps exist."""

    EVENT: ClassVar[str] = "task.planned"
    ir: dict[str, Any]
    source: str
    reason: str
    removed_edges: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    similar: list[dict[str, Any]]
    lessons: list[dict[str, Any]] | None = None
    generated_tokens: int
    predicted_ms: int | None = None
    """Expected length of the longest chain of steps, from the durations learned so far: inference only."""
    predicted_steps: list[str] | None = None
    """That chain, first step first."""
    slots: dict[str, int] | None = None
    """Slots of the models that the steps are planned for."""
    added_edges: list[dict[str, Any]] | None = None
    as_written: dict[str, Any] | None = None
    """Shape of the plan before dependencies were dropped and added, and `as_run` after that: `plan.PlanShape`."""
    as_run: dict[str, Any] | None = None


class PlanGrown(Fact, frozen=True, kw_only=True):
    """First or further steps of a plan that is still in the making: they begin; `TaskPlanned` ends it."""

    EVENT: ClassVar[str] = "task.plan_grown"
    steps: list[dict[str, Any]]


class ReplanAsked(Fact, frozen=True, kw_only=True):
    """The rest of the plan is to be made anew; `held` does not begin meanwhile. `step` could not be done."""

    EVENT: ClassVar[str] = "task.replanning"
    version: int
    trigger: str
    reason: str
    rule: str
    held: list[str]
    notes: str
    """What happened, as material for whoever goes on: becomes the artefact `V<version>.notes`."""
    failure: dict[str, Any] | None = None


class TaskReplanned(Fact, frozen=True, kw_only=True):
    """A new version of the plan is in force."""

    EVENT: ClassVar[str] = "task.replanned"
    version: int
    trigger: str
    source: str
    reason: str
    kept: list[str]
    dropped: list[str]
    added: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    generated_tokens: int
    slots: dict[str, int]


class ReplanAbandoned(Fact, frozen=True, kw_only=True):
    """There is no new version: the old one goes on, or the task ends with what asked for it."""

    EVENT: ClassVar[str] = "task.replan_abandoned"
    version: int
    reason: str


class PersonasMade(Fact, frozen=True, kw_only=True):
    """The task has these of its own from now on: made for it, or on trial when its steps took them up."""

    EVENT: ClassVar[str] = "task.personas"
    personas: list[dict[str, Any]]


class StepsAdded(Fact, frozen=True, kw_only=True):
    """The graph has grown while the task ran."""

    EVENT: ClassVar[str] = "task.extended"
    steps: list[dict[str, Any]]
    client: str


class StepExpanded(Fact, frozen=True, kw_only=True):
    """A mapped step has become one sub-step per item: `items[i]` is the input artefact of sub-step `<step>.<i+1>`."""

    EVENT: ClassVar[str] = "step.expanded"
    items: list[dict[str, Any]]


class SwarmTurned(Fact, frozen=True, kw_only=True):
    """A turn of a spawning step has called tools, or its first turn begins (`turn` 0, no calls); the next one is open.

    A call that was carried out made the sub-agent `agent`, or the sub-step `step`; one with a `code` was refused.
    """

    EVENT: ClassVar[str] = "swarm.turned"
    turn: int
    calls: list[dict[str, Any]]
    unread: int = 0
    """Further calls of the turn, beyond the bound, which were not looked at."""
    closing: str = ""
    """Why the turn that is now open may only answer: the last one failed for good, and has no calls."""


class StepJoined(Fact, frozen=True, kw_only=True):
    """All sub-steps of a mapped step are done, or a spawning step has answered; this is what they made."""

    EVENT: ClassVar[str] = "step.joined"
    artefact: dict[str, Any]


class AttemptQueued(Fact, frozen=True, kw_only=True):
    """A step is ready, or is to be tried again; its call waits for a slot."""

    EVENT: ClassVar[str] = "step.ready"
    role: str
    model: str
    key: str
    constrained: bool = False
    delay_ms: int | None = None
    """Pause before it may go to a worker; only in journals of before a pause was part of the same attempt."""
    arm: str | None = None
    """`plain` or `harder` for the last attempt of a role before an escalation, `escalated` for the first one after."""
    told_chars: int | None = None
    """Room for what it is told about earlier attempts: with them, this gives the very text."""


class AttemptStarted(Fact, frozen=True, kw_only=True):
    """A worker has it; `reattached` = it brought it back after a silence of its own or of the hub."""

    EVENT: ClassVar[str] = "step.started"
    worker: str
    reattached: bool = False
    unserved_ms: list[int] | None = None
    """From when until when it waited without any READY worker for its model (unix ms); absent if there was one."""


class AttemptLost(Fact, frozen=True, kw_only=True):
    """A run of an attempt, or of its gates, came to nothing: the worker is gone or gave it back, or lacked something.

    That says nothing about the answer, so the same attempt goes on. `blame` counts towards poison.
    """

    EVENT: ClassVar[str] = "step.lost"
    code: str
    message: str
    blame: bool
    category: str = "PEER"
    work: str = "inference"
    """What came to nothing: `inference` or `gates`."""
    action: str | None = None
    """What the failure table says, and `rule` why; absent in journals of before this was kept."""
    rule: str | None = None
    delay_ms: int | None = None
    """Pause before it is done again."""


class AttemptMoved(Fact, frozen=True, kw_only=True):
    """Its model is not served: the attempt waits for another one, in the same role."""

    EVENT: ClassVar[str] = "step.moved"
    model: str
    reason: str


class TaskSetback(Fact, frozen=True, kw_only=True):
    """The plan, the checks of the final artefacts, or what memory is told failed, and what follows."""

    EVENT: ClassVar[str] = "task.retried"
    work: str
    failure: dict[str, Any]
    action: str
    rule: str
    blame: bool
    delay_ms: int | None = None


class AttemptAnswered(Fact, frozen=True, kw_only=True):
    """The first answer for the attempt's key; later ones are duplicates."""

    EVENT: ClassVar[str] = "step.answered"
    artefacts: list[dict[str, Any]]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    first_token_ms: float
    repaired: bool | None = None
    """True where the model had to mend its own answer; absent in journals before this was kept."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    generate_ms: float = 0
    """Decoding alone, without the reading of the prompt."""


class AttemptChecked(Fact, frozen=True, kw_only=True):
    """Its gates have spoken."""

    EVENT: ClassVar[str] = "step.checked"
    gates: list[dict[str, Any]]


class AttemptFailed(Fact, frozen=True, kw_only=True):
    """The attempt has failed; `action` is what the failure table says and `rule` why."""

    EVENT: ClassVar[str] = "step.retried"
    failure: dict[str, Any]
    action: str
    rule: str
    generated_tokens: int = 0


class StepDone(Fact, frozen=True, kw_only=True):
    """The outputs of the newest attempt are now artefacts of the task."""

    EVENT: ClassVar[str] = "step.done"


class StepFailed(Fact, frozen=True, kw_only=True):
    """No further attempt will be made."""

    EVENT: ClassVar[str] = "step.failed"
    failure: dict[str, Any]


class StepDropped(Fact, frozen=True, kw_only=True):
    """The step will not run or was stopped: `state` is cancelled or skipped."""

    EVENT: ClassVar[str] = "step.skipped"
    state: str
    reason: str


class DuplicateSeen(Fact, frozen=True, kw_only=True):
    """A second terminal result for a key; it has no effect."""

    EVENT: ClassVar[str] = "step.duplicate"
    key: str
    worker: str


class TaskChecked(Fact, frozen=True, kw_only=True):
    """The gates of the final artefacts have spoken."""

    EVENT: ClassVar[str] = "task.checked"
    gates: list[dict[str, Any]]


class TaskEnded(Fact, frozen=True, kw_only=True):
    """Nothing about the task changes any more."""

    EVENT: ClassVar[str] = "task.ended"
    state: str
    failure: dict[str, Any] | None = None


class OutcomesSettled(Fact, frozen=True, kw_only=True):
    """Memory has the outcomes of this task, or has refused them for good (`reason`)."""

    EVENT: ClassVar[str] = "task.learned"
    stored: int
    reason: str = ""


TYPES: Final[dict[str, type[Fact]]] = {
    cls.__name__: cls
    for cls in (
        TaskAccepted,
        TaskPlanned,
        PlanGrown,
        ReplanAsked,
        TaskReplanned,
        ReplanAbandoned,
        PersonasMade,
        StepsAdded,
        StepExpanded,
        SwarmTurned,
        StepJoined,
        AttemptQueued,
        AttemptStarted,
        AttemptLost,
        AttemptMoved,
        TaskSetback,
        AttemptAnswered,
        AttemptChecked,
        AttemptFailed,
        StepDone,
        StepFailed,
        StepDropped,
        DuplicateSeen,
        TaskChecked,
        TaskEnded,
        OutcomesSettled,
    )
}
_write: Final = msgspec.msgpack.Encoder().encode
_read_parts: Final = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_readers: Final = {name: msgspec.msgpack.Decoder(cls) for name, cls in TYPES.items()}


def pack_fact(fact: Fact) -> bytes:
    """Encode as a msgpack map of the fields that differ from their default."""
    return _write(fact)


def pack_facts(facts: Sequence[Fact]) -> bytes:
    """Encode several as a msgpack array, and a single one as `pack_fact` does."""
    return _write(facts[0] if len(facts) == 1 else facts)


def unpack_facts(kinds: str, data: bytes) -> list[Fact]:
    """Decode what `pack_facts` has made; `kinds` names the facts in order, with spaces between. Raises ValueError."""
    names = kinds.split(" ")
    if len(names) == 1:
        return [unpack_fact(kinds, data)]
    try:
        parts = _read_parts(data)
    except msgspec.MsgspecError as err:
        raise ValueError(str(err)) from err
    if len(parts) != len(names):
        raise ValueError(f"{len(parts)} facts under {len(names)} names")
    return [unpack_fact(name, part) for name, part in zip(names, parts, strict=True)]


def unpack_fact(kind: str, data: bytes | msgspec.Raw) -> Fact:
    """Decode; fields of newer versions are ignored.

    Raises ValueError for a kind that this version does not know, and for bytes that are no fact of this kind.
    """
    reader = _readers.get(kind)
    if reader is None:
        raise ValueError(f"the journal holds a {kind!r}, which this version does not know: use a newer one")
    try:
        return reader.decode(data)
    except msgspec.MsgspecError as err:
        raise ValueError(str(err)) from err
