"""Engines: how a registry entry becomes the command line of a child that serves llama.cpp's HTTP API.

Command lines are generated here and nowhere else. Flags differ between versions of llama-server, so the ones used are
looked up in `--help` of the binary at hand before it is started. The life of the child is `machine`'s business, its
HTTP API `llama_http`'s.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from services.inference.probe import ProbeFailed, probe
from services.kit.config import Home
from services.kit.registry import ModelEntry

API_KEY_VARIABLE: Final = "LLAMA_API_KEY"
"""The key travels in the environment: an argument would be readable for every user of the machine."""

CACHE_RAM_MIB: Final = 256
"""Prompts of idle slots kept in memory. llama-server would take 8 GiB per process, more than small machines have."""

LOG_VERBOSITY: Final = 2
"""Warnings and errors. At the next level every request writes lines, and the file would grow without bound."""

HOST: Final = "127.0.0.1"
_HELP_TIMEOUT_S: Final = 20.0
_FLAG: Final = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")
_REMOVED: Final = "argument has been removed"


class EngineUnusable(Exception):
    """No engine can be started for this entry; the message says what to do."""


class Engine(Protocol):
    """What the life cycle needs to know about an engine."""

    name: str
    """As in models.yaml, for status and answers."""

    async def check(self) -> None:
        """Raise EngineUnusable if the engine cannot be started on this machine."""
        ...

    def command(self, entry: ModelEntry, port: int) -> list[str]:
        """Program and arguments that serve this entry on `port` of 127.0.0.1."""
        ...


class NativeEngine:
    """A llama-server binary."""

    name = "llama-server"

    def __init__(self, binary: Path, probe_for: ModelEntry) -> None:
        self._binary = binary
        self._used = [argument for argument in self.command(probe_for, 1) if argument.startswith("--")]

    async def check(self) -> None:
        """See Engine. Asks the binary for its flags."""
        if not os.access(self._binary, os.X_OK) or not self._binary.is_file():
            raise EngineUnusable(f"{self._binary} is no executable file: repair binary in models.yaml")
        try:
            probed = await probe([str(self._binary), "--help"], timeout_s=_HELP_TIMEOUT_S)
        except ProbeFailed as err:
            raise EngineUnusable(f"{self._binary} does not run: {err}") from err
        known, removed = flags_in_help(probed.output.decode("utf-8", "replace"))
        missing = [flag for flag in self._used if flag not in known or flag in removed]
        if missing:
            raise EngineUnusable(
                f"{self._binary} does not know {', '.join(missing)} (its --help ended with {probed.status}): "
                "build a version that does with deploy/build-native, or set engine: embedded"
            )

    def command(self, entry: ModelEntry, port: int) -> list[str]:
        """See Engine. Flags and values are separate arguments: llama-server does not take `--flag=value`."""
        return [
            str(self._binary),
            *("--model", str(entry.path)),
            *("--alias", entry.name),
            *("--host", HOST),
            *("--port", str(port)),
            *("--ctx-size", str(entry.context_tokens * entry.slots)),
            *("--parallel", str(entry.slots)),
            "--no-kv-unified",  # each slot has its own context: a long prompt cannot take another slot's
            *("--threads", str(entry.threads)),
            *("--cache-ram", str(CACHE_RAM_MIB)),
            *("--log-verbosity", str(LOG_VERBOSITY)),
            "--metrics",
            "--slots",
            "--offline",
        ]


class EmbeddedEngine:
    """llama.cpp from the xllamacpp wheel, in a Python child (`services.inference.embedded`)."""

    name = "embedded"

    async def check(self) -> None:
        """See Engine. The wheel is a dependency of the project; without it the child says so."""

    def command(self, entry: ModelEntry, port: int) -> list[str]:
        """See Engine."""
        return [
            *(sys.executable, "-m", "services.inference.embedded"),
            *("--model", str(entry.path)),
            *("--alias", entry.name),
            *("--port", str(port)),
            *("--slots", str(entry.slots)),
            *("--context-tokens", str(entry.context_tokens)),
            *("--threads", str(entry.threads)),
        ]


def choose_engine(entry: ModelEntry, home: Home) -> Engine:
    """The engine that serves an entry: the registry's binary, then the one built into the cache, then PATH.

    Raises EngineUnusable where llama-server is asked for and none is found; `auto` is embedded then.
    """
    if entry.engine == "embedded":
        return EmbeddedEngine()
    binary = entry.binary or find_native(home)
    if binary is not None:
        return NativeEngine(binary, entry)
    if entry.engine == "llama-server":
        raise EngineUnusable("no llama-server found: run deploy/build-native, or set binary in models.yaml")
    return EmbeddedEngine()


def find_native(home: Home) -> Path | None:
    """The llama-server built by deploy/build-native, else the one on PATH, else None."""
    built = home.cache / "native" / "current" / "bin" / "llama-server"
    if built.is_file():
        return built
    found = shutil.which("llama-server")
    return None if found is None else Path(found)


def environment(own: Mapping[str, str], api_key: str) -> dict[str, str]:
    """Environment of the child: ours without LLAMA_* (they would override the command line), and the key."""
    kept = {name: value for name, value in own.items() if not name.startswith("LLAMA_")}
    return {**kept, API_KEY_VARIABLE: api_key}


def flags_in_help(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Flags that a `--help` page lists, and those among them that it calls removed."""
    known: set[str] = set()
    removed: set[str] = set()
    entry: list[str] = []
    for line in text.splitlines():
        if line.startswith("-") and not line.startswith("---"):
            # Flags stand before the description, which begins after two blanks in column 40 or on the next line.
            entry = _FLAG.findall(re.split(r"(?<=\S) {2,}(?=[^\s-])", line, maxsplit=1)[0])
            known.update(entry)
        if _REMOVED in line:
            removed.update(entry)
    return frozenset(known), frozenset(removed)
