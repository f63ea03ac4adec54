"""Rules about acceleration: one bad edit of a good registry over real model files, refused at its line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.kit.gguf_facts import read_facts
from services.kit.hardware import Machine, Node
from services.kit.model_facts import KvShape, ModelFacts
from services.kit.registry import Problem, Registry, RegistryError, load_registry
from services.kit.registry.acceleration import Speculation
from services.kit.registry.constraints import DRAFT_TOKENS, EXPERT_FLOORS, expert_floor, good_draft_tokens, violations
from services.kit.registry.entries import HardwareEntry
from services.kit.registry.memory import memory_needs
from services.kit.registry.registry import hardware_of
from tests.fakes.gguf_files import write_tiny_gguf
from tests.unit.test_registry_rules import GOOD

MODELS = """\
models:
  dense:
    tier: A
    path: dense.gguf
    context_tokens: 1024
    threads: 2
    numa: {cores: "0-1"}
    speculation:
      type: draft
      draft: small
      lookup: ngram-simple
      n_max: 8
      ngram_n: 4
  moe:
    tier: B
    path: moe.gguf
    engine: llama-server
    context_tokens: 1024
    experts: 4
    numa: {nodes: [1]}
    declared:
      architecture: qwen3moe
      parameters_b: 0.0000008
      file_bytes: 7104
      context_tokens: 4096
      vocabulary_tokens: 300
      kv_bytes_per_token: 0
      experts_trained: 8
      experts_total: 16
  hybrid:
    tier: C
    path: hybrid.gguf
    context_tokens: 1024
  small:
    tier: D
    path: small.gguf
"""
ROLES = "".join(
    f"  {name}:\n    description: Works.\n    model: {name}\n    prompt: Work.\n    max_tokens: 100\n"
    for name in ("dense", "moe", "hybrid")
)
HARDWARE = """\
hardware:
  cores: 8
  threads_per_core: 2
  memory_bytes: 10000000000
  nodes: [{cores: 0-3, memory_bytes: 3000}, {cores: 4-7, memory_bytes: 90000000}]
"""
WORDS = [f"t{number}" for number in range(300)]
ATTENTION = {"attention.head_count": 8, "attention.head_count_kv": 8, "attention.key_length": 1_000_000}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model files of every kind, written once so that their headers are read once."""
    folder = tmp_path_factory.mktemp("files")
    moe = {"expert_count": 16, "expert_used_count": 8}
    write_tiny_gguf(folder / "dense.gguf", tokens=WORDS, parameters=800)
    write_tiny_gguf(folder / "moe.gguf", architecture="qwen3moe", tokens=WORDS, parameters=800, extra=moe)
    write_tiny_gguf(folder / "hybrid.gguf", architecture="qwen3next", tokens=WORDS, extra={"ssm.state_size": 8})
    write_tiny_gguf(folder / "small.gguf", tokens=WORDS)
    write_tiny_gguf(folder / "foreign.gguf", tokens=[*WORDS[:9], "other", *WORDS[10:]])
    write_tiny_gguf(folder / "mamba.gguf", architecture="mamba", tokens=WORDS)
    write_tiny_gguf(folder / "large.gguf", tokens=WORDS, parameters=8000)
    write_tiny_gguf(folder / "thirsty.gguf", tokens=WORDS, parameters=800, extra=ATTENTION)
    (folder / "cut.gguf").write_bytes((folder / "dense.gguf").read_bytes()[:900])
    return folder


@pytest.fixture
def folder(tmp_path: Path, files: Path) -> Path:
    texts = {**GOOD, "models.yaml": MODELS, "roles.yaml": "roles:\n" + ROLES, "hardware.yaml": HARDWARE}
    texts["personas.yaml"] = "personas: {}\n"
    for file, text in texts.items():
        (tmp_path / file).write_text(text)
    (tmp_path / "models").symlink_to(files)
    return tmp_path


def load(folder: Path, *, check_files: bool = True) -> Registry:
    return load_registry(folder, folder / "models", check_files=check_files)


def edit(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))


def refused(folder: Path, *, check_files: bool = True) -> tuple[Problem, ...]:
    with pytest.raises(RegistryError) as caught:
        load(folder, check_files=check_files)
    return caught.value.problems


def test_the_good_one_is_good_with_and_without_its_files(folder: Path) -> None:
    launch = load(folder).launch("dense")
    assert launch.draft is not None
    assert launch.draft.path == folder / "models" / "small.gguf"
    assert launch.where("speculation.n_max") == "models.yaml:12"
    assert load(folder, check_files=False).served.keys() == {"dense", "moe", "hybrid"}


