"""How many items an answer may have to list, by its request: what tells a long list that is meant from a loop.

A model that answers each of eighty clauses with the same words writes what a model does that cannot stop. The request
knows: it lists what is to be answered, says how many entries it wants, or has a schema that bounds its arrays. `abort`
lets as many equal entries pass. Nothing here reads the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from protocol.messages.infer import ChatMessage, InferRequest

MAX_ITEMS: Final = 1_000
"""A request that lists more is read as one of so many."""
_MAX_DEPTH: Final = 32
_ENTRY: Final = re.compile(r"^[ \t]*(?:(\d+[.):])|[-*•])[ \t]+\S", re.MULTILINE)
_SAID: Final = re.compile(
    r"\b(\d{1,4})(?: [\w-]+)? (?:entries|items|lines|rows|records|elements|labels|answers|questions|points|bullets)\b",
    re.IGNORECASE,
)
_GRID: Final = re.compile(r"\b(\d{1,3}) ?(?:x|\u00d7|by) ?(\d{1,3})\b", re.IGNORECASE)


def asked_items(request: InferRequest) -> int:
    """The longest list that the request has, names or bounds, in entries; at most MAX_ITEMS, 0 = none."""
    listed = max((_listed(message.content) for message in _users(request.messages)), default=0)
    return min(MAX_ITEMS, max(listed, _bound(request.json_schema, _MAX_DEPTH)))


def _users(messages: Iterable[ChatMessage]) -> Iterable[ChatMessage]:
    return (message for message in messages if message.role == "user")


def _listed(text: str) -> int:
    marks = [found[1] is not None for found in _ENTRY.finditer(text)]
    numbered = sum(marks)
    said = (int(found[1]) for found in _SAID.finditer(text))
    grids = (int(found[1]) * int(found[2]) for found in _GRID.finditer(text))
    return max(numbered, len(marks) - numbered, *said, *grids)


def _bound(schema: Any, depth: int) -> int:
    """Items of the largest array that the schema bounds, with those of the arrays within; 0 = it bounds none."""
    if depth == 0 or not isinstance(schema, dict | list):
        return 0
    parts = schema if isinstance(schema, list) else schema.values()
    inner = max((_bound(part, depth - 1) for part in parts), default=0)
    own = (schema.get("maxItems") or schema.get("minItems")) if isinstance(schema, dict) else None
    if not isinstance(own, int) or isinstance(own, bool) or own < 1:
        return inner
    return min(MAX_ITEMS, own) * max(1, inner)
