"""One look-up per named thing, where facts are measured against each other; nothing elsewhere."""

import time

import pytest

from services.planner.lookups import find_lookups


@pytest.mark.parametrize(
    ("question", "things"),
    [
        ("Which is taller, the Eiffel Tower or Big Ben?", ("Eiffel Tower", "Big Ben")),
        ("What is the total population of Ohio and Utah?", ("Ohio", "Utah")),
        ("What is the combined GDP of France, Germany and Italy in USD?", ("France", "Germany", "Italy")),
        (
            "If Chile's population grew by 8%, Peru's by 7% and Cuba's fell by 3%, which is largest?",
            ("Chile", "Peru", "Cuba"),
        ),
        (
            "Is the average age of the Statue of Zeus and the Dome of the Rock above 900?",
            ("Statue of Zeus", "Dome of the Rock"),
        ),
        (
            "Of the Great Wall of China, Stonehenge and the Colosseum, which is the oldest?",
            ("Great Wall of China", "Stonehenge", "Colosseum"),
        ),
        (
            "After Lake Nyasa grew by 5% and Lake Ladoga shrank, what is the ratio of Lake Nyasa to Lake Ladoga?",
            ("Lake Nyasa", "Lake Ladoga"),
        ),
        (
            "What is the ratio of the Gobi Desert to the Namib Desert, and of the Namib to the Thar Desert?",
            ("Gobi Desert", "Namib Desert", "Thar Desert"),
        ),
        (
            "Given a lion that runs 10% faster, a zebra with a 5% slower gait and an impala, which is fastest?",
            ("lion", "zebra", "impala"),
        ),
        ("What is faster: cheetahs, ostriches or greyhounds?", ("cheetahs", "ostriches", "greyhounds")),
        ("What is the height difference of Mt. Fuji and K2?", ("Mt Fuji", "K2")),
    ],
)
def test_each_thing_is_looked_up_once(question: str, things: tuple[str, ...]) -> None:
    assert find_lookups(question) == things


@pytest.mark.parametrize(
    "question",
    [
        "Say hello",
        "What's the largest planet?",
        "What is the difference between ASCII and Unicode?",
        "Write a story about the biggest dog in New York and Boston",
        "How to find the shortest path in C with Dijkstra?",
        "What are the best things to see in Europe in October?",
        "Which is larger?\n```\nA = 1; B = 2\n```",
    ],
)
def test_without_things_to_measure_nothing_is_looked_up(question: str) -> None:
    assert find_lookups(question) == ()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Congo Forest", "Congo Rainforest", True),
        ("Ushiku Daibutsu", "Ushiku Faibutsu", True),
        ("Mount Everest", "Everest", True),
        ("Mount Everest", "Mount Elbert", False),
        ("North Korea", "South Korea", False),
        ("Gambia", "Zambia", False),
    ],
)
def test_one_thing_may_have_two_names(one: str, other: str, same: bool) -> None:
    found = find_lookups(f"What is the average size of the {one}, the Thar Desert and the {other}?")
    assert len(found) == (2 if same else 3)


@pytest.mark.parametrize("piece", ["A ", "A of the ", "a b, ", "A's ", "10% a a-a ", "a and ", "A. "])
def test_hostile_repetition_costs_no_time(piece: str) -> None:
    started = time.process_time()
    for size in (1_199, 64 * 1024):
        find_lookups(("ratio " + piece * (size // len(piece)))[:size])
    assert time.process_time() - started < 10, "where it takes milliseconds; a square would take minutes"