#: text that is replaced, its replacement, line, field, rule, a part of the message
BAD_EDITS = [
    # the fields of speculation
    ("draft: small", "draft: smal", 10, "dense.speculation.draft", "unknown-draft", "dense, moe, hybrid, small"),
    ("draft: small", "draft: hybrid", 10, "dense.speculation.draft", "draft-tier", "of tier C"),
    ("      draft: small\n", "", 8, "dense.speculation", "speculation-fields", "needs draft"),
    ("lookup: ngram-simple", "p_min: 0.5", 13, "dense.speculation.ngram_n", "speculation-fields", "a lookup"),
    ("n_max: 8", "n_min: 9\n      n_max: 8", 12, "dense.speculation.n_min", "speculation-lengths", "n_max (8)"),
    ("type: draft", "type: ngram-fancy", 9, "dense.speculation.type", "literal_error", "ngram-fancy"),
    ("type: draft", "kind: draft", 9, "dense.speculation.kind", "extra_forbidden", ""),
    # vocabulary and kind of the draft
    ("small.gguf", "foreign.gguf", 10, "dense.speculation.draft", "draft-vocabulary", "(models.yaml:36)"),
    ("small.gguf", "large.gguf", 10, "dense.speculation.draft", "draft-size", "exchange the two"),
    ("small.gguf", "mamba.gguf", 10, "dense.speculation.draft", "draft-recurrent", "architecture mamba"),
    # recurrent and hybrid models
    ("dense.gguf", "mamba.gguf", 9, "dense.speculation.type", "recurrent-speculation", "draft with ngram-simple"),
    (
        "path: hybrid.gguf", "path: hybrid.gguf\n    speculation: {type: ngram-mod}", 33,
        "hybrid.speculation.type", "recurrent-speculation", "architecture qwen3next",
    ),
    (
        "path: hybrid.gguf", "path: hybrid.gguf\n    cache_reuse: 64", 33, "hybrid.cache_reuse",
        "recurrent-cache-reuse", "cannot be moved",
    ),
    # experts
    ("experts: 4", "experts: 3", 19, "moe.experts", "experts-below-range", "4 to 8"),
    ("experts: 4", "experts: 9", 19, "moe.experts", "experts-above-range", "trained with 8"),
    ("threads: 2", "experts: 4", 6, "dense.experts", "experts-dense", "llama is a dense model"),
    ("llama-server", "embedded", 19, "moe.experts", "experts-engine", "no kv overrides"),
    ("experts: 4", "speculation: {type: draft, draft: small, p_split: 0.5}", 19, "moe.speculation.p_split",
     "split-with-experts", "this one has 16 experts a layer"),
    # what is declared and what the file has
    ("experts_trained: 8", "experts_trained: 6", 28, "moe.declared.experts_trained", "declared-differs", "has 8"),
    ("file_bytes: 7104", "file_bytes: 9", 24, "moe.declared.file_bytes", "declared-differs", "the file has"),
    ("qwen3moe", "qwen2moe", 22, "moe.declared.architecture", "declared-differs", "has qwen3moe"),
    # context and memory
    ("context_tokens: 1024", "context_tokens: 5000", 5, "dense.context_tokens", "context-over-trained", "4096 at most"),
    ("threads: 2", "kv_type_v: q8_0\n    flash_attention: off", 6, "dense.kv_type_v", "quantised-values", "line 7"),
    ("threads: 2", "batch_tokens: 64\n    ubatch_tokens: 65", 7, "dense.ubatch_tokens", "batch-order", "(64)"),
    ("dense.gguf", "cut.gguf", 4, "dense.path", "model-file-damaged", "breaks off at byte 900"),
    # cores
    ('cores: "0-1"', 'cores: "3,8-9"', 7, "dense.numa.cores", "unknown-core", "no cores 8-9"),
    ('cores: "0-1"', 'cores: "1-0"', 7, "dense.numa.cores", "value_error", "must rise"),
    ('cores: "0-1"', 'cores: "4-5"', 20, "moe.numa", "bound-twice", "core 4 is bound by 'dense' in line 7 too"),
    ("path: hybrid.gguf", 'path: hybrid.gguf\n    residency: warm\n    numa: {cores: "1"}', 34, "hybrid.numa",
     "bound-twice", "core 1 is bound by 'dense'"),
    ("path: hybrid.gguf", 'path: hybrid.gguf\n    residency: cold\n    numa: {cores: "2"}', 34, "hybrid.numa",
     "bound-twice", "core 2 is a thread of the same physical core as 0, which is bound by 'dense'"),
    ("nodes: [1]", "nodes: [2]", 20, "moe.numa.nodes.0", "unknown-node", "0 to 1"),
    ("nodes: [1]", 'nodes: [1], cores: "4"', 20, "moe.numa.cores", "numa-fields", "remove one"),
    ("threads: 2", "threads: 3", 6, "dense.threads", "threads-over-bound", "the 2 cores it is bound to (0-1)"),
    ("threads: 2", "threads_batch: 3", 6, "dense.threads_batch", "threads-over-bound", "3 threads"),
    ("path: hybrid.gguf", "threads_batch: 5\n    path: hybrid.gguf", 32, "hybrid.threads_batch",
     "threads-over-all-nodes", "at most 4"),
    ("path: small.gguf", "path: small.gguf\n    threads: 3", 37, "small.threads", "threads-over-bound",
     "'dense', which it guesses for, is bound to 2 cores (0-1) in line 7"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "field", "rule", "part"), BAD_EDITS)
