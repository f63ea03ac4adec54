"""A client's session: whatever the hub does, each request is asked until it has its one ending."""

from __future__ import annotations

import msgpack
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.client_session import (
    PROBE_MS,
    Asked,
    ClientSession,
    Closed,
    Command,
    Deliver,
    Dropped,
    Opened,
    Received,
    Reconnected,
    Ticked,
    Transmit,
)
from protocol.codec import pack_body, unpack_body
from protocol.header import Header
from protocol.kinds import STEP_TOKENS, UNKNOWN_PEER
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.result import Listing, ListQuery, TaskEvent, TaskQuery, Watch
from protocol.messages.session import Reject, StatusReport, Welcome

WELCOME = Welcome(protocol=1, hub_epoch="hub", ping_ms=1_000)
UNKNOWN = ErrorReply(failure=Failure(code=UNKNOWN_PEER, category=Category.PEER, origin="hub", message="who?"))
REPORT = StatusReport(hub_epoch="hub", hub_pid=1, uptime_ms=1, peers=[], queued={}, tasks={}, counters={})


class Talk:
    """A session and the time of day."""

    def __init__(self) -> None:
        self.session = ClientSession(service="client-1", pid=1, boot="b")
        self.now_ms = 0

    def open(self) -> list[Command]:
        return self.session.handle(Opened(self.now_ms))

    def ask(self, ident: str, kind: str = "task.list", body: Message | None = None) -> list[Command]:
        header = Header(kind=kind, id=ident, key=f"key-{ident}")
        return self.session.handle(Asked(self.now_ms, header, pack_body(body or ListQuery())))

    def get(self, kind: str, body: Message, corr: str | None = None) -> list[Command]:
        return self.session.handle(Received(self.now_ms, Header(kind=kind, id="h", corr=corr), pack_body(body)))

    def tick(self, by_ms: int) -> list[Command]:
        self.now_ms += by_ms
        return self.session.handle(Ticked(self.now_ms))


def joined() -> Talk:
    talk = Talk()
    talk.open()
    talk.get("session.welcome", WELCOME)
    return talk


def kinds(commands: list[Command]) -> list[str]:
    return [command.header.kind for command in commands if isinstance(command, Transmit)]


def test_nothing_is_asked_before_the_welcome_and_all_of_it_after() -> None:
    talk = Talk()
    assert kinds(talk.open()) == ["session.hello"]
    assert talk.ask("r1") == []
    assert kinds(talk.get("session.welcome", WELCOME)) == ["task.list"]


def test_a_restarted_hub_gets_one_hello_however_often_it_says_that_it_does_not_know_us() -> None:
    talk = joined()
    talk.ask("r1")
    talk.ask("r2")
    assert kinds(talk.get("error", UNKNOWN, "r1")) == ["session.hello"]
    assert talk.get("error", UNKNOWN, "r2") == []
    again = talk.get("session.welcome", WELCOME)
    assert [(c.header.id, c.header.key) for c in again if isinstance(c, Transmit)] == [
        ("r1", "key-r1"),
        ("r2", "key-r2"),
    ]
    assert talk.get("session.welcome", WELCOME) == []


def test_a_watch_is_repeated_from_the_last_event_and_shows_each_once() -> None:
    talk = joined()
    talk.ask("w", "task.watch", Watch(task_id="T", after_seq=4))

    def event(seq: int, name: str = "x") -> list[Command]:
        return talk.get("task.event", TaskEvent(task_id="T", seq=seq, at_ms=1, event=name), "w")

    assert event(4) == []
    assert len(event(5)) == 1
    assert len(event(5, STEP_TOKENS)) == 1
    talk.get("error", UNKNOWN, "w")
    (repeated,) = talk.get("session.welcome", WELCOME)
    assert isinstance(repeated, Transmit)
    assert unpack_body(Watch, repeated.body).after_seq == 5
    assert event(5) == []
    assert len(event(6)) == 1


