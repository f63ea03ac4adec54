"""Every rule of the registry: one bad edit of a good registry, refused at the file, line and field that is wrong."""

import os
from pathlib import Path

import pytest

from services.kit.model_facts import KvShape, ModelFacts
from services.kit.registry import Problem, Registry, RegistryError, UnknownNameError, load_registry
from services.kit.registry.memory import expected_load_s, file_bytes, memory_need_bytes, memory_needs, placed_before
from tests.fakes.gguf_files import write_tiny_gguf

GOOD = {
    "models.yaml": """\
models:
  front:
    tier: A
    path: front.gguf
    context_tokens: 1024
    port: 9001
  worker:
    tier: C
    path: worker.gguf
    engine: embedded
    slots: 4
    threads: 2
  draft:
    tier: D
    path: worker.gguf
    port: 9003
""",
    "roles.yaml": """\
roles:
  talker:
    description: Talks.
    model: front
    prompt: Talk.
    max_tokens: 512
  worker:
    description: Works.
    model: worker
    prompt: Work.
    sampling: {temperature: 0.1}
    escalates_to: talker
""",
    "personas.yaml": """\
personas:
  calm:
    description: When in doubt.
    prompt: Be calm.
    fits:
      roles: [worker, talker]
      task_types: [doc]
""",
    "gates.yaml": """\
gates:
  schema:
    description: Valid.
    kinds: [json]
    category: SCHEMA
    builtin: schema
  lint:
    description: Clean.
    kinds: [code]
    category: FORMAT
    argv: ["{python}", -m, ruff, "{artefact}"]
  unit:
    description: Works.
    kinds: [code]
    category: CODE
    argv: ["{python}", -m, pytest, "{workspace}/{artefact}"]
    depends_on: [lint]
""",
    "failures.yaml": """\
failures:
  FORMAT: {action: retry, same_role: 3, quality_signal: true}
  SCHEMA: {action: retry, same_role: 2, then: escalate, constrained: true, quality_signal: true}
  CODE: {action: retry, same_role: 2, then: escalate, quality_signal: true}
  LOGIC: {action: retry, same_role: 1, then: escalate, quality_signal: true}
  TIMEOUT: {action: escalate, quality_signal: true}
  EARLY_ABORT: {action: escalate, quality_signal: true}
  PEER: {action: rerun, quality_signal: false}
  RESOURCE: {action: backoff, same_role: 3, quality_signal: false}
  POLICY: {action: fail, quality_signal: true}
caps:
  retries_per_step: 3
""",
    "hardware.yaml": """\
hardware:
  cores: 4
  memory_bytes: 10000000000
""",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model file for all tests, so that its header is read once."""
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A good registry with two small model files in `models/`."""
    for file, text in GOOD.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "models").mkdir()
    for name in ("front.gguf", "worker.gguf"):
        (tmp_path / "models" / name).hardlink_to(tiny)
    os.mkfifo(tmp_path / "models" / "pipe")
    return tmp_path


def load(folder: Path) -> Registry:
    return load_registry(folder, folder / "models")


def edit(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))


def refused(folder: Path) -> tuple[Problem, ...]:
    with pytest.raises(RegistryError) as caught:
        load(folder)
    return caught.value.problems


def test_a_good_registry_loads_with_absolute_paths_and_answers_by_role_and_model(folder: Path) -> None:
    registry = load(folder)
    assert registry.models["front"].path == folder / "models" / "front.gguf"
    assert registry.model_of("worker") is registry.models["worker"]
    assert [role.name for role in registry.roles_of("front")] == ["talker"]
    assert [role.name for role in registry.escalation_chain("worker")] == ["talker"]
    assert registry.escalation_chain("talker") == ()
    assert (registry.hardware.cores, registry.hardware.memory_bytes) == (4, 10_000_000_000)
    assert [note.rule for note in registry.notes] == ["draft-unused"]


