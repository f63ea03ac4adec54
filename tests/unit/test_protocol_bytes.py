"""Hostile and broken bytes end in BadFrame and in nothing else; good ones survive the journey."""

from __future__ import annotations

import string
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.codec import describe, pack_body, unpack_body, unpack_map
from protocol.errors import BadFrame
from protocol.header import Header, pack_header, unpack_header
from protocol.kinds import BODIES
from protocol.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES, MAX_NESTING
from protocol.messages.artefact import Artefact, ArtefactKind
from protocol.messages.task import Submit, TaskIR

tokens = st.text(string.ascii_letters + string.digits + "_.:-", min_size=1, max_size=40)
counts = st.integers(0, 2**63 - 1)
headers = st.builds(
    Header,
    kind=tokens,
    id=tokens,
    corr=st.none() | tokens,
    src=st.none() | tokens,
    dst=st.none() | tokens,
    epoch=st.none() | tokens,
    seq=st.none() | counts,
    key=st.none() | tokens,
    attempt=st.none() | counts,
    deadline=st.none() | counts,
    task=st.none() | tokens,
    step=st.none() | tokens,
    parent=st.none() | tokens,
    credit=st.none() | counts,
    prio=st.sampled_from([None, "interactive", "batch"]),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
#: All that msgpack can say, also what no message of ours contains.
msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**40), st.integers(0, 999_999_999)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.binary() | st.integers(-(2**63), 2**63), inner, max_size=4)
    ),
    max_leaves=12,
)
#: Maps with the field names of a kind, so that validation is reached.
field_names = sorted({name for model in BODIES.values() for name in model.model_fields})
near_bodies = st.dictionaries(st.sampled_from(field_names) | st.text(), msgpack_values, max_size=8)


def reads(function: Any, *arguments: Any) -> None:
    """The call returns or raises BadFrame; anything else fails the test."""
    with suppress(BadFrame):
        function(*arguments)


@given(headers)
def test_a_header_comes_out_as_it_went_in(header: Header) -> None:
    assert unpack_header(pack_header(header)) == header


@given(st.binary(max_size=200))
def test_random_bytes_as_header_are_a_bad_frame(data: bytes) -> None:
    with pytest.raises(BadFrame):
        unpack_header(data)


@given(st.dictionaries(st.sampled_from([*Header.__struct_fields__, "other"]), msgpack_values))
def test_a_map_with_the_wrong_values_is_a_bad_header_or_a_good_one(fields: dict[str, Any]) -> None:
    reads(unpack_header, msgpack.packb({"kind": "k", "id": "1", "v": 1, **fields}))


@given(st.binary(max_size=200), st.sampled_from(sorted(BODIES)))
def test_random_bytes_as_body_are_a_bad_frame_or_a_message(data: bytes, kind: str) -> None:
    reads(unpack_body, BODIES[kind], data)


@settings(max_examples=400)
@given(near_bodies, st.sampled_from(sorted(BODIES)))
def test_a_body_with_the_right_names_and_any_values_is_a_bad_frame_or_a_message(
    fields: dict[str, Any], kind: str
) -> None:
    reads(unpack_body, BODIES[kind], msgpack.packb(fields))


@given(msgpack_values)
def test_a_hostile_value_inside_an_artefact_is_a_bad_frame(value: Any) -> None:
    reads(unpack_body, Artefact, msgpack.packb({"name": "a", "kind": "json", "value": value}))


@given(json_values)
def test_json_inside_an_artefact_comes_out_as_it_went_in(value: Any) -> None:
    artefact = Artefact(name="a", kind=ArtefactKind.JSON, value=value)
    assert unpack_body(Artefact, pack_body(artefact)) == artefact


@pytest.mark.parametrize("value", [b"bytes", msgpack.Timestamp(1), msgpack.ExtType(5, b""), float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused_by_name(value: Any) -> None:
    with pytest.raises(BadFrame) as bad:
        unpack_map(msgpack.packb({"task": {"deep": [value]}}))
    assert bad.value.code == "body.not_json"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "body.not_msgpack"),
        (b"\xc1", "body.not_msgpack"),
        (b"\x80\x80", "body.not_msgpack"),
        (b"\x81\xa1a\xa1\xff", "body.not_msgpack"),
        (b"\x90", "body.not_a_map"),
        (b"\x81\x01\x02", "body.not_json"),
        (b"\x81\xc4\x01a\x02", "body.not_json"),
        (b"\x81\xa1a" + b"\x91" * (MAX_NESTING + 1) + b"\xc0", "body.too_deep"),
        (b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0", "body.not_msgpack"),
        (b"\x00" * (MAX_BODY_BYTES + 1), "body.too_large"),
        (b"\xdf\xff\xff\xff\xff", "body.not_msgpack"),
    ],
)
def test_each_way_to_break_a_body_has_its_code(data: bytes, code: str) -> None:
    with pytest.raises(BadFrame) as bad:
        unpack_map(data)
    assert bad.value.code == code


def test_nesting_up_to_the_bound_is_read() -> None:
    value: Any = 1
    for _ in range(MAX_NESTING - 1):
        value = [value]
    assert unpack_map(msgpack.packb({"a": value}))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"id": "1", "v": 1}, "header.field"),
        ({"kind": "k", "v": 1}, "header.field"),
        ({"kind": "k", "id": "1", "v": 2}, "header.version"),
        ({"kind": "k", "id": "1"}, "header.version"),
        ({"kind": "../../etc", "id": "1", "v": 1}, "header.field"),
        ({"kind": "k\n", "id": "1", "v": 1}, "header.field"),
        ({"kind": "k", "id": "x" * 129, "v": 1}, "header.field"),
        ({"kind": "k", "id": "1", "v": 1, "seq": -1}, "header.field"),
        ({"kind": "k", "id": "1", "v": 1, "seq": True}, "header.field"),
        ({"kind": "k", "id": "1", "v": 1, "credit": 2**63}, "header.field"),
        ({"kind": "k", "id": "1", "v": 1, "prio": "urgent"}, "header.field"),
        ({"kind": "k", "id": "1", "v": 1, "trace": "00-x"}, "header.field"),
        ({"kind": "k", "id": "1", "v": 1, "pad": "x" * MAX_HEADER_BYTES}, "header.too_large"),
        ([], "header.not_a_map"),
    ],
)
def test_each_way_to_break_a_header_has_its_code(fields: Any, code: str) -> None:
    with pytest.raises(BadFrame) as bad:
        unpack_header(msgpack.packb(fields))
    assert bad.value.code == code


def test_a_bad_body_names_the_field_and_does_not_echo_large_input() -> None:
    with pytest.raises(BadFrame) as bad:
        unpack_body(Submit, msgpack.packb({"task": "x" * 100_000}))
    assert "task: " in str(bad.value)
    assert len(str(bad.value)) < 1_000


def test_many_problems_are_listed_up_to_ten() -> None:
    with pytest.raises(ValidationError) as invalid:
        TaskIR.model_validate({"objective": "x", **{f"field{number}": 1 for number in range(14)}})
    text = describe(invalid.value)
    assert "field0: " in text
    assert text.endswith("and 4 more")
