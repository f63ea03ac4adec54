"""What YAML would let slip by is refused with its line; what is read keeps the lines of its keys."""

from pathlib import Path

import pytest
import yaml

from services.kit.config import CHECKOUT
from services.kit.registry.yaml_lines import MAX_DEPTH, MAX_FILE_BYTES, Document, UnreadableFileError, read_document


def read(folder: Path, content: str | bytes) -> Document:
    path = folder / "models.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_document(path)


def test_the_shipped_files_are_read_by_the_compiled_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML's own takes 40 ms for them, at the start of each service and of many commands."""
    monkeypatch.setattr(yaml.reader.Reader, "__init__", _refuse)
    files = sorted((CHECKOUT / "registry").glob("*.yaml"))
    assert len(files) > 5
    for path in files:
        assert read_document(path).data


def _refuse(*_: object) -> None:
    raise AssertionError("read by PyYAML's own parser")


def test_a_tab_that_only_the_compiled_parser_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="t' that cannot start any token"):
        read(tmp_path, "a: 1\nb:\t2\n")


def test_every_key_and_item_keeps_its_line(tmp_path: Path) -> None:
    document = read(
        tmp_path, "# comment\nmodels:\n  front:\n    slots: 2\n    list:\n      - a\n      - b\n    text: |\n      x\n"
    )
    assert document.data == {"models": {"front": {"slots": 2, "list": ["a", "b"], "text": "x\n"}}}
    assert document.line_of(("models",)) == 2
    assert document.line_of(("models", "front", "slots")) == 4
    assert document.line_of(("models", "front", "list", 1)) == 7
    assert document.line_of(("models", "front", "text")) == 8


def test_a_missing_field_has_the_line_of_its_nearest_ancestor(tmp_path: Path) -> None:
    document = read(tmp_path, "\nmodels:\n  front:\n    slots: 2\n")
    assert document.line_of(("models", "front", "tier")) == 3
    assert document.line_of(("other", "thing")) == 2


def test_an_empty_file_has_no_data(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n").data is None


def test_every_duplicate_key_is_named_with_both_lines(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError) as caught:
        read(
            tmp_path, "models:\n  front:\n    slots: 2\n    slots: 4\n  worker:\n    slots: 1\n  front:\n    slots: 9\n"
        )
    first, second = caught.value.problems
    assert (first.file, first.line, first.field, first.rule) == (
        "models.yaml",
        4,
        "models.front.slots",
        "duplicate-key",
    )
    assert "line 3" in first.message
    assert (second.line, second.field) == (7, "models.front")
    assert "line 2" in second.message


@pytest.mark.parametrize(
    ("content", "line", "rule"),
    [
        ("a: 1\nb: [1, 2\n", 3, "yaml-syntax"),
        ("a: 1\n\tb: 2\n", 2, "yaml-syntax"),
        ("a: 1\nb: \x01\n", 2, "yaml-syntax"),
        (b"a: 1\nb: \xff\xfe\n", 2, "encoding"),
        ("a: &x [1]\nb: *x\n", 2, "yaml-syntax"),
        ("a: 1\nb: {<<: {c: 1}}\n", 2, "yaml-merge"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", 2, "yaml-tag"),
        ("a: 1\nb: 2026-01-01\n", 2, "yaml-tag"),
        ("a: 1\non: 2\n", 2, "key-type"),
        ("a: 1\n? [b, c]\n: 2\n", 2, "key-type"),
        ("a: 1\nb: 0x_\n", 2, "yaml-number"),
        (f"a: 1\nb: {'9' * 5_000}\n", 2, "yaml-number"),
        ("a: 1\nb: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 2, "yaml-syntax"),
        ("a: 1\nb: " + "[" * 100_000, 2, "yaml-syntax"),
        ("a: 1\n---\nb: 2\n", 2, "yaml-syntax"),
        (b"#" * (MAX_FILE_BYTES + 1), 1, "file-size"),
    ],
)
def test_what_yaml_would_let_slip_by_is_refused_at_its_line(
    tmp_path: Path, content: str | bytes, line: int, rule: str
) -> None:
    with pytest.raises(UnreadableFileError) as caught:
        read(tmp_path, content)
    problem = caught.value.problems[0]
    assert (problem.file, problem.line, problem.rule) == ("models.yaml", line, rule)


def test_aliases_that_would_multiply_are_refused_before_they_are_expanded(tmp_path: Path) -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10))
    with pytest.raises(UnreadableFileError) as caught:
        read(tmp_path, f"l0: &l0 [x]\n{levels}\n")
    assert "aliases" in caught.value.problems[0].message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError) as caught:
        read_document(tmp_path / "roles.yaml")
    assert (caught.value.problems[0].file, caught.value.problems[0].rule) == ("roles.yaml", "file-missing")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "roles.yaml").mkdir()
    with pytest.raises(UnreadableFileError) as caught:
        read_document(tmp_path / "roles.yaml")
    assert caught.value.problems[0].rule == "file-unreadable"
