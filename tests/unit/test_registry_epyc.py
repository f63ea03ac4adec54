"""The example of a two-socket server: it checks, its commands are the known-good ones, and it can be planned with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from services.ctl.__main__ import main
from services.inference.command_line import Mode
from services.inference.engines import NativeEngine
from services.kit.config import CHECKOUT
from services.kit.registry import Registry, RegistryError, load_registry
from services.kit.registry.launch_rules import known_facts
from services.kit.registry.sections import read_files

FOLDER = CHECKOUT / "registry" / "examples" / "epyc"
GOLDEN = Path(__file__).parent / "golden" / "epyc_commands.txt"
MODELS = Path("/models")
BINARY = Path("/opt/llama-server")
OLDER_HELP = Path(__file__).resolve().parents[1] / "fakes" / "older_llama_help.txt"
CORES = 96
"""Physical ones; each has two threads."""


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(FOLDER, MODELS, check_files=False)


@pytest.fixture(scope="module")
def commands(registry: Registry) -> dict[str, dict[str, str]]:
    """Flag -> value of each served model in the mode with everything on; under `cores` what it is bound to."""
    found: dict[str, dict[str, str]] = {}
    for name in registry.served:
        words = command(registry, name, Mode.SPECULATING)
        found[name] = {
            word: "" if following.startswith("--") else following
            for word, following in zip(words, [*words[1:], "--"], strict=True)
            if word.startswith("--")
        }
    return found


def command(registry: Registry, name: str, mode: Mode) -> list[str]:
    facts, _ = known_facts(read_files(FOLDER), registry.models, MODELS, check_files=False)
    launch = registry.launch(name)
    drafts = facts[launch.draft.name] if launch.draft is not None else None
    return NativeEngine(BINARY).command(launch.with_facts(facts[name], drafts), 9000, mode)


def test_the_commands_are_the_golden_ones(registry: Registry) -> None:
    lines = [
        f"{name} {mode}: {' '.join(command(registry, name, mode))}"
        for name, entry in registry.served.items()
        for mode in ([Mode.SPECULATING, Mode.PLAIN] if entry.speculation.types else [Mode.PLAIN])
    ]
    assert GOLDEN.read_text().splitlines() == lines


def test_experts_are_at_least_4_and_3_for_the_480b(commands: dict[str, dict[str, str]]) -> None:
    experts = {name: flags["--override-kv"] for name, flags in commands.items() if "--override-kv" in flags}
    assert experts == {
        "front": "qwen3moe.expert_used_count=int:6",
        "architect": "qwen3moe.expert_used_count=int:4",
        "code-architect": "qwen3moe.expert_used_count=int:3",
        "ingest": "qwen3next.expert_used_count=int:4",
    }


def test_guesses_are_24_tokens_for_the_32b_and_8_for_the_7b_and_none_for_the_others(
    commands: dict[str, dict[str, str]],
) -> None:
    lengths = {name: flags.get("--spec-draft-n-max") for name, flags in commands.items()}
    assert {name: length for name, length in lengths.items() if length} == {"coder": "24", "worker": "8"}
    assert commands["coder"]["--spec-type"] == "draft-simple,ngram-simple"
    drafts = {flags["--spec-draft-model"] for flags in commands.values() if "--spec-draft-model" in flags}
    assert drafts == {"/models/Qwen2.5-Coder-0.5B-Instruct-Q8_0.gguf"}


def test_no_process_takes_all_threads_and_those_up_to_65_gb_have_a_quarter_of_their_own(
    registry: Registry, commands: dict[str, dict[str, str]]
) -> None:
    bound: set[int] = set()
    for name, entry in registry.served.items():
        assert int(commands[name]["--threads"]) <= CORES
        assert entry.declared is not None
        launch = registry.launch(name)
        if entry.declared.file_bytes > 65e9:
            assert launch.cores == ()
            assert commands[name]["--numa"] == "distribute"
            assert entry.exclusive == "heavy"
            continue
        assert len(launch.cores) == CORES // 4
        assert len([node for node in registry.hardware.nodes if set(launch.cores) <= set(node.cores)]) == 1
        assert not bound.intersection(launch.cores)
        assert commands[name]["--cpu-list"] == f"{min(launch.cores)}-{max(launch.cores)}"
        bound.update(launch.cores)


def test_no_more_is_admitted_than_there_are_slots_in_the_server(
    registry: Registry, commands: dict[str, dict[str, str]]
) -> None:
    for name, entry in registry.served.items():
        assert commands[name]["--parallel"] == str(entry.slots)
        assert commands[name]["--ctx-size"] == str(entry.slots * entry.context_tokens)
    assert {name: entry.slots for name, entry in registry.served.items() if entry.tier != "B"} == {
        "front": 4,
        "worker": 8,
    }


def test_what_stays_is_locked_in_memory_and_what_comes_and_goes_is_mapped(commands: dict[str, dict[str, str]]) -> None:
    modes = {name: flags["--load-mode"] for name, flags in commands.items()}
    assert {name for name, mode in modes.items() if mode == "mlock"} == {"front", "coder", "worker"}
    assert {name for name, mode in modes.items() if mode == "mmap"} == {"architect", "code-architect", "ingest"}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert main([*argv, "--registry", str(FOLDER), "--hardware", str(FOLDER / "hardware.yaml"), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERLINE_HOME", str(tmp_path))


def test_it_is_checked_planned_with_and_simulated_on_a_machine_that_has_none_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(capsys, "registry", "check", "--no-files")["notes"] == []
    plan = run(capsys, "plan", "Write a parser, and document it")
    assert plan["forecast"]["failure"] is None  # type: ignore[index]  # JSON
    simulated = run(capsys, "simulate", "--tasks", "6", "--shape", "diamond", "--tokens-per-s", "30")
    assert simulated["base"]["failed"] == 0  # type: ignore[index]  # JSON


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ('numa: {cores: "72-95"}', 'numa: {cores: "0-23"}', "bound-twice"),
        ('numa: {cores: "72-95"}', 'numa: {cores: "96-119"}', "bound-twice"),
        ('numa: {cores: "24-47"}', "port: 0", "unbound-beside-bound"),
    ],
)
def test_who_would_compute_on_the_cores_of_another_one_is_told(tmp_path: Path, old: str, new: str, rule: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "registry")
    path = tmp_path / "registry" / "models.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    try:
        told = load_registry(path.parent, MODELS, check_files=False).notes
    except RegistryError as err:
        told = err.problems
    assert [problem.rule for problem in told] == [rule]


def test_another_machine_is_another_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("hardware:\n  cores: 8\n  memory_bytes: 300000000000\n  nodes: [{cores: 0-7, memory_bytes: 9}]\n")
    argv = ["registry", "check", "--no-files", "--registry", str(FOLDER), "--hardware", str(small), "--json"]
    assert main(argv) == 2
    details = " ".join(json.loads(capsys.readouterr().out)["error"]["details"])
    for rule in ("threads-over-cores", "unknown-core"):
        assert f"(rule: {rule})" in details


def with_nothing_but(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no llama-server is found but one that this folder may have."""
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TIERLINE_CACHE", str(folder))


