"""`up`, `down` and what lies between, on the whole stack under a real supervisord, with models that need no file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from services.ctl.stack import stray_processes
from services.ctl.supervisor import Supervisor
from services.kit.config import CHECKOUT, load_home

SERVICES = {"gates", "inference-front", "inference-worker", "memory", "planner", "scheduler"}
BROKEN = """[program:broken]
command=python -c "import sys; sys.exit('the disk is made of cheese')"
redirect_stderr=true
stdout_logfile=%(ENV_TIERLINE_HOME)s/logs/broken.out
startretries=1000
"""


class Installation:
    """A home with a registry whose models answer at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        registry = root / "registry"
        shutil.copytree(CHECKOUT / "registry", registry)
        roles = yaml.safe_load((registry / "roles.yaml").read_text())
        for role in roles["roles"].values():
            role["model"] = "front" if role["model"] == "front" else "worker"
        (registry / "roles.yaml").write_text(yaml.safe_dump(roles))
        # Models that answer anything at once cannot follow each shape that is tried for the sake of learning.
        (registry / "learning.yaml").write_text("learning: {enabled: false}\n")
        self.write_models(slots=4)
        self.environment = {
            **os.environ,
            "TIERLINE_HOME": str(root / "h"),
            "TIERLINE_REGISTRY": str(registry),
            "PYTHONPATH": str(CHECKOUT),
        }
        self.home = load_home(self.environment)

    def write_models(self, slots: int) -> None:
        entry = {"engine": "noop", "context_tokens": 4096, "slots": slots}
        models = {"front": {"tier": "A", **entry}, "worker": {"tier": "C", **entry}}
        (self.root / "registry" / "models.yaml").write_text(yaml.safe_dump({"models": models}))

    def tierline(self, *argv: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services.ctl", *argv],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def pids(self) -> dict[str, int]:
        return {one.name: one.pid for one in Supervisor(self.home).processes()}


@pytest.fixture(scope="module")
def installation() -> Iterator[Installation]:
    with tempfile.TemporaryDirectory(prefix="tl-", dir="/tmp") as folder:
        installation = Installation(Path(folder))
        try:
            yield installation
        finally:
            installation.tierline("down")


@pytest.fixture
def running(installation: Installation) -> Installation:
    done = installation.tierline("up")
    assert done.returncode == 0, done.stderr
    return installation


def test_up_twice_at_the_same_time_starts_one_stack(installation: Installation) -> None:
    ups = [
        subprocess.Popen(
            [sys.executable, "-m", "services.ctl", "up", "--json"],
            env=installation.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for up in ups:
        out, err = up.communicate(timeout=300)
        assert up.returncode == 0, err
        assert {service["name"] for service in json.loads(out)["services"]} == SERVICES
    supervisors = [
        process for process in stray_processes(installation.home) if "supervisor.supervisord" in process.cmdline()
    ]
    assert len(supervisors) == 1


def test_up_on_a_running_stack_restarts_nothing(running: Installation) -> None:
    before = running.pids()
    done = running.tierline("up")
    assert done.returncode == 0, done.stderr
    assert "nothing" in done.stderr
    assert running.pids() == before


def test_a_task_runs_from_end_to_end_and_is_explained(running: Installation) -> None:
    done = running.tierline("run", "compare apples, pears and plums", "--type", "doc", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    view = json.loads(done.stdout)
    assert view["state"] == "succeeded"
    assert view["plan"]["decisions"]
    explained = json.loads(running.tierline("explain", view["task_id"], "--json").stdout)
    assert explained["memory_unavailable"] is None
    assert len(explained["memory"]) == sum(len(one["ids"]) for one in view["plan"]["decisions"])


def test_a_killed_service_is_seen_and_comes_back(running: Installation) -> None:
    before = running.pids()["planner"]
    psutil.Process(before).kill()
    done = running.tierline("up")  # waits until all are ready again
    assert done.returncode == 0, done.stderr
    assert running.pids()["planner"] != before


def test_a_changed_registry_restarts_the_services_that_have_read_it(running: Installation) -> None:
    before = running.pids()
    running.write_models(slots=6)
    done = running.tierline("up")
    assert done.returncode == 0, done.stderr
    assert "the registry has changed" in done.stderr
    after = running.pids()
    assert all(after[name] != before[name] for name in SERVICES)
    worker = next(m for m in json.loads(running.tierline("models", "--json").stdout)["models"] if m["name"] == "worker")
    assert worker["live"]["granted"] >= 6


def test_up_names_the_service_that_does_not_start_and_its_line(running: Installation) -> None:
    local = running.home.conf_d / "local.conf"
    local.write_text(BROKEN)
    try:
        done = running.tierline("up")
        assert done.returncode == 1
        assert "broken" in done.stderr
        assert "logs/broken.out: the disk is made of cheese" in done.stderr
    finally:
        local.unlink()
    assert running.tierline("up").returncode == 0
    assert "broken" not in running.pids()


def test_doctor_is_content_with_a_running_stack(running: Installation) -> None:
    checks = json.loads(running.tierline("doctor", "--json").stdout)["checks"]
    leftovers = next(check for check in checks if check["name"] == "leftovers")
    assert leftovers["verdict"] == "ok"


def test_down_leaves_no_process_and_up_works_again(running: Installation) -> None:
    done = running.tierline("down")
    assert done.returncode == 0, done.stderr
    assert "was killed" not in done.stdout
    assert stray_processes(running.home) == []
    assert running.tierline("status").returncode == 3
    assert running.tierline("up").returncode == 0


def test_down_ends_what_a_killed_supervisord_left_behind(running: Installation) -> None:
    supervisord = next(
        process for process in stray_processes(running.home) if "supervisor.supervisord" in process.cmdline()
    )
    supervisord.kill()
    supervisord.wait(60)
    done = running.tierline("down")
    assert done.returncode == 0, done.stderr
    assert stray_processes(running.home) == []
