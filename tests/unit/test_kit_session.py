"""A service's session with the hub: whatever happens in whatever order, work is done once and nothing is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.codec import pack_body, unpack_body
from protocol.header import Header
from protocol.kinds import ENDINGS, UNKNOWN_PEER
from protocol.messages.base import Message
from protocol.messages.failure import Category, Failure
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Hello, PeerState, Ping, Reject, Reside, Welcome
from services.kit.session import (
    AskDropped,
    Asked,
    CancelWork,
    ChangeResidence,
    Command,
    Deliver,
    DrainAsked,
    Event,
    Opened,
    PartialMade,
    PeerSession,
    Received,
    Reconnected,
    Reopen,
    ReportState,
    StartWork,
    StateChanged,
    Stop,
    Ticked,
    Transmit,
    WorkEnded,
)

WELCOME = Welcome(protocol=1, hub_epoch="hub", ping_ms=1_000)
UNKNOWN = ErrorReply(failure=Failure(code=UNKNOWN_PEER, category=Category.PEER, origin="hub", message="who?"))


@dataclass
class Peer:
    """A session with what is convenient for tests: times that pass by themselves, bodies that are packed."""

    session: PeerSession = field(
        default_factory=lambda: PeerSession(service="worker", capabilities=("infer.worker",), slots=2, pid=1)
    )
    now_ms: int = 0

    def feed(self, event: Event) -> list[Command]:
        commands = self.session.handle(event)
        self.session.check_invariants()
        return commands

    def open(self, epoch: str = "e1") -> list[Command]:
        return self.feed(Opened(self.now_ms, epoch))

    def get(self, kind: str, body: Message, **header: object) -> list[Command]:
        received = Received(self.now_ms, Header(kind=kind, id="h1", **header), pack_body(body))  # type: ignore[arg-type]
        return self.feed(received)

    def request(self, key: str | None, ident: str = "r1", deadline: int | None = None) -> list[Command]:
        header = Header(kind="infer.request", id=ident, key=key, deadline=deadline)
        return self.feed(Received(self.now_ms, header, b"body"))

    def join(self, welcome: Welcome = WELCOME) -> list[Command]:
        return self.get("session.welcome", welcome)


def ready() -> Peer:
    peer = Peer()
    peer.feed(StateChanged(PeerState.READY))
    peer.open()
    peer.join()
    return peer


def test_the_word_about_the_model_is_taken_once_in_its_order_and_always_answered() -> None:
    peer = ready()
    peer.join()
    assert peer.get("session.reside", Reside(loaded=False, order=2))[0] == ChangeResidence(loaded=False)
    for late in (1, 2):
        (pong,) = peer.get("session.reside", Reside(loaded=True, order=late))
        assert isinstance(pong, ReportState)
    assert peer.session.order == 2
    assert peer.get("session.reside", Reside(loaded=True, order=3))[0] == ChangeResidence(loaded=True)


def test_a_model_is_not_taken_from_running_work_and_a_new_epoch_counts_anew() -> None:
    peer = ready()
    peer.join()
    peer.request("k1")
    (pong,) = peer.get("session.reside", Reside(loaded=False, order=7))
    assert isinstance(pong, ReportState)
    assert peer.session.order == 7, "heard, and refused"
    peer.open("e2")
    assert peer.session.order == 0


def hello_in(commands: list[Command]) -> Hello:
    (command,) = commands
    assert isinstance(command, Transmit)
    assert command.header.kind == "session.hello"
    return unpack_body(Hello, command.body)


def sent(commands: list[Command]) -> list[tuple[str, str | None, int | None]]:
    """Kind, answered request and credit of every message sent."""
    return [(c.header.kind, c.header.corr, c.header.credit) for c in commands if isinstance(c, Transmit)]


def test_a_peer_that_is_loading_grants_nothing_until_it_is_ready() -> None:
    peer = Peer()
    assert sent(peer.open()) == [("session.hello", None, 0)]
    assert peer.join() == [ReportState(corr=None, credit=0)]
    assert peer.feed(StateChanged(PeerState.LOADING)) == [ReportState(corr=None, credit=0)]
    assert peer.feed(StateChanged(PeerState.READY)) == [ReportState(corr=None, credit=2)]


def test_each_ending_grants_its_slot_again() -> None:
    peer = ready()
    assert [type(c) for c in peer.request("K1") + peer.request("K2", "r2")] == [StartWork, StartWork]
    assert sent(peer.feed(WorkEnded("K2", "infer.final", b"two"))) == [("infer.final", "r2", 3)]
    assert sent(peer.feed(WorkEnded("K1", "error", b"one"))) == [("error", "r1", 4)]


def test_a_key_asked_for_again_is_worked_on_once_answered_to_the_newest_and_its_second_slot_given_back() -> None:
    peer = ready()
    peer.request("K1", "r1")
    assert peer.request("K1", "r2") == [ReportState(corr=None, credit=3)]
    assert sent(peer.feed(WorkEnded("K1", "infer.final", b"text"))) == [("infer.final", "r2", 4)]


@pytest.mark.parametrize("kind", ["infer.final", "error"])
def test_a_repeat_of_a_request_spends_and_grants_nothing_not_even_after_the_ending(kind: str) -> None:
    peer = ready()
    peer.request("K1", "r1")
    assert peer.request("K1", "r1") == []
    assert sent(peer.feed(WorkEnded("K1", kind, b"text"))) == [(kind, "r1", 3)]
    assert peer.request("K1", "r1") == []
    assert peer.session.granted == 3


@pytest.mark.parametrize("kind", ["infer.final", "error"])
def test_work_that_ends_between_hello_and_welcome_is_answered_after_the_welcome(kind: str) -> None:
    peer = ready()
    peer.request("K1", "r1")
    peer.get("error", UNKNOWN)
    assert hello_in(peer.open("e2")).in_flight == ["K1"]
    assert peer.feed(WorkEnded("K1", kind, b"text")) == []
    assert sent(peer.join()) == [(kind, "r1", 2)]


def test_a_finished_request_is_answered_from_what_was_kept() -> None:
    peer = ready()
    peer.request("K1", "r1")
    peer.feed(WorkEnded("K1", "infer.final", b"text"))
    (again,) = peer.request("K1", "r9")
    assert isinstance(again, Transmit)
    assert (again.header.corr, again.header.credit, again.body) == ("r9", 4, b"text")


def test_a_failed_request_is_worked_on_again_when_asked_again() -> None:
    peer = ready()
    peer.request("K1")
    peer.feed(WorkEnded("K1", "error", b"no"))
    assert isinstance(peer.request("K1", "r2")[0], StartWork)


def test_work_that_is_late_is_not_begun_and_gives_its_slot_back() -> None:
    peer = ready()
    peer.now_ms = 5_000
    commands = peer.request("K1", deadline=4_999)
    assert sent(commands) == [("error", "r1", 3)]
    assert unpack_body(ErrorReply, commands[0].body).failure.category is Category.TIMEOUT  # type: ignore[union-attr]


def test_a_draining_peer_takes_nothing_new_and_finishes_what_it_has() -> None:
    peer = ready()
    peer.request("K1")
    assert sent(peer.feed(DrainAsked("SIGTERM"))) == [("session.goodbye", None, None)]
    assert sent(peer.request("K2", "r2")) == [("error", "r2", 3)]
    assert sent(peer.feed(WorkEnded("K1", "infer.final", b"x"))) == [("infer.final", "r1", 4)]


def test_a_cancel_reaches_running_work_only() -> None:
    peer = ready()
    peer.request("K1")
    assert peer.get("infer.cancel", UNKNOWN, key="K1") == [CancelWork("K1")]
    assert peer.get("infer.cancel", UNKNOWN, key="K9") == []


def test_pieces_are_held_back_while_a_silent_hub_may_not_read() -> None:
    peer = ready()
    peer.request("K1")
    peer.now_ms += 1_500
    assert sent(peer.feed(PartialMade(peer.now_ms, "K1", "infer.partial", b"a"))) == [("infer.partial", "r1", None)]
    peer.now_ms += 1
    assert peer.feed(PartialMade(peer.now_ms, "K1", "infer.partial", b"b")) == []
    peer.get("session.ping", Ping(at_ms=1))
    assert sent(peer.feed(PartialMade(peer.now_ms, "K1", "infer.partial", b"bc"))) == [("infer.partial", "r1", None)]


def test_pieces_are_dropped_while_there_is_no_hub_and_the_final_is_kept() -> None:
    peer = ready()
    peer.request("K1")
    assert sent(peer.feed(PartialMade(peer.now_ms, "K1", "infer.partial", b"a"))) == [("infer.partial", "r1", None)]
    assert peer.get("error", UNKNOWN) == [Reopen(failures=0)]
    assert peer.feed(PartialMade(peer.now_ms, "K1", "infer.partial", b"b")) == []
    assert peer.feed(WorkEnded("K1", "infer.final", b"ab")) == []
    hello = hello_in(peer.open("e2"))
    assert (hello.in_flight, hello.finished) == ([], ["K1"])
    welcome = WELCOME.model_copy(update={"resend": ["K1"]})
    assert sent(peer.join(welcome)) == [("infer.final", "r1", 2)]


def test_a_restarted_hub_learns_what_is_in_flight_and_drops_what_nobody_wants() -> None:
    peer = ready()
    peer.request("K1")
    peer.get("error", UNKNOWN)
    hello = hello_in(peer.open("e2"))
    assert hello.in_flight == ["K1"]
    assert peer.session.granted == 1  # the slot of the running work grants itself when it ends
    commands = peer.join(WELCOME.model_copy(update={"drop": ["K1", "stranger"]}))
    assert commands[0] == CancelWork("K1")


def test_after_one_missed_ping_the_hub_is_spoken_to_once_per_silence() -> None:
    peer = ready()
    assert peer.feed(Ticked(1_200)) == []
    assert peer.feed(Ticked(1_201)) == [ReportState(corr=None, credit=2)]
    assert peer.feed(Ticked(1_400)) == []
    peer.now_ms = 1_500
    peer.get("session.ping", Ping(at_ms=1))
    assert peer.feed(Ticked(2_701)) == [ReportState(corr=None, credit=2)]


def test_a_silent_hub_is_left_after_three_pings_and_an_unanswered_hello_after_three_seconds() -> None:
    peer = ready()
    peer.feed(Ticked(2_000))
    assert peer.feed(Ticked(3_000)) == []
    assert peer.feed(Ticked(3_001)) == [Reopen(failures=1)]
    peer.now_ms = 10_000
    peer.open("e2")
    assert peer.feed(Ticked(13_000)) == []
    assert peer.feed(Ticked(13_001)) == [Reopen(failures=2)]
    peer.open("e3")
    peer.join()
    assert peer.session.failures == 0


def test_a_connection_that_came_back_is_a_new_session_whether_or_not_the_old_one_had_been_joined() -> None:
    peer = Peer()
    peer.open()
    assert peer.feed(Reconnected()) == [Reopen(failures=0)], "the HELLO may be lost"
    peer.open("e2")
    peer.get("session.welcome", WELCOME)
    peer.feed(StateChanged(PeerState.READY))
    peer.request("k1")
    assert peer.feed(Reconnected()) == [Reopen(failures=0)]
    assert not peer.session.joined
    hello = peer.open("e3")[0]
    assert isinstance(hello, Transmit)
    assert unpack_body(Hello, hello.body).in_flight == ["k1"]


def test_a_ping_is_answered_with_the_state() -> None:
    peer = ready()
    assert peer.get("session.ping", Ping(at_ms=1)) == [ReportState(corr="h1", credit=2)]


def test_a_version_mismatch_is_final_and_a_fenced_epoch_is_not() -> None:
    peer = ready()
    assert isinstance(peer.get("session.reject", Reject(code="fenced", message="too late"))[0], Reopen)
    assert isinstance(peer.get("session.reject", Reject(code="version", message="speak 2"))[0], Stop)


def test_questions_are_repeated_to_a_new_hub_and_their_answers_delivered_once() -> None:
    peer = ready()
    question = Asked(Header(kind="memory.request", id="a1", key="Q"), b"?")
    assert sent(peer.feed(question)) == [("memory.request", None, None)]
    peer.get("error", UNKNOWN)
    peer.open("e2")
    assert sent(peer.join()) == [("memory.request", None, None)]
    (answer,) = peer.get("memory.final", WELCOME, corr="a1")
    assert isinstance(answer, Deliver)
    assert peer.get("memory.final", WELCOME, corr="a1") == []


def test_a_dropped_question_is_cancelled() -> None:
    peer = ready()
    peer.feed(Asked(Header(kind="memory.request", id="a1", key="Q"), b"?"))
    assert sent(peer.feed(AskDropped("a1"))) == [("memory.cancel", "a1", None)]
    assert peer.feed(AskDropped("a1")) == []


def test_a_request_without_a_key_is_refused_and_gives_its_slot_back() -> None:
    assert sent(ready().request(None)) == [("error", "r1", 3)]


def test_a_hub_restart_while_the_model_is_reloaded_costs_no_slot() -> None:
    peer = ready()
    peer.request("K1")
    peer.feed(StateChanged(PeerState.LOADING))
    peer.get("error", UNKNOWN)
    assert sent(peer.open("e2")) == [("session.hello", None, 0)]
    peer.join()
    peer.feed(WorkEnded("K1", "error", b"the child died"))
    assert peer.feed(StateChanged(PeerState.READY)) == [ReportState(corr=None, credit=2)]


def test_an_unreadable_error_of_another_service_is_an_answer_and_does_not_stop_this_one() -> None:
    peer = ready()
    peer.feed(Asked(Header(kind="memory.request", id="a1", key="Q"), b"?"))
    (answer,) = peer.get("error", WELCOME, corr="a1")
    assert isinstance(answer, Deliver)


KEYS = st.sampled_from(["K1", "K2", "K3", "K4"])


class SessionStory(RuleBasedStateMachine):
    """A hub with its own books, a peer, and any order of events between them."""

    def __init__(self) -> None:
        super().__init__()
        self.peer = Peer()
        self.running: set[str] = set()
        """Keys the driver works on, by StartWork and WorkEnded alone."""
        self.owed: Counter[str] = Counter()
        """Endings that the hub waits for, per key."""
        self.granted = 0
        self.spent = 0
        """Credit spent in this epoch."""
        self.epochs = 0
        self.requests = 0
        self.closed = True
        self.stopped = False
        self.told_running: list[str] = []
        self.told_finished: list[str] = []
        """What the last HELLO said: the hub waits for the one and may ask for the other."""

    def look(self, commands: list[Command]) -> list[Command]:
        session = self.peer.session
        for command in commands:
            match command:
                case StartWork(header, _):
                    assert header.key is not None
                    assert header.key not in self.running, "the same key is worked on twice at once"
                    assert header.key not in session.finished, "work that has its result is done again"
                    self.running.add(header.key)
                case Transmit(header, _) if header.kind in ENDINGS:
                    assert session.joined, "an ending was sent while there is no session: it is lost"
                    self.owed[header.key or ""] -= 1
                case Reopen():
                    self.closed = True
                case Stop():
                    self.stopped = True
            credit = getattr(command, "credit", None) or getattr(getattr(command, "header", None), "credit", None)
            if credit is not None:
                assert credit >= self.granted, "credit went down within an epoch"
                self.granted = credit
        return commands

    @initialize(ready=st.booleans())
    def begin(self, ready: bool) -> None:
        if ready:
            self.peer.feed(StateChanged(PeerState.READY))
        self.open()
        if ready:
            self.welcome(drop=False)

    @precondition(lambda self: self.closed)
    @rule()
    def open(self) -> None:
        self.epochs += 1
        self.granted = self.spent = 0
        self.owed.clear()  # the new session settles anew who is owed what
        self.closed = False
        hello = hello_in(self.look(self.peer.open(f"e{self.epochs}")))
        assert set(hello.in_flight) == self.running, "running work is missing from HELLO, so it will be done twice"
        assert not set(hello.in_flight) & set(hello.finished)
        self.told_running, self.told_finished = hello.in_flight, hello.finished

    @precondition(lambda self: not self.closed and not self.peer.session.joined)
    @rule(drop=st.booleans())
    def welcome(self, drop: bool) -> None:
        self.owed.update(self.told_finished)
        self.owed.update(self.running if drop else self.told_running)  # a cancelled call is answered all the same
        dropped = self.told_running if drop else []
        self.look(self.peer.join(WELCOME.model_copy(update={"resend": self.told_finished, "drop": dropped})))

    @precondition(lambda self: self.peer.session.joined and self.granted > self.spent)
    @rule(key=KEYS)
    def request(self, key: str) -> None:
        self.requests += 1
        self.spent += 1
        if key not in self.running:  # a running one is answered together with the new one
            self.owed[key] += 1
        self.look(self.peer.request(key, f"r{self.requests}"))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), kind=st.sampled_from(["infer.final", "error"]))
    def work_ends(self, data: st.DataObject, kind: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(key)
        joined = self.peer.session.joined
        commands = self.look(self.peer.feed(WorkEnded(key, kind, pack_body(UNKNOWN))))
        assert len(sent(commands)) == (1 if joined else 0)

    @rule(key=KEYS)
    def partial(self, key: str) -> None:
        assert len(self.look(self.peer.feed(PartialMade(self.peer.now_ms, key, "infer.partial", b"x")))) <= 1

    @rule(state=st.sampled_from([PeerState.LOADING, PeerState.READY, PeerState.DEGRADED]))
    def state(self, state: PeerState) -> None:
        self.look(self.peer.feed(StateChanged(state)))

    @precondition(lambda self: not self.closed)
    @rule()
    def hub_restarts(self) -> None:
        self.look(self.peer.get("error", UNKNOWN))

    @precondition(lambda self: not self.closed)
    @rule(by_ms=st.sampled_from([100, 3_500]))
    def time_passes(self, by_ms: int) -> None:
        self.peer.now_ms += by_ms
        self.look(self.peer.feed(Ticked(self.peer.now_ms)))

    @precondition(lambda self: self.peer.session.joined)
    @rule()
    def ping(self) -> None:
        self.look(self.peer.get("session.ping", Ping(at_ms=1)))

    @precondition(lambda self: not self.closed)
    @rule(
        kind=st.sampled_from(["infer.final", "error", "session.report", "task.event", "nobody.knows"]),
        readable=st.booleans(),
    )
    def stray_message(self, kind: str, readable: bool) -> None:
        body = ErrorReply(failure=UNKNOWN.failure.model_copy(update={"code": "x"}))
        self.look(self.peer.get(kind, body if readable else WELCOME, corr="stranger"))

    @invariant()
    def each_request_has_at_most_one_ending(self) -> None:
        if self.peer.session.joined:
            for key, count in self.owed.items():
                assert count == (1 if key in self.running else 0), f"{key} is owed {count} endings"

    @invariant()
    def an_idle_ready_peer_can_be_given_as_much_as_it_has_slots(self) -> None:
        session = self.peer.session
        if session.joined and session.state is PeerState.READY and not self.running:
            assert session.granted - self.spent == session.slots

    @invariant()
    def nothing_stops_it(self) -> None:
        assert not self.stopped


SessionStory.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestSessionStory = SessionStory.TestCase
