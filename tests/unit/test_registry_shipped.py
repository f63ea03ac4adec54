"""The registry that ships: it loads, says what the design says, and its schemas are those of the code."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from protocol.docstrings import attribute_docstrings
from protocol.messages.failure import Category
from services.kit.registry import Registry, load_registry
from services.kit.registry.schema import main, schema_texts
from services.kit.registry.sections import FILES

SHIPPED = Path(__file__).parents[2] / "registry"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(SHIPPED, Path("/nowhere"), check_files=False)


def test_it_has_three_tiers_and_the_roles_that_plans_name(registry: Registry) -> None:
    assert {model.tier: (name, model.slots) for name, model in registry.models.items()} == {
        "A": ("front", 2),
        "B": ("specialist", 1),
        "C": ("worker", 4),
    }
    assert set(registry.roles) == {"frontdoor", "coder", "architect", "writer", "reviewer", "extractor", "worker"}
    assert [role.name for role in registry.escalation_chain("worker")] == ["coder", "architect"]
    assert registry.model_of("frontdoor").tier == "A"
    assert all(registry.roles_of(model) for model in registry.models)


def test_no_model_asks_for_more_than_one_core_so_that_every_machine_can_start_it(registry: Registry) -> None:
    assert {model.threads for model in registry.models.values()} == {1}


def test_the_failure_table_is_the_one_of_the_design(registry: Registry) -> None:
    told = {
        category.value: (rule.action, rule.same_role, rule.then, rule.constrained, rule.quality_signal)
        for category, rule in registry.failures.rules.items()
    }
    assert told == {
        "FORMAT": ("retry", 3, "fail", False, True),
        "SCHEMA": ("retry", 2, "escalate", True, True),
        "CODE": ("retry", 2, "escalate", False, True),
        "LOGIC": ("retry", 1, "escalate", False, True),
        "TIMEOUT": ("escalate", 0, "fail", False, True),
        "EARLY_ABORT": ("escalate", 0, "fail", False, True),
        "PEER": ("rerun", 0, "fail", False, False),
        "RESOURCE": ("backoff", 3, "fail", False, False),
        "POLICY": ("fail", 0, "fail", False, True),
    }
    assert set(registry.failures.rules) == set(Category)
    assert (registry.failures.caps.retries_per_step, registry.failures.caps.worker_deaths) == (3, 3)


def test_the_gates_are_those_of_the_design_and_tests_run_only_on_code_that_parses(registry: Registry) -> None:
    assert {name: gate.category.value for name, gate in registry.gates.items()} == {
        "schema": "SCHEMA",
        "taskir": "SCHEMA",
        "data": "FORMAT",
        "shellcheck": "CODE",
        "shfmt": "FORMAT",
        "format": "FORMAT",
        "lint": "FORMAT",
        "security": "CODE",
        "typecheck": "CODE",
        "unit": "CODE",
        "integration": "CODE",
        "markdown": "FORMAT",
        "c_syntax": "CODE",
        "js_syntax": "CODE",
        "definition_of_done": "LOGIC",
    }
    assert registry.gates["unit"].depends_on == ("lint",)
    assert [name for name, gate in registry.gates.items() if not gate.required] == ["markdown"]
    assert [name for name, gate in registry.gates.items() if gate.executes] == ["unit", "integration"]


def test_a_judge_is_asked_last_and_a_tool_says_its_version(registry: Registry) -> None:
    judge = registry.gates["definition_of_done"]
    others = {name for name, gate in registry.gates.items() if gate.required and gate.role is None}
    assert others - set(judge.depends_on) == {"shfmt", "format", "security"}  # matters of taste or of degree
    assert all(gate.version_argv for gate in registry.gates.values() if gate.argv and gate.target != "command")


def test_the_schema_files_are_those_of_the_code() -> None:
    written = {path.name: path.read_text() for path in (SHIPPED / "schema").iterdir()}
    assert written == schema_texts(), "run: python -m services.kit.registry.schema"


def test_the_schema_command_writes_every_file(tmp_path: Path) -> None:
    assert main([str(tmp_path / "new")]) == 0
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == schema_texts()


@pytest.mark.parametrize("file", FILES)
def test_editor_and_loader_agree_on_the_shipped_files_and_on_a_misspelt_field(file: str) -> None:
    schema = json.loads((SHIPPED / "schema" / file.replace(".yaml", ".schema.json")).read_text())
    data = yaml.safe_load((SHIPPED / file).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "misspelt": {}}, schema)


def test_every_field_is_described_for_operators() -> None:
    readme = (SHIPPED / "README.md").read_text()
    for file, sections in FILES.items():
        for section in sections:
            described = attribute_docstrings(section.entry)
            for field in section.entry.model_fields:
                assert described.get(field), f"{file}: {field} has no docstring"
                if field == "name":  # the key of the entry, never written as a field
                    continue
                assert f"`{field}`" in readme, f"registry/README.md does not describe {file}: {field}"
