from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.sse import EventStream, EventTooLarge


def all_of(*parts: bytes, max_bytes: int = 10_000) -> list[bytes]:
    stream = EventStream(max_bytes)
    found = [data for part in parts for data in stream.feed(part)]
    return [*found, *stream.end()]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_comments_other_fields_and_several_data_lines(end: bytes) -> None:
    lines = [
        b": ping",
        b"",
        b"event: message",
        b"data: one",
        b"id: 4",
        b"",
        b"data:two",
        b"data: lines",
        b"",
        b":",
        b"",
    ]
    assert all_of(end.join([*lines, b"data: [DONE]", b"", b""])) == [b"one", b"two\nlines", b"[DONE]"]


def test_the_last_event_counts_without_its_blank_line_and_a_mark_at_the_start_is_no_field() -> None:
    assert all_of(b"\xef\xbb\xbfdata: a\n\ndata: b") == [b"a", b"b"]


def test_keep_alives_without_end_fill_no_memory_and_a_huge_event_is_refused() -> None:
    stream = EventStream(100)
    for _ in range(1_000):
        assert list(stream.feed(b": keep-alive comment\n\n")) == []
    with pytest.raises(EventTooLarge):
        all_of(b"data: " + b"x" * 200, max_bytes=100)
    with pytest.raises(EventTooLarge):
        all_of(*[b"data: 0123456789\n"] * 20, max_bytes=100)


TEXT = b': hello\r\ndata: {"a": 1}\r\n\r\ndata: x\rdata: y\r\rid: 3\ndata: z\n\n\r\ndata: [DONE]\r\n\r\n'


@given(st.lists(st.integers(0, len(TEXT)), max_size=12))
def test_where_the_bytes_are_cut_makes_no_difference(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    parts = [TEXT[a:b] for a, b in pairwise(places)]
    assert all_of(*parts) == [b'{"a": 1}', b"x\ny", b"z", b"[DONE]"]
