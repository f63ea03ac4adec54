"""The hub reads a registry beside its loop: in turn, bounded, and what does not pass is said with its lines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from protocol.header import Header
from services.kit.config import CHECKOUT, Home, load_home
from services.scheduler.events import ReadRegistry, RegistryChanged, RegistryRefused
from services.scheduler.registry_reader import MAX_WAITING, RegistryReader
from tests.waiting import until

Outcome = RegistryChanged | RegistryRefused


@pytest.fixture
def home(tmp_path: Path) -> Home:
    shutil.copytree(CHECKOUT / "registry", tmp_path / "registry", ignore=shutil.ignore_patterns("schema", "examples"))
    return load_home({"TIERLINE_HOME": str(tmp_path / "h"), "TIERLINE_REGISTRY": str(tmp_path / "registry")}).make()


def asked(number: int = 1, digest: str | None = None) -> ReadRegistry:
    return ReadRegistry(b"client", Header(kind="registry.reload", id=f"r{number}"), digest)


def outcomes(reader: RegistryReader, count: int) -> list[Outcome]:
    found: list[Outcome] = []

    def all_there() -> bool:
        found.extend(reader.outcomes(at_ms=5))
        return len(found) >= count

    until(all_there, f"{count} readings have ended", look_every_s=0.005)
    return found


def test_readings_end_in_the_order_in_which_they_were_asked_for(home: Home) -> None:
    reader = RegistryReader(home)
    for number in range(3):
        reader.read(asked(number))
    found = outcomes(reader, 3)
    assert [one.header.id for one in found] == ["r0", "r1", "r2"]
    assert all(isinstance(one, RegistryChanged) for one in found)
    assert list(reader.outcomes(at_ms=5)) == []


def test_what_does_not_pass_is_refused_with_its_lines_and_what_was_not_checked_with_the_reason(home: Home) -> None:
    reader = RegistryReader(home)
    reader.read(asked(1, digest="a" * 64))
    (other,) = outcomes(reader, 1)
    assert isinstance(other, RegistryRefused)
    assert "not those that were checked" in other.reason
    (home.registry / "roles.yaml").write_text("roles: {}\n")
    reader.read(asked(2))
    (bad,) = outcomes(reader, 1)
    assert isinstance(bad, RegistryRefused)
    assert {problem.file for problem in bad.problems} >= {"roles.yaml"}


def test_more_than_may_wait_are_refused_at_once(home: Home) -> None:
    reader = RegistryReader(home)
    for number in range(MAX_WAITING + 3):
        reader.read(asked(number))
    found = outcomes(reader, MAX_WAITING + 3)
    refused = [one.header.id for one in found if isinstance(one, RegistryRefused)]
    assert refused == [f"r{MAX_WAITING + 1}", f"r{MAX_WAITING + 2}"]


def test_what_a_task_lacks_is_found_in_the_newest_registry_that_has_all_of_it(home: Home) -> None:
    reader = RegistryReader(home)
    reader.keep()
    assert reader.past_with({}) is None
    assert reader.past_with({"roles": {"nobody"}}) is None
    roles = home.registry / "roles.yaml"
    roles.write_text(roles.read_text().replace("\n  reviewer:", "\n  critic:"))
    for file in (home.registry / "personas.yaml", home.registry / "gates.yaml"):
        file.write_text(file.read_text().replace("reviewer", "critic"))
    reader.keep()
    past = reader.past_with({"roles": {"reviewer", "worker"}})
    assert past is not None
    assert "reviewer" in past.roles
    newest = reader.past_with({"roles": {"worker"}})
    assert newest is not None
    assert "critic" in newest.roles
