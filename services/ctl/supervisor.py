"""Speaks to this home's supervisord over its socket, and starts it where none runs.

Plain `supervisorctl` works on the same supervisord; this is for commands that need the answers as data. What the
programs are is in deploy/supervisord.conf and both conf.d folders; whether a service is *ready* only the hub knows.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.ctl.outcomes import CommandError
from services.kit.config import CHECKOUT, Home

CONFIG: Final = CHECKOUT / "deploy" / "supervisord.conf"

_CALL_TIMEOUT_S: Final = 10.0
_START_TIMEOUT_S: Final = 30.0


class SupervisorGone(Exception):
    """No supervisord answers at this home: start one, or treat the stack as stopped."""


class SupervisorStuck(CommandError):
    """A supervisord holds the socket but does not answer: wait, or end it with `tierline down`."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One program as supervisord sees it."""

    name: str
    state: str
    """`running`, `starting`, `backoff`, `stopped`, `exited`, `fatal`, … in small letters."""
    pid: int
    """0 while it does not run."""
    description: str
    uptime_s: int
    output: Path
    """Where its standard error goes: what a crash printed. With redirect_stderr that is its standard output."""


class Supervisor:
    """The supervisord of one home. Every call raises SupervisorGone without one, SupervisorStuck if it hangs."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._socket = home.run / "supervisor.sock"

    def pid(self) -> int:
        """Process id of supervisord."""
        return int(self._call("supervisor.getPID"))

    def processes(self) -> list[ProcessInfo]:
        """All programs, by name."""
        found = [
            ProcessInfo(
                name=str(item["name"]),
                state=str(item["statename"]).lower(),
                pid=int(item["pid"]),
                description=str(item["description"]),
                uptime_s=max(0, int(item["now"]) - int(item["start"])) if item["pid"] else 0,
                output=Path(str(item["stderr_logfile"] or item["stdout_logfile"])),
            )
            for item in self._call("supervisor.getAllProcessInfo")
        ]
        return sorted(found, key=lambda process: process.name)

    def apply_config(self, rewritten: Set[str] | None) -> list[str]:
        """Read the configuration again: end what is gone, restart what was rewritten, start what is new or stopped.

        `rewritten` names programs beyond those whose configuration changed, None means all. Returns the names of
        programs that were ended, restarted or added.
        """
        ((added, changed, removed),) = self._call("supervisor.reloadConfig")
        known = {process.name for process in self.processes()} - {*added, *removed}
        again = known if rewritten is None else known & {*rewritten, *changed}
        for name in sorted({*removed, *again}):
            self._call("supervisor.stopProcessGroup", name)
            self._call("supervisor.removeProcessGroup", name)
        for name in sorted({*added, *again}):
            self._call("supervisor.addProcessGroup", name)
        self._call("supervisor.startAllProcesses", False)
        return sorted({*added, *removed, *again})

    def add_programs(self) -> list[str]:
        """Read the configuration again and start what is new in it; all else stays as it is. Returns the names."""
        ((added, _, _),) = self._call("supervisor.reloadConfig")
        for name in sorted(added):
            self._call("supervisor.addProcessGroup", name)
        return sorted(added)

    def remove_program(self, name: str) -> None:
        """Stop one program and forget it until its configuration is read again. It may be gone already."""
        if any(process.name == name for process in self.processes()):
            self._call("supervisor.stopProcessGroup", name)
            self._call("supervisor.removeProcessGroup", name)

    def shut_down(self) -> None:
        """Ask for the end of all programs and of supervisord; returns before they have ended."""
        self._call("supervisor.shutdown")

    def start(self) -> None:
        """Start supervisord in the background and wait until it answers. Raises CommandError if it does not."""
        if not CONFIG.is_file():
            raise CommandError(f"{CONFIG} is missing: 'tierline up' works from a checkout of the project")
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(CONFIG)]
        try:
            # Output goes to a file, not to a pipe: the daemon's children would hold a pipe open.
            with (self._home.logs / "supervisord.out").open("wb") as sink:
                done = subprocess.run(
                    command,
                    env=self._environment(),
                    cwd=CHECKOUT,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    timeout=_START_TIMEOUT_S,
                    check=False,
                )
        except subprocess.TimeoutExpired as err:
            raise CommandError(f"supervisord did not go into the background within {_START_TIMEOUT_S:g} s") from err
        if done.returncode != 0:
            words = (self._home.logs / "supervisord.out").read_text(encoding="utf-8", errors="replace")
            last = (words.strip().splitlines() or ["it said nothing"])[-1]
            raise CommandError(f"supervisord could not start (exit {done.returncode}): {last}")
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self.pid()
            except SupervisorGone as err:
                if time.monotonic() > deadline:
                    log = self._home.logs / "supervisord.log"
                    raise CommandError(f"supervisord started but does not answer; see {log}") from err
                time.sleep(0.1)
            else:
                return

    def _environment(self) -> Mapping[str, str]:
        """Ours, with the folders written out, and with this very Python first for programs that say `python`."""
        home = self._home
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "TIERLINE_HOME": str(home.root),
            # Not the files that people edit: the copy that `up` or a reload has checked and taken up.
            "TIERLINE_REGISTRY": str(home.current_registry),
            # Those files: what is adopted for its outcomes is written there as well.
            "TIERLINE_REGISTRY_SOURCE": str(home.registry),
            "TIERLINE_CACHE": str(home.cache),
            "TIERLINE_MODELS": str(home.models),
        }

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = _UnixTransport(self._socket)
        try:
            with xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=transport) as server:
                return getattr(server, method)(*arguments)
        except xmlrpc.client.Fault as err:
            raise CommandError(f"supervisord refused {method}: {err.faultString}") from err
        except TimeoutError as err:
            message = f"supervisord holds {self._socket} but has not answered within {_CALL_TIMEOUT_S:g} s"
            raise SupervisorStuck(f"{message}; try again, or end it with: tierline down") from err
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as err:
            raise SupervisorGone(f"no supervisord answers at {self._socket}: {err}") from err


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket, with a deadline for every operation."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_CALL_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket file instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)