#: file, text that is replaced, its replacement, line, field, rule, a part of the message
BAD_EDITS = [
    # shape of one entry
    ("models.yaml", "slots: 4", "slots: 0", 11, "models.worker.slots", "greater_than_equal", "got 0"),
    ("models.yaml", "slots: 4", 'slots: "4"', 11, "models.worker.slots", "int_type", 'got "4"'),
    ("models.yaml", "slots: 4", "slots: true", 11, "models.worker.slots", "int_type", "got true"),
    ("models.yaml", "slots: 4", "slot: 4", 11, "models.worker.slot", "extra_forbidden", "did you mean 'slots'"),
    ("models.yaml", "slots: 4", "name: w", 11, "models.worker.name", "extra_forbidden", "the key above"),
    ("models.yaml", "slots: 4", "load_deadline_s: .inf", 11, "models.worker.load_deadline_s", "finite_number", ""),
    ("models.yaml", "    tier: C\n", "", 7, "models.worker.tier", "missing", "add it"),
    ("models.yaml", "tier: C", "tier: E", 8, "models.worker.tier", "literal_error", "got"),
    ("models.yaml", "port: 9001", "port: 70000", 6, "models.front.port", "less_than_equal", "65535"),
    ("models.yaml", "  draft:", "  Dräft:", 13, "models.Dräft", "name", "small letters"),
    ("roles.yaml", "temperature", "temprature", 11, "roles.worker.sampling.temprature", "extra_forbidden", ""),
    ("roles.yaml", "prompt: Work.", "prompt: ''", 10, "roles.worker.prompt", "string_too_short", ""),
    ("personas.yaml", "[doc]", "[dok]", 7, "personas.calm.fits.task_types.0", "enum", "got"),
    ("gates.yaml", "category: CODE", "category: PEER", 15, "gates.unit.category", "literal_error", ""),
    ("gates.yaml", "kinds: [json]", "kinds: []", 4, "gates.schema.kinds", "too_short", ""),
    ("hardware.yaml", "cores: 4", "cores: 0", 2, "hardware.cores", "greater_than_equal", ""),
    (
        "hardware.yaml", "cores: 4", "nodes: [{cores: 3-1, memory_bytes: 9}]", 2, "hardware.nodes.0.cores",
        "value_error", "must rise",
    ),
    (
        "hardware.yaml", "cores: 4", "nodes: [{cores: 0-2, memory_bytes: 9}, {cores: 2-3, memory_bytes: 9}]", 2,
        "hardware.nodes.1.cores", "node-cores-twice", "core 2",
    ),
    (
        "hardware.yaml", "cores: 4", "cores: 4\n  nodes: [{cores: 0-2, memory_bytes: 9}]", 2, "hardware.cores",
        "cores-over-nodes", "3 cores of the nodes in line 3",
    ),
    # duplicate keys
    ("models.yaml", "slots: 4", "slots: 4\n    slots: 8", 12, "models.worker.slots", "duplicate-key", "line 11"),
    ("roles.yaml", "  worker:", "  talker:", 7, "roles.talker", "duplicate-key", "line 2"),
    # models
    ("models.yaml", "    path: front.gguf\n", "", 2, "models.front", "engine-fields", "needs path"),
    ("models.yaml", "engine: embedded", "engine: noop", 9, "models.worker.path", "engine-fields", "remove path"),
    ("models.yaml", "slots: 4", "binary: /bin/sh", 11, "models.worker.binary", "engine-fields", "remove it"),
    ("models.yaml", "port: 9001", "binary: bin/sh", 6, "models.front.binary", "binary-path", "absolute"),
    ("models.yaml", "port: 9001", "binary: /nowhere", 6, "models.front.binary", "binary-missing", "PATH"),
    ("models.yaml", "port: 9003", "port: 9001", 16, "models.draft.port", "port-clash", "'front' in line 6"),
    ("models.yaml", "threads: 2", "threads: 5", 12, "models.worker.threads", "threads-over-cores", "4 cores"),
    ("models.yaml", "front.gguf", "gone.gguf", 4, "models.front.path", "model-file-missing", "deploy/fetch-model"),
    ("models.yaml", "front.gguf", "../models.yaml", 4, "models.front.path", "model-file-format", "not a GGUF"),
    ("models.yaml", "front.gguf", '"a\\0b.gguf"', 4, "models.front.path", "value_error", "no NUL character"),
    ("models.yaml", "front.gguf", "~nobody-here/m.gguf", 4, "models.front.path", "value_error", "of ~nobody-here is"),
    ("models.yaml", "port: 9001", "binary: ~nobody-here/x", 6, "models.front.binary", "value_error", "whole path"),
    ("models.yaml", "front.gguf", "pipe", 4, "models.front.path", "model-file-missing", "no regular file"),
    ("models.yaml", "front.gguf", "m-00000-of-00000.gguf", 4, "models.front.path", "model-file-missing", "No such"),
    # memory: what stays, and the largest that comes and goes
    ("hardware.yaml", "10000000000", "200000000", 4, "models.front.path", "memory", "hardware.yaml (line 3)"),
    ("models.yaml", "slots: 4", "memory_bytes: 20000000000", 11, "models.worker.memory_bytes", "memory", "it warm"),
    (
        "models.yaml", "slots: 4", "memory_bytes: 9900000000\n    residency: warm", 12, "models.worker.residency",
        "memory-warm", "could never be loaded",
    ),
    (
        "models.yaml", "slots: 4", "memory_bytes: 20000000000\n    residency: warm\n    pinned: true", 11,
        "models.worker.memory_bytes", "memory", "hot, pinned",
    ),
    ("models.yaml", "slots: 4", "residency: lukewarm", 11, "models.worker.residency", "literal_error", "hot"),
    ("models.yaml", "slots: 4", "pinned: true", 11, "models.worker.pinned", "residency-fields", "never unloaded"),
    ("models.yaml", "slots: 4", "idle_unload_s: 3", 11, "models.worker.idle_unload_s", "residency-fields", "hot model"),
    ("models.yaml", "port: 9003", "residency: warm", 16, "models.draft.residency", "residency-fields", "its target"),
    (
        "models.yaml", "    path: worker.gguf\n    engine: embedded\n", "    engine: noop\n    residency: cold\n", 10,
        "models.worker.residency", "residency-fields", "cannot be cold",
    ),
    # roles and personas
    ("roles.yaml", "model: worker", "model: wroker", 9, "roles.worker.model", "unknown-model", "front, worker, draft"),
    ("roles.yaml", "model: worker", "model: draft", 9, "roles.worker.model", "draft-tier-role", "tier D"),
    ("roles.yaml", "512", "1024", 6, "roles.talker.max_tokens", "answer-over-context", "models.yaml:5"),
    ("roles.yaml", "to: talker", "to: boss", 12, "roles.worker.escalates_to", "unknown-role", "boss"),
    ("roles.yaml", "to: talker", "to: worker", 12, "roles.worker.escalates_to", "escalation-cycle", "circle"),
    (
        "roles.yaml", "max_tokens: 512", "escalates_to: worker", 6, "roles.talker.escalates_to", "escalation-cycle",
        "talker -> worker -> talker",
    ),
    (
        "roles.yaml", "escalates_to:", "lateral: spare\n    escalates_to:", 12, "roles.worker.lateral", "unknown-model",
        "front, worker",
    ),
    (
        "roles.yaml", "escalates_to:", "lateral: worker\n    escalates_to:", 12, "roles.worker.lateral", "lateral-self",
        "own model",
    ),
    (
        "roles.yaml", "escalates_to:", "lateral: front\n    escalates_to:", 12, "roles.worker.lateral", "lateral-tier",
        "what escalates_to is for",
    ),
    ("personas.yaml", ", talker]", ", tolker]", 6, "personas.calm.fits.roles.1", "unknown-role", "tolker"),
    # gates
    ("gates.yaml", "[lint]", "[lint, lynt]", 17, "gates.unit.depends_on.1", "unknown-gate", "schema, lint, unit"),
    ("gates.yaml", "[lint]", "[unit]", 17, "gates.unit.depends_on", "gate-cycle", "unit -> unit"),
    (
        "gates.yaml", "category: FORMAT", "depends_on: [unit]\n    category: FORMAT", 10, "gates.lint.depends_on",
        "gate-cycle", "lint -> unit -> lint",
    ),
    ("gates.yaml", "    builtin: schema\n", "", 2, "gates.schema", "gate-command", "one of argv"),
    ("gates.yaml", "builtin: schema", "builtin: schema\n    argv: [x]", 2, "gates.schema", "gate-command", "not two"),
    ("gates.yaml", "{workspace}/", "{worksapce}/", 16, "gates.unit.argv", "unknown-placeholder", "{worksapce}"),
    ("gates.yaml", "{workspace}/{artefact}", "{artefact}{test}", 16, "gates.unit.argv", "placeholder-target", "only"),
    ("gates.yaml", "{workspace}/{artefact}", "x{artefacts}", 16, "gates.unit.argv", "placeholder-list", "of its own"),
    ("gates.yaml", "builtin: schema", "role: nobody", 6, "gates.schema.role", "unknown-role", "talker"),
    ("gates.yaml", "category: CODE", "category: CODE\n    pattern: '(?P<message>x)'", 16, "gates.unit.pattern",
     "gate-pattern", "belong together"),
    ("gates.yaml", "category: CODE", "category: CODE\n    parser: pattern\n    pattern: '('", 17, "gates.unit.pattern",
     "gate-pattern", "no regular expression"),
    ("gates.yaml", "category: CODE", "category: CODE\n    parser: pattern\n    pattern: 'x'", 17, "gates.unit.pattern",
     "gate-pattern", "named group"),
    ("gates.yaml", "category: CODE", "category: CODE\n    memory_bytes: 900000000000000", 16, "gates.unit.memory_bytes",
     "gate-memory", "lower it"),
    ("gates.yaml", "builtin: schema", "builtin: schema\n    cores: 5", 7, "gates.schema.cores", "gate-cores", "never"),
    # failures
    ("failures.yaml", "  PEER: {action: rerun, quality_signal: false}\n", "", 1, "failures", "missing-category", ""),
    ("failures.yaml", "same_role: 1, ", "", 5, "failures.LOGIC.same_role", "failure-shape", "at least 1"),
    (
        "failures.yaml", "TIMEOUT: {action: escalate", "TIMEOUT: {action: escalate, same_role: 1", 6,
        "failures.TIMEOUT.same_role", "failure-shape", "at once",
    ),
    (
        "failures.yaml", "TIMEOUT: {action: escalate", "TIMEOUT: {action: escalate, then: fail", 6,
        "failures.TIMEOUT.then", "failure-shape", "at once",
    ),
    (
        "failures.yaml", "POLICY: {action: fail", "POLICY: {action: fail, constrained: true", 10,
        "failures.POLICY.constrained", "failure-shape", "only retry",
    ),
    (
        "failures.yaml", "  retries", "  circuit_pause_max_ms: 400\n  retries", 12, "caps.circuit_pause_max_ms",
        "circuit-order", "raise it",
    ),
    ("failures.yaml", "same_role: 1", "same_role: 4", 5, "failures.LOGIC.same_role", "failure-over-cap", "line 12"),
    (
        "failures.yaml", "rerun, quality_signal: false", "rerun, quality_signal: true", 8,
        "failures.PEER.quality_signal", "never-quality", "false",
    ),
    (
        "failures.yaml", "action: rerun", "action: rerun, replan: true", 8,
        "failures.PEER.replan", "never-replan", "no cure",
    ),
    ("failures.yaml", "action: rerun", "action: escalate", 8, "failures.PEER.action", "never-escalate", "no cure"),
    (
        "failures.yaml", "backoff, same_role: 3", "backoff, same_role: 3, then: escalate", 9,
        "failures.RESOURCE.then", "never-escalate", "no cure",
    ),
    (
        "failures.yaml", "retries_per_step: 3", "retries_per_step: 3\n  backoff_max_ms: 10", 13,
        "caps.backoff_max_ms", "backoff-order", "raise it",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "line", "field", "rule", "part"), BAD_EDITS)
