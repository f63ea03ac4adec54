"""Real hub, planner, gates, memory and wrappers as processes, around model servers that answer what a test says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from protocol.messages.result import TaskView
from services.ctl.bench.bare_stack import BareStack
from services.kit.config import CHECKOUT
from tests.conftest import temporary_home
from tests.fakes.gguf_files import write_tiny_gguf


class ScriptedStack:
    """A stack whose models answer what a test says."""

    def __init__(self, stack: BareStack, folder: Path) -> None:
        self.stack = stack
        self.model = folder / "tiny.gguf"
        self._script = folder / "script.json"
        self._record = folder / "record.jsonl"
        self._folder = folder

    def say(self, *rules: dict[str, Any], persist: bool = False) -> None:
        """Rules for all models; every test uses words of its own, so that turns do not mix.

        With `persist` the answers go on in turn after a respawn of the engine.
        """
        script = {"record": str(self._record), "rules": list(rules), "persist": persist}
        draft = self._script.with_suffix(".draft")
        draft.write_text(json.dumps(script), encoding="utf-8")
        draft.replace(self._script)

    def held(self, name: str) -> str:
        """The `hold` of an answer that is not given before `release` is called with this name."""
        return str(self._folder / f"{name}.released")

    def release(self, name: str) -> None:
        """Let the answers be given that are held under this name."""
        Path(self.held(name)).touch()

    def prompts_with(self, text: str) -> list[str]:
        """Prompts that held this text, in order."""
        lines = self._record.read_text(encoding="utf-8").splitlines() if self._record.exists() else []
        return [line for line in lines if text in line]

    def tierline(self, *argv: str) -> str:
        """What the command prints; fails if it could not."""
        command = [sys.executable, "-m", "services.ctl", *argv]
        done = subprocess.run(command, env=self.stack.environ, capture_output=True, text=True, timeout=120)
        assert done.returncode in (0, 1), done.stderr  # 1 = about a task that failed
        return done.stdout

    def requests_with(self, text: str) -> list[dict[str, Any]]:
        """Bodies of the requests whose prompt held this text, in order."""
        return [json.loads(line)["body"] for line in self.prompts_with(text)]

    def run(self, *steps: dict[str, Any], **fields: Any) -> TaskView:
        """Run a task of these steps; the actor is the worker and there are no gates unless a step says otherwise."""
        filled = [{"actor": "worker", "gates": []} | step for step in steps]
        task = {"objective": "test the routing of failures", "plan": {"steps": filled}} | fields
        return self.stack.client.run(task, timeout_s=300)

    def switch_learning(self, *, on: bool) -> None:
        """Whether memory's advice may replace the rules'; off where a test needs the rules' choice every time."""
        text = f"learning: {{enabled: {str(on).lower()}}}\n"
        (self.stack.registry / "learning.yaml").write_text(text, encoding="utf-8")
        self.stack.restart("planner")
        self.stack.wait_ready(["planner"])

    def figures(self, model: str) -> dict[str, Any]:
        """What the service of this entry last told the hub about itself."""
        peers = self.stack.client.status().peers
        return next(peer.metrics for peer in peers if peer.service == f"inference-{model}")


@contextmanager
def scripted_stack(
    *,
    worker_slots: int = 2,
    threads: int = 1,
    prepare: Callable[[Path], None] = lambda registry: None,
    more: Mapping[str, dict[str, Any]] | None = None,
) -> Iterator[ScriptedStack]:
    """Up and ready; gone when the context ends.

    `prepare` may change the registry's files before anything starts; `more` are further entries of models.yaml.
    """
    binary = str(CHECKOUT / "tests" / "fakes" / "llama_server.py")
    with temporary_home() as folder:
        model = write_tiny_gguf(folder / "tiny.gguf")
        script = folder / "script.json"
        script.write_text("{}", encoding="utf-8")
        entry = {"path": str(model), "engine": "llama-server", "binary": binary, "slots": 2, "context_tokens": 2048}
        entry["threads"] = threads
        models = {
            "front": entry | {"tier": "A"},
            "specialist": entry | {"tier": "B"},
            "worker": entry | {"tier": "C", "slots": worker_slots},
        }
        models |= {name: entry | fields for name, fields in (more or {}).items()}
        stack = BareStack(folder, models=models, environ={"TIERLINE_FAKE_SCRIPT": str(script)})
        prepare(stack.registry)
        with stack:
            yield ScriptedStack(stack, folder)
