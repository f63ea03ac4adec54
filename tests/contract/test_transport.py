"""What both transports promise: the same assertions on real sockets and on their twin inside one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from protocol.errors import AddressTaken, SendLater, StrandPeer
from protocol.memory_transport import MemoryRouter
from protocol.transport import DealerPort, RouterPort
from protocol.zmq_transport import ZmqDealer, ZmqRouter

WAIT_MS = 20_000
FAR_TOO_MANY = 200_000


@dataclass
class Bus:
    """A hub's port and a way to make peers for it."""

    router: RouterPort
    connect: Callable[[], DealerPort]


@pytest.fixture(params=["memory", "zmq"])
def bus(request: pytest.FixtureRequest, address: str) -> Iterator[Bus]:
    dealers: list[DealerPort] = []
    router: RouterPort
    if request.param == "memory":
        memory = router = MemoryRouter()
        make: Callable[[], DealerPort] = memory.connect
    else:
        router = ZmqRouter(address)

        def make() -> DealerPort:
            return ZmqDealer(address)

    def connect() -> DealerPort:
        dealers.append(make())
        return dealers[-1]

    yield Bus(router, connect)
    for dealer in dealers:
        dealer.close()
    router.close()


def take(port: RouterPort) -> tuple[bytes, list[bytes]]:
    assert port.wait(WAIT_MS)
    message = port.receive()
    assert message is not None
    return message


def introduce(bus: Bus, dealer: DealerPort) -> bytes:
    """Let the hub learn the identity of a peer."""
    dealer.send(b"hello", b"")
    return take(bus.router)[0]


def drain(receive: Callable[[], object], wait: Callable[[int], bool], expected: int) -> list[object]:
    got: list[object] = []
    while len(got) < expected and wait(WAIT_MS):
        while (message := receive()) is not None:
            got.append(message)
    return got


def fill(send: Callable[[int], None]) -> int:
    """Send until the pipe is full; returns how many messages were taken. An endless pipe fails the test."""
    for number in range(FAR_TOO_MANY):
        try:
            send(number)
        except SendLater:
            return number
    raise AssertionError(f"{FAR_TOO_MANY} messages were taken although nobody reads them")


def keep_sending(router: RouterPort, identity: bytes) -> None:
    """Send for some seconds: real sockets notice a moment later that a peer has left."""
    for _ in range(1_000):
        router.send(identity, b"header", b"body")
        router.wait(5)


def test_a_message_arrives_whole_in_both_directions(bus: Bus) -> None:
    dealer = bus.connect()
    dealer.send(b"header", b"body")
    identity, frames = take(bus.router)
    assert frames == [b"header", b"body"]
    bus.router.send(identity, b"back", b"\x00" * 1_000_000)
    assert dealer.wait(WAIT_MS)
    assert dealer.receive() == [b"back", b"\x00" * 1_000_000]


def test_nothing_there_is_none_and_not_a_wait(bus: Bus) -> None:
    dealer = bus.connect()
    assert bus.router.receive() is None
    assert dealer.receive() is None
    assert not bus.router.wait(1)
    assert not dealer.wait(1)


def test_a_message_for_an_unknown_peer_is_refused_not_dropped(bus: Bus) -> None:
    with pytest.raises(StrandPeer) as stranded:
        bus.router.send(b"nobody", b"header", b"body")
    assert stranded.value.peer == b"nobody"


def test_a_message_for_a_peer_that_left_is_refused(bus: Bus) -> None:
    dealer, other = bus.connect(), bus.connect()
    identity = introduce(bus, dealer)
    still = introduce(bus, other)
    dealer.close()
    with pytest.raises(StrandPeer):
        keep_sending(bus.router, identity)
    bus.router.send(still, b"header", b"body")  # and the others are unharmed


def test_each_peer_gets_its_own_messages_in_order(bus: Bus) -> None:
    dealers = [bus.connect() for _ in range(3)]
    identities = [introduce(bus, dealer) for dealer in dealers]
    assert len(set(identities)) == 3
    for number in range(300):
        bus.router.send(identities[number % 3], b"%d" % number, b"")
    for place, dealer in enumerate(dealers):
        got = drain(dealer.receive, dealer.wait, 100)
        assert got == [[b"%d" % number, b""] for number in range(place, 300, 3)]