def test_a_bad_edit_is_refused_with_its_line_and_field_and_nothing_else_is_blamed(
    folder: Path, file: str, old: str, new: str, line: int, field: str, rule: str, part: str
) -> None:
    edit(folder, file, old, new)
    problems = refused(folder)
    assert [(problem.line, problem.field, problem.rule) for problem in problems] == [(line, field, rule)]
    assert part in problems[0].message


def test_all_problems_of_all_files_come_at_once_one_a_line(folder: Path) -> None:
    edit(folder, "models.yaml", "slots: 4", "slots: 0")
    edit(folder, "roles.yaml", "model: front", "model: frond")
    edit(folder, "gates.yaml", "[lint]", "[lynt]")
    (folder / "hardware.yaml").unlink()
    with pytest.raises(RegistryError) as caught:
        load(folder)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("gates.yaml:17: gates.unit.depends_on.0: ")
    assert lines[1].startswith("hardware.yaml:1: ")
    assert lines[2] == (
        "models.yaml:11: models.worker.slots: input should be greater than or equal to 1, got 0"
        "  (rule: greater_than_equal)"
    )
    assert lines[3].startswith("roles.yaml:4: roles.talker.model: ")
    assert len(lines) == 4


def test_a_role_of_an_invalid_or_unreadable_model_is_not_blamed_too(folder: Path) -> None:
    edit(folder, "models.yaml", "tier: A", "tier: Z")
    assert [problem.field for problem in refused(folder)] == ["models.front.tier"]
    (folder / "models.yaml").write_text("models: [")
    assert [problem.rule for problem in refused(folder)] == ["yaml-syntax"]


