"""Every flag comes from the table, every field reaches a flag, and builds that differ get what they know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from services.inference.command_line import RULES, Mode, arguments, modes_of
from services.inference.embedded import SETTINGS
from services.inference.engines import EmbeddedEngine, EngineUnusable, NativeEngine, build_names
from services.kit.hardware import Node
from services.kit.model_facts import KvShape, ModelFacts
from services.kit.registry import Hardware, ModelEntry
from services.kit.registry.acceleration import Numa, Speculation
from services.kit.registry.launch import Launch

FAKE = Path(__file__).resolve().parents[1] / "fakes" / "llama_server.py"
OLDER_HELP = FAKE.parent / "older_llama_help.txt"
"""What builds say that were made before a draft model had a name in --spec-type; in words of our own."""
DRAFT = ModelEntry(name="small", tier="D", path=Path("/d.gguf"), threads=3, kv_type_k="q8_0", kv_type_v="q8_0")
DENSE = ModelFacts("llama", 7_000_000_000, 1, 8192, 100, KvShape(1, 1))
MOE = ModelFacts("qwen3moe", 30_000_000_000, 1, 8192, 100, KvShape(1, 1), experts_trained=8, experts_total=128)
HARDWARE = Hardware(8, 10**12, (Node((0, 1, 2, 3), 1), Node((4, 5, 6, 7), 1)))


def launch(facts: ModelFacts = DENSE, draft: ModelEntry | None = None, **fields: object) -> Launch:
    entry = ModelEntry.model_validate({"name": "m", "tier": "A", "path": "/m.gguf", **fields}, strict=False)
    return Launch(entry, draft, HARDWARE).with_facts(facts, None)


def flags(of: Launch, mode: Mode = Mode.SPECULATING) -> dict[str, str]:
    return {argument.ways[0][0]: " ".join(argument.ways[0][1:]) for argument in arguments(of, 8000, mode)}


#: field of models.yaml, its value, the flag and value that come of it
FIELDS = [
    ({"slots": 3, "context_tokens": 1000}, "--ctx-size", "3000"),
    ({"threads_batch": 7}, "--threads-batch", "7"),
    ({"batch_tokens": 1024}, "--batch-size", "1024"),
    ({"ubatch_tokens": 256}, "--ubatch-size", "256"),
    ({"load_mode": "mmap+mlock"}, "--load-mode", "mmap+mlock"),
    ({"numa": Numa(strategy="distribute")}, "--numa", "distribute"),
    ({"flash_attention": "on"}, "--flash-attn", "on"),
    ({"kv_type_k": "q8_0"}, "--cache-type-k", "q8_0"),
    ({"kv_type_v": "q4_0"}, "--cache-type-v", "q4_0"),
    ({"cache_reuse": 64}, "--cache-reuse", "64"),
    ({"speculation": Speculation(type="ngram-simple", ngram_n=4)}, "--spec-ngram-simple-size-n", "4"),
    ({"speculation": Speculation(type="ngram-map-k", ngram_m=9)}, "--spec-ngram-map-k-size-m", "9"),
    ({"speculation": Speculation(type="ngram-mod", n_min=5)}, "--spec-ngram-mod-n-min", "5"),
]


@pytest.mark.parametrize(("fields", "flag", "value"), FIELDS)
def test_a_field_becomes_its_flag(fields: dict[str, object], flag: str, value: str) -> None:
    assert flags(launch(**fields))[flag] == value
    if "slots" not in fields:
        assert flag not in flags(launch())


def test_slots_are_saved_where_copies_can_be_taken_only() -> None:
    folder = Path("/slots")
    recurrent = replace(DENSE, recurrent="is of the recurrent or hybrid architecture mamba")
    assert flags(replace(launch(), prefix_folder=folder))["--slot-save-path"] == "/slots/"
    for of in (launch(draft=DRAFT), launch(recurrent), launch(prefix_disk_bytes=0)):
        assert "--slot-save-path" not in flags(replace(of, prefix_folder=folder))


def test_speculation_is_in_one_of_two_modes_and_nothing_else_differs() -> None:
    spec = Speculation(type="draft", draft="small", lookup="ngram-simple", n_max=5, p_min=0.5, p_split=0.1)
    both = launch(draft=DRAFT, speculation=spec)
    more = flags(both).items() - flags(both, Mode.PLAIN).items()
    assert dict(more) == {
        "--spec-type": "draft-simple,ngram-simple",
        "--spec-draft-model": "/d.gguf",
        "--spec-draft-n-max": "5",
        "--spec-draft-p-min": "0.5",
        "--spec-draft-p-split": "0.1",
        "--spec-draft-threads": "3",
        "--spec-draft-type-k": "q8_0",
        "--spec-draft-type-v": "q8_0",
    }
    assert flags(both, Mode.PLAIN).items() <= flags(both).items()


@pytest.mark.parametrize(
    ("policy", "modes"),
    [
        ("auto", (Mode.SPECULATING, Mode.PLAIN)),
        ("always", (Mode.SPECULATING,)),
        ("off", (Mode.PLAIN,)),
    ],
)
def test_the_policy_says_which_modes_there_are(policy: str, modes: tuple[Mode, ...]) -> None:
    assert modes_of(launch(speculation=Speculation(type="ngram-mod", policy=policy))) == modes  # type: ignore[arg-type]
    assert modes_of(launch()) == (Mode.PLAIN,)


@pytest.mark.parametrize(("billions", "tokens"), [(0.135, "8"), (7.6, "8"), (32.8, "24"), (72.7, "16"), (235, "16")])
def test_a_draft_guesses_as_long_as_is_good_for_the_size_of_its_target(billions: float, tokens: str) -> None:
    facts = ModelFacts("qwen2", round(billions * 1e9), 1, 8192, 100, KvShape(1, 1))
    spec = Speculation(type="draft", draft="small")
    assert flags(launch(facts, DRAFT, speculation=spec))["--spec-draft-n-max"] == tokens
    assert (
        flags(launch(facts, DRAFT, speculation=Speculation(type="draft", draft="small", n_max=3)))["--spec-draft-n-max"]
        == "3"
    )


def test_branching_is_turned_off_for_experts_only() -> None:
    spec = Speculation(type="draft", draft="small")
    assert "--spec-draft-p-split" not in flags(launch(DENSE, DRAFT, speculation=spec))
    assert flags(launch(MOE, DRAFT, speculation=spec))["--spec-draft-p-split"] == "0"


def test_experts_are_overridden_under_the_architecture_of_the_file() -> None:
    assert flags(launch(MOE, experts=4))["--override-kv"] == "qwen3moe.expert_used_count=int:4"


def test_bound_cores_stand_before_the_program() -> None:
    native = NativeEngine(Path("/bin/llama-server"))
    assert native.command(launch(numa=Numa(nodes=(1,))), 1, Mode.PLAIN)[:4] == [
        *("taskset", "--cpu-list", "4-7"),
        "/bin/llama-server",
    ]
    assert native.command(launch(numa=Numa(cores="0,2-3")), 1, Mode.PLAIN)[2] == "0,2-3"
    assert native.command(launch(), 1, Mode.PLAIN)[0] == "/bin/llama-server"


def test_the_embedded_engine_reads_every_flag_but_kv_overrides() -> None:
    assert {rule.flag for rule in RULES} - SETTINGS.keys() == {"--override-kv"}


async def test_the_embedded_engine_refuses_experts_by_name() -> None:
    with pytest.raises(EngineUnusable, match=r"embedded cannot do --override-kv \(field experts, models.yaml:1\)"):
        await EmbeddedEngine().check(launch(MOE, experts=4))


EVERYTHING = {
    "threads_batch": 2,
    "batch_tokens": 64,
    "ubatch_tokens": 64,
    "load_mode": "mlock",
    "flash_attention": "on",
    "kv_type_k": "q8_0",
    "kv_type_v": "q8_0",
    "cache_reuse": 8,
    "numa": Numa(strategy="isolate"),
    "experts": 4,
    "speculation": Speculation(
        type="draft", draft="small", lookup="ngram-mod", n_max=4, n_min=1, p_min=0.1, ngram_n=4, ngram_m=8
    ),
}


async def test_a_build_with_every_flag_is_taken() -> None:
    await NativeEngine(FAKE).check(launch(MOE, DRAFT, **EVERYTHING))


def old_build(folder: Path, *lines: str) -> NativeEngine:
    """A binary whose help has these lines beside what every build knows."""
    common = "--model --alias --host --port --ctx-size --parallel --no-kv-unified --threads --cache-ram"
    page = [*f"{common} --log-verbosity --metrics --slots --offline".split(), *lines]
    return build_with(folder, "\n".join(f"{line}  text" for line in page) + "\n")


def build_with(folder: Path, page: str) -> NativeEngine:
    """A binary with this help."""
    (folder / "page").write_text(page)
    binary = folder / "llama-server"
    binary.write_text(f"#!/bin/sh\ncat {folder / 'page'}\n")
    binary.chmod(0o755)
    return NativeEngine(binary)


async def older_arguments(folder: Path, wanted: Launch) -> dict[str, str]:
    """Flag -> value in the build before a draft had a type; without what stands before the model's own settings."""
    engine = build_with(folder, OLDER_HELP.read_text())
    await engine.check(wanted)
    words = engine.command(wanted, 1, modes_of(wanted)[0])
    words = words[words.index("--threads") + 2 : words.index("--cache-ram")]
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {word: "" if after.startswith("--") else after for word, after in pairs if word.startswith("--")}


