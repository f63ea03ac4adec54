"""The wire spec says what the code does, and its example is made of real bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import msgpack
import pytest

from protocol.codec import unpack_body
from protocol.header import unpack_header
from protocol.kinds import BODIES, UNKNOWN_PEER
from protocol.spec import README, render

TEXT = README.read_text("utf-8")


def shown_frames() -> Iterator[tuple[str, object, bytes]]:
    """Name, JSON and bytes of every frame in the worked example."""
    example = TEXT.partition("<!-- begin example -->")[2].partition("<!-- end example -->")[0]
    for name, shown, hexes in re.findall(r"^(header|body) +(\{.*\})\n((?: +[0-9a-f ]+\n)+)", example, re.MULTILINE):
        yield name, json.loads(shown), bytes.fromhex(hexes)


def test_the_readme_is_not_stale() -> None:
    assert render(TEXT) == TEXT, "run: python -m protocol.spec"


def test_a_readme_without_its_marks_is_an_error_and_not_an_empty_spec() -> None:
    with pytest.raises(ValueError, match="marks of the part"):
        render("# nothing here")


def test_the_bytes_of_the_example_are_the_messages_shown_beside_them() -> None:
    frames = list(shown_frames())
    assert [name for name, _, _ in frames] == ["header", "body"] * 4
    for _, shown, data in frames:
        assert msgpack.unpackb(data) == shown
    for (_, _, header), (_, _, body) in zip(frames[::2], frames[1::2], strict=True):
        unpack_body(BODIES[unpack_header(header).kind], body)


def test_every_kind_and_every_word_that_programs_compare_is_in_the_spec() -> None:
    for word in (*BODIES, UNKNOWN_PEER, "step.tokens", "body.not_json", "retry_after_ms"):
        assert f"`{word}`" in TEXT, word


def test_every_link_inside_the_page_has_its_heading() -> None:
    titles = [line.lstrip("# ").lower() for line in TEXT.splitlines() if line.startswith("#")]
    headings = {re.sub(r"[^a-z0-9 -]", "", title).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings


def test_every_field_of_a_task_says_what_it_means_or_needs_no_words() -> None:
    table = TEXT.partition("#### TaskIR\n")[2].partition("####")[0]
    for field in ("objective", "plan", "gates", "deadline_s", "idempotency_key", "budget", "escalation"):
        assert f"| `{field}` |" in table
