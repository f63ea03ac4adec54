"""A real llama-server as another host's server is a tier of the stack, from the client to its tokens and back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from protocol.messages.result import TaskState
from protocol.messages.session import PeerReport
from services.ctl.bench.bare_stack import BareStack
from services.ctl.bench.demo_models import DEMO_MODEL
from services.inference.engines import find_native
from services.kit.config import CHECKOUT, load_home
from tests.conftest import temporary_home
from tests.waiting import until

KEY = "sk-other-host-4711"


class OtherHost:
    """The demo model behind a llama-server (the built one, else the wheel's) that is no child of the stack."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        home = load_home()
        model, native = str(home.models / DEMO_MODEL), find_native(home)
        self.argv = [
            *(sys.executable, "-m", "services.inference.embedded", "--model", model, "--alias", "far"),
            *("--port", str(self.port), "--slots", "2", "--context-tokens", "2048", "--threads", "1"),
        ]
        if native is not None:
            self.argv = [
                *(str(native), "--model", model, "--alias", "far", "--host", "127.0.0.1", "--port", str(self.port)),
                *("--ctx-size", "4096", "--parallel", "2", "--no-kv-unified", "--threads", "1", "--offline"),
            ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.argv,
            cwd=CHECKOUT,
            env={**os.environ, "LLAMA_API_KEY": KEY},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(self.is_well, "the other host's server has loaded its model")

    def is_well(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
            return True
        return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(60)


@pytest.fixture
def other_host() -> Iterator[OtherHost]:
    host = OtherHost()
    host.start()
    yield host
    host.stop()


def task(action: str) -> dict[str, object]:
    step = {
        "id": "S1", "actor": "worker", "action": action, "outputs": [{"name": "greeting", "kind": "text"}],
        "max_tokens": 24,
    }  # fmt: skip
    return {"objective": action, "task_type": "chat", "plan": {"steps": [step]}}


def test_a_task_runs_on_a_server_elsewhere_survives_its_outage_and_shows_its_key_nowhere(other_host: OtherHost) -> None:
    near = {"tier": "A", "engine": "noop", "slots": 2, "context_tokens": 4096}
    far = {
        "tier": "C", "engine": "openai", "base_url": f"http://127.0.0.1:{other_host.port}/v1", "remote_model": "far",
        "api_key_env": "FAR_KEY", "slots": 2, "context_tokens": 2048,
        "remote": {"dialect": "llama-server", "attempts": 2, "breaker_failures": 2, "probe_after_s": 0.5,
                   "probe_max_s": 1},
    }  # fmt: skip
    models = {"front": near, "specialist": near, "worker": far}
    with temporary_home() as folder:
        (folder / "home" / "secrets").mkdir(parents=True)
        (folder / "home" / "secrets" / "FAR_KEY").touch(0o600)
        (folder / "home" / "secrets" / "FAR_KEY").write_text(KEY)
        with BareStack(folder, models=models, core=("scheduler", "planner")) as stack:
            view = stack.client.run(task("Say hello to the harbour."), timeout_s=300)
            assert view.state is TaskState.SUCCEEDED, view.failure
            assert view.artefacts[0].value
            (attempt,) = view.steps[0].attempts
            assert attempt.worker == "inference-worker"
            assert attempt.prompt_tokens > 10
            assert attempt.generated_tokens > 0

            other_host.stop()
            task_id = stack.client.submit(task("Say goodbye to the harbour.")).task_id
            until(lambda: worker(stack).state == "degraded", "the tier is degraded")
            peer = worker(stack)
            assert "circuit open" in (peer.reason or "")
            assert peer.metrics["breaker"] in ("open", "half-open")
            status = tierline(stack, "status")
            assert "circuit open" in status.stdout
            models_shown = tierline(stack, "models", "--json")
            assert "FAR_KEY" in models_shown.stdout, "its name may be shown"
            other_host.start()
            view = stack.client.result(task_id, timeout_s=300)
            assert view.state is TaskState.SUCCEEDED, view.failure
            assert len(view.steps[0].attempts) == 1, "an outage is no failed attempt"

            shown = [
                status,
                models_shown,
                tierline(stack, "status", "--json"),
                tierline(stack, "show", task_id, "--json"),
            ]
        said = "".join(done.stdout + done.stderr for done in shown)
        assert KEY not in said + view.model_dump_json()
        files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "secrets"]
        logs = {path.name for path in files if path.suffix == ".jsonl"}
        assert {"scheduler.jsonl", "inference-worker.jsonl"} <= logs
        assert [path for path in files if KEY.encode() in path.read_bytes()] == []
        assert opened(folder / "home" / "logs" / "inference-worker.jsonl") >= 1


def worker(stack: BareStack) -> PeerReport:
    return next(peer for peer in stack.client.status().peers if peer.service == "inference-worker")


def tierline(stack: BareStack, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.ctl", *argv],
        cwd=CHECKOUT,
        env=stack.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def opened(log: Path) -> int:
    return sum(json.loads(line)["event"] == "remote.circuit_opened" for line in log.read_text().splitlines())