def test_a_command_is_told_for_a_machine_that_has_no_llama_server(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nothing_but(tmp_path, monkeypatch)
    assert main(["models", "--explain", "coder", "--registry", str(FOLDER)]) == 0
    assert "note: the flags were not checked against a binary: no llama-server found" in capsys.readouterr().out
    assert main(["models", "--explain", "coder", "--registry", str(FOLDER), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["refusals"] == []
    assert len(told["notes"]) == 1


def test_what_a_build_does_unasked_is_no_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text(f"#!/bin/sh\n/bin/cat {OLDER_HELP}\n")
    binary.chmod(0o755)
    with_nothing_but(tmp_path, monkeypatch)
    assert main(["models", "--explain", "worker", "--registry", str(FOLDER), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == []
    flags = {flag["flag"] for flag in told["flags"]}
    assert "--model-draft" in flags
    assert "--spec-type" not in flags


def test_the_reason_of_every_flag_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_nothing_but(tmp_path, monkeypatch)
    assert main(["models", "--explain", "coder", "--registry", str(FOLDER), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    flags = {flag["flag"]: flag for flag in told["flags"]}
    lines = (FOLDER / "models.yaml").read_text().splitlines()
    for flag, text in (
        ("--spec-draft-n-max", "n_max: 24"),
        ("--spec-draft-threads", "threads: 8"),
        ("taskset --cpu-list", 'numa: {cores: "24-47"}'),
        ("--load-mode", "load_mode: mlock"),
    ):
        file, _, line = flags[flag]["where"].partition(":")
        assert file == "models.yaml"
        assert lines[int(line) - 1].strip() == text
        assert flags[flag]["rule"]
    assert flags["--spec-draft-n-max"]["modes"] == ["speculating"]
    assert flags["--threads"]["modes"] == ["speculating", "plain"]
    assert flags["--port"]["default"] is True
    assert flags["--metrics"]["where"] is None
    assert set(told["commands"]) == {"speculating", "plain"}
    assert "--slot-save-path" not in flags, "its service saves no slots beside a draft"
    assert told["facts"]["kv_bytes"] == 2 * 16384 * 262144
    assert told["facts"]["memory_bytes"] > told["facts"]["kv_bytes"] + 20_000_000_000