def test_the_hub_gets_the_messages_of_a_peer_in_order(bus: Bus) -> None:
    dealer = bus.connect()
    identity = introduce(bus, dealer)
    for number in range(500):
        dealer.send(b"%d" % number, b"")
    assert drain(bus.router.receive, bus.router.wait, 500) == [(identity, [b"%d" % n, b""]) for n in range(500)]


def test_a_full_pipe_to_a_peer_raises_and_what_was_taken_is_not_lost(bus: Bus) -> None:
    dealer = bus.connect()
    identity = introduce(bus, dealer)
    sent = fill(lambda number: bus.router.send(identity, b"%d" % number, b""))
    got = drain(dealer.receive, dealer.wait, sent)
    assert got == [[b"%d" % number, b""] for number in range(sent)]


def test_a_full_pipe_to_the_hub_raises_and_what_was_taken_is_not_lost(bus: Bus) -> None:
    dealer = bus.connect()
    introduce(bus, dealer)
    sent = fill(lambda number: dealer.send(b"%d" % number, b""))
    assert len(drain(bus.router.receive, bus.router.wait, sent)) == sent


def test_one_full_pipe_does_not_stop_the_others(bus: Bus) -> None:
    slow, quick = bus.connect(), bus.connect()
    slow_id, quick_id = introduce(bus, slow), introduce(bus, quick)
    fill(lambda number: bus.router.send(slow_id, b"header", b""))
    bus.router.send(quick_id, b"for you", b"")
    assert quick.wait(WAIT_MS)
    assert quick.receive() == [b"for you", b""]


# What only real sockets can promise


def test_a_second_hub_on_a_live_address_is_refused_and_the_first_goes_on_working(address: str) -> None:
    first = ZmqRouter(address)
    dealer = ZmqDealer(address)
    with pytest.raises(AddressTaken, match="tierline down"):
        ZmqRouter(address)
    dealer.send(b"still", b"here")
    assert take(first)[1] == [b"still", b"here"]
    late = ZmqDealer(address)  # one that connects after the attempt must reach the first hub too
    late.send(b"late", b"")
    assert take(first)[1] == [b"late", b""]
    for port in (dealer, late, first):
        port.close()


def test_a_closed_hub_gives_its_address_back_and_peers_find_the_next(address: str) -> None:
    first = ZmqRouter(address)
    dealer = ZmqDealer(address)
    dealer.send(b"one", b"")
    take(first)
    first.close()
    second = ZmqRouter(address)
    end = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < end:
        dealer.send(b"two", b"")  # again and again: what goes out while the connection breaks may be lost
        if second.wait(100):
            break
    assert take(second)[1] == [b"two", b""]
    dealer.close()
    second.close()


def test_a_connection_that_broke_and_came_back_is_told_once_and_the_first_one_is_not_such(address: str) -> None:
    first = ZmqRouter(address)
    dealer = ZmqDealer(address)
    dealer.send(b"one", b"")
    take(first)
    assert not dealer.reconnected()
    first.close()
    second = ZmqRouter(address)
    end = time.monotonic() + WAIT_MS / 1000
    while not (back := dealer.reconnected()) and time.monotonic() < end:
        time.sleep(0.01)
    assert back
    assert not dealer.reconnected()
    dealer.send(b"two", b"")  # not before: what goes out while the connection breaks may be lost
    take(second)
    dealer.close()
    dealer.close()
    second.close()


@pytest.mark.parametrize("bad", ["tcp://127.0.0.1:5555", "inproc://x", "hub.sock", "ipc://" + "/x" * 60])
def test_an_address_that_cannot_be_used_says_what_to_change(bad: str) -> None:
    for make in (ZmqRouter, ZmqDealer):
        with pytest.raises(ValueError, match="TIERLINE_HOME"):
            make(bad)