def test_a_pipe_in_place_of_a_file_is_refused_instead_of_waited_for(folder: Path) -> None:
    (folder / "gates.yaml").unlink()
    os.mkfifo(folder / "gates.yaml")
    (problem,) = refused(folder)
    assert (problem.file, problem.rule) == ("gates.yaml", "file-unreadable")


@pytest.mark.parametrize(
    ("text", "line", "field", "rule"),
    [
        ("", 1, "", "file-shape"),
        ("- a\n", 1, "", "file-shape"),
        ("modells: {}\n", 1, "modells", "extra_forbidden"),
        ("models:\n", 1, "models", "section-empty"),
        ("# x\nmodels: {}\n", 2, "models", "section-empty"),
        ("models: [a]\n", 1, "models", "section-shape"),
        ("models:\n  front: 3\n", 2, "models.front", "entry-shape"),
    ],
)
def test_a_file_of_the_wrong_shape_is_refused(folder: Path, text: str, line: int, field: str, rule: str) -> None:
    (folder / "models.yaml").write_text(text)
    first = next(problem for problem in refused(folder) if problem.file == "models.yaml")
    assert (first.line, first.field, first.rule) == (line, field, rule)


def test_a_missing_folder_is_one_problem_that_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="TIERLINE_REGISTRY") as caught:
        load_registry(tmp_path / "none", tmp_path)
    assert len(caught.value.problems) == 1


