"""The account of what peers were sent and have not been seen to read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import pack_body, unpack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.messages.reply import Refused
from protocol.messages.result import TaskQuery, Watch
from protocol.messages.session import Hello, PeerState, Ping, Pong
from services.scheduler import events as ev
from services.scheduler import unread as u
from tests.unit.simulation import say, stack, task_of

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["send", "mark", "pong", "gone", "sweep"]), st.integers(0, 3), st.integers(1, 9_000_000)),
    max_size=80,
)


@given(ACTIONS)
def test_the_sum_is_that_of_the_accounts_whatever_happens(actions: list[tuple[str, int, int]]) -> None:
    unread = u.Unread()
    pings: dict[bytes, list[str]] = {}
    for number, (what, who, size) in enumerate(actions):
        peer = f"p{who}".encode()
        if what == "send":
            unread.sent(peer, size)
        elif what == "mark":
            for due in unread.take_due():
                unread.mark(due, f"ping{number}")
                pings.setdefault(due, []).append(f"ping{number}")
        elif what == "pong":
            unread.on_pong(peer, pings[peer].pop(size % len(pings[peer])) if pings.get(peer) else "never-sent")
        elif what == "gone":
            unread.gone(peer)
            pings.pop(peer, None)
        else:
            unread.want_marks({b"p0", b"p1"})
        unread.check_invariants()
        assert unread.bytes_of(peer) >= 0


def test_a_pong_answers_for_what_was_sent_before_its_ping_and_no_more() -> None:
    unread = u.Unread()
    unread.sent(b"p", u.MARK_BYTES)
    assert unread.take_due() == [b"p"]
    assert unread.take_due() == []
    unread.mark(b"p", "one")
    unread.sent(b"p", 10)
    unread.on_pong(b"p", "other")
    assert unread.bytes_of(b"p") == u.MARK_BYTES + 10
    unread.on_pong(b"p", "one")
    unread.on_pong(b"p", "one")
    assert unread.bytes_of(b"p") == 10


def test_together_they_have_a_bound_too_and_a_newcomer_still_gets_its_answers() -> None:
    unread = u.Unread()
    peers = [f"p{number}".encode() for number in range(200)]
    for _ in range(200):
        for peer in peers:
            if unread.objection(peer) is None:
                unread.sent(peer, 1_000_000)
    assert max(map(unread.bytes_of, peers)) <= u.MAX_UNREAD_PER_PEER + 1_000_000
    assert sum(map(unread.bytes_of, peers)) <= u.MAX_UNREAD + len(peers) * (2 * u.MARK_BYTES + 1_000_000)
    assert unread.objection(b"newcomer") is None


def test_accounts_are_bounded() -> None:
    unread = u.Unread()
    for number in range(10_000):
        unread.sent(str(number).encode(), 1)
    assert unread.bytes_of(b"0") == 0
    assert unread.bytes_of(b"9999") == 1
    unread.check_invariants()


class Reader:
    """A client at a hub of the simulation that reads only when told to, and what it was sent meanwhile."""

    def __init__(self) -> None:
        self.world = stack(say("x" * 900_000))
        assert self.world.hub is not None
        self.hub = self.world.hub
        self.sent: list[ev.Send] = []
        self.number = 0
        hello = Hello(service="reader-1", protocol_min=1, protocol_max=1, pid=1)
        self.ask("session.hello", hello)

    def ask(self, kind: str, body: Hello | TaskQuery | Watch | Pong, corr: str | None = None) -> list[ev.Send]:
        self.number += 1
        header = Header(kind=kind, id=f"r{self.number}", corr=corr)
        frames = [pack_header(header), pack_body(body)]
        commands = self.hub.handle(ev.FrameIn(b"reader", frames, self.world.now))
        mine = [one for one in commands if isinstance(one, ev.Send) and one.identity == b"reader"]
        self.sent += mine
        return mine

    def read_all(self) -> None:
        taken, self.sent = self.sent, []
        for one in taken:
            header = unpack_header(one.header)
            if header.kind == "session.ping":
                unpack_body(Ping, one.body)
                pong = Pong(state=PeerState.READY, in_flight=0, loop_lag_ms=0, rss_bytes=0)
                self.ask("session.pong", pong, corr=header.id)


def kinds(sends: list[ev.Send]) -> list[str]:
    return [unpack_header(one.header).kind for one in sends]


def test_who_does_not_read_is_refused_and_told_why_until_it_reads() -> None:
    reader = Reader()
    task_id = reader.world.submit(task_of([{"id": "S1"}]))
    reader.world.finish(task_id)
    refused = None
    for _ in range(200):
        answers = reader.ask("task.show", TaskQuery(task_id=task_id))
        if kinds(answers) == ["refused"]:
            refused = unpack_body(Refused, answers[0].body)
            break
    assert refused is not None
    assert "session.ping" in refused.reason
    assert refused.retry_after_ms == u.RETRY_AFTER_MS
    held = sum(len(one.body) for one in reader.sent)
    assert held <= u.MAX_UNREAD_PER_PEER + 1_000_000
    reader.read_all()
    assert kinds(reader.ask("task.show", TaskQuery(task_id=task_id)))[0] == "task.detail"


def test_who_reads_may_ask_for_any_amount() -> None:
    reader = Reader()
    task_id = reader.world.submit(task_of([{"id": "S1"}]))
    reader.world.finish(task_id)
    for _ in range(300):
        assert kinds(reader.ask("task.show", TaskQuery(task_id=task_id)))[0] == "task.detail"
        reader.read_all()


def test_a_watcher_that_cannot_be_told_its_results_any_more_is_gone() -> None:
    """Many watches of one task end in as many results at once: they are not even made beyond the bound."""
    reader = Reader()
    task_id = reader.world.submit(task_of([{"id": "S1"}]))
    for _ in range(400):
        reader.ask("task.watch", Watch(task_id=task_id, quiet=True))
    told: list[ev.Send] = []
    deliver = reader.world._deliver

    def keep(identity: bytes, header: bytes, body: bytes) -> None:
        if identity == b"reader":
            told.append(ev.Send(identity, header, body))
        else:
            deliver(identity, header, body)

    reader.world._deliver = keep  # type: ignore[method-assign]  # this client is none of the world's
    reader.world.finish(task_id)
    assert 0 < sum(len(one.body) for one in told) <= 2 * u.MAX_UNREAD_PER_PEER + 2_000_000
    assert b"reader" not in reader.hub.broker.peers
    assert any("does not read" in note for note in reader.world.notes)