def test_an_idle_client_is_silent_and_a_waiting_one_probes_a_silent_hub() -> None:
    talk = joined()
    assert talk.tick(600_000) == []
    talk.ask("r1")
    assert talk.tick(PROBE_MS - 1) == []
    assert kinds(talk.tick(1)) == ["session.status"]
    assert talk.tick(PROBE_MS - 1) == []
    assert kinds(talk.tick(1)) == ["session.status"]


def test_after_a_living_hub_has_answered_the_probe_only_what_it_answers_itself_is_repeated() -> None:
    talk = joined()
    talk.ask("r1")
    talk.ask("i1", "infer.request")
    talk.tick(PROBE_MS)
    assert kinds(talk.get("session.report", REPORT, "probe")) == ["task.list"]
    assert talk.get("session.report", REPORT, "probe") == []


def test_a_connection_that_came_back_gets_a_hello_and_then_all_that_is_outstanding() -> None:
    talk = joined()
    talk.ask("r1")
    assert kinds(talk.session.handle(Reconnected(talk.now_ms))) == ["session.hello"]
    assert talk.ask("r2") == []
    assert kinds(talk.get("session.welcome", WELCOME)) == ["task.list", "task.list"]
    talk.get("session.reject", Reject(code="version", message="no"))
    assert talk.session.handle(Reconnected(talk.now_ms)) == [], "rejected for good"


def test_a_hello_that_nobody_answers_is_repeated() -> None:
    talk = Talk()
    talk.open()
    assert talk.tick(PROBE_MS - 1) == []
    assert kinds(talk.tick(1)) == ["session.hello"]


def test_a_version_mismatch_ends_every_request_now_and_later() -> None:
    talk = Talk()
    talk.open()
    talk.ask("r1")
    (ended,) = talk.get("session.reject", Reject(code="version", message="speak 2"))
    (later,) = talk.ask("r2")
    for command in (ended, later):
        assert isinstance(command, Deliver)
        assert isinstance(command.body, ErrorReply)
        assert command.body.failure.code == "session.version"
    assert talk.tick(60_000) == []


def test_a_fenced_client_comes_back_under_a_new_epoch() -> None:
    talk = joined()
    before = talk.session.epoch
    talk.get("session.reject", Reject(code="fenced", message="too late"))
    assert kinds(talk.tick(PROBE_MS)) == ["session.hello"]
    assert talk.session.epoch != before


def test_a_dropped_call_of_a_worker_is_cancelled_and_a_dropped_question_to_the_hub_forgotten() -> None:
    talk = joined()
    talk.ask("i1", "infer.request")
    talk.ask("r1")
    (cancel,) = talk.session.handle(Dropped("i1"))
    assert isinstance(cancel, Transmit)
    assert (cancel.header.kind, cancel.header.corr, cancel.header.key) == ("infer.cancel", "i1", "key-i1")
    assert msgpack.unpackb(cancel.body) == {}
    assert talk.session.handle(Dropped("r1")) == []
    assert talk.get("task.listing", Listing(tasks=[]), "r1") == []


def test_a_request_whose_place_another_one_took_ends_with_an_error_and_cancels_nothing() -> None:
    talk = joined()
    talk.ask("b1", "batch.request")
    talk.ask("b2", "batch.request")
    failure = Failure(code="call.superseded", category=Category.POLICY, origin="scheduler", message="a newer request")
    told = ErrorReply(failure=failure)
    assert talk.get("error", told, "b1") == [Deliver("b1", told, ends=True)]
    assert talk.session.handle(Dropped("b1")) == []
    assert list(talk.session.outstanding) == ["b2"]