def test_a_misspelt_failure_category_is_named_and_the_one_it_hides_is_missed(folder: Path) -> None:
    edit(folder, "failures.yaml", "  PEER:", "  PEERS:")
    assert [(problem.line, problem.field, problem.rule) for problem in refused(folder)] == [
        (1, "failures", "missing-category"),
        (8, "failures.PEERS", "unknown-category"),
    ]


def test_two_separate_circles_are_both_reported(folder: Path) -> None:
    edit(folder, "gates.yaml", "builtin: schema", "builtin: schema\n    depends_on: [schema]")
    edit(folder, "gates.yaml", "[lint]", "[lint, unit]")
    assert [problem.field for problem in refused(folder)] == ["gates.schema.depends_on", "gates.unit.depends_on"]


def test_a_split_model_needs_all_its_parts_and_counts_with_all_of_them(folder: Path, tiny: Path) -> None:
    for number in (1, 2, 3):
        (folder / "models" / f"big-0000{number}-of-00003.gguf").hardlink_to(tiny)
    size = tiny.stat().st_size
    edit(folder, "models.yaml", "front.gguf", "big-00001-of-00003.gguf")
    assert file_bytes(load(folder).models["front"]) == 3 * size
    edit(folder, "models.yaml", "big-00001-of-00003.gguf", "big-00002-of-00003.gguf")
    (problem,) = refused(folder)
    assert (problem.line, problem.field, problem.rule) == (4, "models.front.path", "split-model-part")
    assert "big-00001-of-00003.gguf" in problem.message
    edit(folder, "models.yaml", "big-00002-of-00003.gguf", "big-00001-of-00003.gguf")
    (folder / "models" / "big-00003-of-00003.gguf").unlink()
    assert "big-00003-of-00003.gguf" in refused(folder)[0].message


