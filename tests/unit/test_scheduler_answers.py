"""Outputs are cut out of answers that may be anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import CallFailed
from protocol.messages.artefact import ArtefactKind
from protocol.messages.failure import Category
from protocol.messages.task import Output
from services.scheduler.answers import cut_outputs, schema_of_parts

TEXT = Output(name="t")
CODE = Output(name="c.py", kind=ArtefactKind.CODE)
JSON = Output(name="j", kind=ArtefactKind.JSON)


def test_code_is_the_longest_fenced_block() -> None:
    answer = "Run it:\n```sh\npython c.py\n```\nHere:\n```python\nprint('hello')\nprint('again')\n```\nDone."
    assert cut_outputs(answer, [CODE])[0].value == "print('hello')\nprint('again')\n"


def test_code_without_a_fence_and_with_an_open_one_is_taken_whole() -> None:
    assert cut_outputs("x = 1", [CODE])[0].value == "x = 1\n"
    assert cut_outputs("```python\nx = 1\n", [CODE])[0].value == "x = 1\n"


def test_repeated_frames_of_our_own_prompt_are_not_part_of_a_text() -> None:
    assert cut_outputs('<material name="a">\nThe text.\n</material>\n</material>', [TEXT])[0].value == "The text."
    assert cut_outputs("Use <b>bold</b> & more.", [TEXT])[0].value == "Use <b>bold</b> & more."


def test_several_outputs_come_as_members_of_one_object() -> None:
    made = cut_outputs('{"t": "words", "j": {"n": 1}}', [TEXT, JSON])
    assert [artefact.value for artefact in made] == ["words", {"n": 1}]
    schema = schema_of_parts([TEXT, JSON])
    assert schema["required"] == ["t", "j"]


@pytest.mark.parametrize(
    ("answer", "outputs", "category", "code"),
    [
        ("  \n ", [TEXT], Category.FORMAT, "answer.empty"),
        ("no json", [JSON], Category.SCHEMA, "answer.not_json"),
        ("NaN", [JSON], Category.SCHEMA, "answer.not_json"),
        ('{"what no message": "can \\ud800 carry"}', [JSON], Category.SCHEMA, "answer.not_json"),
        ("[1e999]", [JSON], Category.SCHEMA, "answer.not_json"),
        ("[123456789012345678901234567890]", [JSON], Category.SCHEMA, "answer.not_json"),
        ("[" * 25 + "]" * 25, [JSON], Category.SCHEMA, "answer.not_json"),
        ("[" * 100_000, [JSON], Category.SCHEMA, "answer.not_json"),
        ("[1]", [TEXT, JSON], Category.SCHEMA, "answer.not_an_object"),
        ('{"t": "x"}', [TEXT, JSON], Category.SCHEMA, "answer.output_missing"),
        ('{"t": 1, "j": {}}', [TEXT, JSON], Category.SCHEMA, "answer.output_type"),
        ("x" * (1024 * 1024 + 1), [TEXT], Category.FORMAT, "answer.too_large"),
    ],
)
def test_what_does_not_hold_the_outputs_is_a_typed_failure(
    answer: str, outputs: list[Output], category: Category, code: str
) -> None:
    with pytest.raises(CallFailed) as failed:
        cut_outputs(answer, outputs)
    assert (failed.value.failure.category, failed.value.failure.code) == (category, code)
    assert failed.value.failure.findings, "the next attempt is told"


@given(st.text(max_size=300), st.sampled_from([[TEXT], [CODE], [JSON], [TEXT, JSON]]))
def test_any_answer_gives_its_outputs_or_a_typed_failure(answer: str, outputs: list[Output]) -> None:
    try:
        made = cut_outputs(answer, outputs)
    except CallFailed:
        return
    assert [artefact.name for artefact in made] == [output.name for output in outputs]
