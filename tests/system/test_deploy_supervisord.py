"""supervisord's configuration, read by supervisord itself and driven by plain supervisorctl.

The programs here are stand-ins: what the services do under supervisord is tested with the real stack elsewhere.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor.datatypes import RestartUnconditionally
from supervisor.options import ServerOptions

from tests.waiting import until

CHECKOUT = Path(__file__).resolve().parents[2]
DEPLOY = CHECKOUT / "deploy"
STAND_IN = """
[program:inference-front]
command=sleep 60
directory=%(ENV_TIERLINE_CHECKOUT)s
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A TIERLINE_HOME with the folders that 'tierline up' makes."""
    for folder in ("run", "logs", "conf.d"):
        (tmp_path / "tierline" / folder).mkdir(parents=True)
    return tmp_path / "tierline"


def parse(home: Path, monkeypatch: pytest.MonkeyPatch) -> ServerOptions:
    monkeypatch.setenv("TIERLINE_HOME", str(home))
    options = ServerOptions()
    options.realize(["-c", str(DEPLOY / "supervisord.conf")])
    return options


def test_every_program_is_restarted_for_ever_and_stopped_with_all_its_children(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (DEPLOY / "inference.conf.in").read_text()
    (home / "conf.d" / "inference-front.conf").write_text(template.replace("@MODEL@", "front"))
    programs = [p for group in parse(home, monkeypatch).process_group_configs for p in group.process_configs]

    assert {p.name for p in programs} == {"scheduler", "memory", "gates", "planner", "inference-front"}
    for program in programs:
        assert program.autorestart is RestartUnconditionally, program.name
        assert program.startretries > 100_000, program.name
        assert (program.stopsignal, program.stopasgroup, program.killasgroup) == (signal.SIGTERM, True, True)
        assert Path(program.stdout_logfile) == home / "logs" / f"{program.name}.jsonl", "what 'tail -f' shows"
        assert Path(program.stderr_logfile) == home / "logs" / f"{program.name}.out"
        assert Path(program.directory).resolve() == CHECKOUT
        assert "PATH" not in program.environment, "it would grow each time the file is read"


def test_an_operators_own_file_in_the_home_sets_the_user(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "conf.d" / "local.conf").write_text("[supervisord]\nuser=nobody\n")
    assert parse(home, monkeypatch).configroot.supervisord.user == "nobody"


def test_the_procfile_starts_what_supervisord_starts() -> None:
    names = set(re.findall(r"^([a-z-]+): exec python -m services\.", (CHECKOUT / "Procfile").read_text(), re.MULTILINE))
    assert {path.stem for path in (DEPLOY / "conf.d").glob("*.conf")} <= names
    assert {name for name in names if name.startswith("inference-")}


@pytest.fixture
def stand_in_checkout(tmp_path: Path, home: Path) -> Iterator[Path]:
    """A folder with this supervisord.conf, none of the services, and a stand-in program in the home."""
    checkout = tmp_path / "checkout"
    (checkout / "deploy").mkdir(parents=True)
    shutil.copy(DEPLOY / "supervisord.conf", checkout / "deploy")
    (home / "conf.d" / "inference-front.conf").write_text(STAND_IN)
    daemon = subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(checkout / "deploy" / "supervisord.conf")],
        env={**os.environ, "TIERLINE_HOME": str(home)},
        stdout=subprocess.DEVNULL,
    )
    yield checkout
    daemon.terminate()
    assert daemon.wait(timeout=90) == 0


def supervisorctl(checkout: Path, state: Path, *arguments: str) -> str:
    """Run supervisorctl as a program of .venv runs: with the .pth file, with no TIERLINE_HOME of its own."""
    site = checkout / "site-packages"
    site.mkdir(exist_ok=True)
    shutil.copy(DEPLOY / "tierline-home.pth", site)
    start = f"import site; site.addsitedir({str(site)!r}); from supervisor.supervisorctl import main; main()"
    env = {name: value for name, value in os.environ.items() if name != "TIERLINE_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", start, "-c", "deploy/supervisord.conf", *arguments],
        cwd=checkout,
        env={**env, "XDG_STATE_HOME": str(state)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    return done.stdout + done.stderr


def wait_for(pattern: str, checkout: Path, state: Path) -> str:
    said: list[re.Match[str] | None] = [None]

    def found() -> bool:
        said[0] = re.search(pattern, supervisorctl(checkout, state, "status"))
        return said[0] is not None

    until(found, f"supervisorctl says {pattern!r}")
    assert said[0] is not None
    return said[0].group(1)


def test_plain_supervisorctl_finds_the_stack_and_a_killed_program_comes_back(
    stand_in_checkout: Path, home: Path
) -> None:
    state = home.parent
    pid = int(wait_for(r"inference-front +RUNNING +pid (\d+)", stand_in_checkout, state))
    assert Path(f"/proc/{pid}/cwd").resolve() == stand_in_checkout
    assert stat.S_IMODE((home / "run" / "supervisor.sock").stat().st_mode) == 0o700

    os.kill(pid, signal.SIGKILL)
    again = int(wait_for(rf"inference-front +RUNNING +pid (?!{pid},)(\d+)", stand_in_checkout, state))
    assert again != pid
