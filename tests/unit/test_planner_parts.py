"""What the planner sees as several things, and what it leaves whole."""

import time

import pytest

from services.planner.parts import find_parts


@pytest.mark.parametrize(
    ("objective", "how", "items"),
    [
        ("1. parse it\n2) run it\n3. print it", "list", ("parse it", "run it", "print it")),
        ("Please:\n- first thing\n* second thing", "list", ("first thing", "second thing")),
        ("Do this: 1) parse 2) evaluate 3) print", "list", ("parse", "evaluate", "print")),
        ("a; b; c", "clauses", ("a", "b", "c")),
        ("第一个任务\uff1b第二个任务", "clauses", ("第一个任务", "第二个任务")),
        ("What is X? How does Y work?", "questions", ("What is X?", "How does Y work?")),
        ("ما هي العاصمة؟ كم عدد السكان؟", "questions", ("ما هي العاصمة?", "كم عدد السكان?")),
        ("compare A and B", "comparison", ("A", "B")),
        ("Compare Python with Rust in terms of speed.", "comparison", ("Python", "Rust")),
        ("Explain the difference between TCP and UDP", "comparison", ("TCP", "UDP")),
        ("Python vs Rust: which is faster?", "comparison", ("Python", "Rust")),
        ("What is the capital of France and Germany?", "names", ("France", "Germany")),
        ("Tell me about Paris, Rome, and Berlin.", "names", ("Paris", "Rome", "Berlin")),
        ("東京、大阪、京都", "names", ("東京", "大阪", "京都")),
    ],
)
def test_lists_are_found(objective: str, how: str, items: tuple[str, ...]) -> None:
    found = find_parts(objective)
    assert found is not None
    assert (found.how, found.items) == (how, items)


@pytest.mark.parametrize(
    "objective",
    [
        "Hello",
        "Write a short, clear and friendly email",
        "Answer in a short, clear and friendly tone.",
        "compare these two files",
        "What is the role of supply and demand?",
        "Explain chapter 3. It is about ships.",
        ";;; ??? 1. 2.",
        "Explain this:\n```c\nfor (i = 0; i < 3; i++) ;\n```",
    ],
)
def test_one_thing_stays_whole(objective: str) -> None:
    assert find_parts(objective) is None


def test_text_about_code_is_split_at_written_lists_only() -> None:
    assert find_parts("add x; then y; then z", explicit_only=True) is None
    assert find_parts("1. a lexer\n2. a parser", explicit_only=True) is not None


@pytest.mark.parametrize(
    "piece", ["compare a, ", "of a a a, ", "x、", "1. ", "\n- ", " ", "of ", "of A and ", "a vs ", "\t", "; "]
)
def test_hostile_repetition_costs_no_time(piece: str) -> None:
    started = time.process_time()
    find_parts(piece * (64 * 1024 // len(piece)))
    assert time.process_time() - started < 10, "where it takes milliseconds; a square would take minutes"