def test_a_bad_edit_is_refused_with_its_line_and_field(
    folder: Path, old: str, new: str, line: int, field: str, rule: str, part: str
) -> None:
    edit(folder, "models.yaml", old, new)
    problems = refused(folder)
    assert [(problem.line, problem.field, problem.rule) for problem in problems] == [(line, f"models.{field}", rule)]
    assert part in problems[0].message


def test_a_cache_that_does_not_fit_is_refused_by_itself_and_with_all_that_stays(folder: Path) -> None:
    edit(folder, "models.yaml", "dense.gguf", "thirsty.gguf")
    cache = 1024 * 8 * (1_000_000 + 1) * 2  # tokens, heads, key and value lengths, bytes
    (alone, together) = sorted(refused(folder), key=lambda problem: problem.rule)
    assert (alone.line, alone.field, alone.rule) == (5, "models.dense.context_tokens", "kv-over-memory")
    assert f"1 slots of 1024 tokens take {cache:,} bytes" in alone.message
    assert (together.field, together.rule) == ("models.dense.path", "memory")


def test_what_is_declared_is_checked_where_the_file_is_absent(folder: Path) -> None:
    edit(folder, "models.yaml", "experts: 4", "experts: 9")
    edit(folder, "models.yaml", "path: moe.gguf", "path: gone.gguf")
    assert [problem.rule for problem in refused(folder, check_files=False)] == ["experts-above-range"]


def hybrid_with(folder: Path, hardware: str, **fields: object) -> tuple[str, ...]:
    """Rules that refuse or note these fields of the entry that is bound nowhere, on another machine."""
    (folder / "hardware.yaml").write_text(f"hardware: {{memory_bytes: 10000000000, {hardware}}}\n")
    edit(folder, "models.yaml", "    numa: {nodes: [1]}\n", "")
    edit(folder, "models.yaml", '    numa: {cores: "0-1"}\n', "")
    added = "".join(f"    {name}: {value}\n" for name, value in fields.items())
    edit(folder, "models.yaml", "    path: hybrid.gguf\n", f"    path: hybrid.gguf\n{added}")
    try:
        problems = load(folder).notes
    except RegistryError as err:
        problems = err.problems
    return tuple(sorted(problem.rule for problem in problems if problem.field.startswith("models.hybrid")))


NEAR = "memory_bytes: 5000000000"
EPYC = f'cores: 192, nodes: [{{cores: "0-47,96-143", {NEAR}}}, {{cores: "48-95,144-191", {NEAR}}}]'
TWO_SOCKETS = f"cores: 64, nodes: [{{cores: 0-31, {NEAR}}}, {{cores: 32-63, {NEAR}}}]"
SMALL_VM = f"cores: 4, nodes: [{{cores: 0-1, {NEAR}}}, {{cores: 2-3, {NEAR}}}]"


