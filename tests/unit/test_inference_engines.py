"""Command lines, the choice of the engine, and what `--help` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.inference.command_line import Mode
from services.inference.embedded import API_KEY_VARIABLE
from services.inference.engines import (
    EmbeddedEngine,
    EngineUnusable,
    NativeEngine,
    choose_engine,
    environment,
    sections_of_help,
)
from services.kit.config import Home, load_home
from services.kit.registry import ModelEntry
from services.kit.registry.launch import Launch

FAKE = Path(__file__).resolve().parents[1] / "fakes" / "llama_server.py"
ENTRY = ModelEntry(name="m", tier="A", path=Path("/m.gguf"), slots=3, context_tokens=1000, threads=2)
LAUNCH = Launch(ENTRY)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return load_home({"TIERLINE_HOME": str(tmp_path / "home")})


def put_binary(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_context_is_per_slot_and_no_flag_carries_its_value() -> None:
    command = NativeEngine(Path("/bin/x")).command(LAUNCH, 8123, Mode.PLAIN)
    assert command[command.index("--ctx-size") + 1] == "3000"
    assert command[command.index("--parallel") + 1] == "3"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert not [argument for argument in command if "=" in argument]


def test_the_registrys_binary_comes_first_then_the_built_one_then_path(home: Home, tmp_path: Path) -> None:
    assert choose_engine(ENTRY, home).name == "embedded"
    on_path = put_binary(tmp_path / "bin" / "llama-server")
    chosen = choose_engine(ENTRY, home)
    assert chosen.command(LAUNCH, 1, Mode.PLAIN)[0] == str(on_path)
    built = put_binary(home.cache / "native" / "current" / "bin" / "llama-server")
    assert choose_engine(ENTRY, home).command(LAUNCH, 1, Mode.PLAIN)[0] == str(built)
    own = ENTRY.model_copy(update={"binary": FAKE})
    assert choose_engine(own, home).command(Launch(own), 1, Mode.PLAIN)[0] == str(FAKE)
    embedded = ENTRY.model_copy(update={"engine": "embedded"})
    assert isinstance(choose_engine(embedded, home), EmbeddedEngine)


def test_llama_server_without_a_binary_is_refused_with_the_cure(home: Home) -> None:
    with pytest.raises(EngineUnusable, match="deploy/build-native"):
        choose_engine(ENTRY.model_copy(update={"engine": "llama-server"}), home)


def test_a_flag_that_the_help_calls_removed_is_not_known() -> None:
    page = (
        "----- common params -----\n"
        "-t,    --threads N                      number of threads (see --draft-max)\n"
        "--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or\n"
        "                                        --spec-ngram-mod-n-max\n"
        "--very-long-flag-name-that-fills-the-column, --other N\n"
        "                                        the argument has been removed. use --threads\n"
    )
    assert set(sections_of_help(page)) == {"-t", "--threads"}


async def test_the_fake_knows_every_flag_that_is_used() -> None:
    await NativeEngine(FAKE).check(LAUNCH)


async def test_a_binary_that_does_not_run_is_unusable(tmp_path: Path) -> None:
    broken = tmp_path / "llama-server"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    with pytest.raises(EngineUnusable, match="cannot be started"):
        await NativeEngine(broken).check(LAUNCH)


def test_settings_of_the_users_own_llama_server_do_not_reach_the_child() -> None:
    env = environment({"PATH": "/bin", "LLAMA_ARG_CTX_SIZE": "9", "LLAMA_API_KEY": "old", "FAR_API_KEY": "x"}, "new")
    assert env == {"PATH": "/bin", API_KEY_VARIABLE: "new"}


def test_the_fake_tells_its_version() -> None:
    run = subprocess.run([sys.executable, str(FAKE), "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("version:")
