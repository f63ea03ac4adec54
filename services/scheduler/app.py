"""The hub's edge: one poll loop that drives the machine, the socket, the journal and the log.

A turn drains what has arrived, writes all facts of the batch in one transaction, then sends: nothing is told to
anybody that a crash could take back. A poll loop and not asyncio, because this loop is the latency of every step.
If the journal cannot be written the hub stops; what clients were not told is theirs to submit again.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from typing import Any, Final

from protocol.errors import SendLater, StrandPeer
from protocol.messages.result import Listing
from protocol.zmq_transport import ZmqRouter
from services.kit.children import die_with_parent
from services.kit.clock import SteadyClock
from services.kit.config import Home
from services.kit.identity import boot_id
from services.kit.logs import Log, LogEvent
from services.kit.registry import Registry
from services.scheduler.effects import Record
from services.scheduler.events import (
    Command,
    Event,
    FrameIn,
    LookedUp,
    LookUp,
    Noted,
    ReadListing,
    ReadStatus,
    ReloadUnsettled,
    Restored,
    Send,
    Tick,
    Undeliverable,
)
from services.scheduler.facts import (
    AttemptAnswered,
    AttemptFailed,
    AttemptQueued,
    StepFailed,
    TaskEnded,
    TaskPlanned,
)
from services.scheduler.journal import Journal
from services.scheduler.machine import MAX_ACTIVE_TASKS, Hub

HUB_STARTED = LogEvent("hub.started", "pid epoch restored unsettled registry")
HUB_STOPPED = LogEvent("hub.stopped", "reason")
JOURNAL_FAILED = LogEvent("journal.failed", "error", "error")
_FIELDS: Final = "task step attempt what seq code category action rule state source"
TASK_EVENT = LogEvent("task.event", _FIELDS)
TASK_DETAIL = LogEvent("task.detail", _FIELDS, "debug")

_TICK_MS: Final = 100
_BATCH: Final = 512
"""Messages drained before the journal is written: bounds the delay of the first one."""


class HubApp:
    """The scheduler process."""

    def __init__(self, home: Home, registry: Registry) -> None:
        self._home = home
        self._clock = SteadyClock()
        self._log = Log(home.logs, "scheduler", self._clock, level=home.log_level, batched=True)
        self._port = ZmqRouter(home.hub_address)
        self._journal = Journal(home.journal / "journal.sqlite")
        self._hub = Hub(epoch=boot_id(), registry=registry, pid=os.getpid(), started_ms=self._clock.now_ms())
        self._records: list[Record] = []
        self._sends: list[Send] = []
        self._stop: str | None = None

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit status: 0, or 1 when the journal cannot be written."""
        if self._home.supervised:
            die_with_parent(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._restore()
            next_tick = self._clock.now_ms()
            while self._stop is None:
                self._port.wait(max(0, next_tick - self._clock.now_ms()))
                self._drain()
                if self._clock.now_ms() >= next_tick:
                    self._feed(Tick(self._clock.now_ms()))
                    next_tick = self._clock.now_ms() + _TICK_MS
                self._flush()
                self._log.flush()
        except sqlite3.Error as err:
            self._log.write(
                JOURNAL_FAILED, error=f"{err}: free disk space or repair {self._home.journal}, then restart"
            )
            return 1
        finally:
            self._log.write(HUB_STOPPED, reason=self._stop or "journal")
            self._port.close()
            self._journal.close()
            self._log.close()
        return 0

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._stop = signal.Signals(number).name

    def _restore(self) -> None:
        now = self._clock.now_ms()
        restored = list(self._journal.open_tasks(MAX_ACTIVE_TASKS * 2, final=False))
        unsettled = list(self._journal.open_tasks(MAX_ACTIVE_TASKS, final=True))
        for task in [*restored, *unsettled]:
            self._feed(Restored(task, now))
        self._flush()
        self._log.write(
            HUB_STARTED,
            pid=os.getpid(),
            epoch=self._hub.epoch,
            restored=len(restored),
            unsettled=len(unsettled),
            registry=self._hub.registry.digest,
        )

    def _drain(self) -> None:
        for _ in range(_BATCH):
            message = self._port.receive()
            if message is None:
                return
            identity, frames = message
            self._feed(FrameIn(identity, frames, self._clock.now_ms()))

    def _feed(self, event: Event) -> None:
        for command in self._hub.handle(event):
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Send():
                self._sends.append(command)
            case Record():
                self._records.append(command)
            case Noted(event, fields):
                self._log.write(event, **fields)
            case LookUp(task_id, identity, header, body):
                # What is about to be written must be seen too: the same task may be in this very batch.
                self._write()
                task = self._journal.load(task_id)
                self._feed(LookedUp(identity, header, body, task, self._clock.now_ms()))
            case ReadListing(identity, header, query):
                self._write()
                listing = Listing(tasks=self._journal.newest(query.limit, query.states))
                self._sends.append(self._hub.reply(identity, header, "task.listing", listing))
            case ReadStatus(identity, header):
                self._write()
                report = self._hub.status(self._journal.counts(), self._clock.now_ms())
                self._sends.append(self._hub.reply(identity, header, "session.report", report))
            case ReloadUnsettled(limit):
                self._write()
                for task in list(self._journal.open_tasks(limit, final=True)):
                    self._feed(Restored(task, self._clock.now_ms()))

    def _write(self) -> None:
        if self._records:
            records, self._records = self._records, []
            self._journal.append(records)
            for record in records:
                self._log_fact(record)

    def _flush(self) -> None:
        """Hand out work, write, then tell. A failed send is an event, which may make further facts and messages.

        Workers begin while the facts are being written; whoever is promised something hears of it afterwards.
        """
        while self._records or self._sends:
            sends, self._sends = self._sends, []
            self._send_all([send for send in sends if not send.promises])
            self._write()
            self._send_all([send for send in sends if send.promises])

    def _send_all(self, sends: list[Send]) -> None:
        for send in sends:
            try:
                self._port.send(send.identity, send.header, send.body)
            except (StrandPeer, SendLater):
                # A full pipe is a peer that has not read 20,000 messages: gone for all purposes; it may rejoin.
                self._feed(Undeliverable(send.identity, self._clock.now_ms()))

    def _log_fact(self, record: Record) -> None:
        fact = record.fact
        extra: dict[str, Any] = {}
        match fact:
            case AttemptFailed():
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
        told = TASK_DETAIL if isinstance(fact, AttemptQueued | AttemptAnswered) else TASK_EVENT
        self._log.write(
            told, task=fact.task, step=fact.step, attempt=fact.number, what=fact.EVENT, seq=record.seq, **extra
        )