OLDER_DRAFT = DRAFT.model_copy(update={"kv_type_k": "f16"})


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"type": "draft", "draft": "small"}, {"--model-draft": "/d.gguf", "--draft-max": "8"}),
        (
            {"type": "draft", "draft": "small", "n_max": 5, "n_min": 1, "p_min": 0.5, "p_split": 0.2},
            {"--model-draft": "/d.gguf", "--draft-max": "5", "--draft-min": "1", "--draft-p-min": "0.5",
             "--draft-p-split": "0.2"},
        ),
        (
            {"type": "draft", "draft": "small", "lookup": "ngram-simple", "ngram_n": 4, "ngram_m": 24},
            {"--model-draft": "/d.gguf", "--draft-max": "8", "--spec-type": "ngram-simple",
             "--spec-ngram-size-n": "4", "--spec-ngram-size-m": "24"},
        ),
        ({"type": "ngram-map-k", "ngram_n": 4}, {"--spec-type": "ngram-map-k", "--spec-ngram-size-n": "4"}),
        ({"type": "ngram-map-k4v", "ngram_m": 4}, {"--spec-type": "ngram-map-k4v", "--spec-ngram-size-m": "4"}),
        (
            {"type": "ngram-mod", "ngram_n": 24, "ngram_m": 64, "n_min": 48},
            {"--spec-type": "ngram-mod", "--spec-ngram-size-n": "24", "--draft-max": "64", "--draft-min": "48"},
        ),
    ],
)  # fmt: skip
async def test_a_build_in_which_a_draft_has_no_type_is_told_of_it_by_its_file(
    tmp_path: Path, spec: dict[str, object], told: dict[str, str]
) -> None:
    drafts = {"--threads-draft": "3", "--cache-type-v-draft": "q8_0"} if "draft" in spec else {}
    draft = OLDER_DRAFT if "draft" in spec else None
    found = await older_arguments(tmp_path, launch(draft=draft, speculation=Speculation.model_validate(spec)))
    assert found == {**told, **drafts}


