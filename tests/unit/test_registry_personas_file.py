"""An adopted persona in the operator's file: everything else stays, and what is read back is what was meant."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.messages.persona import Persona
from services.kit.config import Home, load_home
from services.kit.registry import load_registry, persona_entry
from services.kit.registry.personas_file import with_persona
from services.scheduler.adoption import NotWritten, adopt
from services.scheduler.personas import AdoptPersona
from services.scheduler.reloading import changes

SHIPPED = Path(__file__).resolve().parents[2] / "registry"
PIRATE = Persona(
    name="pirate", description="At sea: # all of it", prompt="Speak so:\n\n  - like 'a' pirate # yes\n\"Arr\""
)
ASKED = AdoptPersona(PIRATE, "better: 0.9")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    registry = tmp_path / "files"
    registry.mkdir()
    for file in SHIPPED.glob("*.yaml"):
        shutil.copy(file, registry)
    environ = {"TIERLINE_HOME": str(tmp_path / "home"), "TIERLINE_REGISTRY": str(registry)}
    return load_home(environ).make()


def test_an_entry_is_added_at_the_end_and_no_other_line_changes() -> None:
    before = (SHIPPED / "personas.yaml").read_text()
    after = with_persona(before, persona_entry(PIRATE), "why it is\nhere")
    assert after.startswith(before)
    assert after[len(before) :].splitlines()[:2] == ["  # why it is here", "  pirate:"]


@pytest.mark.parametrize("text", ["# mine\npersonas: {}\n", "# mine\npersonas:\n", "# mine\n# end\npersonas: {}\n"])
def test_a_file_without_any_persona_gets_its_first(text: str) -> None:
    assert with_persona(text, persona_entry(PIRATE), "x").startswith("# mine\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [", "no YAML"), ("- a", "personas:"), ("personas: {pirate: {}}", "no persona")],
)
def test_a_file_that_cannot_take_it_is_left_alone(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        with_persona(text, persona_entry(PIRATE), "x")


def test_a_file_that_has_the_very_entry_already_is_good_as_it_is() -> None:
    once = with_persona("personas: {}\n", persona_entry(PIRATE), "x")
    assert with_persona(once, persona_entry(PIRATE), "y") == once
    with pytest.raises(ValueError, match="would not be read back"):
        with_persona(once, persona_entry(PIRATE.model_copy(update={"prompt": "Be mild."})), "y")


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(max_size=200), description=st.text(max_size=60))
def test_whatever_passes_as_a_persona_is_read_back_as_it_was_or_refused(prompt: str, description: str) -> None:
    try:
        persona = Persona(name="odd", description=description, prompt=prompt)
    except ValidationError:
        return
    try:
        with_persona("personas: {}\n", persona_entry(persona), "x")  # compares by itself
    except ValueError as err:
        assert "read back" in str(err)  # noqa: PT017  a refusal is as good as an entry, anything else is not


def test_an_adopted_persona_is_all_that_is_new_in_the_registry_and_a_copy_is_kept(home: Home) -> None:
    declared = load_registry(home.registry, home.models, check_files=False)
    taken = adopt(ASKED, home, declared)
    assert taken is not None
    assert [(one.section, one.name, one.change) for one in changes(declared, taken)[0]] == [
        ("personas", "pirate", "added")
    ]
    assert taken.personas["pirate"] == persona_entry(PIRATE)
    assert (home.registry_copies / taken.digest / "personas.yaml").is_file()
    assert "adopted for its outcomes: better: 0.9" in (home.registry / "personas.yaml").read_text()


def test_where_the_operator_has_changed_more_it_waits_in_the_files(home: Home) -> None:
    declared = load_registry(home.registry, home.models, check_files=False)
    learning = home.registry / "learning.yaml"
    learning.write_text(learning.read_text().replace("enabled: true", "enabled: false"))
    assert adopt(ASKED, home, declared) is None
    assert "pirate" in load_registry(home.registry, home.models, check_files=False).personas
    learning.write_text("learning: [")  # the operator is in the middle of it
    other = AdoptPersona(PIRATE.model_copy(update={"name": "sailor"}), "better")
    assert adopt(other, home, declared) is None


def test_a_file_that_cannot_be_written_is_as_it_was_and_the_reason_names_it(home: Home) -> None:
    declared = load_registry(home.registry, home.models, check_files=False)
    path = home.registry / "personas.yaml"
    path.write_text("personas: [")
    with pytest.raises(NotWritten, match=r"personas\.yaml could not be written"):
        adopt(ASKED, home, declared)
    assert path.read_text() == "personas: ["


def test_what_the_registry_would_refuse_is_not_written_at_all(home: Home) -> None:
    declared = load_registry(home.registry, home.models, check_files=False)
    before = (home.registry / "personas.yaml").read_text()
    lost = AdoptPersona(PIRATE.model_copy(update={"roles": ["left-meanwhile"]}), "better")
    with pytest.raises(NotWritten, match=r"the registry would refuse it: .*left-meanwhile"):
        adopt(lost, home, declared)
    assert (home.registry / "personas.yaml").read_text() == before


def test_the_registry_that_services_read_is_a_copy_and_the_link_moves(home: Home, tmp_path: Path) -> None:
    declared = load_registry(home.registry, home.models, check_files=False)
    environ = {
        "TIERLINE_HOME": str(home.root),
        "TIERLINE_REGISTRY": str(home.current_registry),
        "TIERLINE_REGISTRY_SOURCE": str(home.registry),
    }
    supervised = load_home(environ)
    taken = adopt(ASKED, supervised, declared)
    assert taken is not None
    assert home.current_registry.readlink().name == taken.digest
    assert home.started_registry.read_text() == taken.digest
