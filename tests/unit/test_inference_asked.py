"""How many entries a request asks for."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.messages.infer import ChatMessage, InferRequest
from services.inference.asked import MAX_ITEMS, asked_items


def asked(text: str, schema: dict[str, Any] | None = None) -> int:
    messages = [
        ChatMessage(role="system", content="\n".join(f"- rule {n} of the house" for n in range(30))),
        ChatMessage(role="user", content=text),
    ]
    return asked_items(InferRequest(role="worker", messages=messages, max_tokens=100, json_schema=schema))


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("Write a poem.", 0),
        ("Write at most 300 words about the year 2024.", 0),
        ("Which clause names it?\n" + "".join(f"{n}. Clause of the contract\n" for n in range(1, 81)), 80),
        ("Which of them?\n" + "".join(f"  - note {n}\n" for n in range(45)), 45),
        ("- a\n- b\n- c\n1. one\n2. two\n", 3),
        ("Write 120 numbered lines that say ok.", 120),
        ("A list of 60 entries, please, with 3 points each.", 60),
        ("A grid of 28 x 28 zeros.", 784),
        ("A grid of 12 by 10 zeros.", 120),
        ("Write 9999 lines.", MAX_ITEMS),
    ],
)
def test_what_the_prompt_lists_or_says(text: str, items: int) -> None:
    assert asked(text) == items


@pytest.mark.parametrize(
    ("schema", "items"),
    [
        ({"type": "array", "items": {"type": "integer"}}, 0),
        ({"type": "array", "maxItems": 300, "items": {"type": "integer"}}, 300),
        ({"type": "array", "minItems": 30}, 30),
        ({"properties": {"maxItems": {"type": "integer"}, "rows": {"minItems": 5, "maxItems": 70}}}, 70),
        ({"anyOf": [{"maxItems": 3}, {"maxItems": 9}]}, 9),
        ({"maxItems": 28, "items": {"maxItems": 28, "items": {"const": 0}}}, 784),
        ({"maxItems": 10**9, "items": {"maxItems": 10**9}}, MAX_ITEMS),
        ({"maxItems": True}, 0),
    ],
)
def test_what_the_schema_bounds(schema: dict[str, Any], items: int) -> None:
    assert asked("Do it.", schema) == items