async def test_in_such_a_build_one_length_cannot_be_two(tmp_path: Path) -> None:
    spec = Speculation(type="draft", draft="small", lookup="ngram-mod", n_max=4, ngram_m=64)
    with pytest.raises(EngineUnusable, match=r"does not know --spec-ngram-mod-n-max \(field speculation.ngram_m"):
        await build_with(tmp_path, OLDER_HELP.read_text()).check(launch(draft=DRAFT, speculation=spec))


async def test_an_older_build_gets_the_names_that_it_knows(tmp_path: Path) -> None:
    assert await older_arguments(tmp_path, launch(load_mode="mlock")) == {"--mlock": "", "--no-mmap": ""}
    assert await older_arguments(tmp_path, launch(flash_attention="off")) == {"--flash-attn": "off"}


@pytest.mark.parametrize(
    ("line", "wanted", "told"),
    [
        ("-fa,   --flash-attn", "on", ["--flash-attn"]),
        ("-fa,   --flash-attn", "off", []),
        ("-fa,   --flash-attn [on|off|auto]", "on", ["--flash-attn", "on"]),
        ("-fa,   --flash-attn [on|off|auto]", "off", ["--flash-attn", "off"]),
        ("--flash-attn, -fa [on|off|auto]", "on", ["--flash-attn", "on"]),
    ],
)
async def test_flash_attention_has_a_value_where_the_build_takes_one(
    tmp_path: Path, line: str, wanted: str, told: list[str]
) -> None:
    engine = old_build(tmp_path, line)
    asked = launch(flash_attention=wanted)
    await engine.check(asked)
    words = engine.command(asked, 1, Mode.PLAIN)
    assert words[words.index("--threads") + 2 : words.index("--cache-ram")] == told


async def test_flash_attention_that_a_build_does_not_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineUnusable, match=r"--flash-attn on \(field flash_attention"):
        await old_build(tmp_path, "--flash-attn [yes|no]").check(launch(flash_attention="on"))


async def test_a_value_that_a_build_does_not_list_is_refused_with_the_line_of_its_field(tmp_path: Path) -> None:
    engine = old_build(tmp_path, "--spec-type none,ngram-simple", "--spec-ngram-mod-n-max N")
    with pytest.raises(EngineUnusable, match=r"does not know --spec-type ngram-mod \(field speculation.type, models"):
        await engine.check(launch(speculation=Speculation(type="ngram-mod")))
    await engine.check(launch(speculation=Speculation(type="ngram-simple")))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("version: 4567 (0a1b2c3)\nbuilt with", {"b4567", "0a1b2c3"}),
        ("version: 0.5.0-dev (build 4567, commit 0a1b2c3)", {"b4567", "0a1b2c3"}),
        ("version: 0.5.0-dev (build 0, commit unknown)", set()),
        ("nothing of the kind", set()),
    ],
)
def test_a_build_has_its_number_and_commit_for_names_and_always_its_digest(text: str, names: set[str]) -> None:
    found = build_names(FAKE, text)
    assert {name for name in found if not name.startswith("sha256:")} == names
    assert len([name for name in found if name.startswith("sha256:")]) == 1