def test_an_answer_of_the_wrong_kind_or_shape_ends_the_request_with_a_failure() -> None:
    talk = joined()
    for ident, kind in (("r1", "task.detail"), ("r2", "task.listing"), ("r3", "error")):
        talk.ask(ident)
        (command,) = talk.get(kind, TaskQuery(task_id="T"), ident)
        assert isinstance(command, Deliver)
        assert isinstance(command.body, ErrorReply)
        assert command.body.failure.code == "answer.invalid"


def test_an_unreadable_welcome_or_reject_changes_nothing() -> None:
    talk = Talk()
    talk.open()
    assert talk.get("session.welcome", TaskQuery(task_id="T")) == []
    assert talk.get("session.reject", TaskQuery(task_id="T")) == []
    assert not talk.session.joined


def test_goodbye_is_said_only_to_a_hub_that_knows_us() -> None:
    assert kinds(joined().session.handle(Closed())) == ["session.goodbye"]
    assert Talk().session.handle(Closed()) == []


class ClientStory(RuleBasedStateMachine):
    """A hub that is restarted at any moment and loses what it was asked; the client must get every answer once."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = Talk()
        self.knows_us = False
        self.at_hub: set[str] = set()
        """Requests the present hub has."""
        self.mail: list[tuple[str, Message, str | None]] = []
        """On the way to the client."""
        self.waiting: set[str] = set()
        self.asked = 0

    def carry(self, commands: list[Command]) -> None:
        """Do what the session commands; the hub reacts as the real one does."""
        for command in commands:
            if isinstance(command, Deliver):
                assert command.id in self.waiting, "an ending was delivered twice, or to nobody"
                assert command.ends
                assert isinstance(command.body, Listing)
                self.waiting.discard(command.id)
                continue
            kind, ident = command.header.kind, command.header.id
            if kind == "session.hello":
                self.knows_us = True
                self.mail.append(("session.welcome", WELCOME, ident))
            elif not self.knows_us:
                self.mail.append(("error", UNKNOWN, ident))
            elif kind == "session.status":
                self.mail.append(("session.report", REPORT, "probe"))
            else:
                self.at_hub.add(ident)

    @initialize()
    def begin(self) -> None:
        self.carry(self.talk.open())

    @rule()
    def ask(self) -> None:
        self.asked += 1
        self.waiting.add(f"r{self.asked}")
        self.carry(self.talk.ask(f"r{self.asked}"))

    @rule()
    def hub_restarts(self) -> None:
        self.knows_us = False
        self.at_hub.clear()
        self.mail.clear()

    @rule()
    def connection_breaks(self) -> None:
        """What was on the way is lost, and the hub does not know it."""
        self.mail.clear()
        self.at_hub.clear()

    @precondition(lambda self: self.at_hub)
    @rule(data=st.data())
    def hub_answers(self, data: st.DataObject) -> None:
        ident = data.draw(st.sampled_from(sorted(self.at_hub)))
        self.at_hub.discard(ident)
        self.mail.append(("task.listing", Listing(tasks=[]), ident))

    @precondition(lambda self: self.mail)
    @rule()
    def mail_arrives(self) -> None:
        kind, body, corr = self.mail.pop(0)
        self.carry(self.talk.get(kind, body, corr))

    @rule(by_ms=st.sampled_from([100, PROBE_MS]))
    def time_passes(self, by_ms: int) -> None:
        self.carry(self.talk.tick(by_ms))

    @invariant()
    def what_the_program_waits_for_is_outstanding(self) -> None:
        assert self.talk.session.outstanding.keys() == self.waiting

    def teardown(self) -> None:
        """From any state, a hub that stays alive answers everything within a few probes."""
        for _ in range(6):
            self.carry(self.talk.tick(PROBE_MS))
            for _ in range(3):
                while self.mail:
                    self.mail_arrives()
                for ident in sorted(self.at_hub):
                    self.mail.append(("task.listing", Listing(tasks=[]), ident))
                self.at_hub.clear()
        assert not self.waiting, "a living hub was not asked for what the program still waits for"


ClientStory.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestClientStory = ClientStory.TestCase