@pytest.mark.parametrize(
    ("hardware", "fields", "rules"),
    [
        (f"threads_per_core: 2, {EPYC}", {"threads": 191}, ("threads-over-all-nodes",)),
        (f"threads_per_core: 2, {EPYC}", {"threads": 97}, ("threads-over-all-nodes",)),
        (f"threads_per_core: 2, {EPYC}", {"threads": 96}, ()),
        (f"threads_per_core: 2, {EPYC}", {"threads_batch": 97}, ("threads-over-all-nodes",)),
        (f"threads_per_core: 2, {EPYC}", {"threads": 97, "numa": "{nodes: [0, 1]}"}, ("threads-over-all-nodes",)),
        # the two threads of a core may both work where the memory is near
        (f"threads_per_core: 2, {EPYC}", {"threads": 96, "numa": "{nodes: [0]}"}, ()),
        (TWO_SOCKETS, {"threads": 64}, ("threads-over-node",)),
        (SMALL_VM, {"threads": 4}, ("threads-over-node",)),
        (SMALL_VM, {"threads": 5}, ("threads-over-all-nodes", "threads-over-cores")),
        (SMALL_VM, {"threads_batch": 5}, ("threads-over-all-nodes", "threads-over-cores")),
        ("cores: 4, nodes: [{cores: 0-7, memory_bytes: 1}]", {"threads_batch": 5}, ("threads-over-cores",)),
    ],
)
def test_threads_are_held_against_the_physical_cores_of_the_machine_at_hand(
    folder: Path, hardware: str, fields: dict[str, object], rules: tuple[str, ...]
) -> None:
    assert hybrid_with(folder, hardware, **fields) == rules


def test_the_threads_of_a_core_are_detected_where_the_nodes_are_those_of_this_machine() -> None:
    nodes = (Node((0, 1), 1), Node((2, 3), 1))
    here = Machine(4, 10**10, nodes, "affinity", "installed", siblings=((0, 1), (2, 3)))
    written = [{"cores": "0-1", "memory_bytes": 5}, {"cores": "2-3", "memory_bytes": 5}]
    elsewhere = [{"cores": "0-3", "memory_bytes": 5}]
    for fields, siblings in (
        ({}, here.siblings),
        ({"nodes": written}, here.siblings),
        ({"nodes": written, "threads_per_core": 2}, here.siblings),
        ({"nodes": written, "threads_per_core": 1}, ()),
        ({"nodes": elsewhere}, ()),
        ({"nodes": elsewhere, "threads_per_core": 2}, ((0, 2), (1, 3))),
    ):
        assert hardware_of(HardwareEntry.model_validate(fields), here).siblings == siblings


def test_two_that_compute_one_at_a_time_may_share_their_cores(folder: Path) -> None:
    edit(folder, "models.yaml", 'cores: "0-1"', 'cores: "4-5"')
    for name in ("dense", "moe"):
        edit(folder, "models.yaml", f"path: {name}.gguf", f"path: {name}.gguf\n    exclusive: heavy")
    load(folder)


@pytest.mark.parametrize("fields", ["", "    exclusive: heavy\n"])
def test_two_warm_ones_may_share_their_cores_if_they_compute_one_at_a_time_only(folder: Path, fields: str) -> None:
    """Both may be in memory, and the scheduler counts cores without asking which: only the group keeps them apart."""
    for name in ("moe", "hybrid"):
        edit(folder, "models.yaml", f"path: {name}.gguf\n", f"path: {name}.gguf\n    residency: warm\n{fields}")
    edit(folder, "models.yaml", "path: hybrid.gguf", "path: hybrid.gguf\n    numa: {nodes: [1]}")
    if fields:
        load(folder)
    else:
        assert [(problem.field, problem.rule) for problem in refused(folder)] == [("models.hybrid.numa", "bound-twice")]


def test_a_hot_model_that_is_bound_nowhere_is_a_note_where_others_are(folder: Path) -> None:
    (note,) = (note for note in load(folder).notes if note.rule == "unbound-beside-bound")
    assert (note.line, note.field) == (30, "models.hybrid")
    assert "the cores of dense, moe" in note.message
    edit(folder, "models.yaml", "path: hybrid.gguf", "path: hybrid.gguf\n    residency: warm")
    assert load(folder).notes == ()


def test_no_note_says_what_the_group_of_all_prevents(folder: Path) -> None:
    for name in ("dense", "moe", "hybrid"):
        edit(folder, "models.yaml", f"path: {name}.gguf", f"path: {name}.gguf\n    exclusive: heavy")
    assert load(folder).notes == ()


def test_speculation_that_is_off_is_no_offence_on_a_recurrent_model(folder: Path) -> None:
    spec = "speculation: {type: ngram-mod, policy: off}"
    edit(folder, "models.yaml", "path: hybrid.gguf", f"path: hybrid.gguf\n    {spec}")
    assert load(folder).models["hybrid"].speculation.policy == "off"  # which YAML takes for false


