"""Batches: many prompts for one role, asked as calls of the hub and put together again in their order. Pure.

Each prompt is one call at the broker, for the client that asked, so that credit, fair shares, classes, deadlines and
lost workers are dealt with where they always are. At most a window of them is there at once: a batch of a thousand
never stands in the queue before what others ask later, and holds no composed prompts in memory. What follows a failed
call the failure table says, but only a rerun or a pause is done here: a prompt that has failed for good is an answer
of its own, and no business of a stronger role or of the other prompts, unless it failed for the schema that all of
them have. A batch whose model nobody serves goes to the lateral model of its role with all that waits, as steps do.

A batch is not journalled. Its items' keys follow from its own key and their prompts, so whoever asks again after a
restart of the hub gets from the workers what they have finished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from protocol.codec import pack_body, unpack_body
from protocol.errors import BadFrame
from protocol.header import Header
from protocol.limits import MAX_BATCH_ANSWER_BYTES
from protocol.messages.base import Message
from protocol.messages.batch import BatchAnswer, BatchFinal, BatchPartial, BatchRequest
from protocol.messages.failure import Category, Failure
from protocol.messages.infer import InferFinal
from protocol.messages.reply import ErrorReply
from services.kit.identity import work_key
from services.kit.registry import Registry
from services.scheduler.admission import DrainRate
from services.scheduler.calls import Call
from services.scheduler.effects import Ask, Drop
from services.scheduler.failures import Action, History, Work, kills, react
from services.scheduler.keys import superseded, taken, withdraws
from services.scheduler.requests import batch_item_request
from services.scheduler.resources import inference_needs

MAX_BATCHES: Final = 64
"""Of all clients; each may hold prompts of MAX_BODY_BYTES and answers of MAX_BATCH_ANSWER_BYTES."""
MAX_BATCHES_PER_CLIENT: Final = 8
MAX_BYTES: Final = 128 * 1024 * 1024
"""Requests of all batches together."""
PROGRESS_MS: Final = 100
"""Shortest time between two partials of a batch; what happens in between is in the next one."""
HEARTBEAT_MS: Final = 1_000
"""Longest time between two of them."""
MAX_MOVES: Final = 2
"""How often a batch changes its model: two that take turns dying must not make it wander until its deadline."""
_DEFAULT_DEADLINE_MS: Final = 3_600_000
_BAD_SCHEMA: Final = "schema.invalid"
"""Code with which a worker says that the schema is no JSON Schema: all prompts of a batch have the same one."""


class Tell(msgspec.Struct, frozen=True):
    """Answer the request of a batch with this message."""

    identity: bytes
    request: Header
    kind: str
    body: Message


Effect = Ask | Drop | Tell


@dataclass(slots=True)
class _Item:
    """One prompt on its way."""

    index: int
    losses: int = 0
    repeats: Counter[Category] = field(default_factory=Counter)
    """How often it was asked again, by category of the failure."""
    started_ms: int | None = None
    """When a worker took it; None while it waits."""
    hold_until_ms: int = 0
    """It pauses until then."""


@dataclass(slots=True)
class _Batch:
    """One request and what has become of it."""

    identity: bytes
    header: Header
    request: BatchRequest
    size_bytes: int
    client: str
    registry: Registry
    model: str
    """That the next prompts go to."""
    deadline_ms: int
    began_ms: int
    answers: list[BatchAnswer | None]
    open: dict[str, _Item] = field(default_factory=dict)
    """Key of its call -> the item, for those that are at the broker."""
    next: int = 0
    """The first prompt that has not been asked."""
    answer_bytes: int = 0
    widest: int = 0
    told_ms: int = 0
    moves: int = 0

    @property
    def key(self) -> str:
        return self.header.key or ""

    @property
    def running(self) -> int:
        return sum(1 for item in self.open.values() if item.started_ms is not None)


@dataclass(slots=True)
class Batches:
    """All batches. Methods named `on_…` take an event; what is to be done comes from `take`.

    `registry` gives the one declared; a batch keeps the one it began with. `slots` tells how many calls for one target
    can run at once, as far as the broker knows.
    """

    registry: Callable[[], Registry]
    slots: Callable[[str], int]
    _batches: dict[str, _Batch] = field(default_factory=dict)
    _owners: dict[str, str] = field(default_factory=dict)
    """Key of a call -> key of its batch."""
    _effects: list[Effect] = field(default_factory=list)
    _drain: DrainRate = field(default_factory=DrainRate)

    def take(self) -> list[Effect]:
        """Effects since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def owns(self, key: str) -> bool:
        """Whether a call is an item of a batch."""
        return key in self._owners

    def requesters(self) -> set[bytes]:
        """Peers that wait for a batch."""
        return {batch.identity for batch in self._batches.values()}

    def models(self) -> set[str]:
        """Models that batches need until they have ended, whatever the registry says meanwhile."""
        return {batch.model for batch in self._batches.values()}

    def objection(self, identity: bytes, header: Header, size_bytes: int) -> str | None:
        """Why this batch cannot be taken now; None if it can. One that is there already can."""
        if header.key in self._batches:
            return None
        own = sum(1 for batch in self._batches.values() if batch.identity == identity)
        held = sum(batch.size_bytes for batch in self._batches.values())
        if own >= MAX_BATCHES_PER_CLIENT:
            return f"{own} of your batches have not ended"
        if len(self._batches) >= MAX_BATCHES:
            return f"{len(self._batches)} batches have not ended"
        if held + size_bytes > MAX_BYTES:
            return f"the batches that have not ended hold {held:,} bytes of {MAX_BYTES:,}"
        return None

    def retry_after_ms(self, at_ms: int) -> int:
        """When whoever was refused should find a place."""
        return self._drain.retry_after_ms(at_ms)

    def ask(self, identity: bytes, header: Header, body: bytes, client: str, at_ms: int) -> None:
        """Begin a batch, or join the one with this key. Raises BadFrame for what cannot be asked."""
        if header.key is None:
            raise BadFrame("call.incomplete", "batch.request needs the header field key")
        request = unpack_body(BatchRequest, body)
        known = self._batches.get(header.key)
        if known is not None:
            if known.request != request:
                raise taken(header.key)
            if (known.identity, known.header.id) != (identity, header.id):
                self._tell(known, "error", superseded(header.key))
                self._move_deadline(known, header.deadline or at_ms + _DEFAULT_DEADLINE_MS, at_ms)
            known.identity, known.header = identity, header
            return
        registry = self.registry()
        role = registry.roles.get(request.role)
        if role is None:
            names = ", ".join(registry.roles)
            raise BadFrame("role.unknown", f"the registry has no role {request.role!r}; it has: {names}")
        batch = _Batch(
            identity=identity,
            header=header,
            request=request,
            size_bytes=len(body),
            client=client,
            registry=registry,
            model=role.model,
            deadline_ms=header.deadline or at_ms + _DEFAULT_DEADLINE_MS,
            began_ms=at_ms,
            answers=[None] * len(request.prompts),
            told_ms=at_ms,
        )
        self._batches[header.key] = batch
        self._go_on(batch, at_ms)

    def body_of(self, call: Call, at_ms: int) -> bytes:
        """The body of an item's call, composed when it starts."""
        batch = self._batches[self._owners[call.key]]
        prompt = batch.request.prompts[batch.open[call.key].index]
        return pack_body(batch_item_request(batch.request, prompt, call.key, batch.registry))

    def on_started(
        self,
        call: Call,
        worker: str,
        at_ms: int,
        *,
        reattached: bool = False,
        unserved_ms: tuple[int, int] | None = None,
    ) -> None:
        """A worker has taken an item, or has brought it back."""
        batch = self._batches[self._owners[call.key]]
        batch.open[call.key].started_ms = at_ms
        batch.widest = max(batch.widest, batch.running)

    def on_lost(self, call: Call, worker: str, at_ms: int) -> None:
        """The worker died with an item; the broker has queued it again unless it counts as poisoned."""
        batch = self._batches[self._owners[call.key]]
        item = batch.open[call.key]
        item.started_ms = None
        lost = _failure("peer.lost", Category.PEER, f"{worker} died or fell silent with this prompt")
        if not self._react(batch, item, lost).repeats:
            self._effects.append(Drop(call.key))
            message = f"{item.losses} workers died with this prompt; the last one was {worker}"
            self._fail(batch, call.key, _failure("item.poisoned", Category.PEER, message), at_ms)
            self._go_on(batch, at_ms)

    def move(self, call: Call, is_served: Callable[[str], bool], at_ms: int) -> None:
        """The model of a waiting item is not served: all that waits of its batch goes to the other one, if that is.

        An item that was at work when the batch moved and has lost its worker since only follows it: that is no move.
        """
        batch = self._batches[self._owners[call.key]]
        if call.target != f"infer.{batch.model}":
            if is_served(batch.model):
                self._ask_anew(batch, call.key, at_ms)
            return
        role = batch.registry.roles[batch.request.role]
        other = role.lateral if batch.model == role.model else role.model
        if other is None or batch.moves >= MAX_MOVES or not is_served(other):
            return
        batch.moves += 1
        batch.model = other
        for key, item in list(batch.open.items()):
            if item.started_ms is None:
                self._ask_anew(batch, key, at_ms)

    def on_ended(self, call: Call, kind: str, body: bytes, worker: str, at_ms: int) -> None:
        """An item's call has its ending."""
        batch = self._batches[self._owners[call.key]]
        try:
            if kind == "error":
                self._on_failure(batch, call, unpack_body(ErrorReply, body).failure, at_ms)
            else:
                self._on_answer(batch, call.key, unpack_body(InferFinal, body), at_ms)
        except BadFrame as err:  # a lying worker; the same path as one that died
            lie = _failure("peer.bad_body", Category.PEER, f"{worker} sent a bad {kind}: {err}")
            self._on_failure(batch, call, lie, at_ms)
        self._go_on(batch, at_ms)

    def on_tick(self, at_ms: int) -> None:
        """End what is past its deadline, and tell who waits that they do. Comes after the broker's own tick.

        The broker has ended its calls by then; what still is open ends here, so that a batch has its final whatever
        has become of them. A client that was killed is found by the message that cannot be sent to it.
        """
        for batch in list(self._batches.values()):
            if batch.deadline_ms <= at_ms:
                for key in list(batch.open):
                    message = "the deadline of the batch passed and nothing was heard of this prompt"
                    self._effects.append(Drop(key))
                    self._fail(batch, key, _failure("batch.deadline", Category.TIMEOUT, message), at_ms)
            if batch.deadline_ms <= at_ms or at_ms - batch.told_ms >= HEARTBEAT_MS:
                self._go_on(batch, at_ms)

    def cancel(self, key: str | None, identity: bytes, corr: str | None = None) -> None:
        """End a batch without an answer, all its calls with it; only for whoever asked, and by its newest request."""
        batch = self._batches.get(key or "")
        if batch is not None and batch.identity == identity and withdraws(corr, batch.header.id):
            self._effects.extend(Drop(call) for call in sorted(batch.open))
            self._remove(batch)

    def cancel_for(self, identity: bytes) -> None:
        """Cancel every batch that this peer waits for: it is gone."""
        for batch in list(self._batches.values()):
            self.cancel(batch.key, identity)

    def check_invariants(self, calls: Iterable[str]) -> None:
        """Raise AssertionError if the state contradicts itself; `calls` are the keys at the broker. For tests."""
        there = set(calls)
        for batch in self._batches.values():
            if not batch.open:
                raise AssertionError(f"batch {batch.key} waits for nothing")
            if not batch.open.keys() <= there:
                raise AssertionError(f"batch {batch.key} waits for calls that are not there")
        if self._owners.keys() != {key for batch in self._batches.values() for key in batch.open}:
            raise AssertionError("calls of batches and batches of calls differ")

    # Inside

    def _go_on(self, batch: _Batch, at_ms: int) -> None:
        """Ask as much as the window holds, then say how far it is, or that it is done."""
        total = len(batch.answers)
        target = f"infer.{batch.model}"
        window = batch.request.concurrency or max(1, self.slots(target), batch.registry.models[batch.model].slots)
        while batch.next < total:
            if batch.deadline_ms <= at_ms:
                message = "the deadline of the batch passed before it was this prompt's turn"
                late = _failure("batch.deadline", Category.TIMEOUT, message)
                batch.answers[batch.next] = BatchAnswer(failure=late, ended_ms=at_ms)
            elif len(batch.open) < window:
                self._ask_item(batch, _Item(batch.next), at_ms)
            else:
                break
            batch.next += 1
        if not batch.open:
            self._finish(batch, at_ms)
        elif at_ms - batch.told_ms >= PROGRESS_MS:
            batch.told_ms = at_ms
            self._tell(batch, "batch.partial", _progress(batch))

    def _move_deadline(self, batch: _Batch, deadline_ms: int, at_ms: int) -> None:
        """The request that waits now has another deadline, and nobody waits until the old one any more.

        Workers know the old one of what they are at: what ends for that is asked for again.
        """
        batch.deadline_ms = deadline_ms
        for key, item in list(batch.open.items()):
            if item.started_ms is None:
                self._ask_anew(batch, key, at_ms, hold_until_ms=item.hold_until_ms)

    def _ask_anew(self, batch: _Batch, key: str, at_ms: int, hold_until_ms: int = 0) -> None:
        """Withdraw the call of an item, and ask for it where the batch is now."""
        self._effects.append(Drop(key))
        self._ask_item(batch, self._close(batch, key), at_ms, hold_until_ms)

    def _ask_item(self, batch: _Batch, item: _Item, at_ms: int, hold_until_ms: int = 0) -> None:
        request = batch.request
        target = f"infer.{batch.model}"
        named = () if batch.model == batch.registry.roles[request.role].model else (batch.model,)
        key = work_key("batch", batch.key, item.index, request.role, request.prompts[item.index], *named)
        item.started_ms, item.hold_until_ms = None, hold_until_ms
        batch.open[key] = item
        self._owners[key] = batch.key
        call = Call(
            key=key,
            kind="infer.request",
            target=target,
            queued_ms=at_ms,
            interactive=batch.header.prio != "batch",
            client=batch.client,
            needs=inference_needs(batch.registry, target),
            outer_ms=batch.deadline_ms,
            timeout_ms=int(batch.registry.roles[request.role].timeout_s * 1000),
            trace=batch.header.trace,
            retry_lost=True,
            hold_until_ms=hold_until_ms,
        )
        self._effects.append(Ask(call))

    def _on_answer(self, batch: _Batch, key: str, final: InferFinal, at_ms: int) -> None:
        size = len(final.text.encode("utf-8", "surrogatepass"))
        if batch.answer_bytes + size > MAX_BATCH_ANSWER_BYTES:
            message = f"the answers of the batch are larger than {MAX_BATCH_ANSWER_BYTES:,} bytes: ask for less at once"
            evidence = {"generated_tokens": final.generated_tokens}
            failure = _failure("batch.too_large", Category.RESOURCE, message).model_copy(update={"evidence": evidence})
            self._fail(batch, key, failure, at_ms)
            return
        batch.answer_bytes += size
        item = self._close(batch, key)
        batch.answers[item.index] = BatchAnswer(
            text=final.text,
            model=final.model,
            finish_reason=final.finish_reason,
            prompt_tokens=final.prompt_tokens,
            cached_tokens=final.cached_tokens,
            generated_tokens=final.generated_tokens,
            first_token_ms=final.first_token_ms,
            repaired=final.repaired,
            started_ms=item.started_ms,
            ended_ms=at_ms,
            losses=item.losses,
        )

    def _on_failure(self, batch: _Batch, call: Call, failure: Failure, at_ms: int) -> None:
        item = batch.open[call.key]
        ran_until_deadline = failure.category is Category.TIMEOUT and call.deadline_ms == call.outer_ms
        if ran_until_deadline and (call.outer_ms or 0) < batch.deadline_ms:
            self._ask_item(batch, self._close(batch, call.key), at_ms)  # that of a request which has been displaced
            return
        action = self._react(batch, item, failure)
        again_ms = at_ms + action.delay_ms
        if action.repeats and again_ms < batch.deadline_ms:
            self._close(batch, call.key)  # the key of its next call is another one if the batch has moved meanwhile
            self._ask_item(batch, item, at_ms, hold_until_ms=again_ms)
        else:
            self._fail(batch, call.key, failure, at_ms)
            if (failure.category, failure.code) == (Category.POLICY, _BAD_SCHEMA):
                self._fail_rest(batch, failure, at_ms)

    def _fail_rest(self, batch: _Batch, failure: Failure, at_ms: int) -> None:
        """No prompt can end otherwise: those that no worker has end with the same failure, the others by themselves."""
        for key, item in list(batch.open.items()):
            if item.started_ms is None:
                self._effects.append(Drop(key))
                self._fail(batch, key, failure, at_ms)
        for index in range(batch.next, len(batch.answers)):
            batch.answers[index] = BatchAnswer(failure=failure, ended_ms=at_ms)
        batch.next = len(batch.answers)

    def _react(self, batch: _Batch, item: _Item, failure: Failure) -> Action:
        """What the failure table says; the item takes note of it."""
        repeats, losses = item.repeats[failure.category], item.losses + kills(batch.registry, failure)
        history = History(repeats=repeats, losses=losses)
        action = react(batch.registry, Work.BATCH, failure, batch.request.role, history)
        item.losses = losses
        item.repeats[failure.category] += action.repeats
        return action

    def _fail(self, batch: _Batch, key: str, failure: Failure, at_ms: int) -> None:
        item = self._close(batch, key)
        spent = failure.evidence.get("generated_tokens", 0)
        batch.answers[item.index] = BatchAnswer(
            failure=failure,
            generated_tokens=spent if type(spent) is int and spent >= 0 else 0,
            started_ms=item.started_ms,
            ended_ms=at_ms,
            losses=item.losses,
        )

    def _close(self, batch: _Batch, key: str) -> _Item:
        del self._owners[key]
        return batch.open.pop(key)

    def _finish(self, batch: _Batch, at_ms: int) -> None:
        final = BatchFinal(
            role=batch.request.role,
            model=batch.model,
            answers=[answer for answer in batch.answers if answer is not None],
            widest=batch.widest,
            wall_ms=at_ms - batch.began_ms,
        )
        self._tell(batch, "batch.final", final)
        self._drain.ended(at_ms)
        self._remove(batch)

    def _remove(self, batch: _Batch) -> None:
        for key in batch.open:
            del self._owners[key]
        del self._batches[batch.key]

    def _tell(self, batch: _Batch, kind: str, body: Message) -> None:
        self._effects.append(Tell(batch.identity, batch.header, kind, body))


def _progress(batch: _Batch) -> BatchPartial:
    ended = [answer for answer in batch.answers if answer is not None]
    failed = sum(1 for answer in ended if answer.failure is not None)
    return BatchPartial(
        done=len(ended) - failed,
        failed=failed,
        running=batch.running,
        total=len(batch.answers),
        generated_tokens=sum(answer.generated_tokens for answer in ended),
    )


def _failure(code: str, category: Category, message: str) -> Failure:
    return Failure(code=code, category=category, origin="scheduler", message=message[:8_000])
