"""What has been on the wire can be read for ever, and what is written today is what was agreed."""

from __future__ import annotations

import msgpack
import pytest

from protocol.codec import pack_body, unpack_body
from protocol.header import Header, pack_header, unpack_header
from protocol.kinds import BODIES, CALL_REQUESTS, ENDINGS, HUB_REQUESTS
from tests.contract.golden_messages import EXAMPLES, FOLDER, header_of, path_of, write_missing

ALL = [(kind, number) for kind, examples in EXAMPLES.items() for number in range(1, len(examples) + 1)]


def frames(kind: str, number: int) -> tuple[bytes, bytes]:
    header, body = path_of(kind, number).read_text("ascii").split()
    return bytes.fromhex(header), bytes.fromhex(body)


@pytest.mark.parametrize(("kind", "number"), ALL)
def test_bytes_once_written_are_read_as_the_same_message(kind: str, number: int) -> None:
    header, body = frames(kind, number)
    assert unpack_header(header) == header_of(kind)
    assert unpack_body(BODIES[kind], body) == EXAMPLES[kind][number - 1]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_newest_example_of_a_kind_is_written_byte_for_byte_the_same(kind: str) -> None:
    header, body = frames(kind, len(EXAMPLES[kind]))
    assert pack_header(header_of(kind)) == header
    assert pack_body(EXAMPLES[kind][-1]) == body


def test_every_kind_has_an_example_and_every_file_belongs_to_one() -> None:
    assert EXAMPLES.keys() == BODIES.keys()
    assert {path_of(kind, number) for kind, number in ALL} == set(FOLDER.glob("*.hex"))


def test_writing_again_touches_no_file() -> None:
    assert write_missing() == []


def test_every_request_has_a_final_and_every_ending_a_body() -> None:
    assert BODIES.keys() >= ENDINGS
    assert BODIES.keys() >= HUB_REQUESTS.keys() | set(HUB_REQUESTS.values()) | CALL_REQUESTS
    assert {kind.replace(".request", ".final") for kind in CALL_REQUESTS} <= ENDINGS


def test_a_newer_peer_may_send_fields_that_we_do_not_know() -> None:
    header, body = frames("task.accepted", 1)
    newer_header = msgpack.packb({**msgpack.unpackb(header), "colour": [1, 2]})
    newer_body = msgpack.packb({**msgpack.unpackb(body), "queue_position": 3})
    assert unpack_header(newer_header) == header_of("task.accepted")
    assert unpack_body(BODIES["task.accepted"], newer_body) == EXAMPLES["task.accepted"][0]


def test_an_absent_header_field_is_not_on_the_wire() -> None:
    assert msgpack.unpackb(pack_header(Header(kind="task.list", id="1"))) == {"kind": "task.list", "id": "1", "v": 1}
