"""The hub's edge: one poll loop that drives the machine, the socket, the journal and the log.

A turn drains what has arrived and hands out work, writes all facts of the batch in one transaction, then tells: nobody
is promised anything that a crash could take back. A poll loop and not asyncio, because this loop is the latency of
every step. If the journal cannot be written the hub stops; what clients were not told is theirs to submit again. A task
whose facts are damaged is set aside with a line in the log; all others go on.
"""

from __future__ import annotations

import gc
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Final

from protocol.codec import pack_body
from protocol.errors import SendLater, StrandPeer
from protocol.messages.base import Message
from protocol.messages.reply import Refused
from protocol.messages.result import Listing
from protocol.transport import RouterPort
from services.kit.children import die_with_parent
from services.kit.clock import Clock, SteadyClock
from services.kit.config import Home
from services.kit.hardware import available_memory
from services.kit.identity import boot_id
from services.kit.logs import Log, LogEvent
from services.kit.registry import Registry, RegistryError
from services.scheduler.durations import LearnedDurations
from services.scheduler.effects import Record
from services.scheduler.events import (
    Command,
    Event,
    EventsRead,
    FrameIn,
    LookedUp,
    LookUp,
    MemorySeen,
    Noted,
    OthersServed,
    ReadEvents,
    ReadListing,
    ReadRegistry,
    ReadStatus,
    ReloadUnsettled,
    Reported,
    Restored,
    Send,
    ServeOthers,
    Tick,
    Undeliverable,
)
from services.scheduler.fact_rows import DamagedTask
from services.scheduler.facts import (
    AttemptAnswered,
    AttemptFailed,
    AttemptLost,
    AttemptQueued,
    AttemptStarted,
    Fact,
    StepDone,
    StepFailed,
    TaskEnded,
    TaskPlanned,
    TaskSetback,
)
from services.scheduler.housekeeping import Housekeeping, Intervals
from services.scheduler.journal import Journal
from services.scheduler.lookups import Found, Lookups
from services.scheduler.machine import Hub
from services.scheduler.occupancy import MAX_ACTIVE_TASKS, MAX_UNSETTLED
from services.scheduler.pages import Pages
from services.scheduler.personas import AdoptPersona, KeepPersona
from services.scheduler.registry_reader import RegistryReader
from services.scheduler.reports import Reports
from services.scheduler.unread import RETRY_AFTER_MS
from services.scheduler.vigil import Vigil
from services.scheduler.watchers import MAX_WATCHES

HUB_STARTED = LogEvent("hub.started", "pid epoch restored unsettled damaged restore_ms registry")
REGISTRY_NOT_KEPT = LogEvent("registry.not_kept", "reason", "warning")
HUB_STOPPED = LogEvent("hub.stopped", "reason")
JOURNAL_FAILED = LogEvent("journal.failed", "error", "error")
TASK_DAMAGED = LogEvent("journal.damaged", "task seq reason", "error")
_FIELDS: Final = "task step attempt what seq code category action rule state source"
TASK_EVENT = LogEvent("task.event", _FIELDS)
TASK_DETAIL = LogEvent("task.detail", _FIELDS, "debug")
_DETAILS: Final = (AttemptQueued, AttemptAnswered)

_TICK_MS: Final = 100
_RESTORED_MS: Final = 20
"""After this no further ended task is read back in one go. One is never cut: a thousand steps take 50 to 150 ms, and
everything else waits meanwhile."""
_MEMORY_EVERY_MS: Final = 1_000
_BATCH: Final = 512
"""Messages drained before the journal is written: bounds the delay of the first one."""
_DRAIN_S: Final = 0.1
"""Nor for more work than this: some messages take many ms, and what others wait for leaves when the drain is over."""
_PAGE: Final = 256
"""Events read at once for a watcher that came late."""
_PAGES_EVERY_MS: Final = 20
"""Between pages, of all watchers together: some 12,000 events a second, which a client can take without falling a
whole pipe behind, and which leaves the loop to the steps."""