def test_the_need_of_a_model_is_declared_or_follows_from_file_slots_and_context(folder: Path) -> None:
    front = load(folder).models["front"].model_copy(update={"slots": 2, "context_tokens": 1_000})
    (folder / "models" / "front.gguf").unlink()  # the file is shared by all tests of this module
    (folder / "models" / "front.gguf").write_bytes(b"GGUF" + bytes(1_000_000 - 4))
    assert memory_need_bytes(front) == 1_000_000 + 2 * 1_000 * 2_500 + 96 * 2**20
    assert memory_need_bytes(front.model_copy(update={"memory_bytes": 5})) == 5
    assert expected_load_s(front) == pytest.approx(1.002)
    assert memory_need_bytes(front.model_copy(update={"engine": "noop", "path": None})) == 0
    known = ModelFacts("llama", 1, 1_000_000, 4096, 9, KvShape(100, 100))
    cells = 2 * 1_024 * 200 * 2  # exact where the header has been read: two slots of 1,000 tokens, rounded up
    assert memory_need_bytes(front, known) == 1_000_000 + cells + 96 * 2**20


def test_a_draft_needs_its_memory_inside_the_process_of_its_target(folder: Path) -> None:
    alone = memory_needs(load(folder).models)
    assert alone["draft"] == 0
    edit(folder, "models.yaml", "port: 9001", "speculation: {type: draft, draft: draft}")
    pair = memory_needs(load(folder).models)
    assert pair["front"] > alone["front"]
    assert (pair["worker"], pair["draft"]) == (alone["worker"], 0)


def test_warm_models_may_need_more_together_than_there_is(folder: Path) -> None:
    edit(folder, "models.yaml", "slots: 4", "memory_bytes: 9500000000\n    residency: warm")
    edit(folder, "models.yaml", "port: 9001", "memory_bytes: 9500000000\n    residency: cold")
    assert load(folder).models["worker"].residency == "warm"


def test_without_file_checks_neither_models_nor_binaries_need_to_exist(folder: Path) -> None:
    edit(folder, "models.yaml", "port: 9001", "binary: /nowhere/llama-server")
    registry = load_registry(folder, Path("/nowhere"), check_files=False)
    assert registry.models["front"].path == Path("/nowhere/front.gguf")


def test_a_noop_model_needs_no_file_and_no_core(folder: Path) -> None:
    edit(folder, "models.yaml", "    path: front.gguf\n", "    engine: noop\n    threads: 9\n")
    assert load(folder).models["front"].path is None


def test_more_threads_than_cores_in_all_and_an_unused_model_are_notes_only(folder: Path) -> None:
    edit(folder, "hardware.yaml", "cores: 4", "cores: 2")
    edit(folder, "roles.yaml", "model: front", "model: worker")
    notes = load(folder).notes
    assert [(note.line, note.field, note.rule) for note in notes] == [
        (1, "models", "cores-shared"),
        (2, "models.front", "model-unused"),
        (13, "models.draft", "draft-unused"),
    ]


def test_more_threads_than_the_largest_node_has_cores_are_a_note(folder: Path) -> None:
    nodes = "cores: 4\n  nodes: [{cores: 0-1, memory_bytes: 50}, {cores: 2-3, memory_bytes: 50}]"
    edit(folder, "hardware.yaml", "cores: 4", nodes)
    edit(folder, "models.yaml", "threads: 2", "threads: 3")
    registry = load(folder)
    assert [node.cores for node in registry.hardware.nodes] == [(0, 1), (2, 3)]
    assert (12, "threads-over-node") in [(note.line, note.rule) for note in registry.notes]


def test_hardware_that_the_file_leaves_out_is_detected(folder: Path) -> None:
    (folder / "hardware.yaml").write_text("hardware:\n  # cores: 4\n")
    hardware = load(folder).hardware
    assert hardware.cores >= 1
    assert hardware.memory_bytes > 2**20