@pytest.mark.parametrize("path", ["foreign.gguf", "large.gguf", "cut.gguf", "gone.gguf"])
def test_the_draft_of_a_policy_that_is_off_is_loaded_by_nobody(folder: Path, path: str) -> None:
    edit(folder, "models.yaml", "path: small.gguf", f"path: {path}")
    refused(folder)
    edit(folder, "models.yaml", "n_max: 8", "n_max: 8\n      policy: off")
    registry = load(folder)
    launch = registry.launch("dense")
    assert launch.draft is None
    assert launch.paths() == [folder / "models" / "dense.gguf"]
    assert launch.with_facts(read_facts(folder / "models" / "dense.gguf"), None).takes_copies
    without = registry.models["dense"].model_copy(update={"speculation": Speculation()})
    assert memory_needs(registry.models)["dense"] == memory_needs({**registry.models, "dense": without})["dense"]


def test_branching_is_no_offence_where_nothing_branches(folder: Path) -> None:
    for setting in ("p_split: 0", "p_split: 0.5, policy: off"):
        edit(folder, "models.yaml", "experts: 4", f"speculation: {{type: draft, draft: small, {setting}}}")
        load(folder)
        edit(folder, "models.yaml", f"speculation: {{type: draft, draft: small, {setting}}}", "experts: 4")


def test_a_recurrent_model_may_speculate_on_the_builds_that_are_named_and_on_no_other(folder: Path) -> None:
    spec = 'speculation: {type: ngram-mod}\n    speculation_on_recurrent: {allowed_builds: ["b4567"]}'
    edit(folder, "models.yaml", "path: hybrid.gguf", f"path: hybrid.gguf\n    {spec}")
    launch = load(folder).launch("hybrid")  # which build will run is known at the launch only
    facts = ModelFacts("qwen3next", 1, 1, 8192, 9, KvShape(0, 0), recurrent="has recurrent layers")
    known = launch.with_facts(facts, None)
    assert violations(known, frozenset({"b4567", "0a1b2c3"})) == []
    (problem,) = violations(known, frozenset({"b4568"}))
    assert (problem.line, problem.rule) == (33, "recurrent-speculation")
    assert "this build (b4568) is not among those in models.yaml:34" in problem.message


@pytest.mark.parametrize("setting", ["speculation: {type: ngram-mod}", 'numa: {cores: "0"}'])
def test_a_setting_that_a_draft_cannot_have_is_noted_with_its_line(folder: Path, setting: str) -> None:
    edit(folder, "models.yaml", "path: small.gguf", f"path: small.gguf\n    {setting}")
    notes = [note for note in load(folder).notes if note.rule == "draft-fields"]
    assert [(note.line, note.field) for note in notes] == [(37, f"models.small.{setting.partition(':')[0]}")]
    assert "set it there" in notes[0].message


def test_a_longer_guess_than_was_good_and_memory_beyond_the_node_are_notes(folder: Path) -> None:
    edit(folder, "models.yaml", "n_max: 8", "n_max: 20")
    edit(folder, "hardware.yaml", "memory_bytes: 90000000", "memory_bytes: 90")
    notes = {note.rule: note for note in load(folder).notes}
    assert "8 were best for a model of 8e-07B" in notes["draft-length"].message
    assert (notes["draft-length"].line, notes["memory-over-node"].field) == (12, "models.moe.numa.nodes")


def test_a_draft_that_nobody_guesses_with_is_a_note(folder: Path) -> None:
    edit(
        folder,
        "models.yaml",
        "type: draft\n      draft: small\n      lookup: ngram-simple\n      n_max: 8",
        "type: ngram-mod",
    )
    edit(folder, "models.yaml", "path: hybrid.gguf", "path: hybrid.gguf\n    residency: warm")
    assert [(note.line, note.rule) for note in load(folder).notes] == [(32, "draft-unused")]


def model(billions: float, trained: int | None = 8) -> ModelFacts:
    return ModelFacts("qwen3moe", round(billions * 1e9), 1, 8192, 9, KvShape(0, 0), experts_trained=trained)


def test_the_floor_of_experts_is_4_and_3_for_the_480b_class_and_never_above_what_was_trained() -> None:
    floors = {size: expert_floor(model(size))[0] for size in (30, 235, 400, 480, 1000)}
    assert floors == {30: 4, 235: 4, 400: 4, 480: 3, 1000: 3}
    assert expert_floor(model(46.7, trained=2))[0] == 2
    assert all(row.reason for row in (*EXPERT_FLOORS, *DRAFT_TOKENS))


def test_the_length_of_a_guess_is_24_16_and_8_for_32b_72b_and_7b() -> None:
    assert [good_draft_tokens(model(size))[0] for size in (32.8, 72.7, 7.6)] == [24, 16, 8]
