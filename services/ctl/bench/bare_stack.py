"""A whole stack of plain child processes in a home of its own: for benchmarks, and for tests on real processes.

No supervisord: whoever uses it decides what is started, killed, frozen and started again, and nothing restarts by
itself in between. Everything lives under one folder and is gone when the context ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import yaml

from protocol.client import Client
from protocol.errors import CallError
from services.kit.config import CHECKOUT, Home, load_home

CORE: Final = ("scheduler", "planner", "gates", "memory")
_READY: Final = ("ready", "parked")
_READY_S: Final = 120.0
_END_S: Final = 30.0


class StackNotReadyError(Exception):
    """A process did not become ready; the text says which, and what it last wrote."""


def bound(module: str, *arguments: str) -> list[str]:
    """A command line for this process, which runs a module until the thread that starts it ends, if not before."""
    return [sys.executable, "-m", "services.kit.bound", str(os.getpid()), module, *arguments]


class BareStack:
    """`with BareStack(folder, models={…}) as stack`: processes up and ready, `stack.client` connected.

    `models` replaces registry/models.yaml (entry name -> fields), `None` keeps the shipped one; `core` are the other
    services to start, by name; `weights` are those of clients, by name or pattern.
    """

    def __init__(
        self,
        folder: Path,
        *,
        models: Mapping[str, Mapping[str, Any]] | None = None,
        core: Iterable[str] = CORE,
        weights: Mapping[str, float] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.registry = folder / "registry"
        shutil.copytree(CHECKOUT / "registry", self.registry, ignore=shutil.ignore_patterns("*.md", "examples"))
        if models is not None:
            text = yaml.safe_dump({"models": {name: dict(entry) for name, entry in models.items()}}, sort_keys=False)
            (self.registry / "models.yaml").write_text(text, encoding="utf-8")
        if weights:
            text = yaml.safe_dump({"clients": {name: {"weight": weight} for name, weight in weights.items()}})
            (self.registry / "clients.yaml").write_text(text, encoding="utf-8")
        names = models or yaml.safe_load((self.registry / "models.yaml").read_text(encoding="utf-8"))["models"]
        inherited = load_home()
        self.environ: dict[str, str] = {
            **os.environ,
            "TIERLINE_HOME": str(folder / "home"),
            "TIERLINE_REGISTRY": str(self.registry),
            "TIERLINE_CACHE": str(inherited.cache),
            "TIERLINE_MODELS": str(inherited.models),
            **(environ or {}),
        }
        self.environ.pop("SUPERVISOR_ENABLED", None)
        self.home: Home = load_home(self.environ).make()
        self.argv: dict[str, list[str]] = {name: bound(f"services.{name}") for name in core}
        for name in names:
            self.argv[f"inference-{name}"] = bound("services.inference", "--model", name)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.client: Client = Client(self.home.hub_address, name="bare-stack")

    def __enter__(self) -> BareStack:
        """Start everything and wait until all of it is ready."""
        try:
            for name in self.argv:
                self.start(name)
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self.close()

    def start(self, name: str) -> None:
        """Start one process by name; its stdout and stderr go to `<name>.out` among the logs."""
        with (self.home.logs / f"{name}.out").open("ab") as sink:
            self.processes[name] = subprocess.Popen(
                self.argv[name],
                cwd=CHECKOUT,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the process alone, as an accident would, and reap it if it ends it."""
        process = self.processes[name]
        process.send_signal(number)
        if number is signal.SIGKILL:
            process.wait(_END_S)

    def restart(self, name: str) -> None:
        """kill -9 and start again at once."""
        self.kill(name)
        self.start(name)

    def wait_ready(self, names: Iterable[str] | None = None, within_s: float = _READY_S) -> None:
        """Wait until these (default: all but the hub) are ready in the hub's eyes; raises StackNotReadyError.

        What the hub says of an earlier process of the same name, whose end it has not seen yet, does not count.
        """
        wanted = set(names if names is not None else self.argv) - {"scheduler"}
        end = time.monotonic() + within_s
        seen: dict[str, str] = {}
        while time.monotonic() < end:
            for name, process in self.processes.items():
                if process.poll() is not None and name in (*wanted, "scheduler"):
                    raise StackNotReadyError(f"{name} ended with status {process.returncode}: {self.last_words(name)}")
            try:
                peers = self.client.status(timeout_s=2).peers
                running = {name: process.pid for name, process in self.processes.items()}
                own = (peer for peer in peers if running.get(peer.service, peer.pid) == peer.pid)
                seen = {peer.service: f"{peer.state} {peer.reason or ''}" for peer in own}
            except CallError:
                continue
            if all(seen.get(name, "").startswith(_READY) for name in wanted):
                return
            time.sleep(0.05)
        missing = sorted(name for name in wanted if not seen.get(name, "").startswith(_READY))
        words = "; ".join(f"{name}: {seen.get(name, 'never came')} {self.last_words(name)}" for name in missing)
        raise StackNotReadyError(f"not ready within {within_s:g} s: {words}")

    def last_words(self, name: str) -> str:
        """The end of what a process wrote outside its log."""
        path = self.home.logs / f"{name}.out"
        return path.read_bytes()[-2_000:].decode("utf-8", "replace") if path.exists() else ""

    def close(self) -> None:
        """SIGTERM to all, SIGKILL to the groups of those that stay; bounded."""
        self.client.close()
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        end = time.monotonic() + _END_S
        for process in self.processes.values():
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # nothing of the group is left, as it should be
