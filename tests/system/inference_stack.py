"""A home, a registry and a scripted hub around real inference processes. For tests of that one service."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from protocol.messages.base import Message
from protocol.messages.infer import ChatMessage, InferRequest
from tests.fakes.gguf_files import write_tiny_gguf
from tests.fakes.hub import ScriptedHub
from tests.waiting import WITHIN_S

CHECKOUT = Path(__file__).resolve().parents[2]
FAKE_BINARY = CHECKOUT / "tests" / "fakes" / "llama_server.py"


def ask_for(prompt: str, **fields: Any) -> InferRequest:
    fields.setdefault("max_tokens", 100)
    return InferRequest(role="tester", messages=[ChatMessage(role="user", content=prompt)], **fields)


class InferenceStack:
    """Context manager; ends what it started."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="tl", dir="/tmp"))  # short: ipc paths are limited to 107 bytes
        self.registry = self.root / "registry"
        self.models = self.root / "models"
        self._entries: dict[str, dict[str, Any]] = {}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> InferenceStack:
        shutil.copytree(CHECKOUT / "registry", self.registry, ignore=shutil.ignore_patterns("schema"))
        self.models.mkdir()
        (self.root / "run").mkdir(mode=0o700)
        self.hub = ScriptedHub(f"ipc://{self.root}/run/hub.sock")
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        self.hub.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def entry(self, name: str, **fields: Any) -> None:
        """Add or replace an entry of models.yaml; without `path` it gets a tiny GGUF of its own."""
        if fields.get("engine") not in ("noop", "openai") and "path" not in fields:
            trained = max(4096, int(fields.get("context_tokens", 0)))
            fields["path"] = str(write_tiny_gguf(self.model_path(name), context_tokens=trained))
        self._entries[name] = {"tier": "A", **fields}
        self._write()

    def _write(self) -> None:
        (self.registry / "models.yaml").write_text(yaml.safe_dump({"models": self._entries}))
        first = next(iter(self._entries))
        roles = {"tester": {"description": "tests", "model": first, "prompt": "Answer.", "max_tokens": 16}}
        (self.registry / "roles.yaml").write_text(yaml.safe_dump({"roles": roles}))
        (self.registry / "personas.yaml").write_text("personas: {}\n")
        (self.registry / "gates.yaml").write_text("gates: {}\n")

    def model_path(self, name: str) -> Path:
        return self.models / f"{name}.gguf"

    def script(self, name: str, script: dict[str, Any]) -> None:
        """What the fake engine of this entry answers; may be changed while it runs."""
        path = Path(f"{self.model_path(name)}.script.json")
        new = path.with_suffix(".new")
        new.write_text(json.dumps(script))
        new.replace(path)

    def start(self, name: str, **env: str) -> subprocess.Popen[bytes]:
        stderr = (self.root / f"{name}.err").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "services.inference", "--model", name],
            cwd=CHECKOUT,
            env={
                **os.environ,
                "TIERLINE_HOME": str(self.root),
                "TIERLINE_REGISTRY": str(self.registry),
                "TIERLINE_MODELS": str(self.models),
                **env,
            },
            stderr=stderr,
        )
        stderr.close()
        self._processes.append(process)
        return process

    def stderr(self, name: str) -> str:
        return (self.root / f"{name}.err").read_text()

    def ask(self, name: str, body: Message, timeout_s: float = WITHIN_S) -> Message:
        return self.hub.ask(f"inference-{name}", "infer.request", body, timeout_s=timeout_s)

    def figures(self, name: str) -> dict[str, Any]:
        """What the service counts at this moment; what it has from its engine may be a second old."""
        return self.hub.newest_pong(f"inference-{name}").metrics

    def await_figures(self, name: str, within_s: float = WITHIN_S, **wanted: Any) -> dict[str, Any]:
        """Metrics of the newest pong once the service is ready and has these figures."""
        service = f"inference-{name}"

        def reached() -> bool:
            pong = self.hub.pongs[service]
            has = all(pong.metrics.get(figure) == value for figure, value in wanted.items())
            return has and pong.state.value == "ready"

        self.hub.newest_pong(service)
        self.hub.until(reached, f"{service} has {wanted}", within_s)
        return self.hub.pongs[service].metrics
