"""Which answers are stopped while they are written, and which much-repeating ones are not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.infer import AbortLimits
from services.inference.abort import Abort, DecodingMonitor, entropy_nats

CHECKOUT = Path(__file__).resolve().parents[2]
WORDS = [
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nobody", "in", "town"),
    *("looks", "at", "what", "was", "done", "there", "before", "noon"),
]


def decode(
    text: str, *, limits: AbortLimits | None = None, constrained: bool = False, items: int = 0, piece_chars: int = 4
) -> tuple[Abort | None, int]:
    """Feed a text as a model writes it; returns the verdict and the characters it had written by then."""
    monitor = DecodingMonitor(limits or AbortLimits(), max_tokens=100_000, constrained=constrained, items=items)
    for number, at in enumerate(range(0, len(text), piece_chars), 1):
        found = monitor.take(text[at : at + piece_chars], number)
        if found is not None:
            return found, at + piece_chars
    return None, len(text)


def prose(words: int, seed: int = 1) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


@pytest.mark.parametrize(
    "passage",
    [
        "I am a language model. ",
        "Well, well, ",
        prose(40) + " ",
        prose(40) + "\n\n",
    ],
)
def test_an_exact_loop_is_stopped_soon_after_it_can_be_told(passage: str) -> None:
    begin = "Here is what I think about the matter, in short: "
    found, chars = decode(begin + passage * 200)
    assert found is not None
    assert found.code == "decoding.repetition"
    assert chars - len(begin) <= max(400, 4 * len(passage)) + 64
    evidence = found.evidence
    assert set(evidence["repeated"]) <= set(passage)
    assert len(evidence["repeated"]) == min(200, len(passage))
    assert evidence["times"] >= 4
    assert abs(evidence["first_char"] - len(begin)) <= len(passage)
    assert evidence["generated_tokens"] == chars // 4


def test_a_numbered_list_of_the_same_sentence_is_a_loop() -> None:
    found, chars = decode("".join(f"{number}. The worker is a worker.\n" for number in range(1, 500)))
    assert found is not None
    assert found.evidence["repeated"] == "The worker is a worker."
    assert chars < 2_200


def test_a_list_that_counts_on_and_says_nothing_new_is_a_loop() -> None:
    found, chars = decode("".join(f"* Animal {number}: An antelope\n" for number in range(1, 500)))
    assert found is not None
    assert found.evidence["repeated"] == "Animal N: An antelope"
    assert chars < 2_400


def test_a_loop_that_is_not_quite_exact_is_found_by_its_phrases() -> None:
    chosen = random.Random(3)
    text = " ".join(
        f"and the system is able to do the work of the system {chosen.choice(['which', 'that'])} is" for _ in range(80)
    )
    found, _ = decode(text)
    assert found is not None
    assert found.evidence["different"] < 0.12


def table(rows: int) -> str:
    lines = "".join(f"| {row} | ok | {row * 7 % 13} | none | yes |\n" for row in range(rows))
    return "| id | state | value | note | good |\n| --- | --- | --- | --- | --- |\n" + lines


def fenced(language: str, text: str) -> str:
    return f"Here it is:\n\n```{language}\n{text}```\n\nThat is all there is to say about it.\n"


def labels(count: int, form: str) -> str:
    """One of three answers for each of many items, in no order: what a model writes that classifies."""
    chosen = random.Random(5)
    return "".join(
        form.format(n=n, label=chosen.choice(["positive", "negative", "neutral"])) for n in range(1, count + 1)
    )


LEGITIMATE = {
    "markdown table": table(60),
    "empty table": "| name | value |\n" + "|      |       |\n" * 40,
    "table of equal cells": "| section | note | risk |\n| --- | --- | --- |\n" + "| closed | closed | closed |\n" * 50,
    "table of long equal rows": "| a | b |\n| --- | --- |\n" + f"| {'not mentioned in the contract | ' * 3}\n" * 15,
    "json list": "[" + ",\n".join(f'{{"id": {n}, "state": "open", "owner": null}}' for n in range(80)) + "]",
    "json labels": "[" + ", ".join(['"positive"'] * 60) + "]",
    "json labels in a sentence": 'The labels are ["' + '", "'.join(["positive"] * 100) + '"], as asked.',
    "json after words": fenced("json", "[\n" + '  {"status": "open", "owner": null},\n' * 40 + "]\n"),
    "json objects over lines": "["
    + ",\n".join(f'  {{\n    "id": {n},\n    "label": "not mentioned"\n  }}' for n in range(150))
    + "]",
    "json without a fence": "Here is the JSON:\n[\n" + '  {"status": "open", "owner": null},\n' * 40 + "]\n",
    "zeros": "Matrix:\n" + "0, 0, 0, 0, 0, 0, 0, 0,\n" * 30,
    "zeros in code": fenced("python", "grid = [\n" + f"    [{', '.join(['0'] * 16)}],\n" * 16 + "]\n"),
    "ruler": "Title\n" + "=" * 200 + "\n" + "-" * 300 + "\n",
    "code with many alike": "".join(f"def get_{n}(self) -> int:\n    raise NotImplementedError\n\n" for n in range(60)),
    "code in a fence": fenced("python", "    assert next(numbers) == expected, numbers\n" * 30),
    "code in an open fence with long lines": "~~~\n" + f"self.assertEqual({'first_value, ' * 6}next(numbers))\n" * 13,
    "indented code": "Write this:\n\n" + "    queue.append(None)\n" * 60,
    "csv": "".join(f"2024-01-{day:02},open,0,0,0\n" for day in range(1, 31)) * 2,
    "csv of equal rows": fenced("csv", "first,second,third\n" + "closed,closed,closed\n" * 70),
    "csv of long equal rows": "a,b,c,d,e,f,g,h\n"
    + ",".join(["not applicable"] * 8)
    + "\n"
    + ((",".join(["not applicable"] * 8) + "\n") * 12),
    "labels": "positive\n" * 150,
    "labels of three kinds": labels(80, "The sentiment is {label}.\n"),
    "numbered labels": labels(80, "{n}. The sentiment is {label}.\n"),
    "numbered answers": "".join(f"{n}. Not mentioned in the contract.\n" for n in range(1, 46)),
    "bold numbered answers": "".join(f"{n}. **Clause {n}:** not mentioned\n" for n in range(1, 51)),
    "answers that count": "".join(f"- Clause {n}: not mentioned here\n" for n in range(1, 51)),
    "bullets": "- Not mentioned in the contract.\n" * 45,
    "yaml list": "items:\n" + "- status: not applicable\n" * 60,
    "yaml records": "".join(f"- id: {n}\n  status: not applicable\n" for n in range(60)),
    "html table": "<table>\n" + "<tr>\n  <td>not available</td>\n  <td>not available</td>\n</tr>\n" * 20,
    "html cells": "<td>not available</td>\n" * 65,
    "html in one line": "<table><tr>" + "<td>not available</td>" * 65 + "</tr></table>",
    "log": "".join(f"12:{n % 60:02}:07 GET /items/{n * 7}, 200, {n * 31 % 997} ms\n" for n in range(60)),
    "log without times": "INFO worker: heartbeat received\n" * 45,
    "log of long lines": "".join(
        f"2024-01-01T12:{n // 60:02}:{n % 60:02}Z INFO worker: a heartbeat of the peer has been received in time, ok\n"
        for n in range(120)
    ),
    "tests": "".join(f"test_{word}_{n} (tests.Cases) ... ok\n" for n in range(4) for word in WORDS) + "ok\n" * 100,
    "tests of one name": "test_parse (tests.test_parser.Cases) ... ok\n" * 35,
    "inserts": "INSERT INTO notes (text, owner) VALUES ('open', NULL);\n" * 28,
    "long inserts": "INSERT INTO tickets (state, owner, opened, urgent) VALUES ('open', NULL, CURRENT_DATE, FALSE);\n"
    * 15,
    "refrain": "\n".join(f"{prose(20, verse)}\nAnd we all go home again tonight.\n" for verse in range(20)),
    "chorus": "Row, row, row your boat,\nGently down the stream,\nMerrily, merrily,\nLife is but a dream.\n\n" * 12,
    "bytes": "data = bytes([" + ", ".join(f"0x{n * 37 % 256:02x}" for n in range(400)) + "])",
    "hexdump": "".join(f"{n * 16:08x}  {'00 ' * 16} |................|\n" for n in range(40)),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_repeats_much_and_is_meant_so_goes_on(name: str) -> None:
    found, _ = decode(LEGITIMATE[name])
    assert found is None, found


LOOPS = {
    "label": "positive\n",
    "sentence a line": "The quick brown fox jumps over the lazy dog and then it goes home.\n",
    "bullet": "- The worker is a worker.\n",
    "nested bullet": "  * Be concise and clear.\n",
    "bullets with gaps": "* It is important to be patient.\n\n",
    "three bullets": "- Be clear.\n- Be concise and to the point.\n- Be honest with yourself.\n",
    "numbered": "{n}. Not mentioned in the contract.\n",
    "numbered questions": "{n}. What is the capital of France?\n\n",
    "counting": "- Step {n}: Repeat step {n} again.\n",
    "question and answer": "Q: What is it?\nA: It is a thing that is what it is.\n\n",
    "table row": "| closed | closed | closed |\n",
    "csv row": "closed,closed,closed\n",
    "yaml entry": "- status: not applicable\n",
    "html cells": "<td>not available</td>",
    "html row": "<tr>\n  <td>not available</td>\n</tr>\n",
    "code": "def f(x):\n    return f(x)\n\n",
    "long code": f"self.assertEqual({'first_value, ' * 6}next(numbers))\n",
    "fence": "```python\nprint('hello world')\n```\n\n",
    "zeros": "0, 0, 0, 0,\n",
    "log": "INFO worker: heartbeat received\n",
    "insert": "INSERT INTO notes (text, owner) VALUES ('open', NULL);\n",
    "test": "test_parse (tests.test_parser.Cases) ... ok\n",
    "refrain": "And we all go home again tonight,\nAnd we all go home again.\n",
}


WITHOUT_NUMBERS = [name for name, rows in LOOPS.items() if "{n}" not in rows]
"""In data numbers are what matters: what counts on there ends by `max_tokens`."""


@pytest.mark.parametrize(
    ("begin", "name"),
    [("Here it is:\n\n", name) for name in LOOPS]
    + [(begin, name) for begin in ("Here it is:\n\n```\n", "[") for name in WITHOUT_NUMBERS],
)
def test_a_loop_of_rows_is_stopped_well_before_the_tokens_of_a_usual_role_are_spent(begin: str, name: str) -> None:
    found, chars = decode(begin + "".join(LOOPS[name].replace("{n}", str(n)) for n in range(1, 400)))
    assert found is not None
    assert chars <= 2_400, "some 600 tokens where a line is mostly signs, 400 of prose; roles have 768"
    assert found.evidence["times"] >= 4


SQUARES = {
    "rows in one line": "[" + ", ".join(["[" + ", ".join(["0"] * 28) + "]"] * 28) + "]",
    "rows without blanks": "[" + ",".join(["[" + ",".join(["0"] * 60) + "]"] * 60) + "]",
    "a row a line": "[\n" + ",\n".join(["  [" + ", ".join(["0.0"] * 28) + "]"] * 28) + "\n]\n",
    "a value a line": json.dumps([[0] * 28] * 28, indent=2),
    "in code": fenced("python", "grid = [\n" + ("    [" + ", ".join(["0"] * 28) + "],\n") * 28 + "]\n"),
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_square_of_equal_rows_is_an_answer(name: str) -> None:
    found, _ = decode(SQUARES[name])
    assert found is None, found


@pytest.mark.parametrize("width", [4, 28])
def test_rows_of_an_array_are_a_loop_once_they_are_more_than_a_square(width: int) -> None:
    row = "[" + ", ".join(["0"] * width) + "], "
    found, chars = decode("[" + row * 400)
    assert found is not None
    assert chars <= max(1_600, (width + 1) * len(row)) + 2 * len(row) + 64


ASKED = {
    "numbered": "{n}. Not mentioned in the contract.\n",
    "counting": "- Clause {n}: not mentioned here\n",
    "bullets": "- Not mentioned in the contract.\n",
    "lines": "Not mentioned in the contract.\n",
    "values": '"not mentioned", ',
    "objects": '{"state": "not mentioned", "owner": null}, ',
    "zeros": "0, ",
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("begin", ["Here it is:\n\n", "["])
def test_as_many_equal_entries_as_the_request_asks_for_pass_and_a_loop_goes_not_far_beyond(
    begin: str, name: str
) -> None:
    entries = [ASKED[name].replace("{n}", str(number)) for number in range(1, 2_000)]
    assert decode(begin + "".join(entries[:200]), items=200)[0] is None
    if begin == "[" and "{n}" in ASKED[name]:
        return  # in data numbers are what matters
    found, chars = decode(begin + "".join(entries), items=200)
    assert found is not None
    assert chars <= len("".join(entries[:210])) + 1_600
    assert decode(begin + "".join(entries))[1] <= 2_400, "nobody asked for any"


def test_a_sentence_without_line_breaks_is_stopped_as_soon_whatever_is_asked_for() -> None:
    found, chars = decode("I am a language model. " * 200, items=200)
    assert found is not None
    assert chars < 500


def test_labels_in_no_order_are_stopped_where_no_list_is_so_long() -> None:
    found, chars = decode(labels(400, "{n}. The sentiment is {label}.\n"))
    assert found is not None
    assert found.evidence["different_lines"] == 3
    assert chars < 4 * 1_600


def test_a_paragraph_after_a_block_of_data_is_prose_again() -> None:
    block = fenced("csv", "closed,closed,closed\n" * 5)
    found, chars = decode(block + "I am a language model. " * 100)
    assert found is not None
    assert chars - len(block) < 500


@pytest.mark.parametrize(
    "pattern", ["services/**/*.py", "tests/**/*.py", "**/*.md", "registry/**/*.json", "registry/*.yaml"]
)
def test_no_file_of_this_project_would_have_been_stopped(pattern: str) -> None:
    files = [path for path in CHECKOUT.glob(pattern) if ".venv" not in path.parts]
    assert files
    for path in files:
        found, _ = decode(path.read_text("utf-8")[:30_000], piece_chars=16)
        assert found is None, (path, found)


def test_the_form_of_data_is_given_four_times_as_much() -> None:
    row = '{"name": "thing", "state": "open"},\n'
    found, chars = decode("[" + row * 300)
    assert found is not None
    assert chars > 1_600
    found, chars = decode(row * 300, constrained=True)
    assert found is not None
    assert chars > 1_600


def test_blanks_without_end_which_a_grammar_may_allow_are_stopped() -> None:
    found, chars = decode('{"a":' + " " * 5_000, constrained=True)
    assert found is not None
    assert chars < 600


def test_a_role_can_switch_it_off_or_ask_for_more() -> None:
    loop = "I am a language model. " * 100
    assert decode(loop, limits=AbortLimits(repetition=False))[0] is None
    assert decode(loop, limits=AbortLimits(repeated_chars=1_500))[1] > 1_500


def test_an_answer_longer_than_its_role_ever_needs_has_run_away() -> None:
    monitor = DecodingMonitor(AbortLimits(runaway_tokens=50), max_tokens=500)
    assert all(monitor.take(f"w{number} ", number) is None for number in range(1, 51))
    found = monitor.take("more", 51)
    assert found is not None
    assert (found.code, found.evidence["runaway_tokens"]) == ("decoding.runaway", 50)


def test_an_engine_that_ignores_its_bounds_is_stopped() -> None:
    monitor = DecodingMonitor(AbortLimits(), max_tokens=10, t_max_s=2.0)
    assert monitor.take("x", 26) is None
    found = monitor.take("x", 27)
    assert found is not None
    assert found.evidence["max_tokens"] == 10
    assert monitor.beyond(2.9) is None
    late = monitor.beyond(3.1)
    assert late is not None
    assert late.code == "decoding.runaway"


def test_high_entropy_over_a_window_means_that_the_model_is_lost() -> None:
    def run(limits: AbortLimits, values: Iterable[float]) -> Abort | None:
        monitor = DecodingMonitor(limits, max_tokens=1_000)
        verdicts = [monitor.take(f"w{number} ", number, [value]) for number, value in enumerate(values, 1)]
        return next((verdict for verdict in verdicts if verdict is not None), None)

    lost = run(AbortLimits(entropy_nats=1.5), [2.0] * 64)
    assert lost is not None
    assert (lost.code, lost.evidence["entropy_nats"]) == ("decoding.entropy", 2.0)
    assert run(AbortLimits(entropy_nats=1.5), [2.0] * 63) is None
    assert run(AbortLimits(entropy_nats=1.5), [2.2, 0.1] * 100) is None
    assert run(AbortLimits(), [2.2] * 200) is None, "off unless the role asks for it"


def test_entropy_of_known_distributions() -> None:
    assert entropy_nats([0.0]) == 0
    assert entropy_nats([-0.6931471805599453] * 2) == pytest.approx(0.6931471805599453)
    # A candidate of one half, and the other half as one further candidate.
    assert entropy_nats([-0.6931471805599453]) == pytest.approx(0.6931471805599453)
    assert entropy_nats([5.0]) == 0, "a peer's nonsense is no crash"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=60), st.integers(1, 9))
def test_any_text_in_any_pieces_is_taken_in_bounded_memory(parts: list[str], piece_chars: int) -> None:
    monitor = DecodingMonitor(AbortLimits(repeated_chars=80), max_tokens=10**9)
    text = "".join(parts) * 5
    for at in range(0, len(text), piece_chars):
        monitor.take(text[at : at + piece_chars], at)
        assert len(monitor._text) <= 32_000 + piece_chars + 48
        assert max(len(monitor._line), len(monitor._unread)) <= 1_000
        assert sum(len(phrases.words) for phrases in monitor._phrases) <= 1_400
        assert max(len(monitor._lines), len(monitor._counted)) <= 384


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abcdefgh .,", min_size=30, max_size=90), st.integers(1, 7))
def test_the_pieces_do_not_matter_for_a_loop(passage: str, piece_chars: int) -> None:
    found, chars = decode(("x" + passage) * 90, piece_chars=piece_chars)
    assert found is not None
    assert chars <= 4 * 400 + 200