class HubApp:
    """The scheduler process. `run` serves to the end; `start`, `turn` and `close` are its parts."""

    def __init__(
        self,
        home: Home,
        registry: Registry,
        port: RouterPort,
        *,
        clock: Clock | None = None,
        intervals: Intervals | None = None,
        available_memory: Callable[[], int | None] = available_memory,
    ) -> None:
        self._home = home
        self._clock = clock or SteadyClock()
        self._log = Log(home.logs, "scheduler", self._clock, level=home.log_level, batched=True)
        self._port = port
        path = home.journal / "journal.sqlite"
        self._journal = Journal(path)
        self._lookups = Lookups(self._journal)
        self._reports = Reports()
        self._durations = LearnedDurations()
        now = self._clock.now_ms()
        self._hub = Hub(epoch=boot_id(), registry=registry, pid=os.getpid(), started_ms=now, durations=self._durations)
        self._housekeeping = Housekeeping(path, intervals or Intervals(), now)
        self._reader = RegistryReader(home)
        self._records: list[Record] = []
        self._personas: list[KeepPersona] = []
        """Rows to write with the facts."""
        self._unpromised: list[Send] = []
        """Messages that may leave before the facts are written."""
        self._promises: list[Send] = []
        """Those that may not."""
        self._reads = Pages()
        self._put_off = False
        """The machine has more to do, once others are served."""
        self._set_aside: set[str] = set()
        """Ended tasks that are damaged: memory will not be told of them."""
        self._available_memory = available_memory
        self._next_tick = self._next_memory = now
        self._next_page = 0
        self._vigil = Vigil()
        self._stop: str | None = None

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit status: 0, or 1 when the journal cannot be written."""
        if self._home.supervised:
            die_with_parent(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self.start()
            _collect_young_garbage_only()
            while self._stop is None:
                self.turn()
            self._hub.engine.ranking.learn()
            self._journal.keep_learned(self._durations.state(), self._hub.engine.effort.state())
        except sqlite3.Error as err:
            self._log.write(
                JOURNAL_FAILED, error=f"{err}: free disk space or repair {self._home.journal}, then restart"
            )
            return 1
        finally:
            self.close()
        return 0

    def start(self) -> None:
        """Take up what the journal holds. Raises sqlite3.Error, as `turn` does."""
        self._durations.restore(self._journal.durations())
        self._hub.engine.effort.restore(self._journal.effort())
        try:
            self._reader.keep()
        except (RegistryError, OSError) as err:  # what runs needs no copy; only a later reload would miss it
            self._log.write(REGISTRY_NOT_KEPT, reason=str(err))
        began = self._clock.now_ms()
        self._hub.restore_personas(self._journal.personas())
        restored = self._restore(self._journal.open_tasks(MAX_ACTIVE_TASKS * 2, final=False))
        unsettled = self._restore_unsettled()
        self._flush()
        self._log.write(
            HUB_STARTED,
            pid=os.getpid(),
            epoch=self._hub.epoch,
            restored=restored[0],
            unsettled=unsettled[0],
            damaged=restored[1] + unsettled[1],
            restore_ms=self._clock.now_ms() - began,
            registry=self._hub.registry.digest,
        )

    def turn(self) -> None:
        """Wait for messages or the next tick, handle what is there, write, send."""
        now = self._clock.now_ms()
        wake = min(self._next_tick, self._next_page) if self._reads else self._next_tick
        wake = now if self._put_off or self._lookups or self._reports else wake
        first = self._next_message(max(0, wake - now))
        if first is not None:
            self._take(first)
            self._hand_out()  # often there is no other; work for all that are there leaves together
            self._drain()
        now = self._clock.now_ms()
        for outcome in self._reader.outcomes(now):
            self._feed(outcome)
        for written in self._reader.written(now):
            self._feed(written)
        if now >= self._next_tick:
            self._log.flush()  # else it is when there is nothing to do
            self._feed(Tick(now))
            self._next_tick = now + _TICK_MS
            self._keep_house(now)
            if now >= self._next_memory and self._hub.loading.has_guests:
                self._next_memory = now + _MEMORY_EVERY_MS
                self._look_at_memory(now)
        self._flush()
        if self._reads and now >= self._next_page:
            self._next_page = now + _PAGES_EVERY_MS
            self._read_page(self._reads.next())
            self._flush()
        if self._reports:
            self._report()
            self._flush()
        if self._lookups:
            self._looked_up(*self._lookups.go_on())
            self._flush()
        if self._put_off:
            self._put_off = False
            self._feed(OthersServed(self._clock.now_ms()))
            self._flush()
        for task_id in self._journal.take_long_tasks():
            task = self._hub.engine.live.get(task_id)
            if task is not None:
                self._journal.keep_snapshot(task)

    def close(self) -> None:
        """Give everything back; what is not written by now is not promised to anybody."""
        self._log.write(HUB_STOPPED, reason=self._stop or "journal")
        self._housekeeping.close()
        self._port.close()
        self._journal.close()
        self._log.close()

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._stop = signal.Signals(number).name

    def _restore(self, ids: list[str]) -> tuple[int, int]:
        """Take up these tasks; returns how many there were, and how many had to be set aside."""
        damaged = 0
        for task_id in ids:
            try:
                task = self._journal.load(task_id)
            except DamagedTask as err:
                damaged += 1
                self._log.write(TASK_DAMAGED, task=err.task, seq=err.seq, reason=err.reason)
                continue
            if task is not None:
                past = self._reader.past_with(self._hub.lacks(task))
                self._feed(Restored(task, self._clock.now_ms(), past))
        return len(ids) - damaged, damaged

    def _restore_unsettled(self) -> tuple[int, int]:
        """Take up ended tasks that memory is still to be told of, oldest first, while there is room; see `_restore`."""
        engine, until = self._hub.engine, self._clock.now_ms() + _RESTORED_MS
        here = len(engine.live) + len(self._set_aside)
        ids = self._journal.open_tasks(here + MAX_UNSETTLED, final=True)
        more = len(ids) == here + MAX_UNSETTLED
        restored = damaged = 0
        for task_id in ids:
            if task_id in engine.live or task_id in self._set_aside:
                continue
            if not engine.occupancy.has_room or self._clock.now_ms() > until:
                more = True
                break
            good, bad = self._restore([task_id])
            if bad:
                self._set_aside.add(task_id)
            restored, damaged = restored + good, damaged + bad
        engine.settling.deferred |= more
        return restored, damaged

    def _keep_house(self, now: int) -> None:
        if self._housekeeping.durations_due(now):
            self._journal.keep_learned(self._durations.state(), self._hub.engine.effort.state())
        for event, fields in self._housekeeping.retain(now):
            self._log.write(event, **fields)

    def _look_at_memory(self, now: int) -> None:
        """Only where models come and go: what is short then can be helped."""
        available = self._available_memory()
        if available is not None:
            self._feed(MemorySeen(available, now))

    def _read_page(self, read: ReadEvents) -> None:
        facts: list[tuple[int, Fact]] = []
        try:
            facts = self._journal.events(read.query.task_id, read.query.after_seq, _PAGE)
        except DamagedTask as err:
            self._log.write(TASK_DAMAGED, task=err.task, seq=err.seq, reason=err.reason)
        self._feed(EventsRead(read.identity, read.header, read.query, facts))

    def _next_message(self, most_ms: int) -> tuple[bytes, list[bytes]] | None:
        """The next one, awaited awake or asleep; None when the time is over."""
        message = self._port.receive()
        if message is not None:
            self._vigil.waited(0.0)
            return message
        began_s = time.perf_counter()
        until_s = began_s + min(self._vigil.awake_s, most_ms / 1000)
        while time.perf_counter() < until_s:
            os.sched_yield()  # whoever waits for this core, such as ZeroMQ's thread that brings the message, goes first
            message = self._port.receive()
            if message is not None:
                break
        else:
            self._log.flush()
            if self._port.wait(most_ms):
                message = self._port.receive()
        self._vigil.waited(time.perf_counter() - began_s)
        return message

    def _drain(self) -> None:
        until_s = time.thread_time() + _DRAIN_S
        for _ in range(_BATCH):
            message = self._port.receive()
            if message is None:
                return
            self._take(message)
            if time.thread_time() > until_s:
                return

    def _take(self, message: tuple[bytes, list[bytes]]) -> None:
        identity, frames = message
        self._feed(FrameIn(identity, frames, self._clock.now_ms()))

    def _feed(self, event: Event) -> None:
        for command in self._hub.handle(event):
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Send():
                (self._promises if command.promises else self._unpromised).append(command)
            case Record():
                self._records.append(command)
            case KeepPersona():
                self._personas.append(command)
            case AdoptPersona():
                self._reader.adopt(command, self._hub.registries.declared)
            case Noted(event, fields):
                self._log.write(event, **fields)
            case LookUp():
                self._look_up(command)
            case ReadEvents():
                self._reads.ask(command)
                if len(self._reads) > MAX_WATCHES:
                    self._reads.retain(self._hub.watchers.late)  # some have left meanwhile
            case ReadListing() | ReadStatus():
                self._refuse(command, self._reports.ask(command))
            case ServeOthers():
                self._put_off = True
            case ReadRegistry():
                self._reader.read(command)
            case ReloadUnsettled():
                self._write()
                self._restore_unsettled()

    def _look_up(self, asked: LookUp) -> None:
        # What is about to be written must be seen too. Other tasks' facts stay for the end of the batch: a sync for
        # each of many submits with a key would be what group commit avoids.
        if any(record.fact.task == asked.task_id for record in self._records):
            self._write()
        if not self._lookups.is_long(asked):
            self._looked_up([asked], self._lookups.at_once(asked))
        elif (objection := self._lookups.objection(asked)) is None:
            self._lookups.begin(asked)
        else:
            self._refuse(asked, objection)

    def _refuse(self, asked: LookUp | ReadListing | ReadStatus, objection: str | None) -> None:
        if objection is not None:
            refused = Refused(reason=objection, retry_after_ms=RETRY_AFTER_MS)
            self._promises.append(self._hub.outbox.reply(asked.identity, asked.header, "refused", refused))

    def _report(self) -> None:
        """Make one listing, or one report, once all facts so far are written."""
        query, askers = self._reports.next()
        made: Message
        if query is not None:
            kind, made = "task.listing", Listing(tasks=self._journal.newest(query.limit, query.states))
        else:
            report = self._hub.status(self._journal.counts(), self._clock.now_ms())
            written = {"commits": self._journal.commits, "synced_commits": self._journal.syncs}
            kind, made = "session.report", report.model_copy(update={"counters": report.counters | written})
        body = pack_body(made)
        for identity, header in askers:
            self._feed(Reported(identity, header, kind, body, self._clock.now_ms()))

    def _looked_up(self, askers: list[LookUp], found: Found) -> None:
        for asked in askers:
            self._feed(LookedUp(asked.identity, asked.header, asked.body, found, self._clock.now_ms()))

    def _write(self) -> None:
        if self._records or self._personas:
            records, self._records = self._records, []
            personas, self._personas = self._personas, []
            self._journal.append(records, personas)
            for record in records:
                self._log_fact(record)

    def _hand_out(self) -> None:
        """Send what promises nothing: workers begin while the facts that led to their work are being written."""
        sends, self._unpromised = self._unpromised, []
        self._send_all(sends)

    def _flush(self) -> None:
        """Hand out work, write, then tell. A failed send is an event, which may make further facts and messages."""
        while self._records or self._personas or self._unpromised or self._promises:
            sends, self._promises = self._promises, []
            self._hand_out()
            self._write()
            self._send_all(sends)

    def _send_all(self, sends: list[Send]) -> None:
        for send in sends:
            try:
                self._port.send(send.identity, send.header, send.body)
            except StrandPeer:
                self._feed(Undeliverable(send.identity, self._clock.now_ms()))
            except SendLater:
                # A full pipe is a peer that has not read 20,000 messages: gone for all purposes; it may rejoin.
                self._feed(Undeliverable(send.identity, self._clock.now_ms(), full=True))

    def _log_fact(self, record: Record) -> None:
        fact = record.fact
        told = TASK_DETAIL if isinstance(fact, _DETAILS) else TASK_EVENT
        if not self._log.keeps(told):
            return
        extra: dict[str, Any] = {}
        match fact:
            case StepDone() | AttemptStarted():
                pass  # by far the most frequent ones
            case AttemptFailed():
                extra = {"code": fact.failure["code"], "category": fact.failure["category"]}
                extra |= {"action": fact.action, "rule": fact.rule}
            case AttemptLost():
                extra = {"code": fact.code, "category": fact.category, "action": fact.action, "rule": fact.rule}
            case TaskSetback():
                extra = {"code": fact.failure["code"], "category": fact.failure["category"]}
                extra |= {"action": fact.action, "rule": fact.rule}
            case StepFailed():
                extra = {"code": fact.failure["code"], "category": fact.failure["category"]}
            case TaskEnded():
                extra = {"state": fact.state}
            case TaskPlanned():
                extra = {"source": fact.source}
            case _:
                pass
        self._log.write(
            told, task=fact.task, step=fact.step, attempt=fact.number, what=fact.EVENT, seq=record.seq, **extra
        )


def _collect_young_garbage_only() -> None:
    """Keep Python's collector from walking over all tasks in memory again and again.

    By default it does so each time their number has grown by a quarter: with five large tasks in memory a step cost
    1.4 times as much as on a fresh hub (`tierline bench overhead`, `history_growth`). State here dies by reference
    counts; the rare cycles, of exceptions, die young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1_000)
