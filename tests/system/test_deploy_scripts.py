"""The scripts of deploy/: defaults, messages, and how deploy/run ends. Downloads and builds are left to deploy/test."""

import os
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.waiting import until

CHECKOUT = Path(__file__).resolve().parents[2]
DEPLOY = CHECKOUT / "deploy"


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that holds only the scripts, so that a test may break it."""
    shutil.copytree(DEPLOY, tmp_path / "checkout" / "deploy")
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path / "checkout")
    return tmp_path / "checkout"


@pytest.fixture
def ready_checkout(checkout: Path) -> Path:
    """A checkout whose installation is done and whose tierline only writes down how it was called."""
    executable(checkout / "deploy" / "setup", "exit 0")
    executable(checkout / "deploy" / "fetch-model", "exit 0")
    executable(
        checkout / ".venv" / "bin" / "tierline",
        # No child of its own: dash forgets a signal that comes while it starts one.
        f'echo "$@" >> {checkout}/calls\n[ "$1" = run ] || exit 0\n'
        '[ "$RUN_S" ] && exec sleep "$RUN_S"\nexit "$RUN_EXIT"',
    )
    return checkout


def calls(checkout: Path) -> list[str]:
    record = checkout / "calls"
    return record.read_text().splitlines() if record.exists() else []


@pytest.mark.parametrize(
    ("exported", "expected"),
    [
        ({"HOME": "/h"}, "/h/.local/state/tierline /h/.local/state/tierline/cache"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/x/tierline /x/tierline/cache"),
        ({"TIERLINE_HOME": "/t"}, "/t /t/cache"),
        ({"TIERLINE_HOME": "/t", "TIERLINE_CACHE": "/c"}, "/t /c"),
    ],
)
def test_one_home_holds_everything_unless_told_otherwise(exported: dict[str, str], expected: str) -> None:
    script = f'. {DEPLOY}/environment.sh; echo "$TIERLINE_HOME $TIERLINE_CACHE $TIERLINE_MODELS $PIP_CACHE_DIR"'
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": os.defpath, **exported}, capture_output=True, text=True, check=True
    )
    cache = expected.split()[1]
    assert done.stdout.split() == [*expected.split(), f"{cache}/models", f"{cache}/pip"]


def test_every_dependency_has_an_exact_version() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]
    pins = [
        Requirement(line)
        for line in (DEPLOY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for requirement in wanted:
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is missing from deploy/constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_setup_says_what_to_install_when_python_is_too_old(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    executable(old, '[ "$1" = --version ] && echo Python 3.9.2 || exit 1')
    done = subprocess.run(
        [checkout / "deploy" / "setup"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Python 3.9.2 is too old; install Python 3.11 or newer" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("told_us", "taken"), [(10**9, True), (1, False)])
def test_setup_takes_the_quicker_build_of_the_same_python(
    told_us: int, taken: bool, checkout: Path, tmp_path: Path
) -> None:
    system = Path("/usr/bin/python3")
    usable = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    if not system.exists() or subprocess.run([system, "-c", usable], check=False, capture_output=True).returncode:
        pytest.skip(f"no {system} of 3.11 or newer that can make a .venv: there is nothing to choose from")
    wrapper = (
        f'case "$2" in *python_speed.py) echo {told_us};; *) echo "$@" >> {tmp_path}/asked; exec {system} "$@";; esac'
    )
    executable(tmp_path / "bin" / "python3", wrapper)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    done = subprocess.run([checkout / "deploy" / "setup"], env=environment, capture_output=True, text=True, check=False)
    assert (f"{system} takes" in done.stderr) is taken, done.stderr
    assert ("-m venv" in (tmp_path / "asked").read_text()) is not taken
    assert (checkout / ".venv" / "bin" / "python").exists()


@pytest.mark.parametrize("script", ["setup", "fetch-model", "build-native"])
def test_an_unknown_argument_is_refused_before_anything_happens(script: str, checkout: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [checkout / "deploy" / script, "--frobnicate"],
        env={**os.environ, "TIERLINE_HOME": str(tmp_path / "home"), "TIERLINE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "argument" in done.stderr
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "cache").exists()


def test_run_without_arguments_runs_the_example_and_leaves_the_stack_up(ready_checkout: Path) -> None:
    environ = {**os.environ, "RUN_EXIT": "0"}
    subprocess.run([ready_checkout / "deploy" / "run"], env=environ, check=True, capture_output=True)
    assert calls(ready_checkout) == ["up", f"run --task {ready_checkout}/deploy/example.yaml"]


@pytest.mark.parametrize("exit_code", [0, 1, 2])
def test_run_once_stops_the_stack_and_exits_as_the_task_did(ready_checkout: Path, exit_code: int) -> None:
    done = subprocess.run(
        [ready_checkout / "deploy" / "run", "--once", "an objective", "--output", "out"],
        env={**os.environ, "RUN_EXIT": str(exit_code)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == exit_code
    assert calls(ready_checkout) == ["up", "run an objective --output out", "down"]


def test_run_once_stops_the_stack_on_ctrl_c(ready_checkout: Path) -> None:
    process = subprocess.Popen(
        [ready_checkout / "deploy" / "run", "--once"],
        env={**os.environ, "RUN_S": "300"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # Whoever runs the tests in the background of a shell has them ignore it, and bash cannot trap that again.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until(lambda: len(calls(ready_checkout)) == 2, "the task runs")
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    assert process.wait(timeout=90) == 130
    assert calls(ready_checkout)[-1] == "down"
