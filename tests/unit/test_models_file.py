"""Fields of models.yaml are set by a program, and whatever a person wrote around them stays."""

from __future__ import annotations

import pytest
import yaml

from services.kit.config import CHECKOUT
from services.kit.registry.models_file import with_settings

TEXT = """# about the file
models:
  # the first one
  front:
    tier: A
    path: a.gguf # where it lies
    threads: 1   # few cores

  # the second one
  worker: {tier: C, path: "b.gguf"}
  last:
    tier: B
    speculation:
      type: ngram-simple # by hand
      ngram_n: 4
"""


@pytest.mark.parametrize("path", ["registry/models.yaml", "registry/examples/epyc/models.yaml"])
def test_a_file_of_the_project_comes_back_as_it_was_when_nothing_is_set(path: str) -> None:
    text = (CHECKOUT / path).read_text(encoding="utf-8")
    for name in yaml.safe_load(text)["models"]:
        assert with_settings(text, name, {}) == text


def test_a_file_that_is_indented_by_four_stays_so() -> None:
    wide = (
        "# mine\n---\nmodels: # all\n\n    # first\n    front:\n        tier: A # door\n        threads: 1\n"
        "        numa:\n            cores: 0-3\n"
    )
    assert with_settings(wide, "front", {}) == wide
    after = with_settings(wide, "front", {"threads": 2}, "now").splitlines()
    assert [(one, other) for one, other in zip(wide.splitlines(), after, strict=True) if one != other] == [
        ("        threads: 1", "        threads: 2 # tuned now")
    ]


@pytest.mark.parametrize("settings", [{}, {"threads": 8, "batch_tokens": 512, "speculation.type": "ngram-mod"}])
def test_line_ends_of_another_system_stay(settings: dict[str, object]) -> None:
    text = "# mine\n---\n" + TEXT
    after = with_settings(text.replace("\n", "\r\n"), "front", settings, "today")
    assert after == with_settings(text, "front", settings, "today").replace("\n", "\r\n")


def test_a_value_changes_in_its_line_and_every_other_line_stays() -> None:
    after = with_settings(TEXT, "front", {"threads": 8}, "2026-01-02: 9 tokens/s").splitlines()
    before = TEXT.splitlines()
    assert [n for n, (one, other) in enumerate(zip(before, after, strict=True)) if one != other] == [6]
    assert after[6] == "    threads: 8   # few cores; tuned 2026-01-02: 9 tokens/s"


def test_a_new_field_stands_inside_its_entry_and_the_comment_of_the_next_entry_stays_with_that() -> None:
    settings = {"batch_tokens": 512, "speculation.type": "ngram-mod", "speculation.ngram_n": 12}
    text = with_settings(TEXT, "front", settings, "today")
    assert yaml.safe_load(text)["models"]["front"] == {
        "tier": "A",
        "path": "a.gguf",
        "threads": 1,
        "batch_tokens": 512,
        "speculation": {"type": "ngram-mod", "ngram_n": 12},
    }
    assert "    batch_tokens: 512 # tuned today\n" in text
    assert "    speculation: {type: ngram-mod, ngram_n: 12} # tuned today\n" in text
    assert "\n\n  # the second one\n  worker:" in text
    assert [line for line in TEXT.splitlines() if line not in text.splitlines()] == []


def test_an_older_note_is_replaced_and_what_a_person_wrote_stays() -> None:
    once = with_settings(TEXT, "front", {"threads": 8}, "yesterday")
    assert with_settings(once, "front", {"threads": 8}, "today") == once.replace("yesterday", "today")


def test_in_braces_the_note_stands_behind_them() -> None:
    text = with_settings(TEXT, "worker", {"threads": 2}, "today")
    assert '  worker: {tier: C, path: "b.gguf", threads: 2} # tuned today\n' in text
    assert yaml.safe_load(text)["models"]["worker"]["threads"] == 2


def test_a_nested_field_is_noted_where_it_stands() -> None:
    text = with_settings(TEXT, "last", {"speculation.ngram_n": 12, "speculation.type": "ngram-map-k"}, "today")
    assert "      type: ngram-map-k  # by hand; tuned today\n" in text
    assert "      ngram_n: 12 # tuned today\n" in text


def test_an_entry_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(KeyError):
        with_settings(TEXT, "nobody", {"threads": 2})
