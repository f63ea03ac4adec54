"""Keys of work: what they are made of, so that the same work has the same key under every version of this code."""

from __future__ import annotations

import hashlib

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from services.kit.identity import work_key

PARTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(PARTS, max_size=6))
def test_a_key_is_half_a_sha256_over_msgpack(parts: list[object]) -> None:
    assert work_key(*parts) == hashlib.sha256(msgpack.packb(parts)).hexdigest()[:32]


def test_a_key_stays_what_it_was_in_journals_that_exist() -> None:
    assert work_key("t-1", "draft", 1, "worker", "write", [("notes", "é")]) == "96491260d00b0d52fcb1f5565e1be07f"
