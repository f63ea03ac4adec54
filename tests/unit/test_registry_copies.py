"""Copies of registries that were taken up: checked, named by digest, switched in one step, found again."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from services.kit.config import CHECKOUT
from services.kit.registry import RegistryError, keep_copy, load_registry, make_current, past_registries

NOWHERE = Path("/nonexistent")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "registry"
    shutil.copytree(CHECKOUT / "registry", folder, ignore=shutil.ignore_patterns("schema", "examples"))
    return folder


def rename_role(source: Path, new: str) -> None:
    """Call the reviewer something else, wherever it is named."""
    text = (source / "roles.yaml").read_text()
    (source / "roles.yaml").write_text(text.replace("\n  reviewer:", f"\n  {new}:"))
    for file in ("personas.yaml", "gates.yaml"):
        (source / file).write_text((source / file).read_text().replace("reviewer", new))


def keep(source: Path, copies: Path) -> str:
    return keep_copy(source, NOWHERE, copies, check_files=False).digest


def test_a_copy_says_what_was_checked_and_stays_when_the_files_change(source: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    first = keep(source, copies)
    assert make_current(copies, first) is None
    rename_role(source, "critic")
    assert load_registry(copies / "current", NOWHERE, check_files=False).digest == first
    second = keep(source, copies)
    assert second != first
    assert make_current(copies, second) == first
    assert "critic" in load_registry(copies / "current", NOWHERE, check_files=False).roles
    assert [past.digest for past in past_registries(copies, NOWHERE)] == [second, first]
    assert not [path for path in copies.iterdir() if path.name.startswith(".")], "no drafts are left"


def test_a_bad_registry_leaves_no_copy(source: Path, tmp_path: Path) -> None:
    (source / "roles.yaml").write_text("roles: {x: {}}\n")
    with pytest.raises(RegistryError):
        keep(source, tmp_path / "copies")
    assert not (tmp_path / "copies").exists()


def test_a_copy_of_a_copy_is_the_same_one_and_a_known_registry_becomes_the_newest(source: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    first = keep(source, copies)
    make_current(copies, first)
    rename_role(source, "critic")
    second = keep(source, copies)
    os.utime(copies / first, ns=(1, 1))
    assert [past.digest for past in past_registries(copies, NOWHERE)] == [second, first]
    assert keep(copies / "current", copies) == first
    assert [past.digest for past in past_registries(copies, NOWHERE)] == [first, second]


def test_old_copies_go_but_never_the_current_one(source: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    first = keep(source, copies)
    make_current(copies, first)
    names = ["reviewer", *(f"critic{number}" for number in range(25))]
    for old, new in pairwise(names):
        for file in ("roles.yaml", "personas.yaml", "gates.yaml"):
            text = (source / file).read_text()
            (source / file).write_text(text.replace(old, new))
        keep(source, copies)
    kept = [path.name for path in copies.iterdir() if not path.is_symlink()]
    assert first in kept
    assert len(kept) <= 22


def test_a_damaged_copy_is_passed_over(source: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    first = keep(source, copies)
    rename_role(source, "critic")
    second = keep(source, copies)
    (copies / second / "roles.yaml").write_text("]")
    assert [past.digest for past in past_registries(copies, NOWHERE)] == [first]
