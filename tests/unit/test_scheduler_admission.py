"""What may wait at the hub: bounded per capability, per requester and in bytes, and measured honestly."""

from __future__ import annotations

import pytest

from protocol.codec import unpack_body
from protocol.header import Header
from protocol.messages.reply import ErrorReply
from protocol.messages.session import Hello, PeerState
from services.scheduler import admission as a
from services.scheduler import broker as b
from services.scheduler import calls as c
from services.scheduler.queues import ReadyQueue
from services.scheduler.resources import Tokens

GREEDY, MODEST = b"greedy", b"modest"


def call(key: str, requester: bytes = GREEDY, *, target: str = "infer.worker", body: bytes = b"1234") -> c.Call:
    return c.Call(key=key, kind="infer.request", target=target, queued_ms=0, body=body, requester=requester)


def broker() -> b.Broker:
    return b.Broker(Tokens(cores=4))


def join_worker(hub: b.Broker, slots: int) -> bytes:
    hello = Hello(
        service="w", protocol_min=1, protocol_max=1, capabilities=["infer.worker"], pid=1, state=PeerState.READY
    )
    hub.on_hello(b"w", hello, "boot-1", slots, 0)
    return b"w"


def test_one_peer_cannot_fill_a_queue_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a, "MAX_CALLS_PER_PEER", 3)
    hub = broker()
    for number in range(3):
        hub.ask(call(f"k{number}"))
    assert "your calls" in (hub.objection(call("k3")) or "")
    assert hub.objection(call("k1")) is None, "asking again for what is there takes no place"
    assert hub.objection(call("m", MODEST)) is None
    hub.cancel("k1")
    assert hub.objection(call("k3")) is None
    hub.check_invariants()


def test_a_capability_has_room_for_so_many_calls_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b, "MAX_QUEUED", 4)
    hub = broker()
    for number in range(4):
        hub.ask(call(f"k{number}", b"peer%d" % number))
    assert "4 calls waiting" in (hub.objection(call("m", MODEST)) or "")
    assert hub.objection(call("m", MODEST, target="gate")) is None
    hub.cancel("k0")
    assert hub.objection(call("m", MODEST)) is None, "a stale entry takes no place"


def test_bodies_are_bounded_in_bytes_per_peer_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a, "MAX_BYTES_PER_PEER", 100)
    monkeypatch.setattr(a, "MAX_BYTES", 150)
    hub = broker()
    hub.ask(call("k1", body=bytes(90)))
    assert "hold 90 bytes" in (hub.objection(call("k2", body=bytes(11))) or "")
    hub.ask(call("m1", MODEST, body=bytes(60)))
    assert "of all peers" in (hub.objection(call("x1", b"third", body=bytes(1))) or "")
    hub.cancel_for(GREEDY)
    assert hub.objection(call("x1", b"third", body=bytes(80))) is None
    hub.check_invariants()


def test_a_call_that_changes_hands_is_booked_for_the_new_requester() -> None:
    hub = broker()
    hub.ask(call("k"))
    hub.ask(call("k", MODEST))
    hub.check_invariants()
    hub.cancel("k")
    assert hub.admission.held() == (0, 0)


def test_asking_and_cancelling_in_a_circle_leaves_nothing_behind() -> None:
    hub = broker()
    for number in range(5_000):
        hub.ask(call(f"k{number}"))
        hub.ask(call(f"s{number}", target=f"strange.{number}"))
        hub.cancel(f"k{number}")
        hub.cancel(f"s{number}")
        if number % 100 == 0:
            assert hub.next_start(number) is None
    assert hub.next_start(5_000) is None
    queues = hub.lines.queues
    assert sum(len(queue) for queue in queues.values()) < 200
    assert len(queues) < 200
    assert hub.admission.held() == (0, 0)


def test_a_purge_forgets_no_call_that_waits_and_keeps_their_order() -> None:
    hub = broker()
    for number in range(500):
        hub.ask(call(f"k{number:03}"))
    for number in range(500):
        if number % 7:
            hub.cancel(f"k{number:03}")
    worker = join_worker(hub, 500)
    started = []
    while isinstance(start := hub.next_start(1), c.Start):
        started.append(start.call.key)
    assert started == [f"k{number:03}" for number in range(0, 500, 7)]
    assert hub.peers[worker].used == len(started)
    hub.check_invariants()


def test_capabilities_of_peers_that_are_gone_are_remembered_up_to_a_bound() -> None:
    hub = broker()
    for number in range(1_000):
        hello = Hello(service="x", protocol_min=1, protocol_max=1, capabilities=[f"c{number}"], pid=1)
        hub.on_hello(b"%d" % number, hello, f"boot{number}-1", 1, number)
        hub.on_unreachable(b"%d" % number, number)
    assert 0 < len(hub.gone_ms) <= 256
    assert hub.gone_ms["c999"] == 999


def test_the_time_to_come_again_is_the_measured_pace_and_a_stall_counts() -> None:
    rate = a.DrainRate()
    assert rate.retry_after_ms(0) == 1_000
    for at_ms in range(0, 10_000, 500):
        rate.ended(at_ms)
    assert rate.retry_after_ms(9_500) == 500
    assert rate.retry_after_ms(9_500, ahead=4) == 2_000
    assert rate.retry_after_ms(14_500) == 5_000, "nothing has ended for 5 s"
    assert rate.retry_after_ms(99_500) == 30_000
    for at_ms in range(10_000, 10_064):
        rate.ended(at_ms)
    assert rate.retry_after_ms(10_064) == 100


def test_rates_are_kept_for_the_newest_capabilities_only() -> None:
    admission = a.Admission()
    for number in range(1_000):
        admission.drained(f"c{number}", number)
    assert len(admission._drains) <= 256


def test_an_empty_queue_counts_nothing() -> None:
    assert ReadyQueue().count(lambda key: True, 1) == 0


def test_a_call_whose_deadline_has_passed_is_dropped_when_its_turn_comes() -> None:
    """Not at the next tick: a slot that comes free in between is for work that somebody still wants."""
    hub = broker()
    late, wanted = call("late"), call("wanted")
    late.outer_ms = 50
    hub.ask(late)
    hub.ask(wanted)
    join_worker(hub, 1)
    commands = list(iter(lambda: hub.next_start(60), None))
    assert [type(command).__name__ for command in commands] == ["Ended", "Start"]
    ended, start = commands
    assert isinstance(ended, c.Ended)
    assert isinstance(start, c.Start)
    assert (ended.call.key, start.call.key) == ("late", "wanted")
    assert unpack_body(ErrorReply, ended.body).failure.code == "call.expired"
    assert hub.counters["expired"] == 1
    hub.check_invariants()


def test_a_call_that_finds_no_place_is_told_the_pace_at_which_such_calls_have_ended() -> None:
    hub = broker()
    worker = hub.peers[join_worker(hub, 4)]
    for number in range(4):
        hub.ask(call(f"k{number}"))
        assert hub.next_start(0) is not None
    for number in range(4):
        hub.on_heard(worker, None, 700 * number)
        hub.on_ending(worker, Header(kind="infer.final", id="", key=f"k{number}"), b"\x80")
    assert hub.admission.retry_after_ms("infer.worker", 2_100) == 700
    assert hub.admission.retry_after_ms("gate", 2_100) == 1_000, "of others nothing is known"