def test_a_client_has_the_weight_of_the_first_entry_that_fits_its_name(folder: Path) -> None:
    assert load(folder).weight_of("importer-1a2b") == 1, "without the file everybody weighs the same"
    (folder / "clients.yaml").write_text(
        'clients:\n  importer: {weight: 3}\n  night-*: {weight: 0.5}\n  "*-import": {weight: 2}\n'
    )
    registry = load(folder)
    weights = {"importer-1a2b": 3, "importer": 3, "night-load-77": 0.5, "night-import-77": 0.5, "mail-import-77": 2}
    assert {name: registry.weight_of(name) for name in weights} == weights
    assert registry.weight_of("other-1a2b") == 1
    assert registry.weight_of("importers-1a2b") == 1


@pytest.mark.parametrize(
    ("text", "line", "field", "rule", "part"),
    [
        ("clients:\n  importer: {weight: 0}\n", 2, "clients.importer.weight", "greater_than_equal", "0.01"),
        ("clients:\n  importer: {weight: .nan}\n", 2, "clients.importer.weight", "finite_number", ""),
        ('clients:\n  importer: {weight: "3"}\n', 2, "clients.importer.weight", "float_type", 'got "3"'),
        ("clients:\n  importer: {wieght: 3}\n", 2, "clients.importer.wieght", "extra_forbidden", "weight"),
        ("clients:\n\n  im porter: {weight: 3}\n", 3, "clients.im porter", "name", "wildcards"),
        ("clients:\n  a: {weight: 3}\n  a: {weight: 4}\n", 3, "", "duplicate-key", "a"),
        ("weights: {}\n", 1, "weights", "extra_forbidden", "clients"),
    ],
)
def test_a_bad_weight_is_refused_with_its_line(
    folder: Path, text: str, line: int, field: str, rule: str, part: str
) -> None:
    (folder / "clients.yaml").write_text(text)
    problem = refused(folder)[0]
    assert problem.file == "clients.yaml"
    assert (problem.line, problem.rule) == (line, rule)
    assert field in problem.field
    assert part in problem.message


def test_the_digest_follows_the_content_and_not_comments_order_or_place(folder: Path, tmp_path: Path) -> None:
    before = load(folder).digest
    edit(folder, "models.yaml", "models:", "# a comment\nmodels:")
    edit(folder, "models.yaml", "    tier: A\n    path: front.gguf\n", "    path: front.gguf\n    tier: A\n")
    assert load_registry(folder, tmp_path / "elsewhere", check_files=False).digest == before
    edit(folder, "models.yaml", "slots: 4", "slots: 5")
    assert load(folder).digest != before


def test_a_loaded_registry_cannot_be_changed(folder: Path) -> None:
    registry = load(folder)
    with pytest.raises(TypeError):
        registry.models["x"] = registry.models["front"]  # type: ignore[index]  # that it is refused is the test
    with pytest.raises(ValueError, match="frozen"):
        registry.models["front"].slots = 9  # type: ignore[misc]  # that it is refused is the test


def test_asking_for_an_unknown_name_says_which_there_are(folder: Path) -> None:
    registry = load(folder)
    with pytest.raises(UnknownNameError, match=r"'boss'.*talker, worker"):
        registry.model_of("boss")
    with pytest.raises(UnknownNameError, match="draft, front, worker"):
        registry.roles_of("big")


def test_a_gate_command_fills_placeholders_once_and_never_reads_the_values(folder: Path) -> None:
    command = load(folder).gates["unit"].command(artefact="{python}.py", workspace="/w", python="/py")
    assert command == ["/py", "-m", "pytest", "/w/{python}.py"]


def test_a_placeholder_of_a_list_becomes_as_many_arguments_as_it_has(folder: Path) -> None:
    edit(folder, "gates.yaml", "{workspace}/{artefact}", "{artefacts}")
    gate = load(folder).gates["unit"]
    assert gate.target == "artefacts"
    assert gate.command(artefacts=["/w/a", "/w/b"], python="/py") == ["/py", "-m", "pytest", "/w/a", "/w/b"]


def test_hot_models_have_their_room_in_the_order_of_the_registry_and_one_that_has_none_stops_no_other() -> None:
    needs = {"a": 4, "huge": 90, "b": 5, "c": 3, "d": 1}
    assert placed_before("huge", needs, 10) == ["a"]
    assert placed_before("c", needs, 10) == ["a", "b"]
    assert placed_before("d", needs, 10) == ["a", "b"]
