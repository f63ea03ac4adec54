"""What the hub says in one turn: answers, news, pings and notes, with ids, and with an eye on who still reads.

A peer that has not read for so long that nothing more can be sent to it is `deaf`; the machine ends its session. Whom
to tell what is the machine's and the watchers' business, when it leaves the process the driver's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from protocol.codec import pack_body
from protocol.header import Header, pack_header
from protocol.kinds import family
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply, Refused
from protocol.messages.session import Ping
from services.kit.logs import LogEvent
from services.scheduler.calls import Call
from services.scheduler.events import Command, Noted, Send
from services.scheduler.unread import Unread

_EMPTY: Final = b"\x80"


@dataclass(slots=True)
class Outbox:
    """Commands for the driver, in order."""

    epoch: str
    unread: Unread = field(default_factory=Unread)
    """What was sent to each connection and is not known to be read."""
    deaf: set[bytes] = field(default_factory=set)
    """Peers that could not be told something in this turn."""
    sent: int = 0
    """Messages so far: their ids are made of it."""
    _commands: list[Command] = field(default_factory=list)

    def add(self, command: Command) -> None:
        """One more thing to do."""
        self._commands.append(command)

    def extend(self, commands: Iterable[Command]) -> None:
        """Several, in order."""
        self._commands.extend(commands)

    def take(self) -> list[Command]:
        """Everything since the last look."""
        commands, self._commands = self._commands, []
        return commands

    def next_id(self) -> str:
        """Id of the next message."""
        self.sent += 1
        return f"{self.epoch}-{self.sent}"

    def reply(self, identity: bytes, request: Header, kind: str, body: Message) -> Send:
        """A message that answers `request`; it is not added."""
        return self._reply(identity, request, kind, pack_body(body))

    def answer(self, identity: bytes, request: Header, kind: str, body: Message) -> None:
        """Answer a request."""
        self._commands.append(self.reply(identity, request, kind, body))

    def push(self, identity: bytes, request: Header, kind: str, body: Message) -> None:
        """Tell whoever made this request something, unless nothing more can be sent to them."""
        if not self.is_deaf(identity):
            self.answer(identity, request, kind, body)

    def push_packed(self, identity: bytes, request: Header, kind: str, body: bytes) -> None:
        """The same with a body that is packed already, since several get it."""
        if not self.is_deaf(identity):
            self._commands.append(self._reply(identity, request, kind, body))

    def refuse(self, identity: bytes, request: Header, reason: str, retry_after_ms: int) -> None:
        """Say that this cannot be had now, and when to come again."""
        self.push(identity, request, "refused", Refused(reason=reason, retry_after_ms=retry_after_ms))

    def error(
        self,
        identity: bytes,
        request: Header | None,
        code: str,
        category: Category,
        message: str,
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        """Say that a message was wrong; to one that does not read nothing is said, and nothing else is done."""
        if self.unread.is_deaf(identity):
            return
        failure = Failure(
            code=code, category=category, origin="scheduler", message=message[:8_000], evidence=dict(evidence or {})
        )
        corr = None if request is None else request.id
        header = Header(kind="error", id=self.next_id(), corr=corr, epoch=self.epoch)
        self._commands.append(self._sending(identity, header, pack_body(ErrorReply(failure=failure))))

    def forward(self, call: Call, kind: str, body: bytes) -> None:
        """Pass on to the requester of a call what its worker says."""
        if call.requester is None or self.is_deaf(call.requester):
            return
        header = Header(kind=kind, id=self.next_id(), corr=call.corr, key=call.key, epoch=self.epoch)
        self._commands.append(self._sending(call.requester, header, body))

    def work(self, identity: bytes, call: Call, body: bytes, *, cores: int) -> None:
        """Hand a call to a worker, with the cores that it holds. It may leave before what led to it is written."""
        header = Header(
            kind=call.kind,
            id=self.next_id(),
            epoch=self.epoch,
            dst=call.target,
            key=call.key,
            attempt=call.attempt,
            deadline=call.deadline_ms,
            task=call.task,
            step=call.step,
            parent=call.parent,
            cores=cores or None,
            prio="interactive" if call.interactive else "batch",
            trace=call.trace,
        )
        send = Send(identity, pack_header(header), body, promises=False)
        self.unread.sent(identity, len(send.header) + len(body))
        if not self.is_deaf(identity):
            self._commands.append(send)

    def cancel(self, identity: bytes, call: Call) -> None:
        """Tell a worker to stop."""
        header = Header(kind=f"{family(call.kind)}.cancel", id=self.next_id(), key=call.key, epoch=self.epoch)
        self._commands.append(Send(identity, pack_header(header), _EMPTY, promises=False))

    def ping(self, identity: bytes, at_ms: int, *, mark: bool = False) -> str:
        """Ask for a sign of life; with `mark`, one that says that all before it was read. Returns the ping's id."""
        header = Header(kind="session.ping", id=self.next_id(), epoch=self.epoch)
        self._commands.append(Send(identity, pack_header(header), pack_body(Ping(at_ms=at_ms)), promises=False))
        if mark:
            self.unread.mark(identity, header.id)
        return header.id

    def unpromised(self, identity: bytes, kind: str, body: Message) -> Send:
        """A message of the hub's own that may go out before what led to it is written; it is not added."""
        header = Header(kind=kind, id=self.next_id(), epoch=self.epoch)
        return Send(identity, pack_header(header), pack_body(body), promises=False)

    def note(self, happened: LogEvent, **fields: Any) -> None:
        """A line for the log."""
        self._commands.append(Noted(happened, fields))

    def is_deaf(self, identity: bytes) -> bool:
        """True if nothing more can be sent to this peer; the machine will end its session."""
        if not self.unread.is_deaf(identity):
            return False
        self.deaf.add(identity)
        return True

    def _reply(self, identity: bytes, request: Header, kind: str, body: bytes) -> Send:
        header = Header(kind=kind, id=self.next_id(), corr=request.id, epoch=self.epoch, task=request.task)
        return self._sending(identity, header, body)

    def _sending(self, identity: bytes, header: Header, body: bytes) -> Send:
        """A message with content, which counts as unread until a later ping is answered."""
        send = Send(identity, pack_header(header), body)
        self.unread.sent(identity, len(send.header) + len(body))
        return send
